"""Integer activations: the maths of groups, every scheme in both engines, causality, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.apply.compress import compress
from workbench.apply.config import MethodConfig
from workbench.apply.integer import IntegerConfig, smoothing_factors
from workbench.apply.recipe import Recipe
from workbench.apply.tender import (
    TenderConfig,
    channel_bias,
    chunk_starts,
    group_powers,
    order_by_power,
)
from workbench.errors import EngineError, IntegrityError, RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.encodings import Encoding, from_parts
from workbench.formats.hadamard import Rotation
from workbench.formats.paley import factors_of, hadamard
from workbench.measure.result import recipe_columns
from workbench.models import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.cpu import CpuEngine
from workbench.runtime.cpu_build import kernels
from workbench.runtime.plan import Consumer, Decider, NormLevels, Plan, Scope, Tap

TEXT = np.random.default_rng(7).integers(0, 256, 150).tolist()
SMALL: dict[str, Any] = {"calibration_tokens": 512}
METHODS: dict[str, MethodConfig] = {
    "tender": TenderConfig(**SMALL),
    "tender-4": TenderConfig(bits=4, activation_bits=4, groups=3, **SMALL),
    "tender-chunk": TenderConfig(scales="chunk", chunk_tokens=20, rounding="up", groups=4, **SMALL),
    "tender-down": TenderConfig(scales="chunk", chunk_tokens=20, rounding="down", **SMALL),
    "per-tensor": IntegerConfig(activations="per-tensor", **SMALL),
    "per-token": IntegerConfig(activations="per-token"),
    "per-channel": IntegerConfig(activations="per-channel", **SMALL),
    "smoothquant": IntegerConfig(activations="smoothquant", **SMALL),
    "plain-groups": IntegerConfig(activations="plain-groups", bits=4, activation_bits=4, group_size=16),
    "requantize": IntegerConfig(activations="requantize", **SMALL),
    "requantize-chunk": IntegerConfig(activations="requantize", scales="chunk", **SMALL),
    "rotation": IntegerConfig(activations="rotation"),
    "rotation-4": IntegerConfig(activations="rotation", bits=4, activation_bits=4),
}
SIMULATED = {"per-channel"}
STATIC = {"per-tensor", "per-channel", "tender-chunk", "tender-down", "requantize-chunk"}


def four_bits(name: str) -> bool:
    return METHODS[name].activation_bits == 4  # type: ignore[attr-defined]


def made(model: LoadedModel, method: MethodConfig) -> CompressedModel:
    return compress(model, Recipe.for_model(model, method))


_MADE: dict[str, CompressedModel] = {}


@pytest.fixture
def models(tiny_model: LoadedModel) -> Callable[[str], CompressedModel]:
    def get(name: str) -> CompressedModel:
        if name not in _MADE:
            _MADE[name] = made(tiny_model, METHODS[name])
        return _MADE[name]

    return get


def rows(engine: Any, text: list[int] = TEXT, chunk: int = 64) -> np.ndarray:
    return np.concatenate([found for _, found in engine.log_probabilities(text, chunk=chunk)])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q)).sum(axis=1).mean())


# The maths ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40),
    st.integers(1, 12),
)
@settings(deadline=None)
def test_a_channels_group_is_the_smallest_scale_that_holds_it(values: list[float], groups: int) -> None:
    magnitude = torch.tensor(values)
    powers = group_powers(magnitude, groups)
    assert int(powers.min()) == 0
    assert int(powers.max()) < groups
    step = float(magnitude.max()) / 2.0 ** int(powers.max())  # of power 0
    held = step * torch.exp2(powers.double())
    assert bool((magnitude.double() <= held * (1 + 1e-6)).all())
    above = powers > 0
    assert bool((magnitude.double()[above] > held[above] / 2 * (1 - 1e-6)).all())


def test_order_runs_from_the_largest_scale_to_the_smallest() -> None:
    order, channels, powers = order_by_power(torch.tensor([0, 5, 0, 2, 5]))
    assert order.tolist() == [1, 4, 3, 0, 2]
    assert (channels, powers) == ((2, 1, 2), (5, 2, 0))


def test_chunks_begin_with_the_first_position_alone() -> None:
    assert chunk_starts(256, 600) == (0, 1, 256, 512)
    assert chunk_starts(256, 1) == (0,)
    assert chunk_starts(1, 3) == (0, 1, 2)


def test_bias_is_the_middle_of_the_range() -> None:
    low, high = torch.tensor([[-9.0, 0], [-1, 2], [-3, 2]]), torch.tensor([[9.0, 0], [1, 4], [1, 6]])
    assert channel_bias(low, high).tolist() == [-1.0, 4.0]


@pytest.mark.parametrize("order", [2, 12, 20, 28, 36])
def test_hadamard_matrices_are(order: int) -> None:
    h = hadamard(order)
    assert set(np.unique(h)) == {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("width", [576, 1536, 4096, 14336, 11008, 896, 48, 100, 7])
def test_rotations_keep_lengths_and_come_back(width: int) -> None:
    rotation, x = Rotation.random(width, 1), torch.randn(4, width)
    assert width % int(np.prod(factors_of(width), initial=1)) == 0
    torch.testing.assert_close(rotation(x).norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, atol=1e-5, rtol=1e-5)


def test_smoothing_at_the_ends_moves_all_or_nothing() -> None:
    x, w = torch.tensor([4.0, 1.0]), torch.tensor([0.5, 2.0])
    assert smoothing_factors(x, w, 1.0).tolist() == [4.0, 1.0]
    torch.testing.assert_close(smoothing_factors(x, w, 0.0), 1 / w)


# Engines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_stays_near_the_dense_model(
    models: Callable[[str], CompressedModel], tiny_model: LoadedModel, name: str
) -> None:
    dense = rows(open_engine(tiny_model, engine="reference"))
    found = rows(open_engine(models(name), engine="reference"))
    limit = 0.4 if four_bits(name) else 0.3 if name in STATIC else 0.002  # random text goes beyond a little calibration
    assert kl(dense, found) < limit


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SIMULATED])
@pytest.mark.parametrize("isa", kernels().isas())
def test_engines_agree(models: Callable[[str], CompressedModel], name: str, isa: str) -> None:
    """With fp32 cache and attention nothing differs but the order of additions ahead of the rounding.

    A value next to a rounding boundary may then fall on either side of it, a whole step of a 4-bit code here and there.
    That products of equal inputs are equal bit for bit is what the kernels' tests say.
    """
    expected = rows(open_engine(models(name), engine="reference"))
    engine = CpuEngine(models(name), threads=2, activation_mode="fp32", isa=isa)
    found = rows(engine)
    assert kl(expected, found) < (0.05 if four_bits(name) else 2e-4)
    assert np.median(np.abs(found - expected)) < (0.2 if four_bits(name) else 0.005)


@pytest.mark.parametrize("name", ["tender", "tender-chunk", "requantize", "rotation"])
def test_steps_prefill_and_score_agree_in_the_cpu_engine(models: Callable[[str], CompressedModel], name: str) -> None:
    engine = CpuEngine(models(name), threads=2)
    assert engine.activation_mode == "int8"
    expected = rows(engine)
    sequence = engine.start()
    logits = [engine.prefill(sequence, TEXT[:40])] + [engine.step([sequence], [t])[0] for t in TEXT[40:60]]
    found = np.stack(logits) - np.stack([np.logaddexp.reduce(row.astype(np.float64)) for row in logits])[:, None]
    np.testing.assert_allclose(found, expected[39:60], atol=1e-4)


def test_runs_in_every_family(make_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Fused matrices, biases, ungated MLPs; from memory and from disk, with and without torch."""
    for family in ("qwen2", "phi3", "opt", "gemma3_text"):
        model = made(make_model(family), TenderConfig(scales="chunk", rounding="up", bias="norms", **SMALL))
        expected = rows(open_engine(model, engine="reference"))
        found = rows(CpuEngine(model, threads=1, activation_mode="fp32"))
        assert kl(expected, found) < 1e-5
        folder = model.save(tmp_path / family)
        np.testing.assert_array_equal(rows(CpuEngine(folder, threads=1, activation_mode="fp32")), found)
        np.testing.assert_array_equal(rows(open_engine(CompressedModel.load(folder), engine="reference")), expected)


