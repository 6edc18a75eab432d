"""Masks of heads and neurons, predicted or given, in the plan and in the reference engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.mask_plans import (
    BLOCKS,
    HEADS,
    MASK_PLANS,
    NEURONS,
    UNITS,
    constant_plan,
    consumers,
    predicted_plan,
    predictor,
    threshold_plan,
)
from workbench.errors import EngineError
from workbench.formats.mask_scores import rounded
from workbench.models import LoadedModel
from workbench.runtime.plan import ConstantMask, Consumer, Decider, Plan, Policy, Scope, Tap, Threshold
from workbench.runtime.reference import ReferenceEngine

TEXT = np.random.default_rng(7).integers(0, 256, 40).tolist()


def masks_of(trace: list, slot: str = "masks") -> np.ndarray:
    return np.stack([step.decisions[slot] for step in trace])


# Programs -------------------------------------------------------------------------------------------------------------


def test_a_predictor_is_its_formula() -> None:
    made = predictor(2, floor=0)
    taps = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32) * 3
    for tap, mask in zip(taps, made(taps, np.arange(5)), strict=True):
        x = tap.astype(np.float64) / np.sqrt(np.mean(tap.astype(np.float64) ** 2))
        h = np.maximum(made.hidden_steps * (made.hidden.astype(np.float64) @ x) + made.hidden_bias, 0)
        h = np.rint(h * 127 / h.max()) * h.max() / 127
        score = made.mean + made.row_steps * (made.rows.astype(np.float64) @ h)
        cut = np.repeat(np.asarray(made.thresholds), np.diff(made.groups))
        sure = np.abs(score - cut) > 1e-4
        np.testing.assert_array_equal(mask[sure], (score > cut)[sure])
        assert 0 < mask.sum() < made.size


def test_hidden_activations_are_rounded_to_127_steps_of_the_highest() -> None:
    hidden = np.random.default_rng(0).exponential(size=(6, 70)).astype(np.float32)
    hidden[1] = 0
    hidden[2] *= np.float32(1e-42)  # too small for its inverse
    hidden[3, 5], hidden[4, 6] = np.nan, np.inf
    codes, steps = rounded(hidden)
    assert codes.min() == 0
    assert codes.max(axis=1)[[0, 5]].tolist() == [127, 127]
    for row in (0, 1, 2, 5):
        off = np.abs(codes[row] * steps[row] - hidden[row])
        assert off.max() <= max(0.5001 * hidden[row].max() / 127, 1e-36)
    assert np.isnan(steps[[3, 4]]).all()
    assert not codes[[3, 4]].any()


@given(st.integers(0, 4), st.integers(0, 96), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_group_keeps_its_floor_by_the_highest_scores(heads: int, neurons: int, seed: int) -> None:
    made = replace(predictor(1, seed=seed), thresholds=(np.inf, np.inf), floors=np.array([heads, neurons]))
    taps = np.random.default_rng(seed).standard_normal((3, 48)).astype(np.float32)
    masks, scores = made(taps, np.arange(3)), made.scores(taps)
    for mask, score in zip(masks, scores, strict=True):
        for begin, end, floor in ((0, HEADS, heads), (HEADS, UNITS, neurons)):
            kept, left = score[begin:end][mask[begin:end] == 1], score[begin:end][mask[begin:end] == 0]
            assert len(kept) == floor
            assert not len(kept) or not len(left) or kept.min() >= left.max()


def test_ties_go_to_the_lower_index_and_the_first_positions_are_whole() -> None:
    made = predictor(1, first=2)
    flat = replace(
        made,
        row_steps=np.zeros(UNITS, np.float32),
        mean=np.zeros(UNITS, np.float32),
        thresholds=(0.0, 0.0),
        floors=np.array([2, 5]),
    )
    masks = flat(np.ones((3, 48), np.float32), np.array([0, 1, 2]))
    assert masks[:2].all()
    assert np.flatnonzero(masks[2]).tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert ConstantMask(np.zeros(3), first=1)(np.zeros((2, 4)), np.arange(2)).tolist() == [[1, 1, 1], [0, 0, 0]]
    np.testing.assert_array_equal(Threshold((0.25,), first=1)(np.zeros((2, 4)), np.arange(2)), [0, 0.25])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold((1.0, 2.0)), "one number"),
        (lambda: Threshold((-1.0,)), "at least 0"),
        (lambda: ConstantMask(np.array([0.0, 0.5])), "zeros and ones"),
        (lambda: replace(predictor(1), thresholds=(0.0,)), "thresholds must have shape"),
        (lambda: replace(predictor(1), thresholds=(0.0, np.nan)), "NaN"),
        (lambda: replace(predictor(1), groups=np.array([0, 4, 99])), "ascend from 0 to 100"),
        (lambda: replace(predictor(1), floors=np.array([5, 1])), "more than there are"),
        (lambda: replace(predictor(1), rows=np.zeros((100, 24), np.float32)), "int8"),
        (lambda: replace(predictor(1), hidden_bias=np.zeros(3, np.float32)), "hidden_bias"),
    ],
)
def test_programs_refuse_what_they_cannot_run(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make()


def test_plans_that_do_not_fit_the_model_are_refused(tiny_model: LoadedModel) -> None:
    arch = tiny_model.architecture
    decider = Decider("m", Tap("attention_output", 0), predictor(1), Scope("token"), default=1)

    def refuse(plan: Plan, message: str) -> None:
        with pytest.raises(EngineError, match=message):
            ReferenceEngine(tiny_model, plan)

    refuse(Plan((decider,), (Consumer("m", "neurons", "blocks.1", offset=5),)), "96 entries from 5")
    refuse(Plan((decider,), (Consumer("m", "heads", "blocks.3"),)), "has 3 blocks")
    wide = Decider("m", Tap("mlp_inner", 0), predictor(1), Scope("token"), default=1)
    refuse(Plan((wide,), (Consumer("m", "heads", "blocks.1"),)), "reads 48 values")
    refuse(Plan((replace(decider, default=0.5),), (Consumer("m", "heads", "blocks.1"),)), "must be 0 or 1")
    cut = Decider("t", Tap("residual", 0), Threshold((0.1,)), Scope("token"))
    bad = Consumer("t", "input_threshold", "blocks.1.o", factors=np.ones(3, np.float32))
    refuse(Plan((cut,), (bad,)), "must be 48 numbers")
    refuse(Plan((cut,), (Consumer("t", "path", "blocks.1", offset=1),)), "Only heads and neurons")
    refuse(Plan((decider,), (replace(bad, slot="m", kind="heads", target="blocks.1"),)), "Only input_threshold")
    late = Decider("m", Tap("mlp_inner", 1), predictor(1, width=NEURONS), Scope("token"), default=1)
    refuse(Plan((late,), (Consumer("m", "neurons", "blocks.1", offset=HEADS),)), "used earlier")
    predicted_plan(Scope("token")).check(arch)


def test_thresholds_of_a_predictor_need_not_ascend() -> None:
    plan = predicted_plan(Scope("token"))
    Policy(thresholds={"masks": (3.0, 2.0, 1.0, 0.0)}).check(plan)
    with pytest.raises(EngineError, match="has 4 thresholds"):
        Policy(thresholds={"masks": (3.0,)}).check(plan)
    with pytest.raises(EngineError, match=r"'masks'.*NaN"):
        Policy(thresholds={"masks": (3.0, 2.0, np.nan, 1.0)}).check(plan)
    with pytest.raises(EngineError, match="zeros and ones"):
        Policy({"masks": 0.5}).check(plan)


# In the reference engine ----------------------------------------------------------------------------------------------


def test_a_masked_model_is_one_without_those_weights(tiny_model: LoadedModel) -> None:
    plan = constant_plan(0.4)
    found = ReferenceEngine(tiny_model, plan).score(TEXT)
    mask = np.asarray(plan.deciders[0].program.values).reshape(BLOCKS, UNITS)  # type: ignore[attr-defined]
    originals = {}
    for i in range(BLOCKS):
        for linear_id, kept in (("o", mask[i, :HEADS].repeat(48 // HEADS)), ("down", mask[i, HEADS:])):
            module = tiny_model.linear_module(f"blocks.{i}.{linear_id}")
            originals[module] = module.weight.data
            module.weight.data = module.weight.data * torch.from_numpy(kept)
    expected = ReferenceEngine(tiny_model).score(TEXT)
    for module, original in originals.items():
        module.weight.data = original
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - ReferenceEngine(tiny_model).score(TEXT)).max() > 1e-3


@pytest.mark.parametrize("name", MASK_PLANS)
def test_later_text_changes_no_earlier_output(tiny_model: LoadedModel, name: str) -> None:
    engine = ReferenceEngine(tiny_model, MASK_PLANS[name]())
    other = [*TEXT[:25], *[(t + 1) % 256 for t in TEXT[25:]]]
    ours, theirs = engine.score(TEXT, prompt_length=6), engine.score(other, prompt_length=6)
    np.testing.assert_array_equal(ours[:24], theirs[:24])
    assert np.abs(ours[25:] - theirs[25:]).max() > 1e-4


@pytest.mark.parametrize("name", MASK_PLANS)
def test_masks_are_recorded_once_as_bytes_and_run_again(tiny_model: LoadedModel, name: str) -> None:
    plan = MASK_PLANS[name]()
    engine = ReferenceEngine(tiny_model, plan)
    trace: list = []
    scores = engine.score(TEXT, prompt_length=6, trace=trace)
    for slot in plan.slots:
        masks = masks_of(trace, slot)
        assert masks.dtype == np.uint8
        assert set(np.unique(masks)) == {0, 1}
        if name in ("reply", "constant"):
            held = [step.decisions[slot] for step in trace[6:]]
            assert all(np.shares_memory(mask, held[0]) for mask in held)
            assert masks[0].all()
    replayed: list = []
    again = ReferenceEngine(tiny_model, plan).score(TEXT, replay=[s.decisions for s in trace], trace=replayed)
    np.testing.assert_allclose(again, scores, atol=1e-5)
    for slot in plan.slots:
        np.testing.assert_array_equal(masks_of(replayed, slot), masks_of(trace, slot))


def test_weights_kept_are_those_of_units_and_inputs_kept(tiny_model: LoadedModel) -> None:
    arch = tiny_model.architecture
    trace: list = []
    ReferenceEngine(tiny_model, constant_plan(0.5, first=2)).score(TEXT, trace=trace)
    assert [step.kept_weights for step in trace[:2]] == [1.0, 1.0]
    masks = trace[2].decisions["masks"].reshape(BLOCKS, UNITS)
    kept = 0.0
    for linear in arch.linears:
        share = masks[linear.block, :HEADS].mean() if linear.role in "qo" else masks[linear.block, HEADS:].mean()
        kept += linear.n_weights * (1 if linear.role in "kv" else share)
    assert trace[2].kept_weights == pytest.approx(kept / sum(linear.n_weights for linear in arch.linears))
    assert trace[2].read_bytes == pytest.approx(trace[2].kept_weights * trace[0].read_bytes, rel=1e-3)

    ReferenceEngine(tiny_model, threshold_plan(np.nextafter(np.float32(np.inf), 0), True)).score(TEXT, trace=trace)
    cut = trace[-1].kept_weights  # both units left out
    units = [arch.unit("blocks.1.gate_up"), arch.unit("blocks.2.down")]
    assert cut == pytest.approx(1 - sum(u.n_weights for u in units) / sum(v.n_weights for v in arch.units))


def test_what_a_mask_leaves_out_is_counted_once_where_a_threshold_follows(tiny_model: LoadedModel) -> None:
    """A threshold of 0 leaves out what is zero: of the masked neurons' product nothing more."""
    mask = constant_plan(0.5)
    cut = Decider("cut", Tap("residual", 0), Threshold((0.0,)), Scope("token"))
    both = Plan((*mask.deciders, cut), (*mask.consumers, Consumer("cut", "input_threshold", "blocks.1.down")))
    traces: list[list] = [[], []]
    for plan, trace in zip((mask, both), traces, strict=True):
        ReferenceEngine(tiny_model, plan).score(TEXT, trace=trace)
    assert [s.kept_weights for s in traces[1]] == pytest.approx([s.kept_weights for s in traces[0]])


