"""Inputs left out by thresholds in the cpu engine, where weights lie input by input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.errors import EngineError
from workbench.formats.compressed import CompressedModel
from workbench.models import LoadedModel
from workbench.runtime import cpu_columns, open_engine
from workbench.runtime.cpu import CpuEngine
from workbench.runtime.cpu_build import kernels
from workbench.runtime.plan import (
    PATH_FULL,
    PATH_SKIP_ATTENTION,
    Consumer,
    Decider,
    Plan,
    Policy,
    PositionTable,
    ProjectionMask,
    Scope,
    Tap,
    Threshold,
)
from workbench.runtime.reference import ReferenceEngine

TEXT = np.random.default_rng(7).integers(0, 256, 150).tolist()
FAMILIES = ("llama", "qwen2", "gemma3_text", "phi3", "opt")
LIMITS = {"qkv": 0.5, "o": 0.02, "gate_up": 0.5, "down": 0.002}


def small(model: LoadedModel, bits: int = 4, **options: Any) -> CompressedModel:
    return compress(model, Recipe.for_model(model, RtnConfig(bits=bits, group_size=16, **options)))


def in_bf16(model: LoadedModel) -> LoadedModel:
    model.module.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    return model


def limits(model: LoadedModel, *, factors: bool = False, scale: float = 1.0) -> Plan:
    """A threshold for every unit, the first two tokens whole."""
    generator = np.random.default_rng(5)
    deciders, consumers = [], []
    for unit in model.architecture.units:
        slot = f"{unit.id}.limit"
        program = Threshold(thresholds=(scale * LIMITS[unit.kind],), first=2)
        deciders.append(Decider(slot, Tap("residual", unit.block), program, Scope("token")))
        of = generator.uniform(0.5, 2, unit.linears[0].in_features).astype(np.float32) if factors else None
        consumers.append(Consumer(slot, "input_threshold", unit.id, factors=of))
    return Plan(tuple(deciders), tuple(consumers))


def rows(engine: Any, text: list[int] = TEXT) -> np.ndarray:
    return np.concatenate([found for _, found in engine.log_probabilities(text, chunk=64)])


def steps(engine: CpuEngine, text: list[int], prompt: int) -> tuple[np.ndarray, Any]:
    sequence = engine.start()
    logits = [engine.prefill(sequence, text[:prompt])]
    logits += [engine.step([sequence], [token])[0] for token in text[prompt:-1]]
    return np.stack(logits), sequence


def kept(engine: Any) -> float:
    trace: list[Any] = []
    engine.score(TEXT, trace=trace)
    return float(np.mean([step.kept_weights for step in trace[2:]]))


def agrees_but_for_the_edge(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the few tokens where an input beside its threshold fell to the other side."""
    off = np.abs(found - expected).max(axis=1)
    assert np.mean(off <= 1e-4 * np.abs(expected).max()) > 0.8
    assert np.median(off) <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factors", [False, True])
def test_codes_agree_with_the_reference(make_model: Callable[..., LoadedModel], family: str, factors: bool) -> None:
    model = make_model(family)
    codes, plan = small(model), limits(model, factors=factors)
    reference = open_engine(codes, engine="reference", plan=plan)
    assert 0.2 < kept(reference) < 0.9
    engine = CpuEngine(codes, plan, columns=True, threads=2, activation_mode="fp32")
    agrees_but_for_the_edge(rows(engine), rows(reference))
    assert kept(engine) == pytest.approx(kept(reference), abs=1e-3)


