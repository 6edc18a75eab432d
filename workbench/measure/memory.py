"""Resident memory of a process, over its whole life."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class MemoryResult:
    """Memory of a fresh process that opened one engine and decoded a few tokens. Interpreter and libraries count.

    Attributes:
        peak_rss_bytes: largest resident size, loading included.
        loaded_rss_bytes: resident size once the engine was open.
        peak_device_bytes: largest allocation on a CUDA device, None on the CPU.
    """

    peak_rss_bytes: int
    loaded_rss_bytes: int
    peak_device_bytes: int | None


def available_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that may still be taken: what the machine has, or less where a container bounds it (control groups, v2).

    What the group counts as used includes files that the kernel drops when asked for more; those are available.
    """
    free = int(psutil.virtual_memory().available)
    try:
        bound, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if bound != "max":
            free = min(free, int(bound) - int(used) + int(counts.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group here, or another form of it
        pass
    return max(0, free)


def engines_at_once(parameters: int, most: int | None = None) -> int:
    """How many engines stand beside one dense pass: what half of the available memory holds in fp32, at least one.

    Args:
        parameters: of the model that each of them holds.
        most: at most so many.
    """
    held = max(1, available_bytes() // 2 // (4 * parameters))
    return held if most is None else min(most, held)


def rss_bytes() -> int:
    """Resident size of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Largest resident size this process ever had.

    Linux's VmHWM comes first: the maximum of ``getrusage`` survives ``exec`` there, so that a child would report the
    size its parent had when it was forked. Elsewhere ``getrusage`` (bytes on macOS, kibibytes on other systems), or
    on Windows the peak working set.
    """
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
