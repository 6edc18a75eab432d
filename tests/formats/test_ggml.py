"""GGUF codes kept as they are, and nested codes, stand for exactly what their definitions say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from workbench.apply.compress import compress
from workbench.apply.gguf import GgufConfig, encoding
from workbench.apply.nested import NestedConfig
from workbench.apply.nested_fit import round_matrix
from workbench.apply.recipe import Recipe
from workbench.errors import EngineError, RecipeError
from workbench.formats.codes import pack
from workbench.formats.encodings import from_parts
from workbench.formats.nested import Nested
from workbench.formats.rebuild import to_model
from workbench.models import LoadedModel
from workbench.models.gguf_codes import CODED, split_blocks
from workbench.runtime.cpu import CpuEngine
from workbench.runtime.cpu_build import kernels
from workbench.runtime.plan import Policy, width_plan
from workbench.runtime.reference import ReferenceEngine
from workbench.runtime.weights import CompressedWeights


def random_blocks(kind: Kind, rows: int = 5, width: int = 512) -> np.ndarray:
    """Random bytes with scales of a sensible size: every code and every packed scale occurs."""
    rng = np.random.default_rng(int(kind))
    weights, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, width // weights, size), dtype=np.uint8)
    halves = [208] if kind == Kind.Q6_K else [0, 2] if kind in (Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K) else [0]
    for at in halves:
        values = rng.uniform(-0.1, 0.1, (rows, width // weights, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = values.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
def test_codes_are_those_that_gguf_dequantizes(kind: Kind) -> None:
    raw = random_blocks(kind)
    expected = quants.dequantize(raw, kind)
    stored = encoding(split_blocks(raw, kind))
    np.testing.assert_allclose(stored.dequantize().numpy(), expected, rtol=2e-6, atol=1e-7)
    again = from_parts(stored.kind, stored.meta(), stored.tensors())
    assert torch.equal(again.dequantize(), stored.dequantize())
    # No more than the file's own bytes, but for the two bits by which 6-bit scales are widened to a byte.
    assert stored.stored_bits <= 8 * raw.size * (1.03 if kind in (Kind.Q4_K, Kind.Q5_K) else 1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("isa", kernels().isas())
def test_kernels_take_float_scales_and_minima_of_small_groups(isa: str, exact: bool) -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 64, (20, 96)).astype(np.uint8)
    scales, minima = rng.uniform(-1, 1, (2, 20, 6)).astype(np.float32)
    x = rng.standard_normal((3, 96)).astype(np.float32)
    packed = pack(torch.from_numpy(codes), 6).numpy()
    for low in (minima, None):
        shifted = codes.astype(np.float64) - (0 if low is not None else 32)
        weights = shifted * np.repeat(scales, 16, axis=1) + (np.repeat(low, 16, axis=1) if low is not None else 0)
        found = kernels().group_product(packed, 96, 6, 16, None, scales, None, None, low, False, [], x, 0, exact, isa)
        np.testing.assert_allclose(found, x @ weights.T, atol=(1e-5 if exact else 0.02) * np.abs(x @ weights.T).max())


def test_the_embedded_file_is_kept_bit_for_bit(embedded_model: LoadedModel) -> None:
    model = compress(embedded_model, Recipe.for_model(embedded_model, GgufConfig()))
    for linear in embedded_model.architecture.linears:
        weight = embedded_model.linear_module(linear.id).weight
        torch.testing.assert_close(model.linears[linear.id].dequantize(), weight, rtol=1e-6, atol=1e-8)
    assert model.effective_bits == 5.0  # 4-bit codes, an fp16 scale and minimum per 32
    text = embedded_model.encode("It is a truth universally acknowledged, that a single man " * 8)[:128]
    dense, stored = CpuEngine(embedded_model), CpuEngine(model)
    difference = 0.0
    for (_, p), (_, q) in zip(dense.log_probabilities(text), stored.log_probabilities(text), strict=True):
        difference += float((np.exp(p.astype(np.float64)) * (p - q)).sum())
    assert difference / len(text) <= 0.005


def test_a_model_that_was_no_gguf_file_has_no_codes_to_keep(tiny_model: LoadedModel) -> None:
    with pytest.raises(RecipeError, match="GGUF"):
        compress(tiny_model, Recipe.for_model(tiny_model, GgufConfig()))


def test_nested_widths_narrow_down_on_the_weights() -> None:
    weight = torch.randn(40, 130, generator=torch.Generator().manual_seed(1))
    nested = Nested.of(round_matrix(weight, (2, 3, 4, 5, 6, 7, 8), 64))
    errors = [float((nested.dequantize(bits) - weight).square().mean()) for bits in nested.widths]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(nested.dequantize(), nested.dequantize(8))
    biases = [float((nested.dequantize(bits) - weight).mean().abs()) for bits in (3, 4, 5)]
    assert max(biases) < 0.02
    reads = [nested.read_bits(bits) for bits in nested.widths]
    assert [b - a for a, b in itertools.pairwise(reads)] == pytest.approx([40 * 130] * 6, rel=0.05)
    with pytest.raises(EngineError, match="may be read at 2, 3"):
        nested.dequantize(9)
    again = from_parts("nested", nested.meta(), nested.tensors())
    assert torch.equal(again.dequantize(3), nested.dequantize(3))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_one_nested_model_runs_at_every_width(tiny_model: LoadedModel, bits: int) -> None:
    config = NestedConfig(widths=(2, 3, 4, 5, 6, 8), group_size=16, fit="rounded")
    model = compress(tiny_model, Recipe.for_model(tiny_model, config))
    plan = width_plan(model.architecture, (2, 3, 4, 5, 6, 8), 8)
    text = list(range(60))
    reference = ReferenceEngine(to_model(model), plan, CompressedWeights(model))
    engines = {mode: CpuEngine(model, plan, threads=2, activation_mode=mode) for mode in ("fp32", "int8")}
    for engine in (reference, *engines.values()):
        engine.set_policy(Policy({"width": bits}))
    expected = reference.score(text)
    np.testing.assert_allclose(engines["fp32"].score(text), expected, atol=2e-4)
    trace: list = []
    engines["int8"].score(text, trace=trace)
    assert {step.decisions["width"] for step in trace} == {float(bits)}
    planes = trace[0].read_bytes
    engines["int8"].set_policy(Policy({"width": 8}))
    whole: list = []
    engines["int8"].score(text, trace=whole)
    assert planes == whole[0].read_bytes if bits == 8 else planes < whole[0].read_bytes
    engines["int8"].set_policy(Policy({"width": 7}))
    with pytest.raises(EngineError, match="does not offer"):
        engines["int8"].score(text)
