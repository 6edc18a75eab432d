"""Timing side by side: fair order, paired ratios, real engines in a real child, and refusals before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import Cancelled, EngineError, InputError
from workbench.measure.alone import measure_alone
from workbench.measure.decoding import Target
from workbench.measure.latency import LatencyResult, compare_latency, measure_many
from workbench.measure.latency_child import order_of_round
from workbench.measure.memory import peak_rss_bytes, rss_bytes
from workbench.measure.statistics import Interval
from workbench.progress import Job, JobState


@pytest.mark.parametrize("sides", [2, 3, 5])
def test_each_side_stands_at_each_place_equally_often(sides: int) -> None:
    rounds = [order_of_round(index, sides) for index in range(2 * sides)]
    assert all(sorted(order) == list(range(sides)) for order in rounds)
    places = np.zeros((sides, sides), dtype=int)
    for order in rounds:
        for place, side in enumerate(order):
            places[side, place] += 1
    assert (places == 2).all()


def test_two_sides_run_abba() -> None:
    assert [order_of_round(index, 2) for index in range(4)] == [[0, 1], [1, 0], [1, 0], [0, 1]]


@pytest.fixture(scope="module")
def timed(model_folder: Path) -> tuple[list[LatencyResult], list[JobState]]:
    """A model against itself and against itself in bf16, timed once for several tests."""
    states: list[JobState] = []
    found = measure_many(
        Target(model_folder, name="dense"),
        [Target(model_folder), Target(model_folder, name="bf16", dtype="bfloat16")],
        prompt=range(1, 9),
        new_tokens=4,
        pairs=6,
        warmup=1,
        threads=1,
        job=Job(states.append),
    )
    return found, states


def test_a_model_takes_about_as_long_as_itself(timed: tuple[list[LatencyResult], list[JobState]]) -> None:
    found = timed[0][0]
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert 0.5 < found.ratio.value < 2
    assert "6 pairs" in found.note
    for side in (found.baseline, found.candidate):
        assert 0 < side.p50_ms <= side.p95_ms <= side.p99_ms
        assert side.tokens_per_s == pytest.approx(1000 / side.ms_per_token)
        assert side.ttft_ms > 0
        assert side.prefill_tokens == 512
        assert side.steps == 6 * 4
        assert side.read_bytes_per_token > 0
    assert found.environment["thread_variables"]["OMP_NUM_THREADS"] == "1"
    assert found.to_json()["verdict"] in ("faster", "slower", "no difference")


def test_progress_reaches_the_end_of_every_stage(timed: tuple[list[LatencyResult], list[JobState]]) -> None:
    last = {state.stage: state for state in timed[1]}
    assert list(last) == ["loading models", "timing", "timing prefill"]
    assert all(state.done == state.total for state in last.values())


def test_several_candidates_share_one_baseline(
    timed: tuple[list[LatencyResult], list[JobState]], model_folder: Path
) -> None:
    found = timed[0]
    assert [result.candidate.activation_mode for result in found] == ["fp32", "bf16"]
    assert [result.candidate.name for result in found] == [str(model_folder), "bf16"]
    assert found[0].baseline == found[1].baseline


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.8, 0.9, "faster"), (1.1, 1.2, "slower"), (0.9, 1.1, "no difference"), (np.nan, np.nan, "unknown")],
)
def test_the_verdict_is_the_interval_against_one(
    timed: tuple[list[LatencyResult], list[JobState]], low: float, high: float, expected: str
) -> None:
    assert replace(timed[0][0], ratio=Interval(1.0, low, high)).verdict == expected


def test_refusals_come_before_any_process_is_started(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.measure.latency.run_child", lambda *a, **k: pytest.fail("a child was started"))
    with pytest.raises(InputError, match="pairs of at least 1"):
        compare_latency(model_folder, model_folder, pairs=0)
    with pytest.raises(InputError, match="this process may use"):
        compare_latency(model_folder, model_folder, threads=10_000)
    with pytest.raises(EngineError, match=r"No engine 'referense'.*reference"):
        compare_latency(model_folder, model_folder, engine="referense")


def test_the_childs_own_refusals_arrive(model_folder: Path) -> None:
    with pytest.raises(InputError, match="do not fit the context of 512"):
        compare_latency(model_folder, model_folder, prompt=[1] * 510, new_tokens=3, threads=1)


def test_cancel_ends_the_timing(model_folder: Path) -> None:
    def stop_while_timing(state: JobState) -> None:
        if state.stage == "timing" and state.done == 3:
            job.cancel()

    job = Job(stop_while_timing)
    with pytest.raises(Cancelled):
        compare_latency(model_folder, model_folder, pairs=10_000, threads=1, job=job)


def test_one_engine_alone_reports_memory_and_energy(model_folder: Path, tmp_path: Path) -> None:
    found = measure_alone(Target(model_folder), prompt=[1, 2, 3], new_tokens=2, threads=1, powercap=tmp_path)
    assert 50e6 < found.memory.loaded_rss_bytes <= found.memory.peak_rss_bytes < 5e9
    assert found.memory.peak_device_bytes is None
    assert found.energy.source == "estimated"
    assert found.energy.tokens == 2
    assert found.to_json()["energy"]["joules_per_token"] > 0


def test_peak_memory_reads_the_high_water_mark_and_falls_back(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n")
    assert peak_rss_bytes(status) == 2048 * 1024
    assert peak_rss_bytes(tmp_path / "none") >= rss_bytes() * 0.5
