"""Dynamic precision: what is measured and learnt, what is stored of it, and the plans that follow for any target."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.analysis.divergence import dense_states
from workbench.analysis.gains import token_gains
from workbench.apply.allocation import allocate, gain_damage, learnt_damage
from workbench.apply.compress import compress
from workbench.apply.estimators import refine, regress, unit_errors
from workbench.apply.learn_precision import learn_precision
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.corpus import open_text
from workbench.corpus import windows as corpus_windows
from workbench.errors import Cancelled, EngineError, InputError, IntegrityError, RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.nested import Nested, NestedCodes
from workbench.formats.selectors import Selectors
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.base import StepTrace
from workbench.runtime.holding import Held
from workbench.runtime.plan import Policy, ProjectionLevels
from workbench.runtime.precision import (
    cuts_of,
    expected_bits,
    gain_thresholds,
    learnt_precision,
    precision_plan,
    target_range,
)
from workbench.runtime.precision_control import PrecisionController
from workbench.runtime.precision_log import PrecisionLog, retuned

NESTED = NestedConfig(widths=(2, 3, 5), group_size=16, fit="rounded")
PRECISION = PrecisionConfig(targets=(2.5, 4.0), learning_steps=3, projection_rows=4, calibration_tokens=1024)


def recipe(model: LoadedModel, **changes: object) -> Recipe:
    return Recipe.for_model(model, NESTED, PRECISION.model_copy(update=changes))


@pytest.fixture(scope="module")
def made(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    model = make_model()
    return compress(model, recipe(model))


@pytest.fixture(scope="module")
def chosen(made: CompressedModel) -> Selectors:
    assert made.selectors is not None
    return made.selectors


@pytest.fixture(scope="module")
def uneven(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    """Made of a model whose norms have weights that differ, as training leaves them.

    With ones, inputs behind a norm are of one length to the last bits, and a unit's tokens move all at once.
    """
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
    return compress(model, recipe(model))


def codes_of(model: CompressedModel) -> dict[str, NestedCodes]:
    return {name: encoding.codes for name, encoding in model.linears.items() if isinstance(encoding, Nested)}


def windows(seed: int = 0, count: int = 3, length: int = 48) -> list[list[int]]:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def bits_read(model: CompressedModel, step: StepTrace) -> float:
    sizes = {unit.id: unit.n_weights for unit in model.architecture.units}
    widths = (2, 3, 5)
    return sum(n * widths[int(step.decisions[name])] for name, n in sizes.items()) / sum(sizes.values())


def test_the_fit_leaves_the_model_alone_and_repeats_to_the_bit(tiny_model: LoadedModel, made: CompressedModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.module.state_dict().items()}
    again = compress(tiny_model, recipe(tiny_model))
    assert again.sha256 == made.sha256
    after = tiny_model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in tiny_model.module.parameters())


def test_gains_are_what_widening_one_unit_takes_off_the_divergence(
    tiny_model: LoadedModel, made: CompressedModel
) -> None:
    """Against the difference that is measured by switching one unit, the others half way, on the same text."""
    from workbench.analysis.divergence import divergence, final_states, in_place_of_dense

    codes = codes_of(made)
    text = windows(1, 2)
    gains = token_gains(tiny_model, codes, 3, 5, text, dense_states(tiny_model, text), Job()).sum(axis=0)
    half = {name: torch.lerp(c.dequantize(3), c.dequantize(5), 0.5) for name, c in codes.items()}

    def total(changed: dict[str, torch.Tensor]) -> float:
        weights = {name: torch.nn.Parameter(w, requires_grad=False) for name, w in {**half, **changed}.items()}
        found = 0.0
        for window in text:
            ids = torch.tensor([window])
            with torch.no_grad():
                dense = final_states(tiny_model, ids)
                with in_place_of_dense(tiny_model, weights):
                    found += float(divergence(tiny_model, dense, ids)) * len(window)
        return found

    measured = []
    for unit in tiny_model.architecture.units:
        low, high = ({x.id: codes[x.id].dequantize(bits) for x in unit.linears} for bits in (3, 5))
        measured.append(total(low) - total(high))
    assert np.corrcoef(gains, measured)[0, 1] > 0.95
    np.testing.assert_allclose(gains.sum(), np.sum(measured), rtol=0.2)


def test_learnt_precision_meets_its_target_and_spares_what_matters(
    tiny_model: LoadedModel, made: CompressedModel
) -> None:
    codes = codes_of(made)
    highest = {unit.id: 5 for unit in tiny_model.architecture.units}
    highest["blocks.1.o"] = 2
    text = windows(2, 4)
    found = learn_precision(tiny_model, codes, highest, text, dense_states(tiny_model, text), 3.2, 24, Job())
    assert found["blocks.1.o"] == 2  # its only width
    assert all(2 <= value <= 5 for value in found.values())
    sizes = {unit.id: unit.n_weights for unit in tiny_model.architecture.units}
    average = sum(sizes[name] * value for name, value in found.items()) / sum(sizes.values())
    assert average == pytest.approx(3.2, abs=0.1)
    assert np.std(list(found.values())) > 0.05


def test_refined_projections_estimate_errors_no_worse(tiny_model: LoadedModel, made: CompressedModel) -> None:
    for one in unit_errors(tiny_model, codes_of(made), windows(3, 6), 24, 0, Job()):
        for step in range(2):
            rows, steps = refine(one.rows[step], one.projected[:, step], one.errors[:, step])
            assert rows.dtype == np.int8
            assert len(rows) == len(steps) <= 24
            exact = np.square(one.errors[:, step], dtype=np.float64)
            random = np.square(one.projected[:, step]).sum(axis=1)
            # The refined rows stand for weights w >= 0 on the squares; scaling all alike is one choice among them.
            scaled = random * (random @ exact) / (random @ random)
            # Inputs that give the same projections: rows are multiples of those of the projection.
            inputs = np.linalg.lstsq(one.rows[step], one.projected[:, step].T, rcond=None)[0].T
            refined = np.square((inputs @ rows.T.astype(np.float32)) * steps).sum(axis=1)
            assert np.square(refined - exact).sum() <= 1.05 * np.square(scaled - exact).sum()


def test_regression_knows_a_line() -> None:
    x = np.linspace(1, 3, 50, dtype=np.float32)
    np.testing.assert_allclose(regress(x, 2 * x + 1), [2, 1, 1], atol=1e-5)
    assert regress(x, np.ones(50, np.float32))[2] == 0
    assert regress(np.ones(50, np.float32), x)[0] == 0


@pytest.mark.parametrize("target", [2.0, 2.4, 3.0, 3.7, 4.9, 5.0])
def test_thresholds_hold_the_target_on_calibration_text(
    made: CompressedModel, chosen: Selectors, target: float
) -> None:
    arch = made.architecture
    cuts = cuts_of(arch, chosen, gain_thresholds(arch, chosen, target))
    # Behind a norm without weights, as in this random model, inputs are of one length to the last bits: where such a
    # unit is the next to be read wider, all its tokens are at once, and no thresholds meet the target any nearer.
    dearer, cheaper = (expected_bits(arch, chosen, cuts * factor) for factor in (1 + 1e-5, 1 - 1e-5))
    assert dearer - 0.02 <= target <= cheaper + 0.02
    assert dearer <= expected_bits(arch, chosen, cuts) <= cheaper
    assert (np.diff(cuts, axis=1) >= 0).all()


@pytest.mark.parametrize("rule", ["gain", "error"])
def test_plans_read_about_their_target_and_engines_agree(
    tiny_model: LoadedModel, made: CompressedModel, chosen: Selectors, rule: str
) -> None:
    text = windows(4, 1, 200)[0]
    averages = []
    for target in (2.5, 3.25, 4.0):
        plan = precision_plan(made.architecture, chosen, target, rule)  # type: ignore[arg-type]
        traces: list[list[StepTrace]] = [[], []]
        engines = [open_engine(made, engine=name, plan=plan, activation_mode="fp32") for name in ("reference", "cpu")]
        for engine, trace in zip(engines, traces, strict=True):
            engine.score(text, trace=trace)  # type: ignore[call-arg]
        decisions = [[s.decisions for s in trace] for trace in traces]
        same = [a[unit.id] == b[unit.id] for a, b in zip(*decisions, strict=True) for unit in made.architecture.units]
        assert np.mean(same) > 0.98  # where a score lies at its threshold, rounding decides, and moves what follows
        found = [e.score(text, replay=decisions[1]) for e in engines]  # type: ignore[call-arg]
        np.testing.assert_allclose(*found, atol=2e-3)
        used = {c.target: c.widths for c in plan.consumers}
        averages.append(
            np.mean(
                [
                    sum(
                        unit.n_weights * used[unit.id][int(step.decisions[unit.id])] for unit in made.architecture.units
                    )
                    for step in traces[1]
                ]
            )
            / sum(unit.n_weights for unit in made.architecture.units)
        )
    assert averages == sorted(averages)
    np.testing.assert_allclose(averages, (2.5, 3.25, 4.0), atol=0.5)  # other text than it was calibrated on


def test_a_units_worth_decides_and_the_first_token_is_read_widest(made: CompressedModel, chosen: Selectors) -> None:
    arch = made.architecture
    gains = np.full_like(chosen.gains, 1e-6)
    gains[0] = 1.0
    changed = dataclasses.replace(chosen, gains=gains)
    share = arch.units[0].n_weights / sum(unit.n_weights for unit in arch.units)
    thresholds = gain_thresholds(arch, changed, 2 + 3 * share)
    trace: list[StepTrace] = []
    engine = open_engine(made, engine="cpu", plan=precision_plan(arch, changed, 2 + 3 * share))
    engine.score(windows(5, 1)[0], trace=trace)  # type: ignore[call-arg]
    assert max(thresholds[arch.units[0].id]) < min(min(thresholds[unit.id]) for unit in arch.units[1:])
    assert all(step.decisions[arch.units[0].id] == 2 for step in trace)
    assert set(trace[0].decisions.values()) == {2.0}


def test_changing_the_target_takes_effect_at_the_next_token(made: CompressedModel, chosen: Selectors) -> None:
    arch = made.architecture
    engine = open_engine(made, engine="cpu", plan=precision_plan(arch, chosen, 2.3))
    sequence = engine.start()
    engine.prefill(sequence, windows(6, 1, 20)[0])
    for target, expected in ((5.0, 5.0), (2.0, 2.0)):
        engine.set_policy(Policy(thresholds=gain_thresholds(arch, chosen, target)))
        engine.step([sequence], [7])
        assert bits_read(made, sequence.trace[-1]) == pytest.approx(expected, abs=0.35)


def test_later_text_changes_no_earlier_choice(made: CompressedModel, chosen: Selectors) -> None:
    for rule in ("gain", "error"):
        plan = precision_plan(made.architecture, chosen, 3.0, rule)  # type: ignore[arg-type]
        engine = open_engine(made, engine="cpu", plan=plan)
        traces: list[list[StepTrace]] = [[], []]
        one = windows(7, 1, 60)[0]
        engine.score(one, trace=traces[0])  # type: ignore[call-arg]
        engine.score(one[:30] + windows(8, 1, 30)[0], trace=traces[1])  # type: ignore[call-arg]
        assert [s.decisions for s in traces[0][:30]] == [s.decisions for s in traces[1][:30]]


def test_the_controller_brings_strange_text_back_to_the_target(made: CompressedModel, chosen: Selectors) -> None:
    """Calibration norms that are too low: thresholds alone read too much, held ones do not."""
    arch = made.architecture
    strange = dataclasses.replace(chosen, norms=chosen.norms * np.float32(0.8), power=chosen.power * np.float32(0.64))
    target = 3.0
    engine = open_engine(made, engine="cpu", plan=precision_plan(arch, strange, target))
    text = windows(9, 24, 128)

    def run(controller: PrecisionController | None) -> float:
        read: list[float] = []
        for window in text:
            if controller is not None:
                engine.set_policy(controller.policy)
            trace: list[StepTrace] = []
            engine.score(window, trace=trace)  # type: ignore[call-arg]
            read += [bits_read(made, step) for step in trace]
            if controller is not None:
                controller.observe(trace)
        return float(np.mean(read))

    alone = run(None)
    controller = PrecisionController(arch, strange, target)
    held = run(controller)
    assert controller.realised == pytest.approx(held)
    assert abs(held - target) < 0.05 < abs(alone - target)


@pytest.mark.parametrize("engine_name", ["reference", "cpu"])
@pytest.mark.parametrize("length", [40, 300])
def test_the_average_is_held_while_a_prompt_is_read(uneven: CompressedModel, engine_name: str, length: int) -> None:
    """Also where calibration norms are too low or too high, and the first token is read at the widest."""
    arch, chosen, prompt = uneven.architecture, uneven.selectors, windows(13, 1, length)[0]
    assert chosen is not None
    for factor in (0.85, 1.0, 1.2):
        strange = dataclasses.replace(
            chosen, norms=chosen.norms * np.float32(factor), power=chosen.power * np.float32(factor**2)
        )
        for target in (3.0, 4.0):
            engine = open_engine(uneven, engine=engine_name, plan=precision_plan(arch, strange, target))
            controller = PrecisionController(arch, strange, target)
            sequence = engine.start()
            watched = Held(engine, sequence, controller)
            engine.generate(sequence, prompt, 1, on_token=watched, between=watched.look)
            watched.finish()
            assert sequence.position == length
            read = float(np.mean([bits_read(uneven, step) for step in sequence.trace]))
            assert controller.realised == pytest.approx(read)
            assert abs(read - target) < (0.05 if length == 300 else 0.25)


def test_pieces_of_a_prompt_change_nothing_but_later_thresholds(made: CompressedModel, chosen: Selectors) -> None:
    """Read in pieces, a prompt gives the same; and what is looked at between two of them was read before."""
    arch, prompt = made.architecture, windows(14, 1, 90)[0]
    for name in ("reference", "cpu"):
        engine = open_engine(made, engine=name, plan=precision_plan(arch, chosen, 3.0), activation_mode="fp32")
        whole, pieces = engine.start(), engine.start()
        seen: list[int] = []

        def note(seen: list[int] = seen, sequence: Any = pieces) -> None:
            seen.append(sequence.position)

        expected = engine.prefill(whole, prompt)
        np.testing.assert_allclose(engine.prefill(pieces, prompt, between=note), expected, atol=2e-3)
        assert [s.decisions for s in pieces.trace] == [s.decisions for s in whole.trace]
        assert pieces.prompt_length == whole.prompt_length == 90
        ends = [*seen, 90]
        assert seen[0] == 8
        assert all(end - begin <= max(8, begin // 4) for begin, end in itertools.pairwise(ends))
        # Another ending of the prompt changes no choice before it, with thresholds that move on the way.
        traces = []
        for ending in (prompt[60:], windows(15, 1, 30)[0]):
            sequence = engine.start()
            watched = Held(engine, sequence, PrecisionController(arch, chosen, 3.0))
            engine.set_policy(watched.controller.policy)
            engine.prefill(sequence, prompt[:60] + ending, between=watched.look)
            traces.append([step.decisions for step in sequence.trace[:60]])
        assert traces[0] == traces[1]


def test_strange_text_is_said_and_may_be_read_at_the_widest(
    tiny_model: LoadedModel, made: CompressedModel, chosen: Selectors
) -> None:
    """Text that the model samples is like that of calibration; with other norms it is not."""
    arch = made.architecture
    strange = dataclasses.replace(chosen, norms=chosen.norms * np.float32(0.5), power=chosen.power * np.float32(0.25))
    corpus = open_text("self", "evaluation", model=tiny_model, n_tokens=1024, length=128)
    prompts = [one.tokens for one in corpus_windows(corpus, tiny_model, 100)]
    for selectors, expected in ((strange, 1.0), (chosen, 0.0)):
        said = []
        for prompt in prompts[:3]:
            for hold in (False, True):
                engine = open_engine(made, engine="cpu", plan=precision_plan(arch, selectors, 3.0))
                controller = PrecisionController(arch, selectors, 3.0, hold=hold, fail_safe=True)
                sequence = engine.start()
                watched = Held(engine, sequence, controller)
                engine.generate(sequence, prompt, 20, on_token=watched, between=watched.look)
                watched.finish()
                said.append(bool(controller.warning))
                assert controller.realised == pytest.approx(np.mean([bits_read(made, s) for s in sequence.trace]))
                widest = [bits_read(made, s) == pytest.approx(5.0) for s in sequence.trace[1:]]
                if said[-1]:  # from some token on, all of them
                    assert widest[-1]
                    assert controller.watch.outside[0] in controller.warning
                    assert all(widest[max(i for i, one in enumerate(widest) if not one) + 1 :])
                    assert controller.policy.thresholds[arch.units[0].id] == (-np.inf, -np.inf)
                else:
                    assert not all(widest)
        assert np.mean(said) == expected


def test_a_log_counts_what_was_chosen_and_keeps_no_text(
    made: CompressedModel, chosen: Selectors, tmp_path: Path
) -> None:
    arch = made.architecture
    thresholds = gain_thresholds(arch, chosen, 3.2)
    engine = open_engine(made, engine="cpu", plan=precision_plan(arch, chosen, 3.2))
    log = PrecisionLog.empty(made.sha256, chosen)
    traces: list[StepTrace] = []
    for window in windows(11, 3, 100):
        trace: list[StepTrace] = []
        engine.score(window, trace=trace)  # type: ignore[call-arg]
        log = log.added(arch, trace, thresholds)
        traces += trace[1:]
    assert log.tokens == 3 * 99
    for index, unit in enumerate(arch.units):
        levels = np.array([step.decisions[unit.id] for step in traces])
        assert log.above[index].tolist() == [(levels > 0).sum(), (levels > 1).sum()]
        np.testing.assert_allclose(np.exp(log.log_cuts[index] / log.tokens), thresholds[unit.id], rtol=1e-6)
    path = log.save(tmp_path / "log.json")
    assert set(json.loads(path.read_text())) == {"schema", "model", "tokens", "read", "log_cuts"}
    back = PrecisionLog.load(path, made.sha256, chosen)
    np.testing.assert_array_equal(back.above, log.above)
    np.testing.assert_array_equal(back.log_cuts, log.log_cuts)
    assert back.tokens == log.tokens


def test_a_log_that_was_changed_is_refused_in_plain_words(
    made: CompressedModel, chosen: Selectors, tmp_path: Path
) -> None:
    arch, path, trace = made.architecture, tmp_path / "log.json", list[StepTrace]()
    open_engine(made, engine="cpu", plan=precision_plan(arch, chosen, 3.2)).score(windows(12)[0], trace=trace)  # type: ignore[call-arg]
    log = PrecisionLog.empty(made.sha256, chosen).added(arch, trace, gain_thresholds(arch, chosen, 3.2))
    whole = json.loads(log.save(path).read_text())
    other = [[n + (unit == 0) for n in row] for unit, row in enumerate(whole["read"])]
    for changed, words in (
        ({"model": "0" * 64}, "another model"),
        ({"tokens": log.tokens - 1}, "contradicts itself"),
        ({"tokens": 10 * log.tokens}, "contradicts itself"),
        ({"tokens": "many"}, "was changed"),
        ({"read": other}, "contradicts itself"),
        ({"read": whole["read"][:-1]}, "was changed"),
        ({"log_cuts": [row[::-1] for row in whole["log_cuts"]]}, "contradicts itself"),
        ({"log_cuts": [["x"]]}, "was changed"),
        ({"schema": 1}, "not a log of precision of this version"),
    ):
        path.write_text(json.dumps(whole | changed))
        with pytest.raises(InputError, match=words) as found:
            PrecisionLog.load(path, made.sha256, chosen)
        assert "\n" not in str(found.value)
    for text in ("{}", "[]", "not json", json.dumps({k: v for k, v in whole.items() if k != "read"})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"not a log of precision.*generate --log") as found:
            PrecisionLog.load(path, made.sha256, chosen)
        assert not any(words in str(found.value) for words in ("'read'", "column", "Expecting"))


def test_retuning_finds_how_norms_have_moved(chosen: Selectors) -> None:
    """Every unit's norms are spread evenly, and moved by a factor of its own; counts alone tell it."""
    random = np.random.default_rng(0)
    n_units, n_levels = chosen.norms.shape
    norms = np.tile(np.linspace(1, 2, n_levels, dtype=np.float32), (n_units, 1))
    calibrated = dataclasses.replace(chosen, norms=norms, power=np.square(norms).mean(axis=1))
    factors = random.uniform(0.8, 1.25, n_units)
    seen = random.uniform(1, 2, (4000, n_units)) * factors
    cuts = np.stack([np.full(n_units, 1.45), np.full(n_units, 1.9)], axis=1)
    above = (seen[:, :, None] > cuts).sum(axis=0).astype(np.float64)
    above[0] = 4000  # of this unit no step tells
    found = retuned(calibrated, PrecisionLog("m", 4000, above, 4000 * np.log(cuts)))
    measured = found.norms[:, 0] / norms[:, 0]
    np.testing.assert_allclose(measured[1:], factors[1:], rtol=0.03)
    assert measured[0] == pytest.approx(np.median(measured[1:]), rel=1e-5)
    np.testing.assert_allclose(found.power, calibrated.power * measured**2, rtol=1e-5)
    with pytest.raises(InputError, match="too few"):
        retuned(calibrated, PrecisionLog("m", 100, above, cuts))