def test_factors_weigh_inputs_before_they_are_cut(tiny_model: LoadedModel) -> None:
    """Half of every input against half the threshold is the same; factors that differ are another order of inputs."""
    plan = threshold_plan(0.5, False)
    halved = Plan(
        threshold_plan(0.25, False).deciders,
        tuple(replace(c, factors=np.full(48 if "gate" in c.target else 96, 0.5, np.float32)) for c in plan.consumers),
    )
    expected = ReferenceEngine(tiny_model, plan).score(TEXT)
    np.testing.assert_array_equal(ReferenceEngine(tiny_model, halved).score(TEXT), expected)
    assert np.abs(ReferenceEngine(tiny_model, threshold_plan(0.5, True)).score(TEXT) - expected).max() > 1e-4
    engine = ReferenceEngine(tiny_model, plan)
    engine.set_policy(Policy(thresholds=dict.fromkeys(plan.slots, (0.0,))))
    np.testing.assert_allclose(engine.score(TEXT), ReferenceEngine(tiny_model).score(TEXT), atol=1e-5)


def test_consumers_of_one_slot_read_their_own_part(tiny_model: LoadedModel) -> None:
    """A mask for all blocks equals masks of its parts, each in a slot of its own."""
    whole = constant_plan(0.5)
    values = np.asarray(whole.deciders[0].program.values).reshape(BLOCKS, UNITS)  # type: ignore[attr-defined]
    apart = Plan(
        tuple(
            Decider(f"m{i}", Tap("residual", 0), ConstantMask(values[i]), Scope("token"), default=1)
            for i in range(BLOCKS)
        ),
        tuple(c for i in range(BLOCKS) for c in consumers(f"m{i}", range(i, i + 1))),
    )
    np.testing.assert_array_equal(
        ReferenceEngine(tiny_model, whole).score(TEXT), ReferenceEngine(tiny_model, apart).score(TEXT)
    )