def test_simulated_runs_in_the_reference_engine_alone(models: Callable[[str], CompressedModel]) -> None:
    model = models("per-channel")
    assert model.engines == ("reference",)
    assert open_engine(model).name == "reference"
    with pytest.raises(EngineError, match="reference"):
        open_engine(model, engine="cpu")


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_traces_count_what_calibration_did_not_see(tiny_model: LoadedModel, engine: str) -> None:
    config = TenderConfig(scales="chunk", chunk_tokens=20, rounding="up", bias="none", **SMALL)
    model = made(tiny_model, config)
    running = open_engine(model, engine=engine)
    trace: list[Any] = []
    running.score(TEXT, trace=trace)
    assert len(trace) == len(TEXT)
    assert all(step.beyond >= step.clamped >= 0 for step in trace)
    assert sum(step.beyond for step in trace) > 0
    both: list[Any] = []
    open_engine(model, engine="reference").score(TEXT, trace=both)
    np.testing.assert_allclose([s.beyond for s in trace], [s.beyond for s in both], atol=2)
    sequence = running.start()
    running.prefill(sequence, TEXT[:30])
    running.step([sequence], [TEXT[30]])
    np.testing.assert_allclose([s.beyond for s in sequence.trace], [s.beyond for s in both[:31]], atol=2)
    quiet: list[Any] = []
    open_engine(made(tiny_model, METHODS["per-token"]), engine=engine).score(TEXT, trace=quiet)
    assert not any(step.clamped or step.beyond for step in quiet)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_later_text_changes_no_earlier_output(models: Callable[[str], CompressedModel], name: str, engine: str) -> None:
    if engine == "cpu" and name in SIMULATED:
        pytest.skip("simulated")
    running = open_engine(models(name), engine=engine)
    other = TEXT[:75] + np.random.default_rng(8).integers(0, 256, 75).tolist()
    first, second = rows(running)[:75], rows(running, other)[:75]
    if engine == "cpu":
        np.testing.assert_array_equal(first, second)
    else:  # products of other shapes may add up in another order
        assert kl(first, second) < 1e-6
    short = rows(running, TEXT[:75])
    assert kl(first, short) < 1e-6


