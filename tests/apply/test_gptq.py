"""GPTQ and GPTAQ: compensation beats rounding on what it minimises, and each reduces to what it is said to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.analysis.blocks import BlockStates
from workbench.apply.awq import AwqConfig
from workbench.apply.compensate import damped, drift_factor, upper_factor, walk, walking_order
from workbench.apply.compress import compress
from workbench.apply.gptq import GptqConfig
from workbench.apply.gptq_fit import Target, compensated
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.salient import SalientConfig
from workbench.apply.tune import TuneConfig
from workbench.errors import Cancelled, RecipeError
from workbench.formats.codes import dequantize, quantize_groups
from workbench.formats.compressed import CompressedModel
from workbench.formats.encodings import Groups
from workbench.formats.rebuild import to_model
from workbench.measure.result import recipe_columns
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt"]
TOKENS = 512
GRID: dict[str, Any] = {"bits": 3, "group_size": 16}


def inputs(n: int, seed: int = 0) -> torch.Tensor:
    """Inputs (400, n) of uneven power that share much of their direction."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(400, n, generator=generator) * (torch.rand(n, generator=generator) + 0.1)
    return found + torch.randn(400, 3, generator=generator) @ torch.randn(3, n, generator=generator)


def matrix(n: int, rows: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 0.05


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def loss(weight: torch.Tensor, coded: torch.Tensor, h: torch.Tensor) -> float:
    error = coded - weight
    return float(((error @ h) * error).sum())


def made(model: LoadedModel, *methods: Any, job: Job | None = None) -> CompressedModel:
    return compress(model, Recipe.for_model(model, *methods), job=job)


# The maths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "group_size"), [(96, 16), (130, 64), (33, 16), (7, 64), (1, 1), (65, 8)])
def test_compensation_beats_rounding_on_the_calibration_text(
    n: int, group_size: int, symmetric: bool, act_order: bool
) -> None:
    weight, target = matrix(n), Target(damped(moment_of(inputs(n)), 0.01))
    grid = quantize_groups(weight, 3, group_size, symmetric)
    found = compensated(weight, grid, target, act_order=act_order)
    assert torch.equal(found.scales, grid.scales)
    assert found.codes.dtype == torch.uint8
    assert found.codes.max() < 8
    rounded = loss(weight, dequantize(grid), target.moment)
    assert loss(weight, dequantize(found), target.moment) <= rounded * (0.7 if n > 30 else 1 + 1e-6)


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight = matrix(64)
    grid = quantize_groups(weight, 4, 16)
    found = compensated(weight, grid, Target(torch.diag(torch.rand(64) + 0.1)))
    assert torch.equal(found.codes, grid.codes)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(0, 50))
def test_the_factor_is_of_the_inverse(n: int, seed: int) -> None:
    h = damped(moment_of(inputs(n, seed).double()), 0.1)
    upper = upper_factor(h)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ h, torch.eye(n, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [5, 63, 64, 65, 150])
def test_blocks_of_columns_change_nothing(n: int) -> None:
    """The walk in blocks is the plain recursion of the papers, columns one by one."""
    x, seen = inputs(n).double(), inputs(n, seed=3).double() * 0.1
    now = x + seen
    h = damped(moment_of(now), 0.05)
    upper = upper_factor(h)
    drift = drift_factor(upper, -seen.T @ now / len(x))
    weight = matrix(n).double()
    plain = weight.T.clone()
    for i in range(n):
        error = (plain[i] - plain[i].round(decimals=1)) / upper[i, i]
        for j in range(i + 1, n):
            plain[j] += drift[i, j] * plain[i] - upper[i, j] * error
    walked = weight.T.clone()
    walk(walked, upper, lambda _, wanted: wanted - wanted.round(decimals=1), drift)
    torch.testing.assert_close(walked, plain, atol=1e-9, rtol=0)