def test_static_allocations_are_exact(made: CompressedModel, chosen: Selectors) -> None:
    arch = made.architecture
    for target in (2.5, 3.5, 4.5):
        for damage in (gain_damage(arch, chosen), learnt_damage(arch, chosen, target)):
            found = allocate(damage, target)
            weights = sum(unit.n_weights for unit in arch.units)
            average = sum(unit.n_weights * found[unit.id] for unit in arch.units) / weights
            assert target - 0.25 < average <= target + 1e-9
    low, high = target_range(arch, chosen)
    assert (low, high) == pytest.approx((2.0, 5.0))
    precision = learnt_precision(arch, chosen, 2.0)
    np.testing.assert_array_equal(precision, 2.0)
    np.testing.assert_array_equal(learnt_precision(arch, chosen, 5.0), 5.0)


def test_memory_is_bounded_by_dropping_planes(tiny_model: LoadedModel, made: CompressedModel) -> None:
    bounded = compress(tiny_model, recipe(tiny_model, memory_bits=3.4, targets=()))
    selectors = bounded.selectors
    assert selectors is not None
    assert selectors.projections == {}
    sizes = np.array([unit.n_weights for unit in bounded.architecture.units])
    assert (selectors.highest * sizes).sum() / sizes.sum() <= 3.4
    assert len(set(selectors.highest.tolist())) > 1
    for index, unit in enumerate(bounded.architecture.units):
        for linear in unit.linears:
            encoding, whole = bounded.linears[linear.id], made.linears[linear.id]
            assert encoding.bits == selectors.highest[index]  # type: ignore[attr-defined]
            for bits in encoding.widths:  # type: ignore[attr-defined]
                assert torch.equal(encoding.dequantize(bits), whole.dequantize(bits))
    _, high = target_range(bounded.architecture, selectors)
    plan = precision_plan(bounded.architecture, selectors, 2.8)
    scores = [
        open_engine(bounded, engine=n, plan=plan, activation_mode="fp32").score(windows(1, 1)[0])
        for n in ("reference", "cpu")
    ]
    np.testing.assert_allclose(*scores, atol=2e-3)
    with pytest.raises(InputError, match="not possible"):
        precision_plan(bounded.architecture, selectors, high + 0.1)
    with pytest.raises(EngineError, match="learnt"):
        precision_plan(bounded.architecture, selectors, 2.8, "error")