def test_widths_of_integer_linears_cannot_be_chosen(models: Callable[[str], CompressedModel]) -> None:
    decider = Decider("w", Tap("residual", 0), NormLevels((1.0,), (8.0, 8.0)), Scope("token"), 8.0)
    plan = Plan((decider,), (Consumer("w", "width", "blocks.0.qkv", widths=(8,)),))
    with pytest.raises(EngineError, match="one width"):
        open_engine(models("tender"), engine="reference", plan=plan)


# On disk and in rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_disk_and_back_is_exact(models: Callable[[str], CompressedModel], name: str, tmp_path: Path) -> None:
    model = models(name)
    again = CompressedModel.load(model.save(tmp_path / "m"))
    assert again.sha256 == model.sha256
    assert again.effective_bits == model.effective_bits
    for linear, encoding in model.linears.items():
        assert again.linears[linear].meta() == encoding.meta()
        torch.testing.assert_close(again.linears[linear].dequantize(), encoding.dequantize(), rtol=0, atol=0)
        assert encoding.stored_bits == 8 * sum(t.numel() * t.element_size() for t in encoding.tensors().values())


def test_dequantized_weights_are_those_of_the_dense_model(
    models: Callable[[str], CompressedModel], tiny_model: LoadedModel
) -> None:
    weight = tiny_model.linear_module("blocks.1.down").weight
    for name in ("tender", "smoothquant", "rotation", "per-channel"):
        found = models(name).linears["blocks.1.down"].dequantize()
        assert float((found - weight).norm() / weight.norm()) < 0.02


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": [1, 2]},
        {"powers": [0, 1]},
        {"accumulate": "sum"},
        {"accumulate": "simulated"},
        {"activation_bits": 5},
        {"clip": 0.0},
        {"starts": [1, 2]},
        {"order": False},
        {"factors": [3]},
        {"limit": -1.0},
    ],
)
def test_damaged_metadata_is_refused(models: Callable[[str], CompressedModel], changes: dict[str, Any]) -> None:
    encoding = _ordered(models("tender-chunk"))
    with pytest.raises(IntegrityError):
        from_parts(encoding.kind, {**encoding.meta(), **changes}, encoding.tensors())


def _ordered(model: CompressedModel) -> Encoding:
    """A linear whose channels fell into several groups, so that their order is stored."""
    return next(encoding for encoding in model.linears.values() if "order" in encoding.tensors())


def test_a_damaged_order_is_refused(models: Callable[[str], CompressedModel]) -> None:
    encoding = _ordered(models("tender-chunk"))
    tensors = encoding.tensors()
    tensors["order"] = torch.zeros_like(tensors["order"])
    with pytest.raises(IntegrityError, match="each once"):
        from_parts(encoding.kind, encoding.meta(), tensors)


def test_rows_name_the_activations() -> None:
    columns = recipe_columns(Recipe(model="m", methods=(METHODS["rotation-4"],)))
    assert (columns["method"], columns["bits"], columns["activation_bits"]) == ("rotation", 4, 4)
    columns = recipe_columns(Recipe(model="m", methods=(METHODS["tender"],)))
    assert (columns["method"], columns["activation_bits"]) == ("tender", 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "integer", "activations": "per-tokens"}, "per-token"),
        ({"method": "integer"}, "activations"),
        ({"method": "integer", "activations": "per-token", "bits": 5}, "bits"),
        ({"method": "tender", "activation_bits": 16}, "activation_bits"),
        ({"method": "tender", "groups": 0}, "groups"),
        ({"method": "tender", "groups": 13}, "groups"),
        ({"method": "tender", "scales": "row"}, "scales"),
        ({"method": "integer", "activations": "rotation", "clip": 0}, "clip"),
    ],
)
def test_configs_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.model_validate({"model": "m", "methods": [values]})