@pytest.mark.parametrize("isa", kernels().isas())
def test_bf16_weights_agree_with_the_reference(make_model: Callable[..., LoadedModel], isa: str) -> None:
    model = in_bf16(make_model("llama"))
    plan = limits(model)
    engine = CpuEngine(model, plan, columns=True, threads=2, isa=isa, activation_mode="fp32")
    widened = make_model("llama")
    for parameter in widened.module.parameters():  # not its table of positions
        parameter.data = parameter.data.bfloat16().float()
    agrees_but_for_the_edge(rows(engine), rows(ReferenceEngine(widened, plan)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("isa", kernels().isas())
def test_int8_activations_stay_close_to_fp32(tiny_model: LoadedModel, isa: str, symmetric: bool) -> None:
    codes, plan = small(tiny_model, symmetric=symmetric), limits(tiny_model)
    exact = rows(CpuEngine(codes, plan, columns=True, activation_mode="fp32", threads=1)).astype(np.float64)
    whole = rows(CpuEngine(codes, activation_mode="fp32", threads=1))
    found = rows(CpuEngine(codes, plan, columns=True, threads=2, isa=isa))

    def kl(q: np.ndarray) -> float:
        return float((np.exp(exact) * (exact - q)).sum(axis=1).mean())

    assert kl(found) < 0.1 * kl(whole)


@pytest.mark.parametrize("stored", ["codes", "bf16"])
@pytest.mark.parametrize("mode", [None, "fp32"])
def test_score_batch_and_threads_compute_what_a_step_does(
    make_model: Callable[..., LoadedModel], stored: str, mode: Any
) -> None:
    model = make_model("llama")
    target: Any = in_bf16(model) if stored == "bf16" else small(model)
    plan = limits(model, factors=True)
    engine = CpuEngine(target, plan, columns=True, threads=2, activation_mode=mode)
    logits, sequence = steps(engine, TEXT, 20)
    for threads in (1, 3):
        other = CpuEngine(target, plan, columns=True, threads=threads, activation_mode=mode)
        np.testing.assert_array_equal(steps(other, TEXT, 20)[0], logits)
    exact = logits.astype(np.float64)
    stepped = exact - np.log(np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    stepped -= exact.max(axis=1, keepdims=True)
    trace: list[Any] = []
    scored = engine.score(TEXT, prompt_length=20, trace=trace)
    np.testing.assert_allclose(scored[19:], stepped[np.arange(len(stepped)), TEXT[20:]], atol=1e-5)
    assert [s.read_bytes for s in trace[20:-1]] == [s.read_bytes for s in sequence.trace[20:]]
    alone, together = [engine.start() for _ in range(7)], [engine.start() for _ in range(7)]
    for i, (a, b) in enumerate(zip(alone, together, strict=True)):
        np.testing.assert_array_equal(engine.prefill(a, TEXT[i : 3 * i + 3]), engine.prefill(b, TEXT[i : 3 * i + 3]))
    expected = np.concatenate([engine.step([a], [i]) for i, a in enumerate(alone)])
    np.testing.assert_array_equal(engine.step(together, list(range(7))), expected)


@pytest.mark.parametrize("columns", [True, False])
def test_several_sequences_use_what_any_of_them_does(tiny_model: LoadedModel, columns: bool) -> None:
    engine = CpuEngine(small(tiny_model), limits(tiny_model), columns=columns, threads=2)

    def together(texts: list[list[int]]) -> tuple[list[Any], float]:
        sequences = [engine.start() for _ in texts]
        for sequence, text in zip(sequences, texts, strict=True):
            if text[:-1]:
                engine.prefill(sequence, text[:-1])
        engine.step(sequences, [text[-1] for text in texts])
        traces = [sequence.trace[-1] for sequence in sequences]
        assert len({step.pass_weights for step in traces}) == 1
        return traces, traces[0].pass_weights

    one, used = together([TEXT[:12]])
    assert used == one[0].kept_weights < 0.9
    alike, same = together([TEXT[:12]] * 3)
    assert same == pytest.approx(used)
    unlike, more = together([TEXT[:12], TEXT[30:42], TEXT[60:72]])
    kept = [step.kept_weights for step in unlike]
    assert max(kept) < more < min(1, sum(kept))
    assert more == pytest.approx(
        1 - np.prod([1 - k for k in kept]), abs=0.15
    )  # inputs of unlike texts are about independent
    if columns:  # tiles are left out by whole blocks alone
        assert alike[0].touched_bytes < unlike[0].touched_bytes
    _, whole = together([TEXT[:12], TEXT[:1]])  # a first token leaves out nothing
    assert whole == pytest.approx(1, abs=0.01)


def test_no_later_token_changes_an_earlier_one(tiny_model: LoadedModel) -> None:
    engine = CpuEngine(small(tiny_model), limits(tiny_model), columns=True, threads=2)
    other = TEXT[:60] + [(t + 1) % 256 for t in TEXT[60:]]
    np.testing.assert_array_equal(rows(engine)[:60], rows(engine, other)[:60])


def test_what_is_read_falls_with_what_is_left_out(tiny_model: LoadedModel) -> None:
    codes, plan = small(tiny_model), limits(tiny_model)
    engine = CpuEngine(codes, plan, columns=True, threads=2)
    read, used = [], []
    for scale in (0.0, 0.5, 1.0, 2.0, 1e6):
        engine.set_policy(Policy(thresholds={d.slot: [scale * d.program.thresholds[0]] for d in plan.deciders}))
        sequence = engine.start()
        engine.prefill(sequence, TEXT)
        read.append(np.mean([s.read_bytes for s in sequence.trace[2:]]))
        used.append(np.mean([s.kept_weights for s in sequence.trace[2:]]))
    assert read == sorted(read, reverse=True)
    assert used == sorted(used, reverse=True)
    assert used[0] == pytest.approx(1, abs=0.01)
    assert used[-1] == 0
    assert read[-1] < 0.02 * read[0]


def test_other_decisions_act_beside_thresholds(tiny_model: LoadedModel) -> None:
    base = limits(tiny_model)
    tap = Tap("attention_output", 0)
    heads = np.random.default_rng(2).standard_normal((4, 48)).astype(np.float32)
    neurons = np.random.default_rng(1).standard_normal((96, 48)).astype(np.float32)
    path = PositionTable((0, 30, 60), (float(PATH_FULL), float(PATH_SKIP_ATTENTION), float(PATH_FULL)))
    plan = Plan(
        (
            *base.deciders,
            Decider("heads", tap, ProjectionMask(heads, keep=2), Scope("token"), default=1),
            Decider("neurons", tap, ProjectionMask(neurons, keep=40), Scope("token"), default=1),
            Decider("path", Tap("residual", 0), path, Scope("token")),
        ),
        (
            *base.consumers,
            Consumer("heads", "heads", "blocks.2"),
            Consumer("neurons", "neurons", "blocks.2"),
            Consumer("path", "path", "blocks.1"),
        ),
    )
    codes = small(tiny_model)
    engine = CpuEngine(codes, plan, columns=True, threads=2, activation_mode="fp32")
    agrees_but_for_the_edge(rows(engine), rows(open_engine(codes, engine="reference", plan=plan)))
    logits, _ = steps(engine, TEXT, 20)
    stepped = torch.from_numpy(logits).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(rows(engine)[19:-1], stepped, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_other_layouts_leave_out_the_same_inputs(tiny_model: LoadedModel, bits: int) -> None:
    codes, plan = small(tiny_model, bits), limits(tiny_model, factors=True)
    expected = rows(open_engine(codes, engine="reference", plan=plan))
    for options in ({"columns": False}, {"planes": True}):
        engine = CpuEngine(codes, plan, threads=2, activation_mode="fp32", **options)
        agrees_but_for_the_edge(rows(engine), expected)


def test_columns_are_taken_where_the_expected_share_makes_them_pay(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, plan = small(tiny_model), limits(tiny_model)
    monkeypatch.setattr(cpu_columns, "_BREAK_EVEN", {4: ((1, 0.5),), 16: ()})
    tiles, laid_out = (rows(CpuEngine(codes, plan, columns=always, threads=2)) for always in (False, True))
    assert (tiles != laid_out).any()  # other blocks of activations are rounded
    for expected, as_if in ((None, tiles), (1.0, tiles), (0.51, tiles), (0.5, laid_out), (0.0, laid_out)):
        told = Plan(plan.deciders, tuple(replace(c, expected=expected) for c in plan.consumers))
        np.testing.assert_array_equal(rows(CpuEngine(codes, told, threads=2)), as_if)
        np.testing.assert_array_equal(rows(CpuEngine(codes, told, columns=False, threads=2)), tiles)
        np.testing.assert_array_equal(rows(CpuEngine(codes, told, columns=True, threads=2)), laid_out)


@pytest.mark.parametrize("bits", [4, 16])
def test_what_pays_goes_on_paying_with_more_left_out_and_longer_runs(bits: int) -> None:
    shares, runs = np.linspace(0, 1, 21), (64, 300, 400, 600, 1200, 3000)
    found = np.array([[cpu_columns.pays(run, bits, share) for share in shares] for run in runs])
    assert (np.diff(found.astype(int), axis=0) >= 0).all()
    assert (np.diff(found.astype(int), axis=1) >= 0).all()
    assert not found[:, 0].any()
    assert found[-1, -1]


def test_weights_are_held_once(tiny_model: LoadedModel) -> None:
    codes = small(tiny_model)
    laid_out = CpuEngine(codes, limits(tiny_model), columns=True, threads=1).weight_bytes
    assert (
        laid_out < 1.5 * CpuEngine(codes, threads=1).weight_bytes
    )  # granules of 32 outputs are padded in a model so small


def test_factors_that_do_not_fit_are_refused(tiny_model: LoadedModel) -> None:
    plan = limits(tiny_model)
    bad = Consumer(plan.consumers[0].slot, "input_threshold", "blocks.0.qkv", factors=np.ones(3, np.float32))
    with pytest.raises(EngineError):
        open_engine(small(tiny_model), engine="cpu", plan=Plan(plan.deciders[:1], (bad,)))
