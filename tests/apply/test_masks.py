"""Predicted masks: what is learnt and stored, the plans that follow at any sparsity, and that they are causal."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from workbench.analysis.divergence import final_states, log_probabilities
from workbench.apply.compress import compress
from workbench.apply.configs import fewest_tokens, sampled_length, window_length
from workbench.apply.mask_examples import Examples, Span, collect
from workbench.apply.mask_net import MaskNet, per_layer_spec, unified_spec
from workbench.apply.mask_training import regress
from workbench.apply.mask_tuning import MaskedRun, limits_of, tune
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.errors import Cancelled, CorpusError, InputError, IntegrityError, RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.mask_predictor import PREFIX, MaskPredictor, mask_groups
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.base import StepTrace
from workbench.runtime.mask_shares import expected_shares, floors_of, mask_of_scores, mask_sparsity, mask_thresholds
from workbench.runtime.masks import constant_mask, mask_plan, mask_policy, oracle_decisions, predictor_groups
from workbench.runtime.plan import Scope, Tap

SPARSE = PredictedSparsityConfig(
    tap="attention_output",
    width=16,
    prefix=8,
    epochs=4,
    decisions_per_text=24,
    calibration_tokens=1024,
    aggregates=("magnitude", "weighted"),
)


def recipe(model: LoadedModel, **changes: object) -> Recipe:
    rtn = RtnConfig(bits=8, group_size=16)
    return Recipe.for_model(model, rtn, PredictedSparsityConfig.model_validate(SPARSE.model_dump() | changes))


@pytest.fixture(scope="module")
def made(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    model = make_model()
    return compress(model, recipe(model))


@pytest.fixture(scope="module")
def chosen(made: CompressedModel) -> MaskPredictor:
    assert made.mask_predictor is not None
    return made.mask_predictor


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def test_the_predictor_is_stored_counted_and_read_back(made: CompressedModel, tmp_path: Path) -> None:
    again = CompressedModel.load(made.save(tmp_path / "model"))
    assert again.mask_predictor is not None
    assert made.mask_predictor is not None
    before, after = made.mask_predictor.arrays(), again.mask_predictor.arrays()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    without = dataclasses.replace(made, mask_predictor=None)
    assert again.sha256 == made.sha256 != without.sha256
    added = sum(array.nbytes for array in before.values())
    weights = sum(linear.n_weights for linear in made.architecture.linears)
    assert made.weight_bytes - without.weight_bytes == added
    assert made.effective_bits - without.effective_bits == pytest.approx(8 * added / weights)


DAMAGES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "missing": lambda arrays: arrays.pop(f"{PREFIX}rows.0"),
    "nothing said": lambda arrays: arrays.pop(f"{PREFIX}said"),
    "said in no JSON": lambda arrays: arrays.update({f"{PREFIX}said": np.frombuffer(b"{]", np.uint8).copy()}),
    "too much": lambda arrays: arrays.update({f"{PREFIX}more": np.zeros(3, np.float32)}),
    "another type": lambda arrays: arrays.update({f"{PREFIX}rows.0": arrays[f"{PREFIX}rows.0"].astype(np.float32)}),
    "another shape": lambda arrays: arrays.update({f"{PREFIX}mean.0": arrays[f"{PREFIX}mean.0"][1:]}),
    "not finite": lambda arrays: arrays.update({f"{PREFIX}scale": arrays[f"{PREFIX}scale"] * np.float32(np.nan)}),
    "a scale of zero": lambda arrays: arrays.update({f"{PREFIX}scale": arrays[f"{PREFIX}scale"] * 0}),
    "quantiles that fall": lambda arrays: arrays.update(
        {f"{PREFIX}quantiles": arrays[f"{PREFIX}quantiles"][:, ::-1].copy()}
    ),
    "groups that do not follow": lambda arrays: _say(
        arrays, b'"attention_output", 0, 0, 4', b'"attention_output", 0, 1, 4'
    ),
    "a block that is not there": lambda arrays: _say(arrays, b'"first_block": 1', b'"first_block": 7'),
    "an unknown scope": lambda arrays: _say(arrays, b'"token"', b'"never"'),
}


def _say(arrays: dict[str, np.ndarray], old: bytes, new: bytes) -> None:
    said = arrays[f"{PREFIX}said"].tobytes()
    assert old in said
    arrays[f"{PREFIX}said"] = np.frombuffer(said.replace(old, new), np.uint8).copy()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_predictor_is_refused_in_one_line(
    chosen: MaskPredictor, made: CompressedModel, damage: Callable[[dict[str, np.ndarray]], Any]
) -> None:
    arrays = chosen.arrays()
    damage(arrays)
    with pytest.raises(IntegrityError, match="compress the model again") as error:
        MaskPredictor.from_arrays(arrays, made.architecture)
    assert "\n" not in str(error.value)


def test_a_damaged_file_names_its_folder(made: CompressedModel, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "model")
    arrays = load_file(folder / "weights.safetensors")
    del arrays[f"{PREFIX}scale"]
    save_file(arrays, folder / "weights.safetensors")
    with pytest.raises(IntegrityError):
        CompressedModel.load(folder)


@pytest.mark.parametrize("predictor", ["unified", "per-layer"])
@pytest.mark.parametrize("scope", ["token", "every", "reply"])
def test_fits_are_equal_and_resume(make_model: Callable[..., LoadedModel], predictor: str, scope: str) -> None:
    """A fit that is stopped again and again, each time with what was finished before, ends in the same bytes."""
    model = make_model()
    wanted = recipe(model, predictor=predictor, scope=scope, n=4, tune_steps=3, span=8)
    whole = compress(model, wanted)

    class Place:
        def __init__(self) -> None:
            self.held: dict[str, bytes] = {}
            self.room = 3

        def read_bytes(self, part: str) -> bytes | None:
            return self.held.get(part)

        def write_bytes(self, part: str, content: bytes) -> None:
            self.held[part] = content
            self.room -= 1
            if self.room == 0:
                raise Cancelled("stopped")

    places: dict[str, Place] = {}
    stops = 0
    for _ in range(50):
        for place in places.values():
            place.room = 3
        try:
            again = compress(make_model(), wanted, keep=lambda r: places.setdefault(r.sha256, Place()))
            break
        except Cancelled:
            stops += 1
    assert stops >= 1
    assert again.sha256 == whole.sha256


def test_a_planted_rule_is_learnt(make_model: Callable[..., LoadedModel]) -> None:
    """Scores that follow from the tap through a small network are predicted on texts that were not seen."""
    architecture = make_model().architecture
    spec = unified_spec(architecture)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, architecture.hidden_size, generator=generator)
    x = x / x.square().mean(dim=1, keepdim=True).sqrt()
    inner = torch.relu(
        x @ torch.randn(architecture.hidden_size, 4, generator=generator) / architecture.hidden_size**0.5
    )
    targets = []
    for group in spec.groups:
        rows = torch.rand(4, group.size, generator=generator)
        targets.append(((inner @ rows + 0.5).square()).bfloat16())
    examples = Examples(torch.arange(4000) // 20, {spec.taps[0]: x}, targets, {}, 0)
    net = MaskNet(architecture, spec, 32, seed=0)
    found = regress(net, examples, 30, seed=0)
    assert found.errors[0] == 1.0
    assert min(found.errors) < 0.1
    predicted = net.parts[0](x[:200]).detach()
    rounded = net.rounded()[0].scores(x[:200].numpy())
    spread = predicted.std(dim=0).mean()
    assert float((torch.from_numpy(rounded) - predicted).abs().mean()) < 0.05 * float(spread)


def test_what_cannot_be_predicted_is_not(make_model: Callable[..., LoadedModel]) -> None:
    """On noise the held-out error is the variance: early stopping keeps the means, not what fits the noise."""
    architecture = make_model().architecture
    spec = unified_spec(architecture)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, architecture.hidden_size, generator=generator)
    targets = [torch.rand(400, group.size, generator=generator).bfloat16() for group in spec.groups]
    net = MaskNet(architecture, spec, 32, seed=0)
    found = regress(net, Examples(torch.arange(400) // 5, {spec.taps[0]: x}, targets, {}, 0), 30, seed=0)
    assert min(found.errors) > 0.98
    assert float(net.parts[0](x).detach().std(dim=0).mean()) < 0.03


@pytest.mark.parametrize("allocation", ["local", "global", "hybrid", "joint"])
@pytest.mark.parametrize("sparsity", [0.2, 0.35])
def test_thresholds_hold_the_sparsity_on_held_out_text(
    chosen: MaskPredictor, made: CompressedModel, allocation: Any, sparsity: float
) -> None:
    architecture = made.architecture
    thresholds = mask_thresholds(architecture, chosen, sparsity, allocation=allocation)
    groups = predictor_groups(architecture, chosen)
    shares = expected_shares(chosen, thresholds)
    left = sum(share * g.size * g.weights for share, g in zip(shares, groups, strict=True))
    total = sum(g.size * g.weights for g in mask_groups(architecture))
    assert left / total == pytest.approx(sparsity, abs=0.02)
    assert (mask_thresholds(architecture, chosen, sparsity + 0.1, allocation=allocation) >= thresholds).all()


def test_protected_blocks_stay_whole_and_the_others_make_up_for_them(
    chosen: MaskPredictor, made: CompressedModel
) -> None:
    architecture = made.architecture
    groups = predictor_groups(architecture, chosen)
    shares = expected_shares(chosen, mask_thresholds(architecture, chosen, 0.2, allocation="local", protected=[2]))
    assert all((share == 0) == (group.block == 2) for share, group in zip(shares, groups, strict=True))
    assert shares[0] == pytest.approx(0.6, abs=0.01)  # one block of three does it all
    with pytest.raises(InputError, match=r"ask for at most 0\.\d+, or protect fewer"):
        mask_plan(architecture, chosen, 0.5, protected=[2])
    with pytest.raises(InputError, match="no block 9"):
        mask_plan(architecture, chosen, 0.2, protected=[9])


@pytest.mark.parametrize("kind", ["static", "random", "magnitude"])
@pytest.mark.parametrize("allocation", ["local", "hybrid", "joint"])
def test_fixed_masks_hold_the_sparsity_to_a_unit(
    chosen: MaskPredictor, made: CompressedModel, kind: Any, allocation: Any
) -> None:
    architecture = made.architecture
    groups = predictor_groups(architecture, chosen)
    mask = constant_mask(architecture, chosen, 0.3, kind=kind, allocation=allocation)
    found = float(mask_sparsity(architecture, groups, mask))
    head = max(group.weights for group in groups) / sum(g.size * g.weights for g in mask_groups(architecture))
    assert abs(found - 0.3) <= 1.05 * head
    assert kind != "random" or (mask != constant_mask(architecture, chosen, 0.3, kind=kind, seed=1)).any()


def test_floors_are_kept(chosen: MaskPredictor, made: CompressedModel) -> None:
    architecture = made.architecture
    groups = predictor_groups(architecture, chosen)
    scores = [np.full(g.size, 1e-6 if g.block == 1 else 1.0) * (1 + np.arange(g.size) / 100) for g in groups]
    # Not divided by its mean, the weak block would be left out whole.
    mask = mask_of_scores(architecture, groups, scores, 0.33, allocation="joint")
    kept = np.split(mask, np.cumsum([g.size for g in groups])[:-1])
    assert kept[0].sum() == 1
    assert kept[1].sum() == 3
    assert kept[0][-1]
    assert kept[1][-3:].all()


@pytest.mark.parametrize("changes", [{}, {"predictor": "per-layer"}, {"scope": "every", "n": 4}, {"scope": "reply"}])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_masks_in_training_are_those_of_the_engine(
    make_model: Callable[..., LoadedModel], changes: dict[str, Any], family: str
) -> None:
    """The differentiable run that predictors are tuned in gives what the reference engine gives under the plan."""
    model = make_model(family)
    sparse = compress(model, recipe(model, **changes, aggregates=[], span=8)).mask_predictor
    assert sparse is not None
    config = PredictedSparsityConfig.model_validate(SPARSE.model_dump() | changes)
    span = Span(config.scope, config.n if config.scope == "every" else 1, 8, config.prefix)
    per_layer = config.predictor == "per-layer"
    spec = per_layer_spec(model.architecture) if per_layer else unified_spec(model.architecture)
    net = MaskNet(model.architecture, spec, config.width, seed=1)
    net.load_rounded(sparse.parts)
    limits = torch.from_numpy(mask_thresholds(model.architecture, sparse, 0.3, allocation="hybrid")).float()
    ids = torch.tensor([tokens(40), tokens(40, 1)])
    floors = floors_of(predictor_groups(model.architecture, sparse), "hybrid").tolist()
    run = MaskedRun(model, net, span, limits, floors)
    with torch.no_grad():
        mine = log_probabilities(model, run.states(ids).flatten(0, 1)).view(2, 40, -1)
    plan = mask_plan(model.architecture, sparse, 0.3, allocation="hybrid")
    dense, engine = open_engine(model, engine="reference"), open_engine(model, engine="reference", plan=plan)
    for row in range(2):
        text = ids[row].tolist()
        trace: list[StepTrace] = []
        found = [p for _, p in engine.log_probabilities(text, prompt_length=config.prefix, trace=trace)]
        whole = np.concatenate([p for _, p in dense.log_probabilities(text)])
        theirs = np.concatenate(found)
        assert np.abs(theirs - mine[row].numpy()).max() < 0.1 < np.abs(theirs - whole).max()
        assert np.abs(theirs - whole)[: config.prefix].max() < 1e-4  # the prefix is whole
        kept = [np.concatenate([np.asarray(d).ravel() for d in step.decisions.values()]) for step in trace]
        assert all(mask.all() for mask in kept[: config.prefix])
        assert not kept[config.prefix].all()
    assert run.kept < 1


def test_masks_are_causal(make_model: Callable[..., LoadedModel], chosen: MaskPredictor) -> None:
    """What later tokens are changes no earlier prediction."""
    model = make_model()
    engine = open_engine(model, engine="reference", plan=mask_plan(model.architecture, chosen, 0.3))
    a, b = tokens(40), [*tokens(40)[:25], *tokens(15, seed=5)]
    rows = [np.concatenate([p for _, p in engine.log_probabilities(text)]) for text in (a, b)]
    assert np.allclose(rows[0][:25], rows[1][:25], atol=1e-5)
    assert not np.allclose(rows[0][25:], rows[1][25:], atol=1e-2)


def test_a_policy_moves_the_sparsity_of_a_running_plan(
    make_model: Callable[..., LoadedModel], chosen: MaskPredictor
) -> None:
    model = make_model()
    architecture = model.architecture
    engine = open_engine(model, engine="reference", plan=mask_plan(architecture, chosen, 0.1))
    other = open_engine(model, engine="reference", plan=mask_plan(architecture, chosen, 0.4))
    engine.set_policy(mask_policy(architecture, chosen, 0.4))
    assert np.array_equal(engine.score(tokens(30)), other.score(tokens(30)))


def test_oracle_masks_are_replayed_and_hold_the_sparsity(
    make_model: Callable[..., LoadedModel], chosen: MaskPredictor
) -> None:
    model = make_model()
    architecture = model.architecture
    groups = predictor_groups(architecture, chosen)
    text = tokens(30)
    scores = np.random.default_rng(0).random((30, sum(g.size for g in groups)))
    recorded = oracle_decisions(architecture, chosen, scores, 0.3)
    engine = open_engine(model, engine="reference", plan=mask_plan(architecture, chosen, 0.3, kind="oracle"))
    trace: list[StepTrace] = []
    list(engine.log_probabilities(text, replay=recorded, trace=trace))
    for step, wanted in zip(trace, recorded, strict=True):
        (mask,) = step.decisions.values()
        assert np.array_equal(np.asarray(mask, np.uint8), *wanted.values())
    left = mask_sparsity(architecture, groups, np.stack([next(iter(r.values())) for r in recorded]))
    assert (left[:8] == 0).all()
    assert np.abs(left[8:] - 0.3).max() < 0.05
    with pytest.raises(InputError, match="every position"):
        oracle_decisions(architecture, chosen, scores[:, 1:], 0.3)


def test_every_decision_governs_tokens_that_it_may(make_model: Callable[..., LoadedModel]) -> None:
    """Places of training are those at which the engine decides, and the tokens for which its decision is in force."""
    for span in (Span("token", prefix=5), Span("every", 4, prefix=6), Span("reply", reply=10, prefix=8)):
        deciding = span.deciding(64)
        for at, begin, end in span.places(64):
            assert begin >= at + (span.scope == "reply")
            if span.scope != "reply":
                assert (deciding[begin:end] == at).all()
        assert (deciding <= torch.arange(64)).all()
        assert (deciding[: span.prefix] == -1).all()
    with pytest.raises(CorpusError, match="shorter prefix"):
        Span("token", prefix=64).places(60)


def test_targets_are_means_over_what_is_governed(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    spec = unified_spec(model.architecture)
    windows = [tokens(24, seed) for seed in range(3)]
    single = collect(model, windows, spec, "magnitude", Span("token", prefix=8))
    spread = collect(model, windows, spec, "magnitude", Span("every", 4, prefix=8))
    for one, four in zip(single.targets, spread.targets, strict=True):
        wanted = one.float().view(3, 4, 4, -1).mean(dim=2).flatten(0, 1)
        assert torch.allclose(wanted, four.float(), rtol=0.02)
    tap = spec.taps[0]
    assert torch.equal(single.inputs[tap].view(3, 16, -1)[:, ::4], spread.inputs[tap].view(3, 4, -1))
    assert spread.texts.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("per_layer", [False, True])
def test_tuning_takes_off_divergence(make_model: Callable[..., LoadedModel], per_layer: bool) -> None:
    model = make_model()
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    spec = per_layer_spec(model.architecture) if per_layer else unified_spec(model.architecture)
    windows = [tokens(32, seed) for seed in range(16)]
    examples = collect(model, windows, spec, "plainact", Span("token", prefix=8))
    net = MaskNet(model.architecture, spec, 16, seed=0)
    scale = regress(net, examples, 3, seed=0).scale
    losses = tune(model, net, scale, windows, Span("token", prefix=8), (0.3,), 120, batch=4)
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.module.named_parameters())


def test_limits_leave_out_the_share_of_weights(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    net = MaskNet(model.architecture, unified_spec(model.architecture), 4, seed=0)
    sizes = [(g.size, g.weights) for g in net.spec.groups]
    scores = torch.randn(50, sum(size for size, _ in sizes), generator=torch.Generator().manual_seed(0))
    weights = torch.cat([torch.full((size,), float(weight)) for size, weight in sizes])
    for share, limit in zip((0.2, 0.4), limits_of(net, {0: scores}, (0.2, 0.4)), strict=True):
        assert float(((scores <= limit) * weights).sum() / (50 * weights.sum())) == pytest.approx(share, abs=0.01)


BAD_RECIPES: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "first": (lambda: (SPARSE, RtnConfig()), "put it after that"),
    "alone": (lambda: (SPARSE,), "stores the weights"),
    "twice": (lambda: (RtnConfig(), SPARSE, SPARSE), "twice"),
    "with widths": (lambda: (NestedConfig(), PrecisionConfig(), SPARSE), "keep one of them"),
}


@pytest.mark.parametrize(("methods", "words"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_recipes_that_cannot_be_are_refused(
    make_model: Callable[..., LoadedModel], methods: Callable[[], tuple[Any, ...]], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.for_model(make_model(), *methods())


def test_what_the_model_cannot_give_is_refused(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    with pytest.raises(RecipeError, match="at most 2"):
        compress(model, recipe(model, whole_blocks=3))
    with pytest.raises(RecipeError, match="residual"):
        compress(model, recipe(model, whole_blocks=2))
    with pytest.raises(RecipeError, match="ascend"):
        PredictedSparsityConfig(tune_sparsities=(0.5, 0.3))
    job = Job()
    job.cancel()
    with pytest.raises(Cancelled):
        compress(model, recipe(model), job=job)


@pytest.mark.parametrize("scope", ["token", "every", "reply"])
@pytest.mark.parametrize("prefix", [0, 60, 64, 130])
def test_the_fewest_tokens_that_hold_a_decision_are_named_at_once(scope: str, prefix: int) -> None:
    asked: dict[str, Any] = {"scope": scope, "prefix": prefix}
    shortest = PredictedSparsityConfig(**asked).shortest
    span = Span(scope, 8 if scope == "every" else 1, 32, prefix)  # type: ignore[arg-type]
    assert span.places(shortest)
    with pytest.raises(CorpusError):
        span.places(shortest - 1)
    fewest = max(512, fewest_tokens(shortest))
    assert window_length(sampled_length(fewest)) >= shortest
    assert PredictedSparsityConfig(**asked, calibration_tokens=fewest).calibration_tokens == fewest
    if fewest > 512:
        with pytest.raises(RecipeError, match=rf"calibration_tokens = {fewest - 1} .* at least {fewest}"):
            PredictedSparsityConfig(**asked, calibration_tokens=fewest - 1)


def test_a_context_that_holds_no_decision_is_refused_before_sampling(make_model: Callable[..., LoadedModel]) -> None:
    model, stages = make_model(), list[str]()
    long = recipe(model, prefix=480, calibration_tokens=8192)  # the model's context is 512 tokens
    with pytest.raises(RecipeError, match="prefix = 480 is not possible"):
        compress(model, long, job=Job(lambda state: stages.append(state.stage)))
    assert not any("sample" in stage for stage in stages)


BAD_PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "too much": ({"sparsity": 0.9}, r"ask for at most 0\.5"),
    "no share": ({"sparsity": 1.5}, "from 0 to below 1"),
    "not a number": ({"sparsity": float("nan")}, "from 0 to below 1"),
    "another kind": ({"kind": "statik"}, "Did you mean 'static'"),
    "another way": ({"allocation": "locla"}, "Did you mean 'local'"),
    "no means": ({"kind": "static", "criterion": "fisher"}, "among its 'aggregates'"),
    "joint heads": ({"allocation": "joint", "heads": 0.1}, "leave 'heads' out"),
}


@pytest.mark.parametrize(("changes", "words"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_plans_that_cannot_be_are_refused(
    chosen: MaskPredictor, made: CompressedModel, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        mask_plan(made.architecture, chosen, **({"sparsity": 0.3} | changes))


def test_a_tap_of_a_later_block_keeps_the_blocks_before_whole(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    sparse = compress(model, recipe(model, tap="residual", whole_blocks=2)).mask_predictor
    assert sparse is not None
    assert sparse.parts[0].tap == "residual"
    assert sparse.first_block == 2
    plan = mask_plan(model.architecture, sparse, 0.2, scope=Scope("token"))
    plan.check()
    assert {c.target for c in plan.consumers} == {"blocks.2"}
    assert plan.deciders[0].tap == Tap("residual", 2)
    offsets = [consumer.offset for consumer in plan.consumers]
    assert offsets == [0, *itertools.accumulate([model.architecture.n_heads])]


def test_final_states_are_those_of_the_model(make_model: Callable[..., LoadedModel]) -> None:
    """A run that leaves nothing out is the dense model."""
    model = make_model()
    net = MaskNet(model.architecture, unified_spec(model.architecture), 4, seed=0)
    ids = torch.tensor([tokens(20)])
    run = MaskedRun(model, net, Span("token", prefix=4), torch.tensor(-torch.inf))
    with torch.no_grad():
        assert torch.allclose(run.states(ids)[0], final_states(model, ids).float(), atol=0.05)
    assert run.kept == pytest.approx(1)