def test_without_drift_gptaq_is_gptq() -> None:
    weight, h = matrix(96), damped(moment_of(inputs(96)), 0.05)
    grid = quantize_groups(weight, 3, 16)
    plain = compensated(weight, grid, Target(h))
    same = compensated(weight, grid, Target(h, torch.zeros(96, 96)))
    assert torch.equal(plain.codes, same.codes)


def test_gptaq_makes_up_for_changed_inputs() -> None:
    """Of the dense outputs on drifted inputs it keeps more than GPTQ, which only sees the drifted inputs."""
    x = inputs(96)
    now = x + 0.3 * x @ torch.randn(96, 96, generator=torch.Generator().manual_seed(2)) / 10
    weight, h = matrix(96), damped(moment_of(now), 0.01)
    grid = quantize_groups(weight, 4, 16)
    plain = dequantize(compensated(weight, grid, Target(h)))
    aware = dequantize(compensated(weight, grid, Target(h, (x - now).T @ now / len(x))))
    wanted = x @ weight.T

    def missed(coded: torch.Tensor) -> float:
        return float((now @ coded.T - wanted).square().mean())

    assert missed(aware) < 0.8 * missed(plain)


def test_refitted_scales_are_better_still() -> None:
    weight, target = matrix(96), Target(damped(moment_of(inputs(96)), 0.01))
    grid = quantize_groups(weight, 3, 16)
    plain, refitted = (compensated(weight, grid, target, refit=refit) for refit in (False, True))
    assert torch.equal(plain.codes, refitted.codes)
    before, after = (loss(weight, dequantize(codes), target.moment) for codes in (plain, refitted))
    assert after < before


def test_moments_that_say_nothing() -> None:
    torch.testing.assert_close(damped(torch.zeros(4, 4), 0.1), 1.1 * torch.eye(4))
    assert walking_order(torch.diag(torch.tensor([1.0, 3.0, 3.0, 2.0]))).tolist() == [1, 2, 3, 0]
    with pytest.raises(RecipeError, match="damping"):
        upper_factor(torch.zeros(3, 3))


# The method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_family_keeps_its_function_at_8_bits(
    family: str, asymmetric: bool, make_model: Callable[..., LoadedModel]
) -> None:
    model = make_model(family)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    awq = AwqConfig(bits=8, group_size=16, calibration_tokens=TOKENS, alpha_steps=4)
    found = made(model, awq, GptqConfig(asymmetric=asymmetric, calibration_tokens=TOKENS))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        dense = model.module(input_ids=ids).logits.log_softmax(-1)
        coded = to_model(found).module(input_ids=ids).logits.log_softmax(-1)
    assert float((dense.exp() * (dense - coded)).sum(-1).mean()) < 1e-2


def test_it_keeps_the_grid_and_the_size_and_changes_codes(tiny_model: LoadedModel) -> None:
    awq = AwqConfig(**GRID, calibration_tokens=TOKENS)
    before, after = made(tiny_model, awq), made(tiny_model, awq, GptqConfig(calibration_tokens=TOKENS))
    changed = 0
    for name, encoding in before.linears.items():
        other = after.linears[name]
        assert isinstance(encoding, Groups)
        assert isinstance(other, Groups)
        assert torch.equal(encoding.scales, other.scales)
        changed += int((encoding.codes.codes != other.codes.codes).sum())
    assert changed > 1000
    assert before.effective_bits == after.effective_bits
    assert all(torch.equal(before.others[name], vector) for name, vector in after.others.items())


def test_on_its_own_text_it_is_closer_to_the_dense_model_than_rounding(tiny_model: LoadedModel) -> None:
    from workbench.apply.calibration import calibration_windows

    tokens, _ = calibration_windows(tiny_model, 4096, 0, Job())
    ids = torch.tensor([list(window) for window in tokens])
    rtn = RtnConfig(**GRID)

    def divergence(*methods: Any) -> float:
        with torch.no_grad():
            dense = tiny_model.module(input_ids=ids).logits.log_softmax(-1)
            coded = to_model(made(tiny_model, *methods)).module(input_ids=ids).logits.log_softmax(-1)
        return float((dense.exp() * (dense - coded)).sum(-1).mean())

    gptq = divergence(rtn, GptqConfig(calibration_tokens=4096))
    gptaq = divergence(rtn, GptqConfig(calibration_tokens=4096, asymmetric=True))
    assert gptaq < gptq < 0.3 * divergence(rtn)