def test_selectors_come_back_from_disk_and_are_counted(made: CompressedModel, tmp_path: Path) -> None:
    made.save(tmp_path / "m")
    back = CompressedModel.load(tmp_path / "m")
    assert back.sha256 == made.sha256
    assert back.selectors is not None
    assert made.selectors is not None
    for name, array in made.selectors.arrays().items():
        np.testing.assert_array_equal(back.selectors.arrays()[name], array)
    weights = sum(linear.n_weights for linear in made.architecture.linears)
    plain = sum(e.stored_bits for e in made.linears.values()) / weights
    assert made.effective_bits == pytest.approx(plain + made.selectors.stored_bits / weights)
    open_engine(tmp_path / "m", engine="cpu").score([1, 2, 3])  # without torch's part of the model


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "unknown", "orphan", "widths"])
def test_damaged_selectors_are_refused(made: CompressedModel, chosen: Selectors, fault: str) -> None:
    arrays = dict(chosen.arrays())
    if fault == "missing":
        del arrays["selectors.gains"]
    elif fault == "shape":
        arrays["selectors.power"] = arrays["selectors.power"][:-1]
    elif fault == "nan":
        arrays["selectors.norms"] = arrays["selectors.norms"] * np.float32(np.nan)
    elif fault == "unknown":
        arrays["selectors.other"] = np.zeros(1)
    elif fault == "orphan":
        arrays["selectors.rows.99.0"] = np.zeros((1, 48), np.int8)
    else:
        arrays["selectors.widths"] = arrays["selectors.widths"][::-1].copy()
    with pytest.raises(IntegrityError, match="compress"):
        Selectors.from_arrays(arrays, made.architecture)


