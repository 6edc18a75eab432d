"""A sitting with widths chosen per token: thresholds that follow, what is moved by hand, a run, and its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from workbench.analysis.precision import autocorrelation, token_excess
from workbench.analysis.precision_thresholds import policy_thresholds, thresholds
from workbench.apply.compress import compress
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.errors import InputError
from workbench.models import LoadedModel
from workbench.runtime.precision import gain_thresholds
from workbench.store import Store
from workbench.view import precision_panels
from workbench.view import precision_plots as plots
from workbench.view.precision_controller import PrecisionSitting
from workbench.view.precision_loop import PrecisionSettings
from workbench.view.precision_token_plots import autocorrelation_lines, token_bars

SETTINGS = PrecisionSettings(
    nested=NestedConfig(widths=(2, 3, 5), group_size=16, fit="rounded"),
    dynamic=PrecisionConfig(targets=(2.5, 4.0), learning_steps=2, projection_rows=4, calibration_tokens=1024),
    prompts=("<b>one</b>", "two two"),
    new_tokens=6,
    n_windows=2,
    window_length=24,
    pairs=1,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def sitting(home: Path, model_folder: Path) -> Iterator[PrecisionSitting]:
    made = PrecisionSitting(model_folder, target=3.3, settings=SETTINGS, store=Store(home / "home"))
    made.analyse().result()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def as_before(sitting: PrecisionSitting) -> None:
    if sitting.state.rule != "gain":
        sitting.set_rule("gain")
        sitting.analyse().result()
    sitting.set_target(3.3)


def test_thresholds_follow_the_target_without_other_bytes(sitting: PrecisionSitting) -> None:
    state = sitting.state
    assert state.compressed is not None
    assert state.possible == pytest.approx((2.0, 5.0))
    assert state.expected == pytest.approx(3.3, abs=0.1)
    before = state.compressed.sha256, state.cuts
    sitting.set_target(4.5)
    assert sitting.state.compressed is state.compressed
    assert state.compressed.sha256 == before[0]
    assert sitting.state.cuts is not None
    assert before[1] is not None
    assert sitting.state.cuts["threshold"].sum() < before[1]["threshold"].sum()
    sitting.set_target(9.0)
    assert "not possible" in sitting.state.error
    assert sitting.state.cuts is None
    with pytest.raises(InputError, match="nothing to run"):
        sitting.run()


def test_a_moved_threshold_changes_its_share_and_the_average(sitting: PrecisionSitting) -> None:
    cuts = sitting.state.cuts
    assert cuts is not None
    unit, low = cuts.iloc[5][["unit", "low"]]
    sitting.move_threshold(unit, int(low), 0.0)
    state = sitting.state
    assert state.cuts is not None
    assert state.expected is not None
    own = state.cuts[state.cuts.unit == unit].set_index("low")
    assert own.share[low] == own.share[2]  # as often as the step before it, and no more
    assert own.share[low] >= cuts.loc[cuts.unit == unit].set_index("low").share[low]
    moved = own.loc[low]
    assert state.moved == {(unit, int(low))}
    assert moved.threshold == 0
    others = (cuts.unit != unit) | (cuts.low != low)
    assert (state.cuts[others].threshold == cuts[others].threshold).all()
    sitting.move_threshold(unit, int(low), 1e9)
    assert sitting.state.expected is not None
    assert sitting.state.expected < state.expected
    sitting.move_threshold(unit, int(low), -1.0)
    assert "0 or more" in sitting.state.error
    sitting.move_threshold("blocks.0.qkv", 4, 1.0)
    assert "decides nothing" in sitting.state.error
    sitting.reset_thresholds()
    assert not sitting.state.moved
    assert sitting.state.expected == pytest.approx(3.3, abs=0.1)


def test_thresholds_of_the_table_are_those_of_the_engine(sitting: PrecisionSitting) -> None:
    compressed = sitting.state.compressed
    assert compressed is not None
    assert compressed.selectors is not None
    table = thresholds(compressed.architecture, compressed.selectors, 3.3)
    found = policy_thresholds(compressed.architecture, compressed.selectors, table)
    expected = gain_thresholds(compressed.architecture, compressed.selectors, 3.3)
    assert found.keys() == expected.keys()
    for name, cuts in expected.items():
        np.testing.assert_allclose(found[name], cuts, rtol=1e-6)


def test_a_run_measures_what_was_read(sitting: PrecisionSitting) -> None:
    trial = sitting.run().result()
    table = trial.table.set_index("method")
    assert list(table.index) == ["dense", "3 bits", "5 bits", "static mix", "per token", "per token, held"]
    assert table.realised_bits["3 bits"] == 3
    assert table.realised_bits["static mix"] <= 3.3 + 1e-6
    assert (table.read_bits > table.realised_bits - 1e-9)[1:].all()
    assert table.ratio["dense"] == 1
    assert not trial.own
    runs = sitting._store.runs()
    assert runs.iloc[0]["name"] == "notebook, 3.3 bits per token"

    compressed = sitting.state.compressed
    assert compressed is not None
    for unit in compressed.architecture.units:
        sitting.move_threshold(unit.id, 2, 0.0)
    own = sitting.run().result()
    assert own.own
    assert list(own.table.method)[-1] == "per token"
    assert own.table.realised_bits.iloc[-1] >= 3
    html = precision_panels.measured(own)
    assert "moved by you" in html


def test_rules_are_looked_at_apart(sitting: PrecisionSitting) -> None:
    sitting.set_rule("error")
    assert sitting.state.look is None
    sitting.analyse().result()
    state = sitting.state
    assert state.look is not None
    assert state.look.provenance.parameters["rule"] == "error"
    assert state.choices is not None
    sitting.set_target(4.2)
    assert sitting.state.choices is None  # other widths are compared there
    sitting.set_target(3.3)

    # A threshold moved far up leaves the narrower width to its unit alone, in what is expected and in what is read.
    cuts = sitting.state.cuts
    assert cuts is not None
    expected = sitting.state.expected
    assert expected is not None
    row = cuts[np.isfinite(cuts.threshold)].iloc[0]
    sitting.move_threshold(row["unit"], int(row["low"]), 1e6)
    assert sitting.state.expected is not None
    assert sitting.state.expected < expected
    own = sitting.run().result()
    assert own.own
    assert own.table.method.iloc[-1] == "per token"
    undecided = cuts[~np.isfinite(cuts.threshold)]
    if len(undecided):
        sitting.move_threshold(undecided.iloc[0]["unit"], int(undecided.iloc[0]["low"]), 1.0)
        assert "decides nothing" in sitting.state.error


def test_choices_under_other_thresholds(sitting: PrecisionSitting) -> None:
    state = sitting.state
    assert state.look is not None
    assert state.choices is not None
    assert state.compressed is not None
    table = state.look.table
    read = table.drop_duplicates(["sequence", "step", "unit"])
    both = state.choices.merge(read, on=["sequence", "step", "unit"], validate="1:1")
    # Those of the target are what the engine read; norms of a random model lie so close to a threshold that some tie.
    keys = ["sequence", "step", "unit"]
    tied = table[np.abs(table.estimate / table.threshold - 1) < 1e-3].set_index(keys).index
    clear = ~both.set_index(keys).index.isin(tied)
    assert clear.mean() > 0.3
    assert (both.bits_x == both.bits_y)[clear].all()
    sizes = {unit.id: unit.n_weights for unit in state.compressed.architecture.units}
    mean = np.average(state.choices.bits, weights=state.choices.unit.map(sizes))
    assert state.seen == pytest.approx(mean)
    unit = "blocks.1.o"
    sitting.move_threshold(unit, 2, 1e9)
    moved = sitting.state.choices
    assert moved is not None
    of = moved[moved.unit == unit]
    assert (of.bits[of.step > 0] == 2).all()
    assert (of.bits[of.step == 0] == 5).all()
    rest = moved[moved.unit != unit].reset_index(drop=True)
    assert rest.equals(state.choices[state.choices.unit != unit].reset_index(drop=True))
    figure = plots.unit_steps(state.look, unit, 2, None, now=moved)
    assert figure.data[-1].name == "width by the thresholds now"
    assert len(plots.unit_steps(state.look, "blocks.0.o", 2, None, now=moved).data) == 3


def test_a_compressed_folder_is_opened_as_it_is(
    sitting: PrecisionSitting, home: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    assert sitting.state.compressed is not None
    folder = sitting.state.compressed.save(tmp_path / "made")
    other = PrecisionSitting(folder, target=3.0, settings=SETTINGS, store=Store(home / "home"))
    other.analyse().result()
    assert other.state.compressed is not None
    assert other.state.compressed.sha256 == sitting.state.compressed.sha256
    other.close()
    plain = compress(tiny_model, Recipe.for_model(tiny_model, RtnConfig(bits=4, group_size=16))).save(
        tmp_path / "plain"
    )
    refused = PrecisionSitting(plain, settings=SETTINGS, store=Store(home / "home"))
    with pytest.raises(InputError, match="dynamic-precision"):
        refused.analyse().result()
    assert "dynamic-precision" in refused.state.error
    refused.close()


@pytest.mark.parametrize("value", list(plots.SHOWN))
def test_the_map_shows_every_number(sitting: PrecisionSitting, value: str) -> None:
    seen = sitting.state.look
    assert seen is not None
    grid = plots.choice_grid(seen, 3, value)
    table = seen.table[seen.table.low == 3]
    merged = grid.table.merge(
        table, left_on=["linear", "sequence", "first"], right_on=["unit", "sequence", "step"], validate="1:1"
    )
    assert len(merged) == len(table) == len(grid.table)
    expected = {"width": merged.bits, "ratio": merged.estimate / merged.error}.get(value, merged.get(value))
    np.testing.assert_allclose(merged.value, expected, rtol=1e-6)
    figure = plots.choice_heatmap(grid, seen, 3, value)
    assert "target of 3.3 bits" in figure.layout.title.subtitle.text
    assert figure.data[0].y[0] == "blocks.0.qkv"


def test_pictures_of_a_unit(sitting: PrecisionSitting) -> None:
    state = sitting.state
    assert state.look is not None
    assert state.compressed is not None
    assert state.compressed.selectors is not None
    unit = "blocks.1.down"
    rows = state.look.table[(state.look.table.unit == unit) & (state.look.table.low == 2)]
    figure = plots.unit_steps(state.look, unit, 2, 1.0)
    assert sorted(figure.data[0].y) == pytest.approx(sorted(rows.error))
    assert [len(trace.y) for trace in figure.data] == [len(rows)] * 3
    index = [one.id for one in state.compressed.architecture.units].index(unit)
    drawn = plots.error_distribution(state.look, state.compressed.selectors, index, unit, 2, 1.5)
    assert drawn.layout.shapes[0].x0 == 1.5
    shares = np.array(drawn.data[0].y)
    assert (np.diff(shares) < 0).all()
    assert f"{(rows.step > 0).sum()} tokens seen" in drawn.layout.title.subtitle.text
    with pytest.raises(InputError, match="decides nothing"):
        plots.unit_steps(state.look, unit, 5, None)


def test_pictures_over_steps_and_tokens(sitting: PrecisionSitting) -> None:
    state = sitting.state
    assert state.look is not None
    assert state.compressed is not None
    lags = autocorrelation(state.look.table, 2, longest=5)
    figure = autocorrelation_lines(lags, "blocks.0.o")
    assert [trace.name for trace in figure.data][-2:] == ["blocks.0.o", "one unit by chance, 95 %"]
    excess = token_excess(state.look.table, state.compressed.architecture)
    bars = token_bars(excess, lambda ids: "<i>x</i>", top=6)
    assert len(bars.data[0].y) == 6
    assert all("<i>" not in name for name in bars.data[0].y)
    html = precision_panels.tokens(excess, lambda ids: "<i>x</i>")
    assert "<i>" not in html
    assert "&lt;i&gt;x" in html
