"""A sitting with contextual sparsity: masks beside what mattered, predictions that follow, a run, and its pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.analysis.mask_steps import FALSE_SKIP, HIT, KEPT, MISS, MaskOutcomes, plan_masks, score_text, true_masks
from workbench.apply.compress import compress
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.errors import Cancelled, InputError
from workbench.formats.mask_predictor import MaskGroup
from workbench.measure.sparse_plans import sparse_plan
from workbench.models import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import StepTrace
from workbench.store import Store
from workbench.view import sparsity_panels, sparsity_verdicts
from workbench.view import sparsity_plots as plots
from workbench.view import sparsity_quality_plots as quality_plots
from workbench.view.sparsity_controller import SparsitySitting, SparsityState
from workbench.view.sparsity_loop import Look, Tables, predicted_kl, unit_shares
from workbench.view.sparsity_picks import SparsityPick, SparsitySettings

PREFIX = 16
SETTINGS = SparsitySettings(
    weights=RtnConfig(bits=16, group_size=48, output_bits=16),
    masks=PredictedSparsityConfig(
        width=16,
        prefix=PREFIX,
        epochs=2,
        decisions_per_text=24,
        calibration_tokens=1024,
        aggregates=("plainact", "magnitude", "fisher"),
    ),
    inputs=InputSparsityConfig(allocation="uniform", calibration_tokens=1024),
    prompts=("<b>one</b> two three", "four"),
    new_tokens=12,
    curve=(0.1, 0.3),
    curve_windows=2,
    curve_length=72,
    by_domain=(0.1, 0.3),
    quality_windows=2,
    quality_length=32,
    n_windows=2,
    window_length=72,
    pairs=1,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sparsity")


@pytest.fixture(scope="module")
def made(home: Path, model_folder: Path) -> Iterator[SparsitySitting]:
    found = SparsitySitting(model_folder, settings=SETTINGS, store=Store(home / "home"))
    found.analyse().result()
    yield found
    found.close()


@pytest.fixture
def sitting(made: SparsitySitting) -> SparsitySitting:
    made.set_pick(**vars(SparsityPick()))
    made.select_text(0)
    assert made.state.error == ""
    return made


def seen(sitting: SparsitySitting) -> tuple[Tables, Look, MaskOutcomes]:
    state = sitting.state
    assert state.tables is not None
    assert state.look is not None
    assert state.outcomes is not None
    return state.tables, state.look, state.outcomes


# Masks beside what mattered ----------------------------------------------------------------------------------------


def test_hits_misses_and_false_skips_are_told_apart() -> None:
    groups = (MaskGroup(0, "heads", 4, 3), MaskGroup(0, "neurons", 2, 1))
    codes = np.array([[KEPT, HIT, MISS, FALSE_SKIP, HIT, KEPT]] * 3, dtype=np.uint8)
    found = MaskOutcomes(groups, np.arange(3), codes, np.arange(6.0))
    table = found.counts().set_index("kind")
    assert table.loc["heads", ["kept", "hit", "miss", "false skip"]].tolist() == [0.25] * 4
    assert table.loc["heads", "wrongly"] == table.loc["heads", "found"] == 0.5
    assert table.loc["neurons", "wrongly"] == 0
    assert table.loc["all", "left_out"] == pytest.approx((2 * 3 + 1) / (4 * 3 + 2))  # by weights
    with pytest.raises(InputError, match="not masked"):
        found.of(1, "heads")


@pytest.mark.parametrize("changes", [{}, {"scope": "every", "n": 8}, {"scope": "reply"}, {"method": "static"}])
def test_masks_are_those_that_an_engine_decides(sitting: SparsitySitting, changes: dict[str, Any]) -> None:
    tables, look, _ = seen(sitting)
    pick = replace(sitting.state.pick, **changes)
    model, text = tables.of(pick), look.texts[0]
    plan = sparse_plan(model, pick.asked)
    positions, masks = plan_masks(plan, text, PREFIX)
    trace = list[StepTrace]()
    engine = open_engine(model, engine="reference", plan=plan)
    list(engine.log_probabilities(text.tokens, prompt_length=text.prompt_length, trace=trace))
    engine.close()
    decided = np.array([np.atleast_1d(step.decisions["masks"]) for step in trace if step.position in set(positions)])
    # The predictor reads what leaves the whole block, so no earlier mask changes what it sees; rounding may tie.
    assert (decided.astype(bool) == masks).mean() > 0.999
    assert 0.15 < 1 - masks.mean() < 0.75
    rest = [np.asarray(step.decisions["masks"]) for step in trace if step.position not in set(positions)]
    assert all(mask.all() for mask in rest)


def test_what_follows_changes_what_mattered_and_no_mask(sitting: SparsitySitting) -> None:
    tables, look, _ = seen(sitting)
    predictor = tables.predictor
    assert predictor is not None
    text = look.texts[0]
    cut = len(text.tokens) - 6
    changed = [*text.tokens[:cut], *((token + 7) % 256 for token in text.tokens[cut:])]
    other = score_text(tables.dense, predictor, changed, text.prompt_length, ["plainact", "magnitude"])
    for pick in (SparsityPick("predicted"), SparsityPick("static")):
        plan = sparse_plan(tables.of(pick), pick.asked)
        (positions, before), (_, after) = (plan_masks(plan, one, PREFIX) for one in (text, other))
        early = positions < cut
        assert early.any()
        np.testing.assert_array_equal(before[early], after[early])
    rows = slice(0, cut - text.first)
    np.testing.assert_allclose(text.scores["magnitude"][rows], other.scores["magnitude"][rows], rtol=1e-3, atol=1e-6)
    assert not np.allclose(text.scores["plainact"][rows], other.scores["plainact"][rows], rtol=1e-2)


def test_true_masks_skip_nothing_falsely(sitting: SparsitySitting) -> None:
    sitting.set_pick(method="oracle", sparsity=0.4)
    tables, look, outcomes = seen(sitting)
    assert not np.isin(outcomes.codes, (MISS, FALSE_SKIP)).any()
    counts = sitting.state.counts
    assert counts is not None
    own = counts[counts["line"] == SparsityPick("oracle").line]
    assert (own["found"] == 1).all()
    assert set(counts["line"]) == {own["line"].iloc[0], "predicted masks", "static mask by plainact", "random mask"}
    # With the same share of every group, whatever is left out scores no more than what is kept.
    text, positions = look.texts[0], outcomes.positions
    true = true_masks(tables.whole.architecture, text, positions, "plainact", 0.4, "local")
    scores = text.scores["plainact"][positions - text.first]
    for begin, end in itertools.pairwise(outcomes.starts):
        kept, row = true[:, begin:end], scores[:, begin:end]
        assert (np.where(kept, -np.inf, row).max(axis=1) <= np.where(kept, row, np.inf).min(axis=1)).all()


def test_fisher_is_the_square_of_plainact(sitting: SparsitySitting) -> None:
    scores = seen(sitting)[1].texts[0].scores
    np.testing.assert_allclose(scores["fisher"], scores["plainact"] ** 2, rtol=1e-6)


# What follows a pick -----------------------------------------------------------------------------------------------


def test_predictions_follow_the_pick_at_once(sitting: SparsitySitting) -> None:
    _, look, _ = seen(sitting)
    curves = look.curves
    for method in ("predicted", "static", "random", "oracle", "teal", "wina"):
        found = []
        for sparsity in (0.0, 0.05, 0.1, 0.2, 0.3):
            sitting.set_pick(method=method, sparsity=sparsity)
            assert sitting.state.predicted is not None
            found.append(sitting.state.predicted)
        line = curves[curves["line"] == sitting.state.pick.line].set_index("sparsity")["kl"]
        assert found[2] == pytest.approx(line[0.1])
        assert found[4] == pytest.approx(line[0.3])
        assert min(line) <= found[3] <= max(line)
        assert found[0] == pytest.approx(curves.loc[curves["line"] == "whole", "kl"].iloc[0])
    sitting.set_pick(method="teal", sparsity=0.6)
    assert sitting.state.error == ""
    assert sitting.state.predicted is None  # beyond what was measured
    assert "measured up to 30%" in sparsity_panels.predicted(sitting.state)
    assert sitting.state.outcomes is None
    assert "nothing is predicted" in sparsity_panels.counts(sitting.state)


def test_predictions_lie_between_measured_points() -> None:
    curves = pd.DataFrame(
        [("whole", 0.0, 0.01), ("random mask", 0.2, 0.1), ("random mask", 0.4, 10.0)],
        columns=["line", "sparsity", "kl"],
    )
    assert predicted_kl(curves, SparsityPick("random", 0.3)) == pytest.approx(1.0)
    assert predicted_kl(curves, SparsityPick("random", 0.1)) == pytest.approx(0.055)
    assert predicted_kl(curves, SparsityPick("random", 0.5)) is None
    assert predicted_kl(curves, SparsityPick("teal", 0.3)) is None


def test_a_slider_gives_the_sparsity_of_a_setting() -> None:
    assert SparsityPick(sparsity=0.1 + 0.2) == SparsityPick(sparsity=0.3)


def test_what_is_not_possible_is_one_clear_error(sitting: SparsitySitting) -> None:
    before = sitting.state.pick
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"sparsity": 0.9}, "A sparsity of 0.9 is not possible here: give 0 to 0.7."),
        ({"sparsity": 0.7}, "ask for at most 0.5"),  # this model has two blocks that may be masked
        ({"method": "perfect"}, "allowed are predicted, static"),
        ({"scope": "sometimes"}, "allowed are token, every, reply"),
        ({"criterion": "plainct"}, "plainact"),
        ({"method": "static", "criterion": "grad_norm"}, "aggregates"),
        ({"method": "learnt"}, "it can do predicted"),
    )
    for changes, said in cases:
        sitting.set_pick(**changes)
        assert said in sitting.state.error, sitting.state.error
        assert "\n" not in sitting.state.error
        assert sitting.state.pick == before
    sitting.select_text(5)
    assert "no text 5: 2 were looked at" in sitting.state.error
    sitting.set_pick(sparsity=0.2)
    assert sitting.state.error == ""


def test_another_text_has_masks_of_its_own(sitting: SparsitySitting) -> None:
    first = seen(sitting)[2]
    sitting.select_text(1)
    other = seen(sitting)[2]
    assert other is not first
    assert other.positions[-1] == len(seen(sitting)[1].texts[1].tokens) - 1


def test_a_run_needs_an_analysis_and_may_be_cancelled(model_folder: Path, tmp_path: Path) -> None:
    fresh = SparsitySitting(model_folder, settings=SETTINGS, store=Store(tmp_path / "home"))
    with pytest.raises(InputError, match="nothing to run with"):
        fresh.run()
    work = fresh.analyse()
    fresh.cancel()
    with pytest.raises(Cancelled):
        work.result()
    assert fresh.state.busy == ""
    assert "ancelled" in fresh.state.message
    fresh.close()


# A run -------------------------------------------------------------------------------------------------------------


def test_a_run_measures_the_pick_beside_its_rivals(sitting: SparsitySitting) -> None:
    sitting.set_pick(sparsity=0.2)
    predicted = sitting.state.predicted
    trial = sitting.run().result()
    table = trial.table.set_index("line")
    assert set(table.index) == {
        *("whole", "predicted masks", "static mask by plainact", "random mask", "true masks: not causal"),
        *("inputs by size (TEAL)", "inputs by size and weights (WINA)"),
    }
    assert table.predicted["predicted masks"] == pytest.approx(predicted)
    assert np.isnan(table.more["predicted masks"])
    assert table.more["whole"] < 0
    assert table.left_out["whole"] == 0
    assert table.left_out.drop("whole").between(0.1, 0.3).all()
    assert table.kl["random mask"] > table.kl["whole"]
    assert set(trial.groups["by"]) == {"domain", "language"}
    assert sorted(trial.groups["sparsity"].unique()) == [0.1, 0.2, 0.3]
    assert len(trial.generations) == len(SETTINGS.prompts)
    assert sitting._store.runs().iloc[0]["name"] == "notebook, 20 % left out"
    html = sparsity_panels.measured(trial)
    assert f"{trial.n_tokens} tokens in 2 windows of prose" in html
    assert "a claim takes 40 windows" in html

    together = trial.batches[trial.batches["line"] == trial.pick.line]
    assert together["batch"].tolist() == trial.batches["batch"].tolist()[: len(together)] == [1, 2, 4, 8]
    assert together["left_out_by_all"].iloc[0] == pytest.approx(together["left_out"].iloc[0])
    assert together["left_out_by_all"].is_monotonic_decreasing
    drawn = quality_plots.batch_lines(trial)
    assert list(drawn.data[1].y) == together["left_out_by_all"].tolist()
    assert list(drawn.data[2].y) == together["speed"].tolist()
    figure = quality_plots.group_dots(trial)
    assert [len(trace.y) for trace in figure.data] == [len(trial.groups) // 3] * 3
    assert "2 windows of prose" in figure.layout.title.subtitle.text
    look = seen(sitting)[1]
    drawn = quality_plots.curve_lines(look.curves, sitting.state.pick, predicted, "<i>", trial)
    marks = {trace.name: trace.y[0] for trace in drawn.data if trace.mode == "markers"}
    assert marks["measured: predicted masks, prose"] == table.kl["predicted masks"]
    assert marks["predicted: predicted masks"] == predicted


def test_true_masks_write_nothing(sitting: SparsitySitting) -> None:
    sitting.set_pick(method="oracle", sparsity=0.1)
    trial = sitting.run().result()
    assert trial.generations == ()
    assert "not causal" in sparsity_panels.replies(trial)
    assert trial.table["ms_per_token"].isna().all()
    assert trial.batches.empty
    assert "true masks cannot be chosen" in sparsity_panels.measured(trial)


# Models that are there already -------------------------------------------------------------------------------------


def test_a_compressed_folder_is_opened_as_it_is(
    sitting: SparsitySitting, home: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    tables = seen(sitting)[0]
    assert tables.masks is not None
    opened = []
    for name, model in (("masks", tables.masks), ("inputs", tables.inputs["wina"])):
        folder = model.save(tmp_path / name)
        other = SparsitySitting(folder, settings=SETTINGS, store=Store(home / "home"))
        other.analyse().result()
        opened.append(other)
    of_masks, of_inputs = opened
    assert of_masks.state.tables is not None
    assert of_masks.state.tables.methods == ("predicted", "static", "random", "oracle")
    own, same = of_masks.state.look, seen(sitting)[1].curves
    assert own is not None
    columns = ["line", "sparsity", "kl"]
    expected = same[same["line"].isin(own.curves["line"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(own.curves[columns].reset_index(drop=True), expected[columns])

    state = of_inputs.state
    assert state.tables is not None
    assert state.tables.methods == ("wina",)
    assert state.pick.method == "wina"
    assert state.outcomes is None
    assert sparsity_verdicts.verdicts(state) == ()
    table = unit_shares(state.tables, state.pick)
    figure = plots.share_map(table, "<b>", 0.3)
    assert figure.data[0].z.shape == (3, 4)
    assert "&lt;b&gt;" in figure.layout.title.subtitle.text
    of_inputs.set_pick(method="predicted")
    assert "cannot do 'predicted'; it can do wina" in of_inputs.state.error
    for other in opened:
        other.close()

    plain = compress(tiny_model, Recipe.for_model(tiny_model, RtnConfig(bits=4, group_size=16))).save(tmp_path / "rtn")
    refused = SparsitySitting(plain, settings=SETTINGS, store=Store(home / "home"))
    with pytest.raises(InputError, match="cannot leave weights out"):
        refused.analyse().result()
    assert "predicted-sparsity" in refused.state.error
    refused.close()


# Pictures and words ------------------------------------------------------------------------------------------------


def test_maps_show_every_number(sitting: SparsitySitting) -> None:
    _, _, outcomes = seen(sitting)
    block = outcomes.blocks[-1]
    heads = plots.outcome_map(outcomes, "heads", "x")
    for trace, code in zip(heads.data, (HIT, MISS, FALSE_SKIP), strict=True):
        np.testing.assert_allclose(trace.z[-1], (outcomes.of(block, "heads") == code).mean(axis=0), rtol=1e-6)
    position = int(outcomes.positions[2])
    single = plots.outcome_map(outcomes, "heads", "x", position).data[0]
    np.testing.assert_array_equal(single.z[-1], outcomes.of(block, "heads")[2])
    # Never by colour alone.
    signs = {plots.LOOKS[code][0] for code in (KEPT, HIT, MISS, FALSE_SKIP)}
    assert len(signs) == 4
    assert {sign for row in single.text for sign in row} <= signs
    neurons = plots.outcome_map(outcomes, "neurons", "x")
    for trace, code in zip(neurons.data, (HIT, MISS, FALSE_SKIP), strict=True):
        share = (outcomes.of(block, "neurons") == code).mean()
        assert np.mean(trace.z[-1]) == pytest.approx(share, abs=1e-5)
    with pytest.raises(InputError, match="Nothing is decided at step 0"):
        plots.outcome_map(outcomes, "heads", "x", 0)


def test_steps_of_a_block_carry_escaped_tokens(sitting: SparsitySitting) -> None:
    _, _, outcomes = seen(sitting)
    block, names = outcomes.blocks[0], ["<b>x</b>"] * len(outcomes.positions)
    heads = plots.outcome_steps(outcomes, block, "heads", "x", names)
    np.testing.assert_array_equal(heads.data[0].z, outcomes.of(block, "heads").T)
    neurons = plots.outcome_steps(outcomes, block, "neurons", "x", names)
    for figure in (heads, neurons):
        assert all(label.endswith("&lt;b&gt;x&lt;/b&gt;") for label in figure.data[0].x)
    total = sum(np.mean(trace.z) for trace in neurons.data) + (outcomes.of(block, "neurons") == KEPT).mean()
    assert total == pytest.approx(1, abs=1e-5)


def test_foreign_text_is_escaped(sitting: SparsitySitting) -> None:
    state = replace(sitting.state, model="<i>m</i>", tables=None)
    assert "&lt;i&gt;m" in sparsity_panels.said_of(state)
    assert state.counts is not None
    odd = replace(state, counts=state.counts.assign(line="<u>"))
    assert "<u>" not in sparsity_panels.counts(odd)
    assert "&lt;u&gt;" in sparsity_panels.counts(odd)


def test_quality_of_the_predictor_over_blocks(sitting: SparsitySitting) -> None:
    profile = seen(sitting)[1].quality
    assert profile is not None
    figure = quality_plots.quality_lines(profile)
    table = profile.table[profile.table["kind"] == "heads"]
    np.testing.assert_allclose(figure.data[0].y, table.groupby("block")["spearman"].mean())
    assert [trace.name for trace in figure.data[:5]][-1] == "recall, chance"
    assert "2 windows of prose" in figure.layout.title.subtitle.text


def test_verdicts_say_plainly_what_was_measured(sitting: SparsitySitting) -> None:
    _, look, _ = seen(sitting)

    def said(value: float, low: float, high: float) -> str:
        row = pd.DataFrame([(0.3, "fisher", value, low, high)], columns=["sparsity", "rival", "value", "low", "high"])
        return " ".join(sparsity_verdicts.verdicts(SparsityState(model="m", look=replace(look, to_static=row))))

    assert "the predicted mask is better (by fisher: -0.200" in said(-0.2, -0.3, -0.1)
    assert "worth having here" in said(-0.2, -0.3, -0.1)
    assert "the static mask is as good" in said(0.0, -0.1, 0.1)
    assert "a static mask does as well here or better" in said(0.2, 0.1, 0.3)
    assert "mean is taken off" in said(0.2, 0.1, 0.3)
    assert "too few for a claim" in said(0.2, 0.1, 0.3)