def test_a_fit_goes_on_from_the_one_before(tiny_model: LoadedModel, made: CompressedModel) -> None:
    start = compress(tiny_model, Recipe.for_model(tiny_model, NESTED))
    again = compress(tiny_model, recipe(tiny_model), start=start)
    assert again.sha256 == made.sha256
    with pytest.raises(RecipeError, match="not made of this one"):
        compress(tiny_model, recipe(tiny_model), start=made)


def test_what_cannot_be_is_refused(tiny_model: LoadedModel) -> None:
    for methods, words in (
        ((PRECISION, NESTED), "comes before"),
        ((NESTED, PRECISION, PRECISION), "twice"),
        ((PRECISION,), "put 'nested'"),
        ((RtnConfig(group_size=16), PRECISION), "put 'nested'"),
        ((NESTED.model_copy(update={"widths": (4,)}), PRECISION), "two or more"),
        ((NESTED, PRECISION.model_copy(update={"targets": (6.0,)})), "between 2 and 5"),
        ((NESTED, PRECISION.model_copy(update={"targets": (2.5, 4.0), "memory_bits": 3.5})), "between 2 and 3.5"),
        ((NESTED, PRECISION.model_copy(update={"targets": (), "memory_bits": 1.0})), "nearest is 2"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.for_model(tiny_model, *methods)
    with pytest.raises(RecipeError, match="ascend"):
        PrecisionConfig(targets=(4.0, 3.0))
    job = Job()
    job.cancel()
    with pytest.raises(Cancelled):
        compress(tiny_model, recipe(tiny_model), job=job)


def test_a_target_that_memory_leaves_no_room_for_is_refused(tiny_model: LoadedModel) -> None:
    """Units have whole widths, so that their widest average a little less than the memory."""
    with pytest.raises(RecipeError, match=r"memory_bits = 3\.4"):
        compress(tiny_model, recipe(tiny_model, memory_bits=3.4, targets=(3.3999,)))


def test_projections_are_there_for_every_target_between_the_learnt(made: CompressedModel, chosen: Selectors) -> None:
    kinds = set()
    for target in np.linspace(2.5, 4.0, 7):
        plan = precision_plan(made.architecture, chosen, float(target), "error")
        kinds |= {type(decider.program) for decider in plan.deciders}
    assert ProjectionLevels in kinds
