"""AWQ: scaling changes no function, the search finds no worse than what it starts from, and recipes are repeatable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.apply.awq import AwqConfig
from workbench.apply.awq_judge import ModuleJudges
from workbench.apply.awq_search import (
    CLIP_LEAST,
    Matrix,
    Options,
    clip_shares,
    group_moments,
    input_scales,
    make_grid,
    search_unit,
    weight_magnitude,
)
from workbench.apply.calibration import calibration_windows
from workbench.apply.compress import compress
from workbench.apply.folding import Folded, find_fold
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.salient import SalientConfig, top_channels
from workbench.errors import Cancelled, EngineError, IntegrityError, RecipeError
from workbench.formats.codes import dequantize, quantize_groups
from workbench.formats.compressed import CompressedModel
from workbench.formats.encodings import Groups, from_parts
from workbench.formats.rebuild import to_model
from workbench.formats.salient import Salient
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt"]
SMALL: dict[str, Any] = {"bits": 3, "group_size": 16, "calibration_tokens": 512}
OPTIONS = Options(group_size=16, symmetric=False, alpha_steps=20, weight_factor=False, clip=True, joint=False)


def uneven(n: int, rows: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix (rows, n), and moment (n, n) and mean magnitude (n,) of inputs of which a few are large."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, n, generator=generator) * torch.randn(n, generator=generator).mul(1.5).exp()
    return torch.randn(rows, n, generator=generator) * 0.05, inputs.T @ inputs / 400, inputs.abs().mean(0)


def made(model: LoadedModel, *after: Any, **changes: Any) -> CompressedModel:
    return compress(model, Recipe.for_model(model, AwqConfig(**SMALL | changes), *after))


def loss(weight: torch.Tensor, changed: torch.Tensor, moment: torch.Tensor) -> float:
    error = changed - weight
    return float(((error @ moment) * error).sum())


# Folding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_the_function_as_it_is(family: str, make_model: Callable[..., LoadedModel]) -> None:
    model = make_model(family)
    model.module.double()
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        before = model.module(input_ids=ids).logits
    folded, generator = Folded(), torch.Generator().manual_seed(1)
    for unit in model.architecture.units:
        fold = find_fold(model.architecture, unit)
        assert fold is not None or family == "gemma3_text"
        if fold is not None:
            scales = torch.randn(unit.linears[0].in_features, generator=generator, dtype=torch.float64).exp()
            folded.scale(model, unit, fold.tie(scales))
    state = model.module.state_dict()
    with torch.no_grad():
        for linear in model.architecture.linears:
            weight = state[f"{linear.path}.weight"]
            changed = folded.weight(linear, weight)
            assert (changed - weight).abs().max() > 1e-3
            weight.copy_(changed)
        for name, vector in folded.vectors.items():
            state[name].copy_(vector)
        after = model.module(input_ids=ids).logits
    # Their own norms round to fp32 inside.
    assert (after - before).abs().max() < (1e-4 if family == "gemma3_text" else 1e-9)


def test_scales_of_grouped_heads_are_tied(tiny_model: LoadedModel) -> None:
    unit = tiny_model.architecture.unit("blocks.0.o")
    fold = find_fold(tiny_model.architecture, unit)
    assert fold is not None
    scales = torch.rand(48) + 0.5
    tied = fold.tie(scales).view(2, 2, 12)  # key/value heads, query heads of each, channels
    assert torch.equal(tied[:, 0], tied[:, 1])
    torch.testing.assert_close(tied[:, 0], scales.view(2, 2, 12).prod(1).sqrt())
    torch.testing.assert_close(fold.of_rows(fold.tie(scales)), tied[:, 0].reshape(-1))


def test_nothing_takes_the_scales_of_a_smooth_activation_without_a_gate(
    make_model: Callable[..., LoadedModel],
) -> None:
    import dataclasses

    architecture = dataclasses.replace(make_model("opt").architecture, activation="gelu")
    assert find_fold(architecture, architecture.unit("blocks.0.down")) is None
    assert find_fold(architecture, architecture.unit("blocks.0.gate_up")) is not None


# The search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_factor", [False, True])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("n", "group_size"), [(96, 16), (50, 16), (7, 64), (33, 8)])
def test_the_search_is_no_worse_than_rounding(n: int, group_size: int, joint: bool, weight_factor: bool) -> None:
    weight, moment, magnitude = uneven(n)
    options = Options(group_size, False, 8, weight_factor, True, joint)
    found = search_unit([Matrix(weight, 3, clip=True)], moment, magnitude, options, lambda scales: scales)
    rounded = loss(weight, dequantize(quantize_groups(weight, 3, group_size)), moment)
    assert found.before == pytest.approx(rounded, rel=1e-4)
    assert found.error < 0.9 * found.before
    assert found.shares[0] is not None
    assert found.shares[0].shape == (24, -(-n // min(group_size, n)))
    assert ((found.shares[0] > CLIP_LEAST) & (found.shares[0] <= 1)).all()
    if found.scales is not None:
        scaled = weight * found.scales
        grid = make_grid(scaled, 3, group_size, False, found.shares[0])
        assert loss(weight, dequantize(grid.nearest(scaled)) / found.scales, moment) == pytest.approx(
            found.error, rel=1e-3
        )


def test_strong_inputs_are_protected() -> None:
    weight, moment, magnitude = uneven(96)
    found = search_unit(
        [Matrix(weight, 3)], moment, magnitude, Options(16, False, 20, False, False, False), lambda scales: scales
    )
    assert found.scales is not None
    assert found.shares == [None]
    assert found.error < 0.7 * found.before
    strong = magnitude.argsort(descending=True)
    assert found.scales[strong[:5]].min() > found.scales[strong[-5:]].max()


def test_without_a_place_to_fold_or_with_dense_weights_nothing_is_scaled() -> None:
    weight, moment, magnitude = uneven(48)
    assert search_unit([Matrix(weight, 3, clip=True)], moment, magnitude, OPTIONS, None).scales is None
    found = search_unit([Matrix(weight, None, clip=True)], moment, magnitude, OPTIONS, lambda scales: scales)
    assert found.scales is None
    assert found.shares == [None]
    assert found.error == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0, 0.95), st.booleans(), st.integers(0, 100))
def test_scales_are_finite_and_around_one(n: int, alpha: float, factor: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) > 0.3)  # some never active
    weights = weight_magnitude([torch.randn(5, n, generator=generator)], 16) if factor else None
    scales = input_scales(magnitude, alpha, weights)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)
    if alpha == 0 and not factor:
        assert torch.equal(scales, torch.ones(n))


def test_clipping_weighs_what_inputs_weigh() -> None:
    """A group whose outlier weight reads a silent input is clipped; where it reads the only input it is not."""
    weight = torch.full((1, 16), 0.1)
    weight[0, :8] = -0.1
    weight[0, 3] = 1.0
    silent, alone = torch.eye(16), torch.zeros(16, 16)
    silent[3, 3] = 0
    alone[3, 3] = 1
    assert clip_shares(weight, silent, 3, 16, False).item() < 0.9
    kept = make_grid(weight, 3, 16, False, clip_shares(weight, alone, 3, 16, False)).nearest(weight)
    whole = quantize_groups(weight, 3, 16)
    assert abs(dequantize(kept)[0, 3] - 1) <= abs(dequantize(whole)[0, 3] - 1)


def test_moments_of_groups_are_the_diagonal_blocks() -> None:
    moment = torch.arange(36.0).view(6, 6)
    blocks = group_moments(moment, 4)
    assert torch.equal(blocks[0], moment[:4, :4])
    assert torch.equal(blocks[1, :2, :2], moment[4:, 4:])
    assert blocks[1, 2:].abs().sum() == 0


# The method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scaled_and_runs(family: str, make_model: Callable[..., LoadedModel]) -> None:
    model = make_model(family)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    found = made(model, bits=8)
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        dense = model.module(input_ids=ids).logits.log_softmax(-1)
        coded = to_model(found).module(input_ids=ids).logits.log_softmax(-1)
    assert float((dense.exp() * (dense - coded)).sum(-1).mean()) < 1e-2  # at 8 bits the folded model is the same
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    changed = [name for name, vector in found.others.items() if not torch.equal(vector, before[name].float())]
    assert any("norm" in name for name in changed)
    assert all(isinstance(encoding, Groups) for encoding in found.linears.values())
    assert (
        found.effective_bits
        == compress(model, Recipe.for_model(model, RtnConfig(bits=8, group_size=16))).effective_bits
    )


def test_the_same_recipe_gives_the_same_bytes(tiny_model: LoadedModel) -> None:
    assert made(tiny_model).sha256 == made(tiny_model).sha256
    assert made(tiny_model).sha256 != made(tiny_model, clip=False).sha256


def test_scales_that_were_folded_away_are_kept_beside_the_weights(tiny_model: LoadedModel, tmp_path: Path) -> None:
    found = made(tiny_model)
    again = CompressedModel.load(found.save(tmp_path / "model"))
    assert found.input_scales.keys() == again.input_scales.keys()
    assert len(found.input_scales) > 6
    assert again.weight_bytes == found.weight_bytes  # nothing computes with them
    for linear in tiny_model.architecture.linears:
        dense, scales = tiny_model.linear_module(linear.id).weight, again.input_scales.get(linear.unit)
        if linear.role in ("q", "k", "gate") and scales is not None:
            weight = again.linears[linear.id].dequantize() / scales
            assert (weight - dense).norm() < 0.3 * dense.norm()
    (tmp_path / "model" / "input_scales.safetensors").write_bytes(b"no")
    with pytest.raises(IntegrityError, match="input_scales"):
        CompressedModel.load(tmp_path / "model")


def test_it_runs_in_the_engines_as_codes_do(tiny_model: LoadedModel) -> None:
    found = made(tiny_model)
    tokens = list(range(40, 80))
    scores = [open_engine(found, engine="reference").score(tokens)]
    if choose_engine("auto", found) == "cpu":
        scores.append(open_engine(found, engine="cpu", activation_mode="fp32").score(tokens))
        assert abs(scores[0] - scores[1]).max() < 1e-3


def test_later_text_changes_no_earlier_output(tiny_model: LoadedModel) -> None:
    engine = open_engine(made(tiny_model), engine="reference")
    one, other = list(range(40, 70)), [*range(40, 60), *range(100, 110)]
    assert abs(engine.score(one)[:19] - engine.score(other)[:19]).max() < 1e-5


def test_dense_and_mixed_units_are_kept(tiny_model: LoadedModel) -> None:
    found = made(tiny_model, unit_bits={"blocks.0.down": 16, "blocks.1.v": 5})
    assert found.linears["blocks.0.down"].kind == "dense"
    assert found.linears["blocks.1.v"].bits == 5
    with pytest.raises(RecipeError, match=r"blocks\.7\.o"):
        made(tiny_model, unit_bits={"blocks.7.o": 4})


def test_a_cancel_stops_it(tiny_model: LoadedModel) -> None:
    job = Job(lambda state: job.cancel() if state.stage.startswith("search") else None)
    with pytest.raises(Cancelled):
        compress(tiny_model, Recipe.for_model(tiny_model, AwqConfig(**SMALL)), job=job)


def test_a_damaged_model_is_refused(tiny_model: LoadedModel) -> None:
    tiny_model.linear_module("blocks.1.up").weight.data[0, 0] = torch.nan
    with pytest.raises(RecipeError, match=r"blocks\.1\.up"):
        made(tiny_model)


# Salient channels -----------------------------------------------------------------------------------------------------


def test_kept_channels_are_exact_and_counted(tiny_model: LoadedModel, tmp_path: Path) -> None:
    rtn = RtnConfig(bits=3, group_size=16)
    plain = compress(tiny_model, Recipe.for_model(tiny_model, rtn))
    kept = SalientConfig(share=0.1, calibration_tokens=512)
    found = compress(tiny_model, Recipe.for_model(tiny_model, rtn, kept))
    weight = tiny_model.linear_module("blocks.0.q").weight
    encoding = found.linears["blocks.0.q"]
    assert isinstance(encoding, Salient)
    assert len(encoding.channels) == 5  # of 48
    channels = encoding.channels.long()
    assert torch.equal(encoding.dequantize()[:, channels], weight[:, channels].to(torch.bfloat16).float())
    others = [c for c in range(48) if c not in channels.tolist()]
    assert torch.equal(encoding.dequantize()[:, others], plain.linears["blocks.0.q"].dequantize()[:, others])
    assert encoding.stored_bits == plain.linears["blocks.0.q"].stored_bits + 5 * (16 * 48 + 32)
    assert torch.equal(encoding.channels, found.linears["blocks.0.k"].channels)  # type: ignore[attr-defined]
    found.save(tmp_path / "model")
    assert CompressedModel.load(tmp_path / "model").sha256 == found.sha256
    assert choose_engine("auto", found) == "reference"
    with pytest.raises(EngineError, match="reference"):
        open_engine(found, engine="cpu")


def test_channels_are_chosen_by_what_is_asked(tiny_model: LoadedModel) -> None:
    rtn = RtnConfig(bits=3, group_size=16)
    weight = tiny_model.linear_module("blocks.2.down").weight.data
    weight[:, 17] *= 9
    found = {
        by: compress(
            tiny_model, Recipe.for_model(tiny_model, rtn, SalientConfig(by=by, share=0.05, calibration_tokens=512))
        ).linears["blocks.2.down"]
        for by in ("activation", "weight", "random")
    }
    chosen = {by: set(encoding.channels.tolist()) for by, encoding in found.items()}  # type: ignore[attr-defined]
    assert 17 in chosen["weight"]
    assert len(set(map(frozenset, chosen.values()))) == 3
    assert top_channels(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.5).tolist() == [1, 2]
    assert top_channels(torch.tensor([1.0, 3.0]), 0.01).tolist() == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": torch.tensor([3, 3], dtype=torch.int32)},
        {"channels": torch.tensor([3, 16], dtype=torch.int32)},
        {"channels": torch.tensor([-1, 3], dtype=torch.int32)},
        {"channels": torch.tensor([3, 5])},
        {"columns": torch.zeros(4, 3, dtype=torch.bfloat16)},
    ],
)
def test_damaged_salient_channels_are_refused(changes: dict[str, torch.Tensor]) -> None:
    weight = torch.randn(4, 16)
    whole = Salient.of(Groups.of(weight, 3, 8), weight, torch.tensor([5, 3]))
    assert torch.equal(from_parts("salient", whole.meta(), whole.tensors()).dequantize(), whole.dequantize())
    with pytest.raises(IntegrityError):
        from_parts("salient", whole.meta(), whole.tensors() | changes)


# Text -----------------------------------------------------------------------------------------------------------------


def test_text_is_sampled_once_for_all_methods(tiny_model: LoadedModel) -> None:
    first = calibration_windows(tiny_model, 512, 0, Job())
    assert calibration_windows(tiny_model, 512, 0, Job()) is first
    assert calibration_windows(tiny_model, 512, 1, Job()) is not first
    assert calibration_windows(tiny_model, 512, 0, Job(), "tuning") is not first


@pytest.mark.parametrize("text", ["prose", "pydoc"])
def test_named_texts_give_windows_of_one_length_from_their_own_split(tiny_model: LoadedModel, text: Any) -> None:
    tokens, record = calibration_windows(tiny_model, 4096, 0, Job(), text=text)
    assert sum(map(len, tokens)) >= 4096
    assert len({len(window) for window in tokens}) == 1
    assert (record.name, record.split) == (text, "calibration")


# The module whose error counts ----------------------------------------------------------------------------------------


def entering(model: LoadedModel, module: torch.nn.Module, windows: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """What a module is called with, window by window."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for window in windows:
            model.module.base_model(input_ids=torch.tensor([window]), use_cache=False)
    hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "opt"])
