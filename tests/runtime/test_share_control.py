"""Shares that are held on what was asked for, on text for which thresholds of calibration give another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from workbench.apply.compress import compress
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.models import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import StepTrace
from workbench.runtime.holding import Follower, Held
from workbench.runtime.input_sparsity import input_plan, input_policy
from workbench.runtime.mask_safety import guarded_reply
from workbench.runtime.mask_shares import highest_sparsity, mask_thresholds
from workbench.runtime.masks import mask_plan, mask_policy
from workbench.runtime.plan import Plan, Policy
from workbench.runtime.share_control import ShareController

SPARSITY = 0.3
TEXT = np.random.default_rng(11).integers(0, 256, 320).tolist()


@pytest.fixture(scope="module", params=["unified", "per-layer", "inputs"])
def made(request: pytest.FixtureRequest, make_model: Callable[..., LoadedModel]) -> CompressedModel:
    """Its tables are as if from text with larger scores, or inputs: thresholds leave out far more than was asked."""
    model = make_model()
    rounded = RtnConfig(bits=8, group_size=16)
    if request.param == "inputs":
        cuts = InputSparsityConfig(allocation="uniform", calibration_tokens=1024)
        found = compress(model, Recipe.for_model(model, rounded, cuts))
        assert found.input_cuts is not None
        moved = replace(found.input_cuts, quantiles=found.input_cuts.quantiles * np.float32(1.6))
        return replace(found, input_cuts=moved)
    masks = PredictedSparsityConfig(
        predictor=request.param, width=16, prefix=8, epochs=2, decisions_per_text=24, calibration_tokens=1024
    )
    found = compress(model, Recipe.for_model(model, rounded, masks))
    assert found.mask_predictor is not None
    spread = found.mask_predictor.quantiles.std(axis=1, keepdims=True)
    return replace(
        found, mask_predictor=replace(found.mask_predictor, quantiles=found.mask_predictor.quantiles + spread / 3)
    )


def controller_of(made: CompressedModel, sparsity: float = SPARSITY, first: int | None = None) -> ShareController:
    tables = made.mask_predictor if made.mask_predictor is not None else made.input_cuts
    assert tables is not None
    return ShareController(made.architecture, tables, sparsity, first=first)


def plan_of(made: CompressedModel, sparsity: float = SPARSITY) -> Plan:
    if made.mask_predictor is not None:
        return mask_plan(made.architecture, made.mask_predictor, sparsity)
    assert made.input_cuts is not None
    return input_plan(made.architecture, made.input_cuts, sparsity)


def policy_of(made: CompressedModel, sparsity: float) -> Policy:
    if made.mask_predictor is not None:
        return mask_policy(made.architecture, made.mask_predictor, sparsity)
    assert made.input_cuts is not None
    return input_policy(made.architecture, made.input_cuts, sparsity)


def left_out(steps: Sequence[StepTrace], first: int) -> float:
    return float(np.mean([1 - step.kept_weights for step in steps if step.position >= first]))


def free_and_held(
    model: LoadedModel | CompressedModel, plan: Plan, controller: ShareController, engine: str = "cpu"
) -> tuple[Sequence[StepTrace], Sequence[StepTrace]]:
    """Steps of ``TEXT`` under the plan's own thresholds, and under the controller's."""
    opened = open_engine(model, engine=engine, plan=plan)
    try:
        free, held = opened.start(), opened.start()
        opened.prefill(free, TEXT)
        watch = Held(opened, held, controller)
        opened.prefill(held, TEXT, between=watch.look)
        watch.finish()
    finally:
        opened.close()
    return free.trace, held.trace


@pytest.mark.parametrize("slope", [0.4, 0.7, 1.5])
def test_an_average_comes_to_its_target_whatever_calibration_predicts(slope: float) -> None:
    follower, expected = Follower(0.3), 0.3
    random = np.random.default_rng(0)
    for _ in range(60):
        values = slope * expected + random.normal(0, 0.02, 8)
        follower.see(values, expected)
        expected = follower.aim()
    assert follower.average == pytest.approx(0.3, abs=0.01)
    assert expected == pytest.approx(0.3 / slope, rel=0.15)


def test_what_no_threshold_chose_is_made_up_for() -> None:
    follower = Follower(0.3)
    follower.count(np.zeros(4))
    assert follower.aim() == pytest.approx(0.3 + 4 * 0.3 / 32)
    assert follower.tokens == 4
    assert Follower(1.0).aim() == 1.0
    assert np.isnan(Follower(1.0).average)


def test_it_begins_with_the_thresholds_of_calibration(made: CompressedModel) -> None:
    controller, expected = controller_of(made), policy_of(made, SPARSITY).thresholds
    assert controller.asked == SPARSITY
    assert np.isnan(controller.realised)
    assert controller.policy.thresholds.keys() == expected.keys()
    for slot, cuts in controller.policy.thresholds.items():  # between two points of a grid
        np.testing.assert_allclose(cuts, expected[slot], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_share_is_held(made: CompressedModel, engine: str) -> None:
    controller = controller_of(made)
    free, held = free_and_held(made, plan_of(made), controller, engine)
    first = 1 if made.mask_predictor is None else 8
    off = left_out(free, first) - controller.target
    assert abs(off) > 0.05  # of thresholds of calibration
    assert controller.realised == pytest.approx(left_out(held, first), abs=1e-6)
    assert abs(controller.realised - controller.target) < min(abs(off) / 3, 0.03)


def test_no_later_token_moves_an_earlier_threshold(made: CompressedModel) -> None:
    opened = open_engine(made, engine="cpu", plan=plan_of(made))
    traces = []
    try:
        for tail in (TEXT[100:], TEXT[:99:-1]):
            controller = controller_of(made)
            opened.set_policy(controller.policy)
            sequence = opened.start()
            opened.prefill(sequence, TEXT[:100] + tail, between=Held(opened, sequence, controller).look)
            traces.append([step.kept_weights for step in sequence.trace])
    finally:
        opened.close()
    assert traces[0][:100] == traces[1][:100]
    assert traces[0] != traces[1]


def test_replies_are_held_and_dense_ones_are_not(made: CompressedModel) -> None:
    controller = controller_of(made)
    opened = open_engine(made, engine="cpu", plan=plan_of(made))
    try:
        sequence, reply, _ = guarded_reply(opened, None, TEXT[:40], 100, controller=controller)
        assert len(reply) == 100
        first = 1 if made.mask_predictor is None else 8
        assert controller.realised == pytest.approx(left_out(sequence.trace, first), abs=1e-6)
        assert controller.realised == pytest.approx(controller.target, abs=0.06)
        free = opened.start()
        opened.prefill(free, TEXT[:60])  # thresholds are the plan's own again
        fresh = open_engine(made, engine="cpu", plan=plan_of(made))
        expected = fresh.start()
        fresh.prefill(expected, TEXT[:60])
        fresh.close()
        assert [step.kept_weights for step in free.trace] == [step.kept_weights for step in expected.trace]
        if made.mask_predictor is not None:
            other = controller_of(made)
            dense, _, _ = guarded_reply(opened, None, TEXT[:40], 20, controller=other, important=True)
            assert np.isnan(other.realised)
            assert {step.kept_weights for step in dense.trace} == {1.0}
    finally:
        opened.close()


def test_first_tokens_are_not_counted(made: CompressedModel) -> None:
    controller = controller_of(made, first=5)
    controller.observe([StepTrace(at, 0, 0.0, 0, kept_weights=1.0) for at in range(5)])
    assert np.isnan(controller.realised)
    controller.observe([StepTrace(5, 0, 0.0, 0, kept_weights=1.0)])
    assert controller.realised == 0
    assert controller.asked > SPARSITY


def test_a_share_beyond_the_tables_stays_at_their_end(made: CompressedModel) -> None:
    controller = controller_of(made)
    for at in range(100):
        controller.observe([StepTrace(100 + at, 0, 0.0, 0, kept_weights=1.0)])
    highest = controller.asked
    assert SPARSITY < highest <= 0.9
    if made.input_cuts is None:
        policy_of(made, highest)  # no error: tables have it
    else:  # what nobody may ask for, and what holds the highest of their targets where it must
        assert made.input_cuts.highest < highest
    for at in range(2000):
        controller.observe([StepTrace(300 + at, 0, 0.0, 0, kept_weights=0.0)])
    assert controller.asked == pytest.approx(SPARSITY / 3)


def test_the_highest_target_of_inputs_is_held_too(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    cuts = InputSparsityConfig(allocation="uniform", calibration_tokens=1024, targets=(0.4,), protected=(0,))
    found = compress(model, Recipe.for_model(model, RtnConfig(bits=8, group_size=16), cuts)).input_cuts
    assert found is not None
    smaller = replace(found, quantiles=found.quantiles / np.float32(1.6))  # thresholds leave out too little
    controller = ShareController(model.architecture, smaller, 0.4)
    free, _ = free_and_held(model, input_plan(model.architecture, smaller, 0.4), controller)
    assert left_out(free, 1) < 0.35
    assert controller.realised == pytest.approx(0.4, abs=0.02)
    assert controller.asked > 0.4
    for slot in (f"cut.{unit.id}" for unit in model.architecture.units if unit.block == 0):
        assert controller.policy.thresholds[slot] == (0.0,)  # what is protected stays whole
    for asked in (0.401, 0.41, 0.6):  # nobody may ask for what lies beyond it
        with pytest.raises(InputError, match="not possible"):
            ShareController(model.architecture, smaller, asked)


def test_nothing_is_held_at_no_sparsity(made: CompressedModel) -> None:
    with pytest.raises(InputError, match="leaves nothing to hold"):
        controller_of(made, 0.0)
    with pytest.raises(InputError, match="not possible"):
        controller_of(made, 0.99)


@pytest.mark.parametrize("options", [{}, {"allocation": "joint"}, {"allocation": "global"}, {"protected": (1,)}])
def test_the_highest_sparsity_is_the_last_that_can_be_asked(made: CompressedModel, options: dict) -> None:
    if made.mask_predictor is None:
        pytest.skip("of masks")
    highest = highest_sparsity(made.architecture, made.mask_predictor, **options)
    assert 0 < highest < 1
    mask_thresholds(made.architecture, made.mask_predictor, highest, **options)
    with pytest.raises(InputError, match="not possible"):
        mask_thresholds(made.architecture, made.mask_predictor, highest + 1e-3, **options)
