"""Any-Precision LLM: splits are the best there are, the seed is a good one, and the method leaves no trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.apply.anyprecision import AnyPrecisionConfig, weight_importance
from workbench.apply.anyprecision_fit import SortedRows, equal_masses, fit_tables, lloyd, seed, split
from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.errors import Cancelled, RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.rebuild import to_model
from workbench.formats.tables import NestedTables, TableCodes
from workbench.models import LoadedModel
from workbench.progress import Job, JobState
from workbench.runtime import open_engine
from workbench.runtime.plan import Policy, width_plan
from workbench.runtime.reference import ReferenceEngine
from workbench.runtime.weights import CompressedWeights

WIDTHS = (3, 4, 5, 6)
SMALL: dict[str, Any] = {"calibration_tokens": 512}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int = 12, n: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (rows, n) and an importance as uneven as squared gradients are."""
    weight = torch.randn(rows, n, generator=rng(seed)) * 0.05
    return weight, torch.randn(rows, n, generator=rng(seed + 1)).mul(3).exp()


def fit(weight: torch.Tensor, importance: torch.Tensor, widths: tuple[int, ...] = WIDTHS) -> TableCodes:
    return fit_tables(weight, importance, widths, rng())


def sorted_rows(weight: torch.Tensor, importance: torch.Tensor) -> SortedRows:
    values, order = weight.sort(dim=1)
    return SortedRows.of(values, importance.gather(1, order))


def error(values: np.ndarray, mass: np.ndarray) -> float:
    """Least weighted squared error of one cluster."""
    if len(values) == 0:
        return 0.0
    mean = (values * mass).sum() / mass.sum()
    return float((mass * (values - mean) ** 2).sum())


# The maths ------------------------------------------------------------------------------------------------------------

numbers = st.lists(
    st.tuples(st.integers(-20, 20).map(lambda v: v / 16), st.sampled_from([0.001, 0.5, 1.0, 7.0, 300.0])),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(row=numbers, cuts=st.lists(st.integers(0, 12), min_size=2, max_size=2))
def test_every_cluster_is_split_as_well_as_it_can_be(row: list[tuple[float, float]], cuts: list[int]) -> None:
    values, mass = (torch.tensor([part]) for part in zip(*sorted(row), strict=True))
    rows, n = SortedRows.of(values, mass), len(row)
    ends = [0, *sorted(min(cut, n) for cut in cuts), n]
    parents = torch.tensor([[-1.0, 0.25, 9.0]], dtype=torch.float64)
    bounds, centroids = split(rows, torch.tensor([ends]), parents)
    found = bounds[0].tolist()
    assert found[::2] == ends
    x, w = values[0].double().numpy(), rows.mass[0].numpy()
    for k, (first, middle, last) in enumerate(zip(found[::2], found[1::2], found[2::2], strict=False)):
        best = min((error(x[first:t], w[first:t]) + error(x[t:last], w[t:last]) for t in range(first, last)), default=0)
        assert error(x[first:middle], w[first:middle]) + error(x[middle:last], w[middle:last]) <= best + 1e-9
        for child, (begin, end) in enumerate([(first, middle), (middle, last)]):
            mean = (x[begin:end] * w[begin:end]).sum() / w[begin:end].sum() if end > begin else parents[0, k]
            assert float(centroids[0, 2 * k + child]) == pytest.approx(float(mean), abs=1e-9)
        # Nothing is left empty that could have had a member.
        assert last - first < 2 or first < middle < last


@pytest.mark.parametrize("clusters", [2, 4, 8, 16])
def test_the_seed_is_no_worse_than_equal_masses_and_often_better(clusters: int) -> None:
    rows = sorted_rows(*matrix(rows=40))
    bounds, centroids = seed(rows, torch.rand(4, 40, clusters, generator=rng(3)))
    equal, _ = lloyd(rows, equal_masses(rows, clusters))
    found, usual = rows.losses(bounds), rows.losses(equal)
    assert bool((found <= usual).all())
    assert float((found < usual).double().mean()) > 0.25
    assert bool((centroids.diff(dim=1) >= 0).all())
    assert bool((bounds.diff(dim=1) >= 0).all())


def test_lloyd_ends_where_each_value_is_nearest_to_its_own_mean() -> None:
    rows = sorted_rows(*matrix())
    bounds, centroids = seed(rows, torch.rand(4, 12, 8, generator=rng()))
    nearest = (rows.values.unsqueeze(2) - centroids.unsqueeze(1)).abs().argmin(dim=2)
    for row in range(12):
        cluster = torch.bucketize(torch.arange(200), bounds[row, 1:-1], right=True)
        assert torch.equal(cluster, nearest[row])


def test_errors_fall_with_the_width_and_important_weights_are_met_best() -> None:
    weight, importance = matrix()
    fitted, even = fit(weight, importance), fit(weight, torch.ones_like(weight))
    losses = [float((importance * (fitted.dequantize(bits) - weight).square()).sum()) for bits in WIDTHS]
    assert all(wide < 0.5 * narrow for narrow, wide in itertools.pairwise(losses))
    for bits, found in zip(WIDTHS, losses, strict=True):
        assert found < 0.5 * float((importance * (even.dequantize(bits) - weight).square()).sum())
        assert (even.dequantize(bits) - weight).norm() < (fitted.dequantize(bits) - weight).norm()


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 40),
    widths=st.sampled_from([WIDTHS, (2,), (3,), (8,), (5, 8), (2, 3, 4, 5, 6, 7, 8)]),
    levels=st.integers(1, 50),
)
def test_rows_with_few_values_keep_them(rows: int, n: int, widths: tuple[int, ...], levels: int) -> None:
    weight = torch.randint(0, levels, (rows, n), generator=rng(n)).float() / 64 - 0.25  # values of fp16
    fitted = fit(weight, torch.rand(rows, n, generator=rng(1)), widths)
    assert fitted.widths == widths
    for bits in widths:
        assert fitted.tables[bits].isfinite().all()
        assert (fitted.tables[bits].float().diff(dim=1) >= 0).all()
        assert (fitted.dequantize(bits) - weight).abs().max() <= levels / 64
    if widths[-1] == 8:
        assert torch.equal(fitted.dequantize(8), weight)