def test_the_same_recipe_gives_the_same_bytes(tiny_model: LoadedModel) -> None:
    methods = (RtnConfig(**GRID), GptqConfig(calibration_tokens=TOKENS, asymmetric=True))
    assert made(tiny_model, *methods).sha256 == made(tiny_model, *methods).sha256


def test_dense_units_are_left_alone(tiny_model: LoadedModel) -> None:
    rtn = RtnConfig(**GRID, unit_bits={"blocks.1.up": 16, "blocks.0.qkv": 5})
    found = made(tiny_model, rtn, GptqConfig(calibration_tokens=TOKENS))
    assert found.linears["blocks.1.up"].kind == "dense"
    assert found.linears["blocks.0.k"].bits == 5


def test_it_runs_in_the_engines_and_looks_at_no_later_text(tiny_model: LoadedModel) -> None:
    found = made(tiny_model, RtnConfig(**GRID), GptqConfig(calibration_tokens=TOKENS))
    tokens, other = list(range(40, 70)), [*range(40, 60), *range(100, 110)]
    reference = open_engine(found, engine="reference")
    scores = reference.score(tokens)
    assert abs(scores[:19] - reference.score(other)[:19]).max() < 1e-5
    if choose_engine("auto", found) == "cpu":
        assert abs(open_engine(found, engine="cpu", activation_mode="fp32").score(tokens) - scores).max() < 1e-3