def test_judges_run_the_module_with_other_weights(family: str, make_model: Callable[..., LoadedModel]) -> None:
    """Dense weights change nothing, others what the module's output taken by hand says; the model stays as it was."""
    model = make_model(family)
    windows = [tuple(range(3 + i, 35 + i)) for i in range(4)]
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    judges = ModuleJudges(model, windows)
    for unit in model.architecture.units:
        judge = judges.judge(unit)
        if unit.kind in ("o", "down") or (family == "opt" and unit.kind == "gate_up"):
            assert judge is None
            continue
        assert judge is not None
        weights = [model.linear_module(linear.id).weight.detach() for linear in unit.linears]
        assert judge(weights) == pytest.approx(0, abs=1e-9)
        assert judge([weight * 1.1 for weight in weights]) > 0
        if unit.id == "blocks.0.gate_up" and family == "llama":
            seen = entering(model, model.block(0).mlp, windows)
            with torch.no_grad():
                gate, up = (weight * 1.1 for weight in weights)
                down = model.block(0).mlp.down_proj.weight
                inner = [(torch.nn.functional.silu(x @ w.T), x @ u.T) for x in seen for w, u in ((gate, up), weights)]
                out = [(g * u) @ down.T for g, u in inner]
                wanted = sum(float((a - b).square().sum()) for a, b in zip(out[::2], out[1::2], strict=True))
            assert judge([gate, up]) == pytest.approx(wanted, rel=0.02)  # inputs come through products in bf16
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())


def test_scales_judged_by_the_module_are_better_for_it(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model("llama")
    tokens, _ = calibration_windows(model, 512, 0, Job())
    errors: dict[str, dict[str, float]] = {}
    for judged in ("module", "unit"):
        compressed = made(model, judge=judged)
        rebuilt = to_model(compressed)
        judges = ModuleJudges(model, tokens)
        for unit in model.architecture.units:
            judge = judges.judge(unit)
            if judge is not None:
                scales = compressed.input_scales.get(unit.id)
                weights = [rebuilt.linear_module(linear.id).weight.detach() for linear in unit.linears]
                if scales is not None:
                    weights = [weight / scales for weight in weights]
                errors.setdefault(unit.id, {})[judged] = judge(weights)
    assert errors
    assert sum(e["module"] for e in errors.values()) < sum(e["unit"] for e in errors.values())