def test_a_row_without_importance_counts_all_its_weights_alike() -> None:
    weight, importance = matrix()
    importance[4] = 0
    fitted, even = fit(weight, importance), fit(weight, torch.ones_like(weight))
    assert torch.equal(fitted.codes[4], even.codes[4])
    assert all(torch.equal(fitted.tables[bits][4], even.tables[bits][4]) for bits in WIDTHS)
    assert not torch.equal(fitted.codes[3], even.codes[3])


def test_only_the_proportions_of_importance_count() -> None:
    weight, importance = matrix()
    fitted, scaled = fit(weight, importance), fit(weight, importance * 2.0**-40)
    assert torch.equal(fitted.codes, scaled.codes)


def test_the_pieces_that_rows_are_fitted_in_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = matrix()
    whole = fit(weight, importance)
    monkeypatch.setattr("workbench.apply.anyprecision_fit._PIECE", 500)
    parts = fit(weight, importance)
    assert torch.equal(whole.codes, parts.codes)
    assert all(torch.equal(whole.tables[bits], parts.tables[bits]) for bits in WIDTHS)


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "NaN or infinite"), (7e4, "too large for fp16")])
def test_weights_that_cannot_be_coded_are_refused(value: float, says: str) -> None:
    weight, importance = matrix()
    weight[3, 4] = value
    with pytest.raises(RecipeError, match=says):
        fit(weight, importance)
    weight, importance = matrix()
    importance[1, 1] = torch.inf
    with pytest.raises(RecipeError, match="gradient"):
        fit(weight, importance)


# The method -----------------------------------------------------------------------------------------------------------


def made(model: LoadedModel, **changes: Any) -> CompressedModel:
    return compress(model, Recipe.for_model(model, AnyPrecisionConfig(**SMALL | changes)))


def test_importance_is_the_sum_of_squared_gradients(tiny_model: LoadedModel) -> None:
    windows = torch.randint(0, 256, (3, 40), generator=rng()).tolist()
    found = weight_importance(tiny_model, windows, Job())
    assert set(found) == {linear.id for linear in tiny_model.architecture.linears}
    weight = tiny_model.linear_module("blocks.1.o").weight
    expected = torch.zeros_like(weight)
    weight.requires_grad_(True)
    for window in windows:
        ids = torch.tensor([window])
        loss = tiny_model.module(input_ids=ids, labels=ids).loss * (len(window) - 1)
        expected += torch.autograd.grad(loss, weight)[0].square()
    weight.requires_grad_(False)
    # Products in bf16, where there are any, keep 8 bits.
    assert (found["blocks.1.o"] - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "opt"])