def test_a_cancel_or_an_error_leaves_the_model_as_it_was(tiny_model: LoadedModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.module.state_dict().items()}
    parameters = dict(tiny_model.module.named_parameters())
    job = Job(lambda state: job.cancel() if state.stage.startswith("compensate") and state.done == 3 else None)
    with pytest.raises(Cancelled):
        made(tiny_model, RtnConfig(**GRID), GptqConfig(calibration_tokens=TOKENS, asymmetric=True), job=job)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.module.state_dict().items())
    assert all(parameters[name] is value for name, value in tiny_model.module.named_parameters())


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ((GptqConfig(),), ["methods[0] 'gptq'", "stands first", "rtn, awq, gptq"]),
        ((GptqConfig(), RtnConfig()), ["methods[0] 'gptq'", "right after"]),
        ((RtnConfig(), SalientConfig(), GptqConfig()), ["methods[2] 'gptq'", "after 'salient'"]),
        ((RtnConfig(), AwqConfig()), ["'rtn'", "'awq'", "keep one"]),
    ],
)
def test_the_order_of_methods_is_checked(methods: tuple[Any, ...], says: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe(model="m", methods=methods)
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("damping", 0, "damping = 0"),
        ("drift", 1.5, "drift = 1.5"),
        ("calibration", "wiki", "'self'"),
        ("calibration_tokens", 3, "at least"),
        ("bits", 4, "unknown field 'bits'"),
    ],
)
def test_wrong_values_are_named(field: str, value: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        GptqConfig(**{field: value})


def test_nothing_but_dense_weights_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(RecipeError, match="no group codes"):
        made(tiny_model, RtnConfig(bits=16), GptqConfig(calibration_tokens=TOKENS))


def test_going_on_from_what_is_stored_gives_the_same(tiny_model: LoadedModel, tmp_path: Path) -> None:
    awq = AwqConfig(**GRID, calibration_tokens=TOKENS)
    methods = (awq, GptqConfig(calibration_tokens=TOKENS, asymmetric=True), TuneConfig(calibration_tokens=TOKENS))
    whole = made(tiny_model, *methods)
    stored = made(tiny_model, awq)
    for count in (2, 3):
        stored = CompressedModel.load(stored.save(tmp_path / str(count)))
        stored = compress(tiny_model, Recipe.for_model(tiny_model, *methods[:count]), start=stored)
    assert stored.sha256 == whole.sha256


# Tuned scales ---------------------------------------------------------------------------------------------------------


def test_tuned_scales_bring_the_model_closer_and_change_nothing_else(tiny_model: LoadedModel) -> None:
    from workbench.analysis.divergence import dense_states, divergence, in_place_of_dense
    from workbench.apply.calibration import calibration_windows

    awq = AwqConfig(bits=2, group_size=16, calibration_tokens=TOKENS)
    before = made(tiny_model, awq, GptqConfig(calibration_tokens=TOKENS))
    parameters = dict(tiny_model.module.named_parameters())
    after = made(tiny_model, awq, GptqConfig(calibration_tokens=TOKENS), TuneConfig(calibration_tokens=TOKENS))
    assert all(parameters[name] is value for name, value in tiny_model.module.named_parameters())
    tokens, _ = calibration_windows(tiny_model, TOKENS, 0, Job())
    dense = dense_states(tiny_model, tokens)

    def distance(found: CompressedModel) -> float:
        weights = {name: torch.nn.Parameter(e.dequantize(), False) for name, e in found.linears.items()}
        norms = {name: vector for name, vector in found.others.items() if vector.dim() == 1}
        with in_place_of_dense(tiny_model, weights, norms), torch.no_grad():
            each = [divergence(tiny_model, d, torch.tensor([w])) for d, w in zip(dense, tokens, strict=True)]
        return float(torch.stack(each).mean())

    assert distance(after) < 0.95 * distance(before)
    for name, encoding in before.linears.items():
        other = after.linears[name]
        assert isinstance(encoding, Groups)
        assert isinstance(other, Groups)
        assert torch.equal(encoding.packed, other.packed)
        assert not torch.equal(encoding.scales, other.scales)
    assert before.effective_bits == after.effective_bits
    with pytest.raises(RecipeError, match=r"blocks\.0\.o"):
        made(tiny_model, RtnConfig(**GRID, unit_bits={"blocks.0.o": 16}), TuneConfig(calibration_tokens=TOKENS))


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_states_walk_through_the_blocks_as_the_model_does(
    family: str, make_model: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.analysis import divergence

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert divergence.half_products(make_model()) is not None
    model = make_model(family)
    windows = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0)).tolist()
    seen: dict[str, list[torch.Tensor]] = {linear.id: [] for linear in model.architecture.linears}
    hooks = [
        model.linear_module(name).register_forward_pre_hook(
            lambda _, args, at=at: at.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, at in seen.items()
    ]
    with torch.no_grad():
        for window in windows:
            model.module(input_ids=torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    states = BlockStates(model, windows)
    for block in range(model.architecture.n_blocks):
        for linear in model.architecture.linears:
            if linear.block == block:
                for index in range(2):
                    torch.testing.assert_close(
                        states.inputs(linear.path, index), seen[linear.id][index], atol=1e-5, rtol=1e-4
                    )
        states.advance()


# In tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "label", "bits"),
    [
        ((RtnConfig(bits=3),), "rtn", 3),
        ((RtnConfig(bits=3), GptqConfig()), "gptq", 3),
        ((AwqConfig(bits=5), GptqConfig(asymmetric=True)), "awq+gptaq", 5),
        ((AwqConfig(), GptqConfig(), TuneConfig()), "awq+gptq+tune", 4),
        ((RtnConfig(), SalientConfig()), "salient", 4),
    ],
)
def test_tables_name_what_made_the_codes(methods: tuple[Any, ...], label: str, bits: int) -> None:
    columns = recipe_columns(Recipe(model="m", methods=methods))
    assert (columns["method"], columns["bits"], columns["group_size"]) == (label, bits, 64)
    assert columns["calibration"] == (None if label == "rtn" else "self")
