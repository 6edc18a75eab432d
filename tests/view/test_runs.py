"""Runs in plain words: better and worse only beyond the interval, nothing invented, nothing trusted."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.store import Store
from workbench.view import runs as view


def run(number: int = 1, **summary: Any) -> view.Run:
    defaults: dict[str, Any] = {"dense": {"weight_bytes": 100}, "compressed": {"weight_bytes": 40}}
    return view.Run(number, datetime(2026, 1, 2, tzinfo=UTC), "demo", "name", "m", "rtn", None, defaults | summary, {})


ratios = st.floats(0.05, 20, allow_nan=False)


@given(st.tuples(ratios, ratios, ratios).map(sorted))
def test_better_and_worse_are_said_only_beyond_the_interval(ends: list[float]) -> None:
    low, ratio, high = ends
    latency = view.cards(run(latency_ratio=ratio, latency_ratio_low=low, latency_ratio_high=high))[0]
    expected = "better" if high < 1 else "worse" if low > 1 else "same"
    assert latency.tone == expected
    assert ("less time" in latency.headline) == (expected == "better")
    assert ("more time" in latency.headline) == (expected == "worse")
    assert f"{low:.3f} to {high:.3f}" in latency.interval


@given(ratios)
def test_without_an_interval_no_claim_is_coloured(ratio: float) -> None:
    latency = view.cards(run(latency_ratio=ratio))[0]
    assert latency.tone == "unknown"
    assert "no interval was recorded" in latency.interval


def test_quality_is_the_exponential_of_the_paired_difference() -> None:
    compressed = {"delta_nll": 0.1, "delta_nll_low": 0.05, "delta_nll_high": 0.15}
    quality = view.cards(run(compressed=compressed))[2]
    assert quality.headline == "11 % higher perplexity than dense"
    assert f"{math.exp(0.05):.3f} to {math.exp(0.15):.3f}" in quality.interval


@pytest.mark.parametrize("value", [None, "12", True, [1], {"a": 1}, math.nan, math.inf])
def test_what_is_no_number_counts_as_not_measured(value: object) -> None:
    broken = run(
        latency_ratio=value, compressed={"weight_bytes": value, "delta_nll": value}, dense={"weight_bytes": value}
    )
    assert [card.headline for card in view.cards(broken)] == ["Not measured"] * 3
    line = view.table([broken]).iloc[0]
    assert line[["effective_bits", "latency_ratio", "bytes_ratio", "perplexity_ratio"]].isna().all()


def test_huge_difference_does_not_overflow() -> None:
    assert view.cards(run(compressed={"delta_nll": 1e4}))[2].headline == "Not measured"


points = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=30)


@given(points)
def test_frontier_keeps_exactly_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    kept = view.frontier([x for x, _ in pairs], [y for _, y in pairs])
    best = {pairs[position] for position in kept}
    assert len(best) == len(kept)
    for pair in pairs:
        beaten = any(other[0] <= pair[0] and other[1] <= pair[1] and other != pair for other in pairs)
        assert (pair in best) == (not beaten)


def test_picture_shows_every_complete_run_and_rings_the_chosen_one() -> None:
    runs = [
        run(number, compressed={"weight_bytes": 10 * number, "delta_nll": 1 / number, "effective_bits": number})
        for number in range(1, 6)
    ]
    figure = view.pareto_of_runs(view.table([*runs, run(9)]), chosen=3)
    drawn = [number for trace in figure.data for number in (trace.customdata if trace.customdata is not None else [])]
    assert sorted(drawn) == [1, 2, 3, 4, 5]
    (ring,) = (trace for trace in figure.data if trace.name == "chosen run")
    assert np.allclose(ring.y, [math.exp(1 / 3)])


def test_picture_of_nothing_is_drawn() -> None:
    assert [trace.name for trace in view.pareto_of_runs(view.table([])).data] == ["dense"]


def test_names_cannot_mark_up_the_picture() -> None:
    hostile = view.Run(
        1, datetime(2026, 1, 2, tzinfo=UTC), "demo", "<b>n</b>", "<i>m</i>", "<a href='x'>rtn</a>", None,
        {"dense": {"weight_bytes": 2}, "compressed": {"weight_bytes": 1, "delta_nll": 0.1}}, {},
    )  # fmt: skip
    text = str(view.pareto_of_runs(view.table([hostile])).to_dict())
    assert not any(mark in text for mark in ("<b>n", "<i>m", "<a "))


def test_controller_follows_the_store(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        controller = view.RunsController(store)
        assert not controller.refresh()
        assert controller.run(None) is None
        numbers = [
            store.record_run("demo", name="n", model=model, method="rtn", summary={"compressed": {"perplexity": 2.0}})
            for model in ("a", "b", "a")
        ]
        store.record_run("analysis", name="no comparison", model="c", method="sensitivity")
        assert controller.refresh()
        assert controller.models == ["a", "b"]
        assert [each.id for each in controller.runs] == numbers[::-1]
        controller.model = "b"
        assert [each.id for each in controller.runs] == [numbers[1]]
        assert controller.run(numbers[0]) == controller.run(numbers[1])
        assert not controller.refresh()
        store.delete_run(numbers[1])
        assert controller.refresh()
        assert controller.model is None