def test_every_family_is_closer_at_more_bits_on_both_engines(
    make_model: Callable[..., LoadedModel], family: str, tmp_path: Path
) -> None:
    model = make_model(family)
    result = made(model)
    assert all(isinstance(e, NestedTables) for e in result.linears.values())
    assert result.widths == WIDTHS
    again = CompressedModel.load(result.save(tmp_path / "model"))
    plan = width_plan(again.architecture, WIDTHS, 6)
    text = torch.randint(0, 256, (60,), generator=rng(5)).tolist()
    dense = ReferenceEngine(model).score(text)
    reference = ReferenceEngine(to_model(again), plan, CompressedWeights(again))
    exact = open_engine(again.folder or "", engine="cpu", plan=plan, threads=2, activation_mode="fp32")
    fast = open_engine(again, engine="cpu", plan=plan, threads=2)
    assert fast.activation_mode == "int8"
    distances = []
    for bits in WIDTHS:
        for engine in (reference, exact, fast):
            engine.set_policy(Policy({"width": bits}))
        expected = reference.score(text)
        np.testing.assert_allclose(exact.score(text), expected, atol=2e-4)
        # The output layer's activations are int8 there, and the cache fp16.
        np.testing.assert_allclose(fast.score(text), expected, atol=0.1)
        distances.append(float(np.abs(expected - dense).mean()))
    assert distances == sorted(distances, reverse=True)
    assert 0 < distances[-1] < 0.3 * distances[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_fitted(make_model: Callable[..., LoadedModel], dtype: torch.dtype) -> None:
    whole, half = make_model("llama"), make_model("llama")
    half.module.to(dtype)  # type: ignore[arg-type]
    half.dtype = dtype
    result = made(half)
    for linear in whole.architecture.linears:
        weight = whole.linear_module(linear.id).weight
        assert (result.linears[linear.id].dequantize(6) - weight).norm() < 0.2 * weight.norm()
    assert half.linear_module("blocks.0.q").weight.dtype == dtype


def test_the_same_seed_gives_the_same_bytes(tiny_model: LoadedModel) -> None:
    recipe = Recipe.for_model(tiny_model, AnyPrecisionConfig(**SMALL))
    first = compress(tiny_model, recipe)
    assert compress(tiny_model, recipe).sha256 == first.sha256
    other = compress(tiny_model, recipe.model_copy(update={"seed": 1}))
    assert other.sha256 != first.sha256


def traces_of(model: LoadedModel) -> list[Any]:
    """Everything that a fit might leave behind."""
    parameters = [(name, id(p), p.requires_grad, p.grad, p.dtype) for name, p in model.module.named_parameters()]
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.module.parameters()]
    return [parameters, hooks, model.module.training, torch.get_num_threads()]


@pytest.mark.parametrize("stage", ["sample text", "measure the importance", "fit tables", "compress", ""])
def test_the_model_is_left_as_it_was_also_when_cancelled(make_model: Callable[..., LoadedModel], stage: str) -> None:
    model = make_model("llama")
    before, weights = traces_of(model), {k: v.clone() for k, v in model.module.state_dict().items()}

    def see(state: JobState) -> None:
        if stage and state.stage.startswith(stage) and state.done > 0:
            job.cancel()

    job = Job(see)
    recipe = Recipe.for_model(model, AnyPrecisionConfig(**SMALL))
    if stage:
        with pytest.raises(Cancelled, match=stage):
            compress(model, recipe, job=job)
    else:
        compress(model, recipe, job=job)
    assert traces_of(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.module.state_dict().items())


def test_a_damaged_model_is_refused_in_one_line(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model("llama")
    model.linear_module("blocks.1.v").weight.data[0, 0] = torch.nan
    with pytest.raises(RecipeError, match=r"blocks\.1\.v is NaN or infinite"):
        made(model)
    model = make_model("llama")
    norm = model.submodule(model.architecture.norms["blocks.1.input"])
    norm.weight.data.fill_(torch.inf)  # type: ignore[union-attr, operator]
    with pytest.raises(RecipeError, match=r"not finite.*float32\.$"):
        made(model)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"widths": (4, 3)}, ["widths = (4, 3)", "ascend", "nearest is [3, 4]"]),
        ({"widths": (4, 16)}, ["2 to 8", "nearest is [4, 8]"]),
        ({"widths": ()}, ["at least one width"]),
        ({"calibration_tokens": 0}, ["calibration_tokens = 0", "at least 512"]),
        ({"output_bits": 9}, ["output_bits = 9", "nearest is 8"]),
        ({"group_size": 64}, ["unknown field 'group_size'", "widths"]),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(given: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        AnyPrecisionConfig(**given)
    assert "\n" not in str(caught.value)
    for part in says:
        assert part in str(caught.value)


def test_a_recipe_survives_its_file(tiny_model: LoadedModel, tmp_path: Path) -> None:
    recipe = Recipe.for_model(tiny_model, AnyPrecisionConfig(widths=(2, 4)))
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
