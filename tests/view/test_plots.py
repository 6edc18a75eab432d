"""What figures must hold: every number that went in, honest pooling, and foreign text shown as text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.analysis.profile import Profile
from workbench.errors import InputError
from workbench.measure.latency import LatencyResult, SideLatency
from workbench.measure.statistics import Interval
from workbench.view import plots
from workbench.view.heatmap import _steps_per_cell
from workbench.view.style import escape

Make = Callable[..., Profile]


def test_every_step_is_its_own_cell_where_they_fit(steps_profile: Make) -> None:
    profile = steps_profile()
    grid = plots.step_grid(profile, 4)
    rows = profile.table[profile.table["bits"] == 4]
    assert grid.steps_per_cell == 1
    assert grid.values.shape == (21, 5 + 12 + 8 + 9)
    merged = grid.table.merge(
        rows, left_on=["linear", "sequence", "first"], right_on=["linear", "sequence", "step"], how="outer"
    )
    assert len(merged) == len(rows)
    assert np.array_equal(merged["value"], merged["relative_error"])


@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_pooling_respects_the_cap_and_never_crosses_a_segment(steps_profile: Make, aggregate: str) -> None:
    profile = steps_profile(prompts=(7, 13), replies=(40, 31))
    grid = plots.step_grid(profile, 3, aggregate=aggregate, max_cells=21 * 15)
    assert grid.values.size <= 21 * 15
    assert grid.n_steps == 91
    table = profile.table[profile.table["bits"] == 3]
    for row in grid.table.itertuples():
        pooled = table[
            (table["linear"] == row.linear)
            & (table["sequence"] == row.sequence)
            & table["step"].between(row.first, row.last)
        ]
        assert set(pooled["phase"]) == {row.phase}
        assert len(pooled) == row.last - row.first + 1 <= grid.steps_per_cell
        expected = pooled["relative_error"].max() if aggregate == "max" else pooled["relative_error"].mean()
        assert row.value == pytest.approx(expected)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.integers(12, 400))
@settings(max_examples=60, deadline=None)
def test_cells_are_no_coarser_than_needed(segments: list[int], allowed: int) -> None:
    lengths = np.array(segments)
    width = _steps_per_cell(lengths, allowed)
    assert (-(-lengths // width)).sum() <= allowed
    assert width == 1 or (-(-lengths // (width - 1))).sum() > allowed


def test_the_picture_says_how_it_was_made(steps_profile: Make) -> None:
    figure = plots.step_heatmap(steps_profile(), 4, sequence=1)
    said = figure.layout.title.subtitle.text
    for part in ("17 steps of 1 sequence", "one cell per step", "tiny", "float32", "cpu", "seed 0", "groups of 64"):
        assert part in said
    assert "log" in figure.data[0].colorbar.title.text
    assert [a.text for a in figure.layout.annotations] == ["prompt", "reply"]
    assert {shape.x0 for shape in figure.layout.shapes} == {7.5}


def test_pooling_is_said_in_the_subtitle(steps_profile: Make) -> None:
    profile = steps_profile(blocks=30, prompts=(200,), replies=(200,), widths=(4,))
    figure = plots.step_heatmap(profile, 4)
    assert "the largest of 2 steps" in figure.layout.title.subtitle.text
    assert np.asarray(figure.data[0].z).size <= 50_000


def test_zero_error_is_drawn_and_hovered_as_zero(steps_profile: Make) -> None:
    profile = steps_profile(prompts=(2,), replies=(2,), widths=(4,))
    profile.table.loc[0, "relative_error"] = 0.0
    trace = plots.step_heatmap(profile, 4).data[0]
    assert np.isfinite(trace.z).all()
    assert trace.customdata[0][0] == 0
    assert trace.z[0][0] == np.asarray(trace.z).min()


def test_what_a_profile_does_not_hold_is_said(steps_profile: Make) -> None:
    profile = steps_profile()
    with pytest.raises(InputError, match="widths 3, 4, not 5"):
        plots.step_heatmap(profile, 5)
    with pytest.raises(InputError, match="sequences 0 to 1, not 7"):
        plots.step_heatmap(profile, 4, sequence=7)
    with pytest.raises(InputError, match="Did you mean 'relative_error'"):
        plots.step_heatmap(profile, 4, value="relative_eror")
    with pytest.raises(InputError, match="choose one sequence"):
        plots.step_grid(profile, 4, max_cells=40)
    with pytest.raises(InputError, match="lacks the column"):
        plots.step_heatmap(Profile(profile.table.drop(columns="phase"), profile.provenance), 4)


def test_foreign_text_stays_text(steps_profile: Make, scores_profile: Make) -> None:
    nasty = "<script>alert(1)</script><b>x</b><a href='javascript:1'>y</a>"
    profile = steps_profile(suffix=nasty, model=nasty, prompts=(2,), replies=(2,), widths=(4,))
    ranking = pd.DataFrame({"linear": [f"blocks.0.q{nasty}"], "unit": ["blocks.0.qkv"], "mean": [0.1]})
    points = pd.DataFrame({"effective_bits": [4.0], "damage": [0.1], "kind": ["solved"]})
    measured = pd.DataFrame({"effective_bits": [4.0], "kl_mean": [0.1], "name": [nasty]})
    for figure in (
        plots.step_heatmap(profile, 4),
        plots.ranked_bars(ranking, note=nasty),
        plots.pareto(points, measured=measured, note=nasty),
        plots.latency_comparison(latency(1.0, 2.0, 3.0, nasty), note=nasty),
        plots.damage_by_unit(scores_profile().table, {f"blocks.0.{nasty.replace('.', '')}": 4}),
    ):
        written = json.dumps(figure.to_plotly_json(), default=lambda a: a.tolist())
        assert "<script" not in written
        assert "<a href" not in written
    assert escape("a<b & 'c'") == "a&lt;b &amp; 'c'"


def test_bars_keep_the_order_and_count_of_the_ranking() -> None:
    ranking = pd.DataFrame({"unit": [f"blocks.{i}.down" for i in range(50)], "kl": np.linspace(1, 0.01, 50), "bits": 3})
    figure = plots.ranked_bars(ranking, top=30)
    assert list(figure.data[0].y)[::-1] == list(ranking["unit"][:30])
    assert "30 of 50 units" in figure.layout.title.subtitle.text
    with pytest.raises(InputError, match="name and a value column"):
        plots.ranked_bars(ranking[["unit"]])


def test_grid_of_bits_shows_each_unit_once(scores_profile: Make) -> None:
    bits = {f"blocks.{b}.{k}": 2 + b + i for b in range(3) for i, k in enumerate(("qkv", "o", "gate_up", "down"))}
    grid = plots.bits_table(bits)
    assert list(grid.index) == ["qkv", "o", "gate_up", "down"]
    assert {f"blocks.{b}.{k}": grid.loc[k, b] for k in grid.index for b in grid.columns} == bits
    figure = plots.damage_by_unit(scores_profile().table, bits, pinned=["blocks.1.o"])
    assert figure.data[0].text[1][1] == "4•"
    assert "pinned by you" in figure.data[0].hovertext[1][1]
    assert "predicted damage (kl) 0.5" in figure.data[0].hovertext[1][1]
    with pytest.raises(InputError, match=r"blocks\.<i>"):
        plots.bits_table({"layer7": 4})


def test_pareto_joins_the_solved_points_in_order() -> None:
    points = pd.DataFrame(
        {
            "effective_bits": [5.0, 3.0, 4.0, 4.25],
            "damage": [0.01, 0.5, 0.1, 0.2],
            "kind": ["solved", "solved", "solved", "uniform"],
        }
    )
    measured = pd.DataFrame({"effective_bits": [4.0], "kl_mean": [0.12], "kl_low": [0.10], "kl_high": [0.15]})
    figure = plots.pareto(points, chosen={"effective_bits": 4.0, "damage": 0.1}, measured=measured)
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces["predicted, solved mix"].x) == [3.0, 4.0, 5.0]
    assert traces["measured"].error_y.arrayminus[0] == pytest.approx(0.02)
    assert traces["measured"].error_y.array[0] == pytest.approx(0.03)
    assert figure.layout.yaxis.type == "log"


def latency(low: float, value: float, high: float, name: str = "x") -> LatencyResult:
    """A hand-made measurement with that ratio."""

    def side(ms: float) -> SideLatency:
        return SideLatency(name, name, "fp32", ms, 1.2 * ms, 1.4 * ms, 1000 / ms, 50.0, 500.0, 512, 1e8, 320)

    return LatencyResult(side(10.0), side(10.0 * value), Interval(value, low, high), 20, 2, 12, 16, 0.0, {}, "")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((0.4, 0.5, 0.6), "Faster than dense: 0.50x the time per token, 95 % interval 0.40 to 0.60"),
        ((1.4, 1.5, 1.6), "Slower than dense: 1.50x"),
        ((0.9, 1.0, 1.1), "No difference to dense shown: 1.00x"),
        ((math.nan, 1.0, math.nan), "1.00x the time per token of dense; one pair gives no interval"),
    ],
)
def test_the_title_says_faster_only_beyond_the_interval(ratio: tuple[float, float, float], words: str) -> None:
    figure = plots.latency_comparison(latency(*ratio))
    assert figure.layout.title.text.startswith(words)
    assert "20 pairs of 16 tokens" in figure.layout.title.subtitle.text
    bar = figure.data[0]
    assert bar.x[0] + bar.error_x.array[0] == pytest.approx(12.0)  # dense p95
    assert list(plots.latency_table(latency(*ratio))["p50_ms"]) == [10.0, 10.0 * ratio[1]]
