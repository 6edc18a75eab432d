"""Nested codes: every width is as good as its bits allow, fitting helps where it says it does, and leaves no trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.apply import moments as moments_module
from workbench.apply.compress import compress
from workbench.apply.moments import input_moments
from workbench.apply.nested import NestedConfig
from workbench.apply.nested_fit import choose, fit_matrix, importance, round_matrix
from workbench.apply.nested_tune import tune_scales
from workbench.apply.parts import Parts
from workbench.apply.recipe import Recipe
from workbench.errors import Cancelled, RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.nested import Nested, NestedCodes
from workbench.models import LoadedModel
from workbench.progress import Job, JobState

WIDTHS = (3, 4, 5, 6)
ALL_WIDTHS = [WIDTHS, (2, 3), (2, 8), (4, 6, 8), (2, 3, 4, 5, 6, 7, 8), (7, 8)]
SMALL: dict[str, Any] = {"group_size": 16, "calibration_tokens": 512, "tune_steps": 1}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt"]


def correlated(n: int, rows: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (rows, n) and the moment (n, n) of inputs of uneven power that share most of their direction."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, n, generator=generator) * torch.rand(n, generator=generator)
    inputs += torch.randn(400, 1, generator=generator) * torch.rand(1, n, generator=generator)
    return torch.randn(rows, n, generator=generator) * 0.05 + 0.01, inputs.T @ inputs / 400


def loss(codes: NestedCodes, bits: int, weight: torch.Tensor, moment: torch.Tensor) -> float:
    """Mean square of the change of the outputs, summed over rows."""
    error = codes.dequantize(bits) - weight
    return float(((error @ moment) * error).sum())


def made(model: LoadedModel, **changes: Any) -> CompressedModel:
    return compress(model, Recipe.for_model(model, NestedConfig(**SMALL | changes)))


def tokens_of(seed: int = 0, count: int = 4) -> list[list[int]]:
    return torch.randint(0, 256, (count, 48), generator=torch.Generator().manual_seed(seed)).tolist()


# The maths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", ALL_WIDTHS, ids=str)
def test_errors_fall_with_the_width_and_fitting_beats_rounding(widths: tuple[int, ...]) -> None:
    weight, moment = correlated(96)
    fitted, rounded = fit_matrix(weight, moment, widths, 32, 0.05), round_matrix(weight, widths, 32)
    for codes in (fitted, rounded):
        assert codes.widths == widths
        losses = [loss(codes, bits, weight, moment) for bits in widths]
        assert all(wide < 0.85 * narrow for narrow, wide in itertools.pairwise(losses))
    # What nesting takes is paid at the wide end; the narrow widths, where damage is, gain most.
    for bits in widths[:2]:
        assert loss(fitted, bits, weight, moment) < 0.9 * loss(rounded, bits, weight, moment)


@pytest.mark.parametrize(("n", "group_size"), [(130, 64), (33, 16), (7, 64), (64, 64), (65, 8)])
@pytest.mark.parametrize("fit", ["compensated", "rounded"])
def test_any_row_length_is_stored_and_read_back(n: int, group_size: int, fit: str) -> None:
    weight, moment = correlated(n, rows=5)
    if fit == "rounded":
        codes = round_matrix(weight, WIDTHS, group_size)
    else:
        codes = fit_matrix(weight, moment, WIDTHS, group_size, 0.1)
    nested = Nested.of(codes)
    again = Nested.from_parts(nested.meta(), nested.tensors())
    for bits in WIDTHS:
        assert nested.dequantize(bits).shape == weight.shape
        assert torch.equal(again.dequantize(bits), codes.dequantize(bits))
        assert (codes.dequantize(bits) - weight).norm() < 0.4 * weight.norm()


@given(
    value=st.floats(-0.5, 1.5),
    shifts=st.lists(st.floats(-0.5, 0.5), min_size=4, max_size=4),
    widths=st.sampled_from([WIDTHS, (2, 3, 4), (3, 4), (5, 6, 7, 8)]),
)
@settings(deadline=None)
def test_a_choice_nests_and_serves_all_widths_together(
    value: float, shifts: list[float], widths: tuple[int, ...]
) -> None:
    wanted = torch.tensor([[value * 2**bits - 0.5 + s] for bits, s in zip(widths, shifts, strict=False)])
    codes = choose(wanted, widths)
    parents = torch.arange(2 ** widths[-1])
    tops = torch.stack([parents >> (widths[-1] - bits) for bits in widths]).float()
    weights = torch.tensor(importance(widths)).unsqueeze(1)
    costs = ((tops - wanted).square() * weights).sum(0)
    found = float(((codes - wanted).square() * weights).sum())
    assert torch.equal(codes[:, 0], tops[:, int(codes[-1, 0])])
    if len(widths) == 2:
        assert found <= float(costs.min()) * 1.0001 + 1e-4
    # With more widths not all parents are tried, but the nearest code at the narrowest and its nearest children are.
    greedy = wanted[0].round().clamp(0, 2 ** widths[0] - 1)
    cost = weights[0] * (greedy - wanted[0]).square()
    for i, (narrow, wide) in enumerate(itertools.pairwise(widths), start=1):
        first = greedy * 2 ** (wide - narrow)
        greedy = wanted[i].round().clamp(first, first + 2 ** (wide - narrow) - 1)
        cost = cost + weights[i] * (greedy - wanted[i]).square()
    assert found <= float(cost) * 1.0001 + 1e-4


def test_inputs_that_are_never_active_break_nothing() -> None:
    weight, moment = correlated(64)
    moment[5], moment[:, 5], moment[32:], moment[:, 32:] = 0, 0, 0, 0
    codes = fit_matrix(weight, moment, WIDTHS, 32, 0.1)
    assert loss(codes, 3, weight, moment) < loss(round_matrix(weight, WIDTHS, 32), 3, weight, moment)
    nothing = fit_matrix(weight, torch.zeros(64, 64), WIDTHS, 32, 0.1)
    for found in (codes, nothing):
        errors = [float((found.dequantize(bits) - weight).square().mean()) for bits in WIDTHS]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 * float(weight.square().mean())


def test_groups_of_one_sign_and_of_nothing_are_kept() -> None:
    """Zero points reach a quarter of the range only: a group far from zero must get the range that this takes."""
    weight = torch.tensor([[0.5, 0.51, 0.49, 0.5] * 8, [-3.0] * 32, [0.0] * 32])
    for codes in (round_matrix(weight, WIDTHS, 16), fit_matrix(weight, torch.eye(32), WIDTHS, 16, 0.1)):
        for bits in WIDTHS:
            assert (codes.dequantize(bits) - weight).abs().max() <= 3 * 2.0**-bits


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "NaN or infinite"), (3e38, "too large for an fp16 scale")])
def test_weights_that_cannot_be_coded_are_refused(value: float, says: str) -> None:
    weight, moment = correlated(32)
    weight[3, 4] = value
    with pytest.raises(RecipeError, match=says):
        round_matrix(weight, WIDTHS, 16)
    with pytest.raises(RecipeError, match=says):
        fit_matrix(weight, moment, WIDTHS, 16, 0.1)


# Moments and tuning ---------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs_however_many_runs_they_take(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = tokens_of()
    whole = [one for part in input_moments(tiny_model, windows, Job()) for one in part]
    assert [one.unit.id for one in whole] == [unit.id for unit in tiny_model.architecture.units]
    with torch.no_grad():
        states = tiny_model.submodule(tiny_model.architecture.embedding_path)(torch.tensor(windows))
        first = tiny_model.submodule(tiny_model.architecture.norms["blocks.0.input"])(states).flatten(0, 1)
    torch.testing.assert_close(whole[0].moment, first.T @ first / len(first))
    torch.testing.assert_close(whole[0].magnitude, first.abs().mean(0))
    monkeypatch.setattr(moments_module, "_MOMENT_BYTES", 1)
    apart = list(input_moments(tiny_model, windows, Job()))
    assert len(apart) == len(whole)
    for one, [same] in zip(whole, apart, strict=True):
        assert one.unit == same.unit
        assert torch.equal(one.moment, same.moment)
        assert torch.equal(one.magnitude, same.magnitude)


def test_fitting_beats_rounding_on_the_inputs_of_a_model(tiny_model: LoadedModel) -> None:
    for part in input_moments(tiny_model, tokens_of(), Job()):
        for unit, moment, _ in part:
            weight = torch.cat([tiny_model.linear_module(x.id).weight for x in unit.linears]).detach()
            fitted, rounded = fit_matrix(weight, moment, WIDTHS, 16, 0.1), round_matrix(weight, WIDTHS, 16)
            for bits in (3, 4):
                assert loss(fitted, bits, weight, moment) < loss(rounded, bits, weight, moment), unit.id


def divergence(model: LoadedModel, codes: dict[str, NestedCodes], bits: int, windows: Sequence[Sequence[int]]) -> float:
    ids = torch.tensor(windows)
    modules = {name: model.linear_module(name) for name in codes}
    dense = {name: module.weight.data for name, module in modules.items()}
    with torch.no_grad():
        p = model.module(ids).logits.log_softmax(-1)
        for name, module in modules.items():
            module.weight.data = codes[name].dequantize(bits)
        q = model.module(ids).logits.log_softmax(-1)
        for name, module in modules.items():
            module.weight.data = dense[name]
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_tuned_scales_bring_low_widths_closer_to_the_dense_model(tiny_model: LoadedModel) -> None:
    windows = tokens_of(count=2)
    linears = tiny_model.architecture.linears
    codes = {x.id: round_matrix(tiny_model.linear_module(x.id).weight, (2, 3, 4, 5), 16) for x in linears}
    tuned = tune_scales(tiny_model, codes, windows, 24, Job(), Parts())
    for bits in (2, 3, 4):
        assert divergence(tiny_model, tuned, bits, windows) < 0.95 * divergence(tiny_model, codes, bits, windows)
    for name, before in codes.items():
        assert torch.equal(tuned[name].scales[5], before.scales[5])  # nothing to gain there
        assert torch.equal(tuned[name].codes, before.codes)
        assert all(torch.equal(tuned[name].zeros[bits], before.zeros[bits]) for bits in before.widths)


# The method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compresses_and_is_closer_at_more_bits(
    make_model: Callable[..., LoadedModel], family: str
) -> None:
    model = make_model(family)
    result = made(model)
    assert set(result.linears) == {linear.id for linear in model.architecture.linears}
    codes = {name: e.codes for name, e in result.linears.items() if isinstance(e, Nested)}
    assert len(codes) == len(result.linears)
    windows = tokens_of(seed=7)
    damages = [divergence(model, codes, bits, windows) for bits in WIDTHS]
    assert damages == sorted(damages, reverse=True)
    assert 0 < damages[-1] < 0.1 * damages[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_fitted(make_model: Callable[..., LoadedModel], dtype: torch.dtype) -> None:
    whole, half = make_model("llama"), make_model("llama")
    half.module.to(dtype)  # type: ignore[arg-type]
    half.dtype = dtype
    result = made(half)
    for linear in whole.architecture.linears:
        weight = whole.linear_module(linear.id).weight
        assert (result.linears[linear.id].dequantize(6) - weight).norm() < 0.1 * weight.norm()
    assert half.linear_module("blocks.0.q").weight.dtype == dtype


def test_the_same_seed_gives_the_same_bytes(tiny_model: LoadedModel) -> None:
    recipe = Recipe.for_model(tiny_model, NestedConfig(**SMALL))
    first = compress(tiny_model, recipe)
    assert compress(tiny_model, recipe).sha256 == first.sha256
    other = compress(tiny_model, recipe.model_copy(update={"seed": 1}))
    assert any(
        not torch.equal(other.linears[name].tensors()["codes"], e.tensors()["codes"])
        for name, e in first.linears.items()
    )


def test_rounding_reads_no_text(tiny_model: LoadedModel) -> None:
    stages: list[str] = []
    recipe = Recipe.for_model(tiny_model, NestedConfig(fit="rounded", group_size=16))
    result = compress(tiny_model, recipe, job=Job(lambda state: stages.append(state.stage)))
    assert set(stages) == {"round to nested codes", "compress (nested)"}
    assert {e.bits for e in result.linears.values()} == {6}


def traces_of(model: LoadedModel) -> list[Any]:
    """Everything that a fit might leave behind."""
    parameters = [(name, id(p), p.requires_grad, p.grad, p.dtype) for name, p in model.module.named_parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules()]
    return [parameters, hooks, model.module.training, torch.get_num_threads()]


@pytest.mark.parametrize("stage", ["sample text", "measure", "fit nested", "tune scales at 3", "tune scales at 4", ""])
def test_the_model_is_left_as_it_was_also_when_cancelled(tiny_model: LoadedModel, stage: str) -> None:
    before, weights = traces_of(tiny_model), {k: v.clone() for k, v in tiny_model.module.state_dict().items()}
    recipe = Recipe.for_model(tiny_model, NestedConfig(**SMALL | {"tune_steps": 2}))

    def see(state: JobState) -> None:
        if stage and state.stage.startswith(stage) and state.done > 0:
            job.cancel()

    job = Job(see)
    if stage:
        with pytest.raises(Cancelled, match=stage):
            compress(tiny_model, recipe, job=job)
    else:
        compress(tiny_model, recipe, job=job)
    assert traces_of(tiny_model) == before
    assert all(torch.equal(v, weights[k]) for k, v in tiny_model.module.state_dict().items())


def test_a_damaged_model_is_refused_in_one_line(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model("llama")
    model.linear_module("blocks.1.v").weight.data[0, 0] = torch.nan
    for fit in ("compensated", "rounded"):
        with pytest.raises(RecipeError, match="NaN or infinite"):
            made(model, fit=fit)
    model = make_model("llama")
    norm = model.submodule(model.architecture.norms["blocks.1.input"])
    norm.weight.data.fill_(torch.inf)  # type: ignore[union-attr, operator]
    with pytest.raises(RecipeError, match="not finite"):
        made(model)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"widths": (4, 3)}, ["widths = (4, 3)", "ascend", "nearest is [3, 4]"]),
        ({"widths": (3, 3, 4)}, ["none twice", "nearest is [3, 4]"]),
        ({"widths": (1, 4)}, ["2 to 8", "nearest is [2, 4]"]),
        ({"widths": (4, 16)}, ["2 to 8", "nearest is [4, 8]"]),
        ({"widths": ()}, ["at least one width"]),
        ({"widths": (3, 4.5)}, ["widths[1] = 4.5", "whole number"]),
        ({"fit": "compensate"}, ["fit = 'compensate'", "Did you mean 'compensated'"]),
        ({"calibration_tokens": 0}, ["calibration_tokens = 0", "at least 512"]),
        ({"tune_steps": -1}, ["tune_steps = -1", "at least 0"]),
        ({"group_size": 4}, ["group_size = 4", "at least 8"]),
        ({"bits": 8}, ["unknown field 'bits'", "widths"]),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(given: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        NestedConfig(**given)
    assert "\n" not in str(caught.value)
    for part in says:
        assert part in str(caught.value)


def test_a_recipe_survives_its_file(tiny_model: LoadedModel, tmp_path: Any) -> None:
    recipe = Recipe.for_model(tiny_model, NestedConfig(widths=(2, 4), fit="rounded"))
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
