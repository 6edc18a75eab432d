"""The reference engine against transformers itself, and the plan's seam with one decider of each scope."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from workbench.errors import Cancelled, EngineError, InputError
from workbench.formats.codes import dequantize, quantize_groups
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime.base import Sampler
from workbench.runtime.plan import (
    PATH_FULL,
    PATH_SKIP_BLOCK,
    Consumer,
    Decider,
    InputTransform,
    NormLevels,
    Plan,
    Policy,
    PositionTable,
    ProjectionMask,
    Scope,
    Tap,
)
from workbench.runtime.reference import ReferenceEngine
from workbench.runtime.sampling import sample

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt")
RNG = np.random.default_rng(7)
TEXT = RNG.integers(0, 256, 40).tolist()


class RoundedWeights:
    """Every width by rounding the dense weights, to give a plan something to choose from."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def weight(self, linear_id: str, bits: int) -> torch.Tensor:
        return dequantize(quantize_groups(self.model.linear_module(linear_id).weight.detach(), bits, 16))

    def stored_bytes(self, linear_id: str, bits: int | None = None) -> float:
        return self.model.architecture.linear(linear_id).n_weights * (bits or 16) / 8


def token_plan() -> Plan:
    """Width of a unit by the norm of the residual, each token anew."""
    return Plan(
        deciders=(Decider("width", Tap("residual", 1), NormLevels((3.8,), (3, 8)), Scope("token"), default=8),),
        consumers=(Consumer("width", "width", "blocks.1.qkv", widths=(3, 8)),),
    )


def every_plan() -> Plan:
    """Neurons and heads of the last block from the first block's attention output, every 4 tokens."""
    matrix = np.random.default_rng(1).standard_normal((96, 48)).astype(np.float32)
    heads = np.random.default_rng(2).standard_normal((4, 48)).astype(np.float32)
    tap = Tap("attention_output", 0)
    return Plan(
        deciders=(
            Decider("neurons", tap, ProjectionMask(matrix, keep=48), Scope("every", 4), default=1),
            Decider("heads", tap, ProjectionMask(heads, keep=2), Scope("every", 4), default=1),
        ),
        consumers=(Consumer("neurons", "neurons", "blocks.2"), Consumer("heads", "heads", "blocks.2")),
    )


def reply_plan() -> Plan:
    """Path of an early block and an input threshold from the last block's residual, once per reply."""
    return Plan(
        deciders=(
            Decider("path", Tap("residual", 2), NormLevels((0.0,), (PATH_FULL, PATH_SKIP_BLOCK)), Scope("reply")),
            Decider("cut", Tap("residual", 2), NormLevels((0.0,), (0.0, 0.3)), Scope("reply")),
        ),
        consumers=(Consumer("path", "path", "blocks.1"), Consumer("cut", "input_threshold", "blocks.0.gate_up")),
    )


PLANS = {"token": token_plan, "every": every_plan, "reply": reply_plan}


def same_decisions(some: list, others: list) -> bool:
    """Whether traces tell the same decisions, masks (bytes, of one entry per unit) included."""
    for one, other in zip(some, others, strict=True):
        if one.decisions.keys() != other.decisions.keys():
            return False
        for slot, value in one.decisions.items():
            if type(value) is not type(other.decisions[slot]) or not np.array_equal(value, other.decisions[slot]):
                return False
            if isinstance(value, np.ndarray) and value.dtype != np.uint8:
                return False
    return True


def open_reference(model: LoadedModel, plan: Plan | None = None) -> ReferenceEngine:
    return ReferenceEngine(model, plan, RoundedWeights(model) if plan else None)


