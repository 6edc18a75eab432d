"""The cpu engine against the reference engine, in every family, on every instruction set; and what it must survive."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.apply.anyprecision import AnyPrecisionConfig
from workbench.apply.compress import compress
from workbench.apply.config import MethodConfig
from workbench.apply.nested import NestedConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.errors import Cancelled, EngineError, InputError
from workbench.formats.compressed import CompressedModel
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine, why_not_cpu
from workbench.runtime.base import Sampler
from workbench.runtime.cpu import CpuEngine
from workbench.runtime.cpu_build import kernels
from workbench.runtime.plan import (
    PATH_FULL,
    PATH_SKIP_ATTENTION,
    PATH_SKIP_BLOCK,
    PATH_SKIP_MLP,
    Consumer,
    Decider,
    InputTransform,
    LinearLevels,
    NormLevels,
    Plan,
    Policy,
    PositionTable,
    ProjectionLevels,
    ProjectionMask,
    Scope,
    Tap,
)
from workbench.runtime.reference import ReferenceEngine

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt")
TEXT = np.random.default_rng(7).integers(0, 256, 150).tolist()
TOLERANCE = 1e-4  # of the largest logit


def small(model: LoadedModel, bits: int = 4, **options: Any) -> CompressedModel:
    return compress(model, Recipe.for_model(model, RtnConfig(bits=bits, group_size=16, **options)))


def rows(engine: Any, text: list[int] = TEXT) -> np.ndarray:
    return np.concatenate([found for _, found in engine.log_probabilities(text, chunk=64)])


def stepwise(engine: Any, text: list[int], prompt: int, **start: Any) -> tuple[np.ndarray, Any]:
    sequence = engine.start(**start)
    logits = [engine.prefill(sequence, text[:prompt])]
    logits += [engine.step([sequence], [token])[0] for token in text[prompt:-1]]
    return np.stack(logits), sequence


def assert_same_decisions(some: list[Any], others: list[Any]) -> None:
    """Of traces, or of recorded decisions."""
    for one, other in zip(some, others, strict=True):
        ours, theirs = getattr(one, "decisions", one), getattr(other, "decisions", other)
        assert ours.keys() == theirs.keys()
        for slot, value in ours.items():
            np.testing.assert_array_equal(value, theirs[slot], err_msg=slot)
            assert not isinstance(value, np.ndarray) or value.dtype == np.uint8


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q)).sum(axis=1).mean())


@pytest.fixture(params=FAMILIES)
def any_tiny_model(request: pytest.FixtureRequest, make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model(request.param)


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", kernels().isas())
def test_agrees_with_the_reference_in_every_family(any_tiny_model: LoadedModel, isa: str) -> None:
    expected = rows(ReferenceEngine(any_tiny_model))
    found = rows(CpuEngine(any_tiny_model, threads=2, isa=isa))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("planes", [False, True])
def test_agrees_on_codes_with_fp32_activations(tiny_model: LoadedModel, bits: int, planes: bool) -> None:
    model = small(tiny_model, bits, symmetric=bits % 2 == 0)
    expected = rows(open_engine(model, engine="reference"))
    found = rows(CpuEngine(model, threads=2, activation_mode="fp32", planes=planes))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


def test_agrees_on_codes_in_every_family_and_int8_stays_close(any_tiny_model: LoadedModel) -> None:
    model = small(any_tiny_model, 6)
    expected = rows(open_engine(model, engine="reference"))
    exact = rows(CpuEngine(model, threads=1, activation_mode="fp32"))
    np.testing.assert_allclose(exact, expected, atol=TOLERANCE * np.abs(expected).max())
    fast = CpuEngine(model, threads=1)
    assert fast.activation_mode == "int8"
    assert kl(exact, rows(fast)) < 0.005


def test_bf16_weights_run_in_bf16(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model("llama")
    expected = rows(ReferenceEngine(model))
    model.module.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    engine = CpuEngine(model, threads=2)
    assert engine.activation_mode == "bf16"
    assert kl(expected, rows(engine)) < 0.005


@pytest.mark.parametrize("mode", ["fp32", "int8"])
def test_score_equals_step(any_tiny_model: LoadedModel, mode: Any) -> None:
    engine = CpuEngine(small(any_tiny_model), threads=2, activation_mode=mode)
    logits, _ = stepwise(engine, TEXT, 20)
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    stepped = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    chosen = stepped[np.arange(len(stepped)), TEXT[20:]]
    np.testing.assert_allclose(engine.score(TEXT)[19:], chosen, atol=1e-5)


def test_threads_change_nothing(tiny_model: LoadedModel) -> None:
    model = small(tiny_model)
    np.testing.assert_array_equal(rows(CpuEngine(model, threads=1)), rows(CpuEngine(model, threads=3)))


def test_a_batch_is_its_sequences(tiny_model: LoadedModel) -> None:
    engine = CpuEngine(small(tiny_model), threads=2)
    texts = [TEXT[:9], TEXT[9:40], TEXT[40:41]]
    alone, together = [engine.start() for _ in texts], [engine.start() for _ in texts]
    for text, a, b in zip(texts, alone, together, strict=True):
        np.testing.assert_array_equal(engine.prefill(a, text), engine.prefill(b, text))
    for token in (1, 2, 3):
        expected = np.concatenate([engine.step([a], [token + i]) for i, a in enumerate(alone)])
        found = engine.step(together, [token, token + 1, token + 2])
        np.testing.assert_array_equal(found, expected)


def test_no_later_token_changes_an_earlier_one(tiny_model: LoadedModel) -> None:
    engine = CpuEngine(small(tiny_model), threads=2)
    other = TEXT[:60] + [(t + 1) % 256 for t in TEXT[60:]]
    np.testing.assert_array_equal(rows(engine)[:60], rows(engine, other)[:60])


def test_the_embedded_model_agrees_over_256_tokens(embedded_model: LoadedModel) -> None:
    model = compress(embedded_model, Recipe.for_model(embedded_model, RtnConfig(bits=4)))
    text = embedded_model.encode("The north wind and the sun disputed which of them was the stronger. " * 20)[:256]
    expected = rows(open_engine(model, engine="reference"), text)
    exact = rows(CpuEngine(model, activation_mode="fp32"), text)
    np.testing.assert_allclose(exact, expected, atol=TOLERANCE * np.abs(expected).max())
    assert kl(exact, rows(CpuEngine(model), text)) <= 0.005


# Plan -----------------------------------------------------------------------------------------------------------------


def token_plan() -> Plan:
    return Plan(
        deciders=(
            Decider("cut", Tap("block_input", 1), NormLevels((7.0,), (0.0, 0.4)), Scope("token")),
            Decider("path", Tap("residual", 2), NormLevels((4.0,), (PATH_FULL, PATH_SKIP_MLP)), Scope("token")),
        ),
        consumers=(
            Consumer("cut", "input_threshold", "blocks.1.gate_up"),
            Consumer("path", "path", "blocks.2"),
        ),
    )


def every_plan() -> Plan:
    heads = np.random.default_rng(2).standard_normal((4, 48)).astype(np.float32)
    neurons = np.random.default_rng(1).standard_normal((96, 48)).astype(np.float32)
    tap = Tap("attention_output", 0)
    return Plan(
        deciders=(
            Decider("neurons", tap, ProjectionMask(neurons, keep=40), Scope("every", 4), default=1),
            Decider("heads", tap, ProjectionMask(heads, keep=2), Scope("every", 4), default=1),
        ),
        consumers=(Consumer("neurons", "neurons", "blocks.2"), Consumer("heads", "heads", "blocks.2")),
    )


def reply_plan() -> Plan:
    return Plan(
        deciders=(
            Decider("path", Tap("residual", 2), NormLevels((0.0,), (PATH_FULL, PATH_SKIP_BLOCK)), Scope("reply")),
            Decider("table", Tap("residual", 0), PositionTable((0, 30), (0.0, PATH_SKIP_ATTENTION)), Scope("token")),
        ),
        consumers=(Consumer("path", "path", "blocks.1"), Consumer("table", "path", "blocks.0")),
    )


PLANS = {"token": token_plan, "every": every_plan, "reply": reply_plan}


@pytest.mark.parametrize("scope", PLANS)
def test_deciders_and_consumers_act_as_in_the_reference(tiny_model: LoadedModel, scope: str) -> None:
    plan = PLANS[scope]()
    reference, engine = ReferenceEngine(tiny_model, plan), CpuEngine(tiny_model, plan, threads=2)
    expected, its_trace = stepwise(reference, TEXT[:60], 17)
    found, trace = stepwise(engine, TEXT[:60], 17)
    plain, _ = stepwise(CpuEngine(tiny_model, threads=2), TEXT[:60], 17)
    assert np.abs(found - plain).max() > 0.01  # the plan does something
    assert_same_decisions(trace.trace, its_trace.trace)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("scope", PLANS)
def test_score_decides_as_step_does(tiny_model: LoadedModel, scope: str) -> None:
    engine = CpuEngine(small(tiny_model), PLANS[scope](), threads=2)
    _, sequence = stepwise(engine, TEXT[:60], 17)
    trace: list[Any] = []
    engine.score(TEXT[:60], prompt_length=17, trace=trace)
    assert_same_decisions(sequence.trace, trace[:59])
    assert [s.read_bytes for s in sequence.trace] == [s.read_bytes for s in trace[:59]]
    assert len({s.read_bytes for s in trace}) > 1  # what was skipped was not read


def test_replay_and_policy_replace_decisions(tiny_model: LoadedModel) -> None:
    plan = every_plan()
    engine = CpuEngine(tiny_model, plan, threads=2)
    reference = ReferenceEngine(tiny_model, plan)
    _, recorded = stepwise(reference, TEXT[:40], 10)
    decisions = [s.decisions for s in recorded.trace]
    changed = [{**d, "heads": (1.0, 0.0, 0.0, 1.0)} for d in decisions]
    expected, _ = stepwise(reference, TEXT[:40], 10, replay=changed)
    found, sequence = stepwise(engine, TEXT[:40], 10, replay=changed)
    assert_same_decisions(sequence.trace, changed)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())
    engine.set_policy(Policy({"heads": 1.0, "neurons": 1.0}))
    plain, _ = stepwise(CpuEngine(tiny_model, threads=2), TEXT[:40], 10)
    np.testing.assert_allclose(stepwise(engine, TEXT[:40], 10)[0], plain, atol=1e-5)
    with pytest.raises(EngineError, match="no slot"):
        engine.set_policy(Policy({"head": 1.0}))


def width_decisions(widths: tuple[int, ...] = (3, 5, 8)) -> Plan:
    """A projection of what each part of the MLP reads, and levels that move several units at once."""
    random = np.random.default_rng(4)

    def projection(width: int, threshold: float) -> ProjectionLevels:
        matrix = random.integers(-127, 128, (5, width)).astype(np.int8)
        return ProjectionLevels((threshold,), (widths[0], widths[1]), matrix=matrix, steps=np.full(5, 0.01, np.float32))

    weights = random.standard_normal(48).astype(np.float32)
    return Plan(
        deciders=(
            Decider(
                "qkv",
                Tap("block_input", 0),
                NormLevels((6.6, 7.0), first=3),
                Scope("token"),
            ),
            Decider("gate_up", Tap("mlp_input", 1), projection(48, 9.0), Scope("token"), default=widths[0]),
            Decider("down", Tap("mlp_inner", 1), projection(96, 8), Scope("token"), default=widths[0]),
            Decider("level", Tap("residual", 1), LinearLevels((-2.0, 3.0), weights=weights, bias=0.3), Scope("token")),
        ),
        consumers=(
            Consumer("qkv", "width", "blocks.0.qkv", widths, widths),
            Consumer("gate_up", "width", "blocks.1.gate_up", widths),
            Consumer("down", "width", "blocks.1.down", widths),
            Consumer("level", "width", "blocks.1.o", widths, (3, 3, 8)),
            Consumer("level", "width", "blocks.2.qkv", widths, (8, 5, 3)),
        ),
    )


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_thresholds_change_at_the_next_token_of_running_sequences(tiny_model: LoadedModel, name: str) -> None:
    config = NestedConfig(widths=(3, 5, 8), group_size=16, fit="rounded")
    compressed = compress(tiny_model, Recipe.for_model(tiny_model, config))
    engine = open_engine(compressed, engine=name, plan=width_decisions())
    sequence = engine.start()
    engine.prefill(sequence, TEXT[:8])
    for low, level in ((-math.inf, 2.0), (math.inf, 0.0)):
        engine.set_policy(Policy(thresholds={"level": (low, low)}))
        engine.step([sequence], [TEXT[8]])
        assert sequence.trace[-1].decisions["level"] == level
    engine.set_policy(Policy())
    engine.step([sequence], [TEXT[9]])
    other = engine.start()
    engine.prefill(other, TEXT[:8] + [TEXT[8]] * 2 + [TEXT[9]])
    scores = [s.trace[-1].decisions["level"] for s in (sequence, other)]
    assert scores[0] == scores[1]  # the plan's thresholds again
    with pytest.raises(EngineError, match="has 2 thresholds"):
        engine.set_policy(Policy(thresholds={"level": (1.0,)}))
    with pytest.raises(EngineError, match="ascend"):
        engine.set_policy(Policy(thresholds={"level": (2.0, 1.0)}))


@pytest.mark.parametrize(
    "config",
    [
        NestedConfig(widths=(3, 5, 8), group_size=16, fit="rounded"),
        AnyPrecisionConfig(widths=(3, 5, 8), calibration_tokens=512),
    ],
    ids=lambda config: config.method,
)
def test_widths_chosen_per_token_act_as_in_the_reference(tiny_model: LoadedModel, config: MethodConfig) -> None:
    compressed = compress(tiny_model, Recipe.for_model(tiny_model, config))
    plan = width_decisions()
    reference = open_engine(compressed, engine="reference", plan=plan)
    engine = CpuEngine(compressed, plan, threads=2, activation_mode="fp32")
    expected, its_trace = stepwise(reference, TEXT[:60], 17)
    found, trace = stepwise(engine, TEXT[:60], 17)
    decisions = [s.decisions for s in trace.trace]
    for slot in plan.slots:
        assert len({d[slot] for d in decisions}) > 1, slot  # both ways were taken
    assert {d["level"] for d in decisions} == {0.0, 1.0, 2.0}
    assert decisions == [s.decisions for s in its_trace.trace]
    assert [d["qkv"] for d in decisions[:3]] == [2.0] * 3  # the first positions
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())
    read = np.array([s.read_bytes for s in trace.trace])
    # Bytes read are a sum over units: each slot's share of them is found by least squares, and grows with the width.
    chosen = np.array([[d[slot] for slot in plan.slots] + [1.0] for d in decisions])
    shares = dict(zip(plan.slots, np.linalg.lstsq(chosen, read, rcond=None)[0], strict=False))
    assert shares["gate_up"] > 0
    assert shares["down"] > 0
    assert shares["qkv"] > 0
    scored: list[Any] = []
    engine.score(TEXT[:60], prompt_length=17, trace=scored)
    assert [s.decisions for s in scored[:59]] == decisions


def test_a_level_that_is_not_there_is_an_error(tiny_model: LoadedModel) -> None:
    compressed = compress(
        tiny_model, Recipe.for_model(tiny_model, NestedConfig(widths=(3, 5, 8), group_size=16, fit="rounded"))
    )
    for open_it in (CpuEngine, lambda c, p: open_engine(c, engine="reference", plan=p)):
        engine = open_it(compressed, width_decisions())
        engine.set_policy(Policy({"level": 3.0}))
        with pytest.raises(EngineError, match="bits"):
            engine.score(TEXT[:20])
    plan = width_decisions()
    with pytest.raises(EngineError, match="not all among its widths"):
        Plan(plan.deciders, (Consumer("level", "width", "blocks.1.o", (3, 8), (3, 4)),)).check()


def test_transforms_act_in_order(tiny_model: LoadedModel) -> None:
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.standard_normal((48, 48)))[0].astype(np.float32)
    transforms = [
        InputTransform("scale", rng.uniform(0.5, 2, 48).astype(np.float32)),
        InputTransform("order", rng.permutation(48)),
        InputTransform("rotation", rotation),
    ]
    plan = Plan(transforms={"blocks.1.o": transforms, "blocks.2.q": transforms[:2]})
    expected = rows(ReferenceEngine(tiny_model, plan))
    found = rows(CpuEngine(tiny_model, plan, threads=2))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


def test_the_tap_sees_what_the_reference_sees(any_tiny_model: LoadedModel) -> None:
    def seen(engine: Any) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {}
        engine.set_tap(lambda site, _, values: found.setdefault(site, []).append(values.numpy().copy()))
        engine.score(TEXT[:30])
        engine.set_tap(None)
        return {site: np.concatenate(parts) for site, parts in found.items()}

    expected, found = seen(ReferenceEngine(any_tiny_model)), seen(CpuEngine(any_tiny_model, threads=2))
    assert set(found) == set(expected)
    for site in expected:
        np.testing.assert_allclose(found[site], expected[site], atol=1e-4 * np.abs(expected[site]).max(), err_msg=site)


# Running --------------------------------------------------------------------------------------------------------------


def test_greedy_and_sampled_replies_are_those_of_the_reference(tiny_model: LoadedModel) -> None:
    reference, engine = ReferenceEngine(tiny_model), CpuEngine(tiny_model, threads=2)
    for sampler in (Sampler(), Sampler(0.8), Sampler(0.8, top_k=5), Sampler(1.2, top_p=0.7), Sampler(1, 9, 0.9)):
        for seed in range(4):
            expected = reference.generate(reference.start(seed=seed), TEXT[:5], 30, sampler=sampler)
            assert engine.generate(engine.start(seed=seed), TEXT[:5], 30, sampler=sampler) == expected


def test_trace_accounts_for_the_step(tiny_model: LoadedModel) -> None:
    engine = CpuEngine(small(tiny_model), threads=2)
    sequence = engine.start()
    engine.generate(sequence, TEXT[:5], 20)
    step = sequence.trace[-1]
    assert [s.position for s in sequence.trace] == list(range(24))
    assert step.touched_bytes > step.read_bytes + engine.output_bytes  # and the cache
    assert 0 < sum(step.parts.values()) <= step.seconds * 1.01


def test_prompts_and_contexts_at_their_limits(tiny_model: LoadedModel) -> None:
    engine = CpuEngine(small(tiny_model), threads=2)
    with pytest.raises(InputError, match="empty"):
        engine.prefill(engine.start(), [])
    assert engine.generate(engine.start(), TEXT[:1], 3)
    with pytest.raises(InputError, match="context"):
        engine.prefill(engine.start(), [1] * 513)
    with pytest.raises(InputError, match="context"):
        engine.generate(engine.start(), [1] * 512, 4)
    sequence = engine.start()
    assert len(engine.generate(sequence, [1] * 500, 100)) == 12
    engine.step([sequence], [1])
    with pytest.raises(InputError, match="context"):
        engine.step([sequence], [1])
    with pytest.raises(EngineError, match="vocabulary"):
        engine.prefill(engine.start(), [320])
    twice = engine.start()
    engine.prefill(twice, [1])
    with pytest.raises(EngineError, match="once"):
        engine.step([twice, twice], [1, 2])


def test_damaged_weights_are_an_error_and_not_text(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model("llama")
    model.linear_module("blocks.1.up").weight.data[3, 4] = float("nan")
    engine = CpuEngine(model, threads=2)
    with pytest.raises(EngineError, match="NaN"):
        engine.generate(engine.start(), TEXT[:4], 4)


def test_cancel_between_steps(tiny_model: LoadedModel) -> None:
    engine, job = CpuEngine(small(tiny_model), threads=2), Job()
    seen: list[int] = []

    def stop(token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            job.cancel()

    with pytest.raises(Cancelled):
        engine.generate(engine.start(), TEXT[:4], 100, job=job, on_token=stop)
    assert len(seen) == 3
    assert len(engine.generate(engine.start(), TEXT[:4], 5)) == 5


def test_two_engines_in_two_threads(tiny_model: LoadedModel) -> None:
    model = small(tiny_model)
    expected = CpuEngine(model, threads=1).score(TEXT)
    found: list[np.ndarray] = []

    def work() -> None:
        engine = CpuEngine(model, threads=2)
        found.extend(engine.score(TEXT) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    for scores in found:
        np.testing.assert_array_equal(scores, expected)


def test_closed_engines_and_strangers_are_refused(tiny_model: LoadedModel) -> None:
    engine, other = CpuEngine(tiny_model, threads=1), CpuEngine(tiny_model, threads=1)
    with pytest.raises(EngineError, match="belongs"):
        engine.prefill(other.start(), [1])
    sequence = engine.start()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.prefill(sequence, [1])


# Opening --------------------------------------------------------------------------------------------------------------


def test_auto_is_cpu_where_it_runs_the_model(tiny_model: LoadedModel) -> None:
    assert why_not_cpu() is None
    assert choose_engine("auto") == "cpu"
    assert open_engine(small(tiny_model)).name == "cpu"
    tiny_model.module.config.attn_logit_softcapping = 30.0
    assert choose_engine("auto", tiny_model) == "reference"
    with pytest.raises(EngineError, match="soft cap"):
        open_engine(tiny_model, engine="cpu")
    with pytest.raises(EngineError, match="Did you mean"):
        choose_engine("cpuu")


def test_without_its_kernels_the_engine_says_so(monkeypatch: pytest.MonkeyPatch, tiny_model: LoadedModel) -> None:
    monkeypatch.setitem(sys.modules, "workbench.runtime._cpu", None)
    monkeypatch.delattr("workbench.runtime._cpu", raising=False)
    assert choose_engine("auto") == "reference"
    assert open_engine(tiny_model).name == "reference"
    with pytest.raises(EngineError, match="compiler"):
        open_engine(tiny_model, engine="cpu")


def test_weights_are_held_once(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model("llama")
    seen, expected = weakref.ref(model.module), CpuEngine(model, threads=1).score(TEXT)
    engine = CpuEngine(model, threads=1)
    del model
    gc.collect()
    assert seen() is None
    np.testing.assert_array_equal(engine.score(TEXT), expected)


def test_a_stored_model_runs_without_torch(tiny_model: LoadedModel, tmp_path: Path) -> None:
    model = small(tiny_model)
    folder = model.save(tmp_path / "small")
    expected = CpuEngine(model, threads=2).score(TEXT)
    code = (
        "import json, sys\n"
        "from workbench.runtime import open_engine\n"
        f"engine = open_engine({str(folder)!r}, engine='cpu', threads=2)\n"
        f"scores = engine.score({TEXT})\n"
        "assert engine.model.decode(engine.model.encode('abc')).endswith('abc')\n"
        "sys.stdout.write(json.dumps([scores.tolist(), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    scores, torch_there = json.loads(done.stdout)
    assert not torch_there
    np.testing.assert_array_equal(np.float32(scores), expected)
