"""Masks of heads and neurons in the cpu engine: against the reference, and alike however rows come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.runtime.mask_plans import MASK_PLANS, UNITS, constant_plan, laid_by_row, predicted_plan, threshold_plan
from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.errors import EngineError
from workbench.formats.compressed import CompressedModel
from workbench.models import LoadedModel
from workbench.runtime.cpu import CpuEngine
from workbench.runtime.cpu_build import kernels
from workbench.runtime.plan import Plan, Policy, Scope
from workbench.runtime.reference import ReferenceEngine

TEXT = np.random.default_rng(7).integers(0, 256, 150).tolist()
PROMPT = 17


def small(model: LoadedModel, bits: int = 4, group_size: int = 16) -> CompressedModel:
    return compress(model, Recipe.for_model(model, RtnConfig(bits=bits, group_size=group_size)))


def stepwise(engine: Any, text: list[int], **start: Any) -> tuple[np.ndarray, Any]:
    sequence = engine.start(**start)
    logits = [engine.prefill(sequence, text[:PROMPT])]
    logits += [engine.step([sequence], [token])[0] for token in text[PROMPT:-1]]
    return np.stack(logits), sequence


def masks_of(trace: list, slot: str) -> np.ndarray:
    return np.stack([step.decisions[slot] for step in trace])


@pytest.mark.parametrize("isa", kernels().isas())
@pytest.mark.parametrize("name", MASK_PLANS)
def test_masks_act_as_in_the_reference(tiny_model: LoadedModel, name: str, isa: str) -> None:
    """Decisions agree but for scores on the edge; replayed, results and counts do."""
    plan = MASK_PLANS[name]()
    engine = CpuEngine(tiny_model, plan, threads=3, isa=isa)
    _, sequence = stepwise(engine, TEXT[:60])
    reference = ReferenceEngine(tiny_model, plan)
    _, its = stepwise(reference, TEXT[:60])
    for slot in plan.slots:
        ours, theirs = masks_of(sequence.trace, slot), masks_of(its.trace, slot)
        assert ours.dtype == np.uint8
        assert (ours != theirs).mean() < 1e-3
        assert 0.2 < ours[PROMPT:].mean() < 0.8
    recorded = [s.decisions for s in its.trace]
    expected, its = stepwise(reference, TEXT[:60], replay=recorded)
    found, sequence = stepwise(engine, TEXT[:60], replay=recorded)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    for slot in plan.slots:
        np.testing.assert_array_equal(masks_of(sequence.trace, slot), masks_of(its.trace, slot))
    kept = [s.kept_weights for s in its.trace]
    assert [s.kept_weights for s in sequence.trace] == pytest.approx(kept)
    assert min(kept) < 0.75


@pytest.mark.parametrize("name", MASK_PLANS)
@pytest.mark.parametrize("layout", ["tiles", "rows", "rows of 16", "dense rows"])
def test_rows_alone_in_a_batch_in_a_prefill_and_in_score_are_alike(
    tiny_model: LoadedModel, name: str, layout: str
) -> None:
    plan = MASK_PLANS[name]() if layout == "tiles" else laid_by_row(MASK_PLANS[name]())
    model = tiny_model if layout == "dense rows" else small(tiny_model, group_size=16 if "16" in layout else 64)
    engine = CpuEngine(model, plan, threads=2)
    text = TEXT[:60]
    logits, sequence = stepwise(engine, text)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    stepped = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    trace: list = []
    scored = engine.score(text, prompt_length=PROMPT, trace=trace)
    np.testing.assert_allclose(scored[PROMPT - 1 :], stepped[np.arange(len(stepped)), text[PROMPT:]], atol=1e-5)
    for slot in engine.plan.slots:
        np.testing.assert_array_equal(masks_of(trace[:59], slot), masks_of(sequence.trace, slot))
    assert [s.read_bytes for s in trace[:59]] == [s.read_bytes for s in sequence.trace]
    assert [s.kept_weights for s in trace[:59]] == [s.kept_weights for s in sequence.trace]

    alone, together = [engine.start() for _ in range(3)], [engine.start() for _ in range(3)]
    for i, (a, b) in enumerate(zip(alone, together, strict=True)):
        prompt = TEXT[10 * i : 15 + 17 * i]
        np.testing.assert_array_equal(engine.prefill(a, prompt), engine.prefill(b, prompt))
    for token in range(6):
        expected = np.concatenate([engine.step([a], [token + i]) for i, a in enumerate(alone)])
        np.testing.assert_array_equal(engine.step(together, [token, token + 1, token + 2]), expected)


@pytest.mark.parametrize("name", MASK_PLANS)
def test_several_sequences_use_what_any_of_them_does(tiny_model: LoadedModel, name: str) -> None:
    engine = CpuEngine(small(tiny_model), MASK_PLANS[name](), threads=2)
    sequences = [engine.start() for _ in range(3)]
    for i, sequence in enumerate(sequences):
        engine.prefill(sequence, TEXT[20 * i : 20 * i + 17])
    engine.step(sequences, [1, 2, 3])
    steps = [sequence.trace[-1] for sequence in sequences]
    union = {slot: np.maximum.reduce([step.decisions[slot] for step in steps]) for slot in steps[0].decisions}
    alone = engine.start(replay=[union] * 8)
    engine.prefill(alone, TEXT[:6])
    engine.step([alone], [TEXT[6]])
    used = alone.trace[-1]
    assert used.pass_weights == used.kept_weights
    assert [step.pass_weights for step in steps] == pytest.approx([used.kept_weights] * 3)
    most = max(step.kept_weights for step in steps)
    assert most == used.kept_weights < 1 if name == "constant" else most < used.kept_weights < 1
    # A pass reads once what any reads; beside the linears that is the output layer, and a cache for each.
    beside = alone.trace[-1].touched_bytes - used.read_bytes
    assert used.read_bytes < sum(step.touched_bytes for step in steps) - beside < used.read_bytes + 3 * beside
    same = [engine.start(replay=[union] * 8) for _ in range(2)]
    for sequence in same:
        engine.prefill(sequence, TEXT[:6])
    engine.step(same, [TEXT[6]] * 2)
    assert same[0].trace[-1].pass_weights == pytest.approx(used.kept_weights)


@pytest.mark.parametrize("name", MASK_PLANS)
def test_later_text_changes_no_earlier_output(tiny_model: LoadedModel, name: str) -> None:
    engine = CpuEngine(small(tiny_model), MASK_PLANS[name](), threads=2)
    other = TEXT[:60] + [(t + 1) % 256 for t in TEXT[60:]]
    ours, theirs = (engine.score(text, prompt_length=PROMPT) for text in (TEXT, other))
    np.testing.assert_array_equal(ours[:59], theirs[:59])
    assert np.abs(ours[60:] - theirs[60:]).max() > 1e-4


def test_threads_and_more_rows_than_a_predictor_takes_change_no_decision(tiny_model: LoadedModel) -> None:
    plan = predicted_plan(Scope("token"), first=5)
    found = []
    for threads in (1, 4):
        trace: list = []
        CpuEngine(tiny_model, plan, threads=threads).score(TEXT, trace=trace)
        found.append(masks_of(trace, "masks"))
    np.testing.assert_array_equal(*found)
    assert found[0][:5].all()
    assert len({mask.tobytes() for mask in found[0]}) > 50


def test_a_held_mask_is_held_once_and_thresholds_move_it(tiny_model: LoadedModel) -> None:
    engine = CpuEngine(tiny_model, predicted_plan(Scope("every", 4)), threads=2)
    sequence = engine.start()
    engine.prefill(sequence, TEXT[:10])
    first = [step.decisions["masks"] for step in sequence.trace]
    for i in range(10):
        assert np.shares_memory(first[i], first[i - i % 4])
    assert not first[0].flags.writeable
    engine.set_policy(Policy(thresholds={"masks": (np.inf,) * 4}))
    for token in TEXT[10:14]:
        engine.step([sequence], [token])
    after = masks_of(sequence.trace[10:], "masks").sum(axis=1)
    assert after.tolist() == [first[8].sum(), first[8].sum(), 8, 8]  # floors: 1 head and 3 neurons in 2 blocks
    engine.set_policy(Policy({"masks": 1.0}))
    whole = engine.start()
    engine.prefill(whole, TEXT[:5])
    assert whole.trace[-1].decisions["masks"].all()
    assert whole.trace[-1].kept_weights == 1.0


@pytest.mark.parametrize("isa", kernels().isas())
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_codes_give_what_tiles_give(tiny_model: LoadedModel, bits: int, isa: str) -> None:
    """With the same mask; and a mask of ones gives what no plan gives."""
    for share, group_size in ((0.5, 16), (0.0, 64)):
        model = small(tiny_model, bits, group_size)
        plan = constant_plan(share)
        options: dict[str, Any] = {"threads": 3, "activation_mode": "fp32", "isa": isa}
        expected = CpuEngine(
            model, replace(plan, consumers=tuple(replace(c, expected=1.0) for c in plan.consumers)), **options
        )
        found = CpuEngine(model, laid_by_row(plan), **options)
        np.testing.assert_allclose(found.score(TEXT[:50]), expected.score(TEXT[:50]), atol=2e-5)
        if not share:
            np.testing.assert_allclose(found.score(TEXT[:50]), CpuEngine(model, **options).score(TEXT[:50]), atol=2e-5)


def test_neurons_that_are_masked_are_not_read_where_rows_lie_side_by_side(tiny_model: LoadedModel) -> None:
    """One neuron of a tile keeps the tile; of rows it is itself that is read."""
    model, plan, read = small(tiny_model, group_size=64), constant_plan(0.6), []
    dense = CpuEngine(model, threads=1)
    for made in (
        None,
        replace(plan, consumers=tuple(replace(c, expected=1.0) for c in plan.consumers)),
        laid_by_row(plan),
    ):
        engine = dense if made is None else CpuEngine(model, made, threads=1)
        trace: list = []
        engine.score(TEXT[:5], trace=trace)
        read.append(trace[-1].read_bytes)
    assert read[2] < 0.8 * read[1] <= 0.8 * read[0]  # though rows of 48 channels are padded to 64


def test_bytes_of_a_predictor_are_counted_where_it_decides(tiny_model: LoadedModel) -> None:
    """Half of all neurons leave no tile of 16 whole: a mask reads what none does, and the predictor."""
    plan = predicted_plan(Scope("every", 4))
    predictor = plan.deciders[0].program.bytes / 4
    for engine in (CpuEngine(tiny_model, plan, threads=1), ReferenceEngine(tiny_model, plan)):
        read = []
        for policy in (Policy(), Policy({"masks": 1.0})):
            engine.set_policy(policy)
            trace: list = []
            engine.score(TEXT[:9], trace=trace)
            read.append(trace[-1].read_bytes)
        whole = CpuEngine(tiny_model, threads=1) if isinstance(engine, CpuEngine) else ReferenceEngine(tiny_model)
        trace = []
        whole.score(TEXT[:9], trace=trace)
        assert read[1] == trace[-1].read_bytes
        if isinstance(engine, CpuEngine):
            assert read[0] == read[1] + predictor


def test_thresholds_of_inputs_are_a_slot_like_any(tiny_model: LoadedModel) -> None:
    plan = threshold_plan(0.4, False)
    engine, reference = CpuEngine(tiny_model, plan, threads=2), ReferenceEngine(tiny_model, plan)
    traces: list[list] = [[], []]
    found, expected = (e.score(TEXT, trace=t) for e, t in zip((engine, reference), traces, strict=True))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    for ours, theirs in zip(*traces, strict=True):
        assert ours.decisions == theirs.decisions
        assert ours.kept_weights == pytest.approx(theirs.kept_weights, abs=1e-3)
    assert traces[0][1].kept_weights == pytest.approx(1, abs=1e-3)
    engine.set_policy(Policy(thresholds=dict.fromkeys(plan.slots, (0.8,))))
    again: list = []
    engine.score(TEXT, trace=again)
    assert again[-1].kept_weights < traces[0][-1].kept_weights


def test_replay_refuses_masks_of_another_size(tiny_model: LoadedModel) -> None:
    plan: Plan = constant_plan(0.5)
    for engine in (CpuEngine(tiny_model, plan, threads=1), ReferenceEngine(tiny_model, plan)):
        with pytest.raises(EngineError, match=f"mask of {3 * UNITS} entries"):
            engine.score(TEXT[:5], replay=[{"masks": np.ones(UNITS, np.uint8)}] * 5)