@pytest.fixture(params=FAMILIES)
def any_tiny_model(request: pytest.FixtureRequest, make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model(request.param)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def decode(engine: ReferenceEngine, text: list[int], prompt_length: int, **start: object) -> tuple[np.ndarray, list]:
    """Log-probabilities of text[prompt_length:] by prefill and single steps, and the trace."""
    sequence = engine.start(**start)
    rows = [engine.prefill(sequence, text[:prompt_length])]
    rows += [engine.step([sequence], [token])[0] for token in text[prompt_length:-1]]
    scores = log_softmax(np.stack(rows).astype(np.float64))
    return scores[np.arange(len(rows)), text[prompt_length:]], sequence.trace


def test_agrees_with_transformers_in_every_family(any_tiny_model: LoadedModel) -> None:
    engine = ReferenceEngine(any_tiny_model)
    with torch.inference_mode():
        expected = any_tiny_model.module(torch.tensor([TEXT])).logits[0].float().log_softmax(1)
    found = np.concatenate([rows for _, rows in engine.log_probabilities(TEXT, chunk=7)])
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
    np.testing.assert_allclose(engine.score(TEXT), found[np.arange(39), TEXT[1:]], atol=1e-5)
    np.testing.assert_allclose(decode(engine, TEXT, 5)[0], engine.score(TEXT)[4:], atol=2e-4)


def test_steps_of_several_sequences_do_not_mix(tiny_model: LoadedModel) -> None:
    engine = ReferenceEngine(tiny_model)
    alone = []
    for prompt in ([1, 2, 3], [9, 8, 7, 6]):
        sequence = engine.start()
        engine.prefill(sequence, prompt)
        alone.append(engine.step([sequence], [5])[0])
    first, second = engine.start(), engine.start()
    engine.prefill(first, [1, 2, 3])
    engine.prefill(second, [9, 8, 7, 6])
    np.testing.assert_allclose(engine.step([first, second], [5, 5]), np.stack(alone), atol=1e-5)


@pytest.mark.parametrize("scope", PLANS)
def test_score_decides_as_step_does(tiny_model: LoadedModel, scope: str) -> None:
    engine = open_reference(tiny_model, PLANS[scope]())
    stepped, trace = decode(engine, TEXT, 6)
    scored_trace: list = []
    scored = engine.score(TEXT, prompt_length=6, trace=scored_trace)
    np.testing.assert_allclose(stepped, scored[5:], atol=2e-4)
    assert same_decisions(trace, scored_trace[: len(trace)])
    assert [s.read_bytes for s in trace] == [s.read_bytes for s in scored_trace[: len(trace)]]


@pytest.mark.parametrize("scope", PLANS)
def test_a_plan_changes_the_result_and_its_scope_shows_in_the_trace(tiny_model: LoadedModel, scope: str) -> None:
    engine = open_reference(tiny_model, PLANS[scope]())
    changed, trace = decode(engine, TEXT, 6)
    assert np.abs(changed - ReferenceEngine(tiny_model).score(TEXT)[5:]).max() > 1e-4
    if scope == "token":
        assert {s.decisions["width"] for s in trace} == {3.0, 8.0}
        assert len({s.read_bytes for s in trace}) == 2
    if scope == "every":
        for step in trace:
            assert same_decisions([step], [trace[step.position - step.position % 4]])
        assert len({s.decisions["neurons"].tobytes() for s in trace}) > 1
        assert all(sum(s.decisions["heads"]) == 2 and sum(s.decisions["neurons"]) == 48 for s in trace)
    if scope == "reply":
        assert all(s.decisions == {"path": PATH_FULL, "cut": 0.0} for s in trace[:6])
        assert all(s.decisions["path"] == PATH_SKIP_BLOCK for s in trace[6:])
        assert all(s.read_bytes < trace[0].read_bytes for s in trace[6:])


@pytest.mark.parametrize("scope", PLANS)
def test_later_text_changes_no_earlier_output(tiny_model: LoadedModel, scope: str) -> None:
    engine = open_reference(tiny_model, PLANS[scope]())
    other = [*TEXT[:25], *RNG.integers(0, 256, 15).tolist()]
    ours, theirs = engine.score(TEXT, prompt_length=6), engine.score(other, prompt_length=6)
    np.testing.assert_array_equal(ours[:24], theirs[:24])


@pytest.mark.parametrize("scope", PLANS)
def test_replayed_decisions_reproduce_a_run_and_a_policy_overrides(tiny_model: LoadedModel, scope: str) -> None:
    plan = PLANS[scope]()
    engine = open_reference(tiny_model, plan)
    scores, trace = decode(engine, TEXT, 6)
    other = Plan(  # the same slots and consumers, deciders that would say something else
        deciders=tuple(
            Decider(d.slot, d.tap, PositionTable((0,), (0.0,)) if d.program.size == 1 else d.program, Scope("every", 3))
            if d.scope.kind == "every"
            else d
            for d in plan.deciders
        ),
        consumers=plan.consumers,
    )
    replayed, _ = decode(open_reference(tiny_model, other), TEXT, 6, replay=[s.decisions for s in trace])
    np.testing.assert_allclose(replayed, scores, atol=1e-5)

    slot = plan.deciders[0].slot
    fixed = {"width": 3.0, "neurons": np.ones(96), "path": PATH_FULL}[slot]
    engine.set_policy(Policy({slot: fixed}))
    _, trace = decode(engine, TEXT, 6)
    assert len({np.asarray(s.decisions[slot]).tobytes() for s in trace}) == 1
    with pytest.raises(EngineError, match="Did you mean"):
        engine.set_policy(Policy({slot + "x": 1.0}))


def test_widths_equal_a_model_with_those_weights(tiny_model: LoadedModel) -> None:
    engine = open_reference(tiny_model, token_plan())
    engine.set_policy(Policy({"width": 3.0}))
    low = engine.score(TEXT)
    weights = RoundedWeights(tiny_model)
    originals = {}
    for role in "qkv":
        module = tiny_model.linear_module(f"blocks.1.{role}")
        originals[module] = module.weight.data
        module.weight.data = weights.weight(f"blocks.1.{role}", 3)
    try:
        np.testing.assert_allclose(low, ReferenceEngine(tiny_model).score(TEXT), atol=1e-5)
    finally:
        for module, original in originals.items():
            module.weight.data = original


def test_transforms_undo_what_the_weights_contain(tiny_model: LoadedModel) -> None:
    """Scaling, reordering and rotating the input of a linear whose weights contain the inverse changes nothing."""
    expected = ReferenceEngine(tiny_model).score(TEXT)
    order = RNG.permutation(48)
    scale = np.exp(RNG.standard_normal(48)).astype(np.float32)
    rotation = np.linalg.qr(RNG.standard_normal((48, 48)))[0].astype(np.float32)
    chain = (InputTransform("scale", scale), InputTransform("order", order), InputTransform("rotation", rotation))
    module = tiny_model.linear_module("blocks.1.gate")
    original = module.weight.data
    module.weight.data = (original / torch.from_numpy(scale))[:, order] @ torch.from_numpy(rotation)
    try:
        found = ReferenceEngine(tiny_model, Plan(transforms={"blocks.1.gate": chain})).score(TEXT)
    finally:
        module.weight.data = original
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_generation_is_seeded_and_cancels(tiny_model: LoadedModel) -> None:
    engine = ReferenceEngine(tiny_model)
    sampler = Sampler(temperature=1.0, top_k=50, top_p=0.95)
    runs = [engine.generate(engine.start(seed=s), [1, 2, 3], 12, sampler=sampler) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    greedy = engine.generate(engine.start(), [1, 2, 3], 12)
    assert engine.generate(engine.start(), [1, 2, 3], 12, stop_tokens=[greedy[4]]) == greedy[: greedy.index(greedy[4])]
    job = Job()
    seen: list[int] = []

    def stop_at_three(token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            job.cancel()

    with pytest.raises(Cancelled):
        engine.generate(engine.start(), [1, 2, 3], 12, job=job, on_token=stop_at_three)
    assert len(seen) == 3


def test_impossible_requests_say_what_to_do(tiny_model: LoadedModel) -> None:
    engine = ReferenceEngine(tiny_model)
    with pytest.raises(InputError, match="empty"):
        engine.score([])
    with pytest.raises(InputError, match="context of 512"):
        engine.score([1] * 513)
    late = Plan(
        deciders=(Decider("w", Tap("residual", 2), NormLevels((1,), (3, 8)), Scope("token")),),
        consumers=(Consumer("w", "width", "blocks.1.o", widths=(3, 8)),),
    )
    with pytest.raises(EngineError, match="earlier"):
        ReferenceEngine(tiny_model, late)
    with pytest.raises(EngineError, match="dense"):
        ReferenceEngine(tiny_model, token_plan())
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.start()


def test_engines_on_one_model_do_not_disturb_each_other(tiny_model: LoadedModel) -> None:
    dense = ReferenceEngine(tiny_model)
    before = dense.score(TEXT)
    planned = open_reference(tiny_model, every_plan())
    planned.score(TEXT)
    np.testing.assert_array_equal(dense.score(TEXT), before)
    planned.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny_model.module.modules())


def test_taps_see_every_linear_once_per_token(any_tiny_model: LoadedModel) -> None:
    engine = ReferenceEngine(any_tiny_model)
    seen: dict[str, int] = {}

    def count(site: str, start: int, rows: torch.Tensor) -> None:
        assert start == seen.get(site, 0)
        seen[site] = start + len(rows)

    engine.set_tap(count)
    engine.generate(engine.start(), TEXT[:6], 5)
    arch = any_tiny_model.architecture
    assert set(seen) == {linear.id for linear in arch.linears} | {f"blocks.{i}" for i in range(arch.n_blocks)}
    assert set(seen.values()) == {10}


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    rng = np.random.default_rng(0)
    draws = np.bincount([sample(logits, Sampler(temperature=1.0), rng) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(draws, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert {sample(logits, Sampler(1.0, top_k=2), rng) for _ in range(200)} == {0, 1}
    assert {sample(logits, Sampler(1.0, top_p=0.6), rng) for _ in range(200)} == {0, 1}
    with pytest.raises(EngineError, match="NaN"):
        sample(np.array([np.nan, 1.0], dtype=np.float32), Sampler(), rng)
