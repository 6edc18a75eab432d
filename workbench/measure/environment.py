"""What the numbers were measured on: processor, memory, system, libraries, and how busy the machine was."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from workbench.errors import InputError
from workbench.measure.memory import available_bytes

# Instruction sets that decide which kernels a library picks. Names as Linux spells them.
_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_PACKAGES = ("compression-workbench", "torch", "transformers", "numpy", "safetensors", "bitsandbytes", "lm-eval")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def environment() -> dict[str, Any]:
    """Describe this machine and process as JSON values; what cannot be found out is None.

    ``flags`` lists only the instruction sets that matter to low-bit arithmetic. ``steal_share`` is the share of
    processor time since boot that a hypervisor gave to other guests: above a few percent, timings wander.
    """
    information = _cpu_information()
    flags = set((information.get("flags") or information.get("Features") or "").split())
    memory = psutil.virtual_memory()
    return {
        "cpu": information.get("model name") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "usable_cores": len(allowed_cpus()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "virtualised": "hypervisor" in flags if flags else None,
        "memory_bytes": int(memory.total),
        "memory_available_bytes": available_bytes(),
        "os": platform.system(),
        "kernel": platform.release(),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "thread_variables": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "load_average": [round(value, 2) for value in psutil.getloadavg()],
        "steal_share": _steal_share(),
    }


def memory_bandwidth(threads: int, gib: float = 1.0, repeats: int = 5) -> float:
    """Measure read-only memory bandwidth in bytes per second: the bound on batch-1 decoding.

    Every thread sums its own slice of one array of 64-bit integers (NumPy releases the interpreter's lock inside a
    sum); the best of ``repeats`` passes counts, since interference only ever slows a pass down. Limits: it is one
    simple streaming kernel, a tuned one may reach some percent more; an array that is not several times the last
    level cache measures the cache in part; on several sockets the pages lie where the filling thread put them.

    Args:
        threads: readers, at least 1.
        gib: size of the array in GiB; at least 1 for a figure to be quoted.
        repeats: passes over the array.

    Raises:
        InputError: no threads, or not enough free memory for the array.
    """
    if threads < 1 or gib <= 0 or repeats < 1:
        raise InputError(f"memory_bandwidth({threads=}, {gib=}, {repeats=}): all three must be positive.")
    size = int(gib * 2**30) // 8
    free = available_bytes()
    if size * 8 > 0.8 * free:
        raise InputError(
            f"Measuring bandwidth over {gib:g} GiB needs more memory than is free ({free / 2**30:.1f} GiB): "
            "give a smaller gib, or free memory."
        )
    # Written, not np.zeros: untouched pages all map to one page of zeros, which would be read from cache.
    slices = np.array_split(np.ones(size, dtype=np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.sum, slices))
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.sum, slices))
            best = min(best, time.perf_counter() - start)
    return size * 8 / best


def allowed_cpus() -> list[int]:
    """Processor numbers this process may run on, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def check_threads(threads: int | None) -> int:
    """Return ``threads``, or one per usable core where None.

    Raises:
        InputError: fewer than 1, or more than this process may use (timings would measure the scheduler).
    """
    usable = len(allowed_cpus())
    if threads is None:
        return max(1, min(usable, psutil.cpu_count(logical=False) or usable))
    if not 1 <= threads <= usable:
        raise InputError(
            f"{threads} threads asked for: this process may use 1 to {usable}. Give --threads in that range."
        )
    return threads


def choose_cpus(threads: int, allowed: Sequence[int], siblings: Sequence[frozenset[int]]) -> list[int]:
    """Pick ``threads`` processors of ``allowed``, one per physical core as long as there are cores left.

    Args:
        threads: how many, at most ``len(allowed)``.
        allowed: processor numbers.
        siblings: for each entry of ``allowed``, the processors that share its core (itself among them).
    """
    firsts: list[int] = []
    others: list[int] = []
    for cpu, shared in zip(allowed, siblings, strict=True):
        (others if shared & set(firsts) else firsts).append(cpu)
    return sorted([*firsts, *others][:threads])


def pin(threads: int) -> list[int] | None:
    """Bind this process to ``threads`` processors; return them, or None where the system does not let one."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = allowed_cpus()
    chosen = choose_cpus(threads, allowed, [_siblings(cpu) for cpu in allowed])
    os.sched_setaffinity(0, chosen)
    return chosen


def _siblings(cpu: int) -> frozenset[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return _parse_cpu_list(path.read_text())
    except OSError:
        return frozenset({cpu})


def _parse_cpu_list(text: str) -> frozenset[int]:
    """Read the kernel's list form, ``0-1,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _cpu_information() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in fields}


def _steal_share() -> float | None:
    times = psutil.cpu_times()
    steal = getattr(times, "steal", None)
    return None if steal is None else round(steal / max(sum(times), 1e-9), 4)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    """Name and memory of each CUDA device that PyTorch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": device.name, "memory_bytes": int(device.total_memory)} for device in devices]
