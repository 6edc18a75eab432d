"""The environment record, processor choice, and the bandwidth figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.measure.environment import (
    allowed_cpus,
    check_threads,
    choose_cpus,
    environment,
    memory_bandwidth,
)
from workbench.measure.memory import available_bytes


def test_environment_is_json_and_names_what_timings_depend_on() -> None:
    found = json.loads(json.dumps(environment()))
    assert {"cpu", "cores", "flags", "memory_bytes", "kernel", "virtualised", "gpus", "load_average"} <= set(found)
    assert found["versions"]["torch"]
    assert found["usable_cores"] == len(allowed_cpus())


def test_bandwidth_is_between_a_slow_disk_and_a_fast_gpu() -> None:
    assert 1e8 < memory_bandwidth(1, gib=0.06, repeats=2) < 1e13


def test_bandwidth_refuses_more_memory_than_there_is() -> None:
    with pytest.raises(InputError, match="more memory than is free"):
        memory_bandwidth(1, gib=2.0**20)
    with pytest.raises(InputError, match="must be positive"):
        memory_bandwidth(0)


def test_threads_are_limited_to_the_processors_of_this_process() -> None:
    usable = len(allowed_cpus())
    assert 1 <= check_threads(None) <= usable
    assert check_threads(usable) == usable
    for wrong in (0, usable + 1):
        with pytest.raises(InputError, match=f"1 to {usable}"):
            check_threads(wrong)


def test_one_processor_per_core_is_taken_before_a_second_one() -> None:
    siblings = [frozenset({0, 4}), frozenset({1, 5}), frozenset({0, 4}), frozenset({1, 5})]
    assert choose_cpus(2, [0, 1, 4, 5], siblings) == [0, 1]
    assert choose_cpus(3, [0, 1, 4, 5], siblings) == [0, 1, 4]
    assert choose_cpus(2, [0, 4, 1, 5], [siblings[0], siblings[0], siblings[1], siblings[1]]) == [0, 1]


@pytest.mark.parametrize(("bound", "expected"), [("2000000000", 700_000_000), ("100", 0)])
def test_a_container_bounds_what_is_available(tmp_path: Path, bound: str, expected: int) -> None:
    (tmp_path / "memory.max").write_text(f"{bound}\n")
    (tmp_path / "memory.current").write_text("1500000000\n")
    (tmp_path / "memory.stat").write_text("anon 1200000000\ninactive_file 200000000\n")
    assert available_bytes(tmp_path) == expected


def test_without_a_bound_the_machine_counts(tmp_path: Path) -> None:
    everything = available_bytes(tmp_path)
    for name in ("max", "current", "stat"):
        (tmp_path / f"memory.{name}").write_text("max" if name == "max" else "0")
    assert available_bytes(tmp_path) > everything / 2 > 0
