"""Energy: which counters count, how they wrap, and that an estimate says that it is one."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.measure.energy import NvmlCounter, PowerModel, RaplCounter, find_counter, measure_energy


def zone(folder: Path, name: str, label: str, energy: int, wraps: int = 10**9) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(label + "\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps}\n")
    return path


def test_rapl_sums_packages_and_memory_and_nothing_twice(tmp_path: Path) -> None:
    counted = [
        zone(tmp_path, "intel-rapl:0", "package-0", 100),
        zone(tmp_path, "intel-rapl:1", "package-1", 100),
        zone(tmp_path, "intel-rapl:0:1", "dram", 100),
    ]
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 100),
        zone(tmp_path, "intel-rapl:2", "psys", 100),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100),
    ]
    counter = RaplCounter(tmp_path)
    for path in counted + others:
        (path / "energy_uj").write_text("2000100")
    assert counter.joules() == pytest.approx(3 * 2.0)


def test_rapl_goes_on_where_a_zone_wraps(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, wraps=10_000_000)
    counter = RaplCounter(tmp_path)
    (path / "energy_uj").write_text("500000")
    assert counter.joules() == pytest.approx(1.5)
    (path / "energy_uj").write_text("700000")
    assert counter.joules() == pytest.approx(1.7)


def test_measured_energy_separates_what_the_idle_machine_draws(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    busy, stop = threading.Event(), threading.Event()

    def power_plant() -> None:  # 10 W idle, 30 W busy
        energy, last = 0.0, time.perf_counter()
        while not stop.is_set():
            time.sleep(0.002)
            now = time.perf_counter()
            energy += (now - last) * (30 if busy.is_set() else 10)
            last = now
            new = path / "new"
            new.write_text(str(int(energy * 1e6)))
            new.replace(path / "energy_uj")

    def work() -> int:
        busy.set()
        time.sleep(0.02)
        return 2

    thread = threading.Thread(target=power_plant)
    thread.start()
    try:
        found = measure_energy(work, bytes_per_token=7, powercap=tmp_path, window_s=0.2, windows=3, idle_s=0.2)
    finally:
        stop.set()
        thread.join()
    assert found.source == "measured_cpu_rapl"
    assert found.idle_watts == pytest.approx(10, rel=0.3)
    assert found.joules_per_token == pytest.approx(30 * found.seconds_per_token, rel=0.2)
    assert found.joules_above_idle == pytest.approx(20 * found.seconds_per_token, rel=0.4)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.joules_per_token <= found.high
    assert "package-0" in found.note


def test_without_a_counter_the_figure_is_called_an_estimate(tmp_path: Path) -> None:
    def work() -> int:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return 10

    found = measure_energy(work, bytes_per_token=123.0, powercap=tmp_path, model=PowerModel(4, 2, 8))
    assert found.source == "estimated"
    assert found.cpu_seconds_per_token >= 0.005
    assert found.joules_per_token == pytest.approx(4 * found.cpu_seconds_per_token)
    assert (found.low, found.high) == pytest.approx((2 * found.cpu_seconds_per_token, 8 * found.cpu_seconds_per_token))
    assert found.bytes_per_token == 123.0
    assert found.note.startswith("Estimated, not measured (no energy counter")
    assert "4 W per busy core" in found.note


def test_unreadable_rapl_is_told_apart_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)

    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path / "energy_uj"))

    monkeypatch.setattr(RaplCounter, "_read", staticmethod(refuse))
    counter, reason = find_counter("cpu", powercap=tmp_path)
    assert counter is None
    assert "not readable by this user" in reason


class FakeNvml:
    """Just enough of nvidia-ml-py."""

    class NVMLError(Exception):
        pass

    def __init__(self, supported: bool = True) -> None:
        self.supported, self.millijoules = supported, 5_000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.supported:
            raise self.NVMLError("Not Supported")
        return self.millijoules


def test_nvml_counts_the_device_of_that_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    counter = NvmlCounter("abc")
    assert counter.joules() == 5.0
    assert counter.source == "measured_gpu"
    assert "GPU-abc" in counter.domain


@pytest.mark.parametrize(("nvml", "words"), [(FakeNvml(supported=False), "Not Supported"), (None, "not installed")])
def test_a_gpu_without_a_counter_gets_no_invented_joules(
    monkeypatch: pytest.MonkeyPatch, nvml: Any, words: str
) -> None:
    import torch

    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    found = measure_energy(lambda: 3, bytes_per_token=1.0, device="cuda:0")
    assert found.source == "estimated"
    assert found.joules_per_token is None
    assert words in found.note


def test_refusals() -> None:
    with pytest.raises(InputError, match="low <= watts_per_core"):
        PowerModel(5, 6, 10)
    with pytest.raises(InputError, match="must be positive"):
        measure_energy(lambda: 1, bytes_per_token=0, windows=0)
