"""Input sparsity: what is measured, split and learnt, what is stored of it, and the plans that follow."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.analysis.divergence import dense_states
from workbench.analysis.input_cuts import InputMasks, Sizes, column_norms
from workbench.apply import input_sparsity, learn_cuts, soft_masks
from workbench.apply.calibration import calibration_windows
from workbench.apply.compress import compress
from workbench.apply.input_shares import greedy_path, shares_along, solved_shares, uniform_shares
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.soft_masks import SoftMask
from workbench.errors import Cancelled, EngineError, InputError, IntegrityError, RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.input_cuts import InputCuts, share_below, threshold
from workbench.formats.selectors import quantile_levels
from workbench.models import LoadedModel
from workbench.operate.fits import fitted
from workbench.progress import Job, JobState
from workbench.runtime import open_engine
from workbench.runtime.base import StepTrace
from workbench.runtime.input_sparsity import (
    expected_sparsity,
    input_plan,
    input_policy,
    input_shares,
    input_thresholds,
)
from workbench.store import Store

WEIGHTS = RtnConfig(group_size=16)
CUTS = InputSparsityConfig(calibration_tokens=1024, allocation_tokens=256)
LEARNT = CUTS.model_copy(
    update={"criterion": "learnt", "allocation": "uniform", "targets": (0.5,), "learning_steps": 40,
            "learning_tokens": 128}
)  # fmt: skip


def made_of(model: LoadedModel, **changes: Any) -> CompressedModel:
    return compress(model, Recipe.for_model(model, WEIGHTS, CUTS.model_copy(update=changes)))


def cuts_of(model: CompressedModel) -> InputCuts:
    assert model.input_cuts is not None
    return model.input_cuts


@pytest.fixture(scope="module")
def made(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    return made_of(make_model())


@pytest.fixture(scope="module")
def learnt(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    model = make_model()
    return compress(model, Recipe.for_model(model, WEIGHTS, LEARNT))


def tokens(seed: int, length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def left_out(trace: list[StepTrace]) -> float:
    return 1 - float(np.mean([step.kept_weights for step in trace]))


def calibration(model: LoadedModel) -> list[list[int]]:
    return [list(w) for w in calibration_windows(model, CUTS.calibration_tokens, 0, Job(), "tuning")[0]]


# What is measured ----------------------------------------------------------------------------------------------------


def test_quantiles_of_sizes_are_those_of_the_values() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs() * 0.01
    values[:2000] = 0
    sizes, levels = Sizes(2), np.array([0.02, 0.2, 0.5, 0.9, 0.999])
    for part in values.split(3000):
        sizes.add(1, part)
    exact = np.quantile(values.numpy(), levels)
    assert exact[0] == sizes.quantiles(levels)[1, 0] == 0
    np.testing.assert_allclose(sizes.quantiles(levels)[1, 1:], exact[1:], rtol=2e-3)
    assert sizes.share_below(1, 0.0) == 0
    assert sizes.share_below(1, float(exact[2])) == pytest.approx(0.5, abs=2e-3)


def test_column_norms_are_those_of_a_units_linears_together(tiny_model: LoadedModel) -> None:
    norms = column_norms(tiny_model)
    for index, unit in enumerate(tiny_model.architecture.units):
        stacked = torch.cat([tiny_model.linear_module(linear.id).weight for linear in unit.linears])
        expected = stacked.norm(dim=0)
        np.testing.assert_allclose(norms[index] / norms[index][0], expected / expected[0], rtol=1e-5)


def test_masks_do_what_a_plan_does_and_leave_the_model_as_it_was(tiny_model: LoadedModel) -> None:
    """The fit sees what will run: hooks on whole windows against the reference engine under the plan."""
    made = made_of(tiny_model, criterion="weighted", allocation="uniform", first=2)
    arch, cuts, text = made.architecture, cuts_of(made), tokens(1, 40)
    from workbench.formats.rebuild import to_model

    engine = open_engine(made, engine="reference", plan=input_plan(arch, cuts, 0.5))
    expected = engine.hidden_states(text)  # type: ignore[attr-defined]
    model = to_model(made)
    factors = {unit: torch.from_numpy(f.astype(np.float32)) for unit, f in cuts.factors.items()}
    with InputMasks(model, 2, factors) as masks:
        masks.cuts = {unit: value[0] for unit, value in enumerate(input_thresholds(arch, cuts, 0.5).values())}
        found = model.module.base_model(torch.tensor([text]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert not any(module._forward_pre_hooks for module in model.module.modules())


# How shares are split ------------------------------------------------------------------------------------------------


def test_solved_shares_are_the_best_split_of_convex_damages() -> None:
    """Damages a s^2: the best shares have equal slopes per weight, s = c w / a."""
    sizes, cost = np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 1.0, 4.0, 2.0])
    nodes = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    damage = cost[:, None] * nodes**2
    found = solved_shares([0.1, 0.2, 0.3], sizes, nodes, damage)
    for target, shares in zip([0.1, 0.2, 0.3], found, strict=True):
        best = sizes / cost
        best *= target / (sizes @ best)
        np.testing.assert_allclose(shares, best, atol=0.02)
        assert sizes @ shares == pytest.approx(target)
    assert (np.diff(found, axis=0) >= -1e-12).all()


def test_solved_shares_hold_their_target_whatever_was_measured() -> None:
    rng = np.random.default_rng(0)
    nodes, targets = (0.3, 0.5, 0.7, 0.9), [0.1, 0.4, 0.7, 0.79]
    sizes = rng.random(20)
    sizes /= sizes.sum()
    sizes[3] = 0  # protected
    for damage in (np.zeros((20, 4)), rng.random((20, 4)), -np.ones((20, 4)), 10 ** rng.uniform(-12, 3, (20, 4))):
        found = solved_shares(targets, sizes, nodes, damage)
        np.testing.assert_allclose(found @ sizes, targets, atol=1e-9)
        assert (found[:, 3] == 0).all()
        assert found.min() >= 0
        assert found.max() <= 0.9 + 1e-9
        assert (np.diff(found, axis=0) >= -1e-12).all()


def test_greedy_spares_the_unit_whose_sparsity_costs() -> None:
    sizes = np.array([1.0, 2.0, 1.0])
    path = greedy_path(lambda s: float(s @ [1.0, 1.0, 100.0]), sizes, 0.6)
    at, shares = path
    assert at[0] == 0
    assert at[-1] >= 0.6
    assert (np.diff(shares, axis=0) >= 0).all()
    assert shares[-1, 2] == 0
    found = shares_along(path, 0.33)
    assert found @ sizes / sizes.sum() == pytest.approx(0.33)
    # All weights in the end, though no unit may go beyond its bound.
    assert greedy_path(lambda s: float(s.sum()), sizes, 0.89)[0][-1] >= 0.89


def test_uniform_shares_are_raised_for_what_is_protected() -> None:
    found = uniform_shares([0.2, 0.4], np.array([0.5, 0.3, 0.0]))
    np.testing.assert_allclose(found, [[0.25, 0.25, 0], [0.5, 0.5, 0]])


# The fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "weighted"])
@pytest.mark.parametrize("allocation", ["uniform", "greedy", "solved"])
def test_tables_ascend_and_thresholds_hold_shares_on_calibration_text(
    tiny_model: LoadedModel, criterion: str, allocation: str
) -> None:
    made = made_of(tiny_model, criterion=criterion, allocation=allocation)
    arch, cuts = made.architecture, cuts_of(made)
    assert (np.diff(cuts.shares, axis=0) >= -1e-6).all()
    sizes = np.array([unit.n_weights for unit in arch.units]) / sum(unit.n_weights for unit in arch.units)
    np.testing.assert_allclose(cuts.shares @ sizes, cuts.targets, atol=1e-5)
    assert (np.ptp(cuts.shares[-1]) < 1e-6) == (allocation == "uniform")
    from workbench.formats.rebuild import to_model

    # Each unit alone: thresholds are of inputs that nothing before has made sparse.
    model = to_model(made)
    seen = Sizes(len(arch.units))
    factors = {unit: torch.from_numpy(f.astype(np.float32)) for unit, f in cuts.factors.items()}
    with InputMasks(model, 1, factors) as masks:
        masks.see = lambda unit, x: seen.add(unit, masks.sizes(unit, x[1:]))
        dense_states(model, calibration(tiny_model))
    for sparsity in (0.13, 0.4, 0.65):
        shares = input_shares(cuts, sparsity)
        thresholds = input_thresholds(arch, cuts, sparsity)
        found = [seen.share_below(unit, t[0]) for unit, t in enumerate(thresholds.values())]
        np.testing.assert_allclose(found, shares, atol=0.01)
        assert expected_sparsity(arch, cuts, thresholds) == pytest.approx(sparsity, abs=2e-3)


def test_the_fit_leaves_the_model_alone_and_repeats_to_the_bit(tiny_model: LoadedModel, made: CompressedModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.module.state_dict().items()}
    assert made_of(tiny_model).sha256 == made.sha256
    after = tiny_model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = compress(tiny_model, Recipe.for_model(tiny_model, WEIGHTS))
    assert all(torch.equal(plain.tensors()[name], made.tensors()[name]) for name in plain.tensors())


def test_units_that_cost_more_are_spared(tiny_model: LoadedModel) -> None:
    """Solved shares against the same share everywhere: less divergence from the weights whole, at the same sparsity."""
    solved, uniform = (made_of(tiny_model, allocation=name) for name in ("solved", "uniform"))
    whole = open_engine(uniform, engine="reference")
    text = calibration(tiny_model)
    damage = []
    for made in (solved, uniform):
        engine = open_engine(made, engine="reference", plan=input_plan(made.architecture, cuts_of(made), 0.5))
        damage.append(mean_kl(whole, engine, text))
    assert damage[0] < damage[1]


def mean_kl(whole: Any, engine: Any, text: list[list[int]]) -> float:
    found = []
    for window in text:
        for (_, p), (_, q) in zip(whole.log_probabilities(window), engine.log_probabilities(window), strict=True):
            found.append((np.exp(p) * (p - q)).sum(axis=1).mean())
    return float(np.mean(found))


def test_protected_blocks_and_first_tokens_are_whole(tiny_model: LoadedModel) -> None:
    made = made_of(tiny_model, protected=(1,), first=3, targets=(0.2, 0.5))
    arch, cuts = made.architecture, cuts_of(made)
    of_block = [i for i, unit in enumerate(arch.units) if unit.block == 1]
    assert (cuts.shares[:, of_block] == 0).all()
    assert cuts.shares[-1].sum() > 0
    assert int(cuts.first) == 3
    trace: list[StepTrace] = []
    open_engine(made, engine="reference", plan=input_plan(arch, cuts, 0.5)).score(tokens(2, 30), trace=trace)  # type: ignore[call-arg]
    assert [step.kept_weights == 1 for step in trace[:5]] == [True, True, True, False, False]
    with pytest.raises(RecipeError, match=r"block 3.*nearest is 2"):
        made_of(tiny_model, protected=(3,))
    with pytest.raises(RecipeError, match=r"0.7 of all weights.*protect fewer"):
        made_of(tiny_model, protected=(0, 1))


@pytest.mark.parametrize("model_type", ["opt", "phi3", "gemma3_text", "qwen3"])
def test_every_family_is_fitted(make_model: Callable[..., LoadedModel], model_type: str) -> None:
    made = made_of(make_model(model_type), criterion="weighted", allocation="greedy", targets=(0.3,))
    arch = made.architecture
    trace: list[StepTrace] = []
    engine = open_engine(made, engine="reference", plan=input_plan(arch, cuts_of(made), 0.3))
    engine.score(tokens(3, 60), trace=trace)  # type: ignore[call-arg]
    assert left_out(trace) == pytest.approx(0.3, abs=0.12)


# Learnt --------------------------------------------------------------------------------------------------------------


def test_what_is_learnt_bears_sparsity_better_at_the_same_share(
    tiny_model: LoadedModel, learnt: CompressedModel
) -> None:
    """On text that nothing was fitted on, sampled with another seed, against the start of the fit."""
    plain = made_of(tiny_model, allocation="uniform", targets=(0.5,))
    whole = open_engine(plain, engine="reference")
    text = [list(w) for w in calibration_windows(tiny_model, 1024, 7, Job(), "calibration")[0]]
    damage, shares = [], []
    for made in (learnt, plain):
        engine = open_engine(made, engine="reference", plan=input_plan(made.architecture, cuts_of(made), 0.5))
        damage.append(mean_kl(whole, engine, text))
        trace: list[StepTrace] = []
        for window in text:
            engine.score(window, trace=trace)  # type: ignore[call-arg]
        shares.append(left_out(trace))
    assert damage[0] < 0.8 * damage[1]
    assert abs(shares[0] - 0.5) < 0.03
    assert shares[0] > shares[1] - 0.02  # and not by leaving out less


def test_a_learnt_table_reaches_from_nothing_to_its_target(learnt: CompressedModel) -> None:
    arch, cuts = learnt.architecture, cuts_of(learnt)
    assert len(cuts.factors) == len(arch.units)
    for sparsity in (0.0, 0.2, 0.5):
        found = expected_sparsity(arch, cuts, input_thresholds(arch, cuts, sparsity))
        assert found == pytest.approx(sparsity, abs=5e-3)
    with pytest.raises(InputError, match=r"0.6 is not possible.*0 to 0.5"):
        input_plan(arch, cuts, 0.6)


def test_the_gradient_of_a_mask_is_that_of_a_sigmoid() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    factors, cut = torch.randn(5, requires_grad=True), torch.tensor(-0.3, requires_grad=True)
    masked, share, rise = SoftMask.apply(x, factors, cut, 2)
    kept = x.detach().abs() * factors.detach().exp() > cut.detach().exp()
    kept[:2] = True
    torch.testing.assert_close(masked, x * kept)
    assert float(share.detach()) == pytest.approx(1 - float(kept[2:].float().mean()))
    found = torch.autograd.grad((masked * g).sum() + 3 * share, (x, factors, cut))
    soft = torch.sigmoid((x.detach().abs().log() + factors - cut) / soft_masks._WIDTH)
    loss = (x.detach() * g * soft)[2:].sum() + 3 * (1 - soft[2:].mean())
    expected = torch.autograd.grad(loss, (factors, cut), retain_graph=True)
    torch.testing.assert_close(found[0], g * kept)
    torch.testing.assert_close(found[1:], expected)
    torch.testing.assert_close(rise, torch.autograd.grad(1 - soft[2:].mean(), cut)[0])


def test_teachers_differ_and_several_targets_are_learnt(tiny_model: LoadedModel) -> None:
    found = {}
    for teacher in ("compressed", "dense"):
        config = LEARNT.model_copy(update={"teacher": teacher, "targets": (0.3, 0.6), "learning_steps": 4})
        found[teacher] = cuts_of(compress(tiny_model, Recipe.for_model(tiny_model, WEIGHTS, config)))
        assert found[teacher].targets.tolist() == pytest.approx([0.3, 0.6])
    one, other = (np.concatenate(list(cuts.factors.values())) for cuts in found.values())
    assert not np.array_equal(one, other)
    assert not any(parameter.requires_grad for parameter in tiny_model.module.parameters())


def test_what_is_fitted_to_is_what_will_run(tiny_model: LoadedModel) -> None:
    """Stored weights in place of the dense ones, embedding and output layer too, against the engine."""
    from workbench.apply.draft import Draft
    from workbench.apply.registry import handler
    from workbench.apply.stored_weights import stored_weights

    draft = Draft(tiny_model)
    config = RtnConfig(bits=3, group_size=16, output_bits=3)
    method = handler(config)
    method.apply(draft, config, method.fit(draft, config, seed=0, job=Job()), job=Job())
    text, made = tokens(4, 30), compress(tiny_model, Recipe.for_model(tiny_model, config))
    with stored_weights(draft):
        inside = tiny_model.module(torch.tensor([text])).logits[0].log_softmax(1)
    engine = open_engine(made, engine="reference")
    expected = np.concatenate([rows for _, rows in engine.log_probabilities(text)])
    np.testing.assert_allclose(inside.detach().numpy(), expected, atol=1e-4)


def test_an_interrupted_fit_goes_on_and_gives_the_same_bytes(
    make_model: Callable[..., LoadedModel], learnt: CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled_at(stage: str, done: int) -> Job:
        def listen(state: JobState) -> None:
            if state.stage.startswith(stage) and state.done >= done:
                job.cancel()

        job = Job(listen)
        return job

    steps: list[int] = []
    take = learn_cuts._Learner.take_step

    def counted(self: Any, masks: Any, state: Any, *rest: Any) -> None:
        take(self, masks, state, *rest)
        steps.append(state.step)

    monkeypatch.setattr(learn_cuts._Learner, "take_step", counted)
    with Store(tmp_path) as store:
        for stage, done in (("measure inputs", 1), ("learn which", 25)):
            model = make_model()
            with pytest.raises(Cancelled):
                fitted(store, model, Recipe.for_model(model, WEIGHTS, LEARNT), cancelled_at(stage, done))
        model = make_model()
        made = fitted(store, model, Recipe.for_model(model, WEIGHTS, LEARNT))
    assert made.sha256 == learnt.sha256
    assert steps.count(19) == 1  # kept at 20 steps, and not taken again
    assert steps.count(22) == 2


@pytest.mark.parametrize("allocation", ["greedy", "solved"])
def test_interrupted_splits_go_on(
    make_model: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    calls: list[str] = []
    for name in ("greedy_path", "unit_damage"):
        function = getattr(input_sparsity, name)
        monkeypatch.setattr(
            input_sparsity, name, lambda *a, _f=function, _n=name, **k: (calls.append(_n), _f(*a, **k))[1]
        )
    config = CUTS.model_copy(update={"allocation": allocation, "targets": (0.1,)})
    expected = compress(model := make_model(), Recipe.for_model(model, WEIGHTS, config)).sha256
    whole = len(calls)

    def listen(state: JobState) -> None:
        if state.stage.startswith(("split", "measure what")) and state.done >= 2:
            job.cancel()

    job = Job(listen)
    with Store(tmp_path) as store:
        model = make_model()
        with pytest.raises(Cancelled):
            fitted(store, model, Recipe.for_model(model, WEIGHTS, config), job)
        model = make_model()
        assert fitted(store, model, Recipe.for_model(model, WEIGHTS, config)).sha256 == expected
    assert len(calls) <= 2 * whole + 1


# Storage -------------------------------------------------------------------------------------------------------------


def test_what_is_stored_comes_back_and_is_counted(
    tiny_model: LoadedModel, learnt: CompressedModel, tmp_path: Path
) -> None:
    plain = compress(tiny_model, Recipe.for_model(tiny_model, WEIGHTS))
    cuts = cuts_of(learnt)
    n_weights = sum(linear.n_weights for linear in learnt.architecture.linears)
    assert learnt.effective_bits == pytest.approx(plain.effective_bits + cuts.stored_bits / n_weights)
    assert learnt.weight_bytes == plain.weight_bytes + cuts.stored_bits // 8
    loaded = CompressedModel.load(learnt.save(tmp_path / "m"))
    assert loaded.sha256 == learnt.sha256
    for name, array in cuts_of(loaded).arrays().items():
        np.testing.assert_array_equal(array, cuts.arrays()[name])
        assert array.dtype == cuts.arrays()[name].dtype
    # The cpu engine reads the folder without torch, and passes over what belongs to no matrix.
    same = [
        open_engine(target, engine="cpu", activation_mode="fp32").score(tokens(5, 20))
        for target in (loaded.folder, plain)
    ]  # fmt: skip
    np.testing.assert_array_equal(*same)


def _without(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.pop(f"input_cuts.{name}")


def _with(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, np.ndarray]], object]:
    def damage(arrays: dict[str, np.ndarray]) -> None:
        key = f"input_cuts.{name}"
        arrays[key] = np.asarray(change(arrays[key].copy()))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without("quantiles"), "lack 'quantiles'"),
        (_without("criterion"), "lack 'criterion'"),
        (_without("factors.3"), "lack the factors of blocks.0.down"),
        (lambda a: a.update({"input_cuts.more": np.zeros(2)}), "unknown part 'more'"),
        (lambda a: a.update({"input_cuts.factors.99": np.ones(2, np.float16)}), "unknown part"),
        (_with("quantiles", lambda x: x.astype(np.float64)), "quantiles is float64"),
        (_with("quantiles", lambda x: x[:-1]), "expected finite float32"),
        (_with("quantiles", lambda x: x[:, ::-1].copy()), "do not ascend"),
        (_with("quantiles", lambda x: x * np.float32("nan")), "expected finite"),
        (_with("quantiles", lambda x: -x[:, ::-1].copy()), "do not ascend"),
        (_with("quantiles", lambda x: x[0, 0]), "quantiles is float32 ()"),
        (_with("targets", lambda x: x[:0]), "shares is float32"),
        (_with("targets", lambda x: x * 3), "between 0 and 1"),
        (_with("targets", lambda x: x * np.float32(0.9)), "do not add up"),
        (_with("shares", lambda x: -x), "not between 0 and 1"),
        (_with("shares", lambda x: x * np.float32(0.9)), "do not add up"),
        (_with("criterion", lambda x: np.int8(7)), "none of magnitude"),
        (_with("criterion", lambda x: np.int8(0)), "unknown part"),
        (_with("first", lambda x: np.int32(0)), "fewer than 1"),
        (_with("texts", lambda x: np.int32(0)), "fewer than 1"),
        (_with("factors.0", lambda x: x * 0), "not all positive"),
        (_with("factors.0", lambda x: x[1:]), "factors of blocks.0.qkv"),
    ],
)
def test_damaged_tables_are_refused(
    learnt: CompressedModel, damage: Callable[[dict[str, np.ndarray]], object], says: str
) -> None:
    arrays = dict(cuts_of(learnt).arrays())
    damage(arrays)
    with pytest.raises(IntegrityError) as error:
        InputCuts.from_arrays(arrays, learnt.architecture)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_folder_names_itself(learnt: CompressedModel, tmp_path: Path) -> None:
    strange = dataclasses.replace(cuts_of(learnt), texts=np.array(0, dtype=np.int32))
    folder = dataclasses.replace(learnt, input_cuts=strange, recorded_sha256=None).save(tmp_path / "m")
    with pytest.raises(IntegrityError, match=r"m: The input cuts"):
        CompressedModel.load(folder)


def test_thresholds_and_shares_are_inverse() -> None:
    quantiles = np.quantile(np.random.default_rng(0).random(9999) ** 2, quantile_levels(64)).astype(np.float32)
    assert threshold(quantiles, 0.0) == 0
    for share in (0.001, 0.2, 0.5, 0.93):
        assert share_below(quantiles, threshold(quantiles, share)) == pytest.approx(share, abs=1e-4)


# Plans ---------------------------------------------------------------------------------------------------------------


def test_no_sparsity_is_dense_to_the_bit(made: CompressedModel, learnt: CompressedModel) -> None:
    for model in (made, learnt):
        plan = input_plan(model.architecture, cuts_of(model), 0.0)
        found, expected = (
            open_engine(model, engine="reference", plan=given).score(tokens(6, 50)) for given in (plan, None)
        )
        np.testing.assert_array_equal(found, expected)


def test_a_plan_says_what_share_of_inputs_it_expects_to_keep(made: CompressedModel) -> None:
    arch, cuts = made.architecture, cuts_of(made)
    for sparsity in (0.0, 0.3, 0.5):
        consumers = input_plan(arch, cuts, sparsity).consumers
        expected = [c.expected for c in consumers]
        assert expected == pytest.approx(1 - input_shares(cuts, sparsity))
        left = sum((1 - e) * u.n_weights for e, u in zip(expected, arch.units, strict=True))  # type: ignore[operator]
        assert left / sum(u.n_weights for u in arch.units) == pytest.approx(sparsity, abs=1e-5)


def test_more_is_left_out_where_more_is_asked_for(made: CompressedModel) -> None:
    found = []
    for sparsity in (0.0, 0.15, 0.3, 0.5, 0.7):
        engine = open_engine(
            made, engine="reference", plan=input_plan(made.architecture, cuts_of(made), sparsity)
        )  # fmt: skip
        trace: list[StepTrace] = []
        engine.score(tokens(7, 80), trace=trace)  # type: ignore[call-arg]
        assert trace[0].kept_weights == 1  # the first token
        found.append(left_out(trace[1:]))
    assert found == sorted(found)
    np.testing.assert_allclose(found, (0.0, 0.15, 0.3, 0.5, 0.7), atol=0.06)  # other text than that of calibration


def test_a_policy_changes_the_sparsity_of_a_running_text(learnt: CompressedModel) -> None:
    arch, cuts = learnt.architecture, cuts_of(learnt)
    engine = open_engine(learnt, engine="reference", plan=input_plan(arch, cuts, 0.0))
    sequence = engine.start()
    engine.prefill(sequence, tokens(8, 10))
    for sparsity in (0.5, 0.1, 0.0, 0.3):
        engine.set_policy(input_policy(arch, cuts, sparsity))
        for token in tokens(9, 8):
            engine.step([sequence], [token])
        assert left_out(sequence.trace[-8:]) == pytest.approx(sparsity, abs=0.1)
    engine.set_policy(input_policy(arch, cuts, 0.5))
    fresh = open_engine(learnt, engine="reference", plan=input_plan(arch, cuts, 0.5))
    np.testing.assert_array_equal(engine.score(tokens(10, 30)), fresh.score(tokens(10, 30)))


def test_later_text_changes_nothing_before_it(made: CompressedModel) -> None:
    engine = open_engine(made, engine="reference", plan=input_plan(made.architecture, cuts_of(made), 0.5))
    one, traces = tokens(11, 60), ([], [])
    found = [
        engine.score(text, trace=trace)  # type: ignore[call-arg]
        for text, trace in zip((one, one[:30] + tokens(12, 30)), traces, strict=True)
    ]
    np.testing.assert_allclose(found[0][:29], found[1][:29], atol=1e-5)
    assert [step.kept_weights for step in traces[0][:30]] == [step.kept_weights for step in traces[1][:30]]
    # Token by token it is the same as all at once.
    sequence = engine.start()
    rows = [engine.prefill(sequence, one[:1])] + [engine.step([sequence], [token])[0] for token in one[1:20]]
    at_once = np.concatenate([block for _, block in engine.log_probabilities(one[:20])])
    logs = np.stack(rows) - np.log(np.exp(np.stack(rows)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logs, at_once, atol=1e-3)


def test_what_plans_refuse(made: CompressedModel) -> None:
    arch, cuts = made.architecture, cuts_of(made)
    for sparsity in (-0.1, 0.71, float("nan")):
        with pytest.raises(InputError, match=r"is not possible with this model: give 0 to 0\.7"):
            input_plan(arch, cuts, sparsity)
    with pytest.raises(EngineError, match="cannot be kept whole"):
        input_plan(arch, cuts, 0.3, first=-1)
    with pytest.raises(EngineError, match=r"no threshold for the slot 'cut\.blocks\.0\.qkv'"):
        expected_sparsity(arch, cuts, {})
    assert input_plan(arch, cuts, 0.3, first=0).deciders[0].program.first == 0  # type: ignore[attr-defined]


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([{"method": "input-sparsity"}], ["no method that stores the weights", "'rtn'"]),
        ([{"method": "input-sparsity"}, {"method": "rtn"}], ["comes before", "put it after"]),
        ([{"method": "rtn"}, {"method": "input-sparsity"}, {"method": "input-sparsity"}], ["there twice"]),
        ([{"method": "rtn"}, {"method": "input-sparsity"}, {"method": "tune"}], ["after 'input-sparsity'"]),
        (
            [{"method": "nested"}, {"method": "dynamic-precision"}, {"method": "input-sparsity"}],
            ["'dynamic-precision' and methods[2] 'input-sparsity'", "keep one"],
        ),
        (
            [{"method": "rtn"}, {"method": "input-sparsity"}, {"method": "predicted-sparsity"}],
            ["'input-sparsity' and methods[2] 'predicted-sparsity'", "keep one"],
        ),
        ([{"method": "tender"}, {"method": "input-sparsity"}], ["'tender' rounds them to integers", "such as 'rtn'"]),
        ([{"method": "bnb-int8"}, {"method": "input-sparsity"}], ["'bnb-int8' rounds"]),
        ([{"method": "rtn"}, {"method": "input-sparsity", "targets": []}], ["at least one share"]),
        ([{"method": "rtn"}, {"method": "input-sparsity", "targets": [0.5, 0.4]}], ["nearest is [0.4, 0.5]"]),
        ([{"method": "rtn"}, {"method": "input-sparsity", "targets": [40]}], ["0.05 to 0.85", "nearest is [0.85]"]),
        ([{"method": "rtn"}, {"method": "input-sparsity", "first": 0}], ["first = 0", "at least 1"]),
        ([{"method": "rtn"}, {"method": "input-sparsity", "protected": [2, 1]}], ["numbered from 0 and ascend"]),
        ([{"method": "rtn"}, {"method": "input-sparsity", "criterion": "norm"}], ["criterion = 'norm'"]),
        ([{"method": "rtn"}, {"method": "input-sparsity", "teacher": "rtn"}], ["teacher = 'rtn'"]),
    ],
)
def test_recipes_are_refused_in_one_line(methods: list[dict[str, Any]], says: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.model_validate({"model": "m", "methods": methods})
    message = str(error.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_dense_weights_take_it_and_a_recipe_survives_json(tiny_model: LoadedModel) -> None:
    recipe = Recipe.for_model(tiny_model, RtnConfig(bits=16), CUTS.model_copy(update={"allocation": "uniform"}))
    assert Recipe.model_validate(json.loads(recipe.canonical())) == recipe
    assert recipe.learns
    assert recipe.label == "input-sparsity"
    made = compress(tiny_model, recipe)
    assert cuts_of(made).highest == pytest.approx(0.7)


def test_a_model_whose_outputs_overflow_is_refused(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    with torch.no_grad():
        model.linear_module("blocks.1.down").weight[:] = 1e38
    with pytest.raises(RecipeError, match="not finite"):
        compress(model, Recipe.for_model(model, RtnConfig(bits=16), CUTS))
