"""Energy per token: measured where a counter exists, otherwise estimated and called so.

Counters: NVML's total-energy counter for a CUDA device, RAPL through Linux's powercap files for a processor. Virtual
machines rarely expose RAPL, and most systems let only root read it. The estimate is processor time times an assumed
power, and is never shown without its proxies: seconds, processor seconds and bytes read per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from workbench.errors import InputError

EnergySource = Literal["measured_gpu", "measured_cpu_rapl", "estimated"]
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class PowerModel:
    """Assumed power of one busy core, watts, with the range it may lie in.

    Thermal design power divided by cores runs from 3 to 10 W over current server processors (360 W for 96 cores is
    3.8 W, 280 W for 32 cores 8.8 W); the default lies inside, and the range is carried through.
    """

    watts_per_core: float = 5.0
    low: float = 3.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.watts_per_core <= self.high:
            raise InputError(f"A power model needs 0 < low <= watts_per_core <= high, got {self}.")


@dataclass(frozen=True)
class EnergyResult:
    """Energy of decoding, per token.

    Attributes:
        source: where the joules come from; ``estimated`` is not a measurement.
        joules_per_token: mean over the windows, everything the counter sees included; None where there is neither a
            counter nor a model (a GPU without NVML).
        low, high: smallest and largest window, or the range of the power model.
        joules_above_idle: the same without what the device draws when idle; None where estimated.
        idle_watts: power before the work began; None where estimated.
        seconds_per_token, cpu_seconds_per_token: wall time, and processor time over all threads.
        bytes_per_token: stored bytes that a step reads.
        tokens: that the figures are over.
        note: how the figure came about.
    """

    source: EnergySource
    joules_per_token: float | None
    low: float | None
    high: float | None
    joules_above_idle: float | None
    idle_watts: float | None
    seconds_per_token: float
    cpu_seconds_per_token: float
    bytes_per_token: float
    tokens: int
    note: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class EnergyCounter(Protocol):
    """A total that only grows. ``domain`` says whose energy it is."""

    source: EnergySource
    domain: str

    def joules(self) -> float: ...


class RaplCounter:
    """Packages (and memory, where it has its own counter) of all processor sockets, through powercap files.

    Only ``intel-rapl:<n>`` (also AMD's name) and its ``dram`` children are summed: ``core`` and ``uncore`` are parts of
    a package, ``psys`` and ``intel-rapl-mmio`` count a package a second time.

    Args:
        folder: of the powercap zones.

    Raises:
        FileNotFoundError: no such zone.
        PermissionError: zones that this user may not read.
    """

    source: EnergySource = "measured_cpu_rapl"

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = [*folder.glob("intel-rapl:[0-9]*")]
        self._zones = [zone for zone in sorted(zones) if _zone_counts(zone)]
        if not self._zones:
            raise FileNotFoundError(f"no RAPL zone in {folder}")
        self._wraps = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = [self._read(zone) for zone in self._zones]
        self._total_uj = 0
        self.domain = "processor packages: " + ", ".join((zone / "name").read_text().strip() for zone in self._zones)

    def joules(self) -> float:
        """Joules since this counter was made. To be read more often than the zones wrap, some minutes at full load."""
        for index, zone in enumerate(self._zones):
            now = self._read(zone)
            step = now - self._last[index]
            self._total_uj += step if step >= 0 else step + self._wraps[index]
            self._last[index] = now
        return self._total_uj / 1e6

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())


def _zone_counts(zone: Path) -> bool:
    name = (zone / "name").read_text().strip()
    return name.startswith("package") or name == "dram"


class NvmlCounter:
    """Total energy of one CUDA device since its driver was loaded (Volta or newer; updated about every 100 ms).

    Args:
        uuid: of the device, as CUDA gives it, so that CUDA_VISIBLE_DEVICES cannot mix devices up.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        OSError: NVML refuses; holds its reason.
    """

    source: EnergySource = "measured_gpu"

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.domain = f"whole device GPU-{uuid}"
            self.joules()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3  # millijoules


def find_counter(device: str, *, powercap: Path = POWERCAP) -> tuple[EnergyCounter | None, str]:
    """Return the counter of ``device`` (``cpu`` or ``cuda[:n]``), or None and the reason why there is none."""
    try:
        if device.startswith("cuda"):
            import torch

            return NvmlCounter(str(torch.cuda.get_device_properties(torch.device(device)).uuid)), ""
        return RaplCounter(powercap), ""
    except PermissionError as error:
        return None, f"RAPL is there but not readable by this user ({error.filename})"
    except ImportError:
        return None, "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    except OSError as error:
        return None, f"no energy counter: {error}"


def measure_energy(
    work: Callable[[], int],
    *,
    bytes_per_token: float,
    device: str = "cpu",
    model: PowerModel | None = None,
    window_s: float = 5.0,
    windows: int = 5,
    idle_s: float = 5.0,
    powercap: Path = POWERCAP,
) -> EnergyResult:
    """Measure, or estimate, the energy of ``work``.

    With a counter: idle first, then windows of at least ``window_s`` seconds, since counters are slow and GPU sensors
    sample only part of the time. Without: one call of ``work`` and the power model.

    Args:
        work: decodes some tokens and returns how many.
        bytes_per_token: recorded as a proxy.
        device: where the work runs.
        model: of the estimate.
        window_s, windows, idle_s: length and number of measured windows, and of the idle reading before them.
        powercap: folder of the RAPL zones.
    """
    if window_s <= 0 or windows < 1 or idle_s <= 0:
        raise InputError(f"measure_energy({window_s=}, {windows=}, {idle_s=}): all three must be positive.")
    counter, reason = find_counter(device, powercap=powercap)
    if counter is None:
        return _estimate(work, bytes_per_token, device, model or PowerModel(), reason)
    return _measure(work, bytes_per_token, counter, window_s, windows, idle_s)


def _measure(
    work: Callable[[], int],
    bytes_per_token: float,
    counter: EnergyCounter,
    window_s: float,
    windows: int,
    idle_s: float,
) -> EnergyResult:
    begin, started = counter.joules(), time.perf_counter()
    time.sleep(idle_s)
    idle_watts = (counter.joules() - begin) / (time.perf_counter() - started)
    joules, seconds, tokens = np.zeros(windows), np.zeros(windows), np.zeros(windows)
    cpu = time.process_time()
    for index in range(windows):
        begin, started = counter.joules(), time.perf_counter()
        while time.perf_counter() - started < window_s:
            tokens[index] += work()
        seconds[index] = time.perf_counter() - started
        joules[index] = counter.joules() - begin
    per_token, total = joules / tokens, tokens.sum()
    return EnergyResult(
        source=counter.source,
        joules_per_token=float(joules.sum() / total),
        low=float(per_token.min()),
        high=float(per_token.max()),
        joules_above_idle=float((joules.sum() - idle_watts * seconds.sum()) / total),
        idle_watts=idle_watts,
        seconds_per_token=float(seconds.sum() / total),
        cpu_seconds_per_token=(time.process_time() - cpu) / float(total),
        bytes_per_token=bytes_per_token,
        tokens=int(total),
        note=f"Measured: {counter.domain}, other programs on it included; {windows} windows of {window_s:g} s.",
    )


def _estimate(
    work: Callable[[], int], bytes_per_token: float, device: str, model: PowerModel, reason: str
) -> EnergyResult:
    started, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    seconds, cpu = (time.perf_counter() - started) / tokens, (time.process_time() - cpu) / tokens
    on_cpu = device == "cpu"
    formula = (
        f"Estimated, not measured ({reason}): processor seconds x {model.watts_per_core:g} W per busy core "
        f"({model.low:g} to {model.high:g}), an assumption. While cores stay busy this is time by another name: it "
        "shows no saving that the latency does not show."
    )
    return EnergyResult(
        source="estimated",
        joules_per_token=cpu * model.watts_per_core if on_cpu else None,
        low=cpu * model.low if on_cpu else None,
        high=cpu * model.high if on_cpu else None,
        joules_above_idle=None,
        idle_watts=None,
        seconds_per_token=seconds,
        cpu_seconds_per_token=cpu,
        bytes_per_token=bytes_per_token,
        tokens=tokens,
        note=formula if on_cpu else f"Not measured ({reason}), and no model of a GPU's power: see the proxies.",
    )
