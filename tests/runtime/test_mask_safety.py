"""The safety net under predicted masks: confidence and drift on planted cases, and requests that run dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.errors import InputError, IntegrityError
from workbench.formats.compressed import CompressedModel
from workbench.formats.mask_predictor import PREFIX, MaskPart, MaskPredictor, mask_groups
from workbench.formats.mask_statistics import MaskStatistics
from workbench.models import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.mask_safety import IMPORTANT, UNLIKE, UNSURE, MaskWatch, guarded_reply
from workbench.runtime.mask_shares import mask_thresholds
from workbench.runtime.masks import mask_plan
from workbench.runtime.plan import Scope

SPARSITY = 0.3
PROMPT = np.random.default_rng(3).integers(0, 256, 24).tolist()


@pytest.fixture(scope="module")
def made(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    model = make_model()
    masks = PredictedSparsityConfig(width=16, prefix=4, epochs=2, decisions_per_text=24, calibration_tokens=1024)
    return compress(model, Recipe.for_model(model, RtnConfig(bits=8, group_size=16), masks))


def predictor_of(made: CompressedModel) -> MaskPredictor:
    assert made.mask_predictor is not None
    return made.mask_predictor


def changed(predictor: MaskPredictor, **changes: Any) -> MaskPredictor:
    assert predictor.statistics is not None
    return replace(predictor, statistics=replace(predictor.statistics, **changes))


# Planted --------------------------------------------------------------------------------------------------------------

ERROR, TEXTS, WIDTH = 0.5, 200, 48
SCALES = np.random.default_rng(1).uniform(0.2, 2, WIDTH)


def text(random: np.random.Generator, length: int, scales: np.ndarray = SCALES) -> np.ndarray:
    """Taps (length, width) whose channels differ in size; those of one text lie off together, each text elsewhere."""
    return scales * (random.standard_normal((length, WIDTH)) + 0.5 * random.standard_normal(WIDTH))


@pytest.fixture
def planted(tiny_model: LoadedModel) -> MaskPredictor:
    """Scores that are the first channel, or less it: far from the thresholds where it is large."""
    architecture = tiny_model.architecture
    groups = mask_groups(architecture, range(1, architecture.n_blocks))
    units = sum(group.size for group in groups)
    hidden = np.zeros((2, WIDTH), dtype=np.int8)
    hidden[:, 0] = (1, -1)
    rows = np.tile(np.array([[1, -1], [-1, 1]], dtype=np.int8), (units // 2, 1))
    ones, zeros = np.ones(units, dtype=np.float32), np.zeros(units, dtype=np.float32)
    part = MaskPart("attention_output", 0, (0, len(groups)), hidden, ones[:2], zeros[:2], rows, ones, zeros)

    random = np.random.default_rng(0)
    first = random.normal(0, 1, 64)
    taps = np.stack([text(random, 64) for _ in range(TEXTS)])
    taps = taps / np.sqrt(np.square(taps).mean(axis=2, keepdims=True))
    lengths = np.array([8, 16, 32, 64], dtype=np.int32)
    statistics = MaskStatistics(
        np.full(len(groups), ERROR, dtype=np.float32),
        taps.mean(axis=(0, 1)).astype(np.float32),
        taps.var(axis=(0, 1)).astype(np.float32),
        np.array(TEXTS, dtype=np.int32),
        lengths,
        np.zeros((4, 2), dtype=np.float32),
        (np.maximum(np.stack([first, -first], axis=1), 0).astype(np.float16),),
    )
    logs = np.array([[np.log(statistics.distance(one[:n]).mean()) for n in lengths] for one in taps])
    drift = np.stack([logs.mean(axis=0), logs.std(axis=0, ddof=1)], axis=1).astype(np.float32)
    facts = {"criterion": "plainact", "predictor": "unified", "scope": "token", "n": 1, "prefix": 0}
    quantiles = np.tile(np.linspace(-3, 3, 61, dtype=np.float32), (len(groups), 1))
    scale = np.ones(len(groups), dtype=np.float32)
    return MaskPredictor(facts, 1, (part,), scale, quantiles, {}, replace(statistics, drift=drift))


def test_confidence_is_the_expected_share_on_the_right_side(tiny_model: LoadedModel, planted: MaskPredictor) -> None:
    watch = MaskWatch(tiny_model.architecture, planted, SPARSITY)
    cut = mask_thresholds(tiny_model.architecture, planted, SPARSITY)[1]
    taps = np.random.default_rng(2).standard_normal((40, WIDTH))
    taps[:, 0] = np.linspace(0, 20, 40)
    scores = taps[:, 0] / np.sqrt(np.square(taps).mean(axis=1))
    # What is stood for scatters about the score: how often is it on the score's side of the threshold?
    noise = np.random.default_rng(5).normal(0, ERROR, 100_000)
    found = watch.confidence([taps])
    for score, sure in zip(scores, found, strict=True):
        sides = [((one + noise > cut) == (one > cut)).mean() for one in (score, -score)]
        assert sure == pytest.approx(np.mean(sides), abs=6e-3)
    assert found[-1] > watch.lowest > 0.5  # 2 % of held-out decisions lie below
    whole = MaskWatch(tiny_model.architecture, planted, 0.0)
    assert whole.confidence([taps]).tolist() == [1.0] * 40  # nothing is chosen


@pytest.mark.parametrize("length", [8, 23, 64, 200])
def test_drift_is_calm_on_such_text_and_tells_other(
    tiny_model: LoadedModel, planted: MaskPredictor, length: int
) -> None:
    watch, statistics = MaskWatch(tiny_model.architecture, planted, SPARSITY), planted.statistics
    assert statistics is not None
    random = np.random.default_rng(9)

    def drifts(scales: np.ndarray) -> np.ndarray:
        found = [watch.drift(statistics.distance(text(random, length, scales))) for _ in range(400)]
        return np.array(found, dtype=np.float64)

    alike = drifts(SCALES)
    assert (np.abs(alike) > watch.band).mean() < 0.03  # 1 % is allowed
    assert abs(alike.mean()) < 0.25
    assert length == 200 or 0.8 < alike.std() < 1.25  # beyond what was measured the band is wider than needed
    assert (drifts(SCALES[::-1]) > watch.band).mean() > 0.95
    assert watch.drift(np.ones(7)) is None


# Requests -------------------------------------------------------------------------------------------------------------


def run(made: CompressedModel, predictor: MaskPredictor, scope: Scope, engine: str, **options: Any) -> Any:
    plan = mask_plan(made.architecture, predictor, SPARSITY, scope=scope)
    opened = open_engine(made, engine=engine, plan=plan)
    watch = MaskWatch(made.architecture, predictor, SPARSITY)
    sequence, reply, verdict = guarded_reply(opened, watch, PROMPT, 20, **options)
    other, *_ = guarded_reply(opened, None, PROMPT, 20)
    kept = [np.array([step.kept_weights for step in one.trace]) for one in (sequence, other)]
    return kept, reply, verdict


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("scope", [Scope("token"), Scope("every", 8), Scope("reply")], ids=lambda s: s.kind)
def test_requests_run_dense_whole_and_others_go_on(made: CompressedModel, scope: Scope, engine: str) -> None:
    predictor = predictor_of(made)
    dense = open_engine(made, engine=engine)
    wanted = dense.generate(dense.start(), PROMPT, 20)
    calm = changed(predictor, drift=np.float32([0, 1e3]) + 0 * predictor.statistics.drift)  # type: ignore[union-attr]
    for one, options, because in (
        (calm, {"important": True}, IMPORTANT),
        (changed(calm, drift=calm.statistics.drift * 0 + np.float32([9, 1])), {"fail_safe": True}, UNLIKE),  # type: ignore[union-attr]
    ):
        (kept, other), reply, verdict = run(made, one, scope, engine, **options)
        assert verdict.dense_because == because
        assert reply == wanted
        assert (kept == 1).all()
        assert other[-15:].min() < 0.95  # the next sequence is sparse again
    (kept, _), reply, verdict = run(made, calm, scope, engine)
    assert verdict.unsure == (verdict.confidence < verdict.lowest) == (verdict.dense_because == UNSURE)
    assert 0.5 <= verdict.confidence <= 1
    assert not verdict.unlike


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_both_engines_judge_alike_and_unsure_requests_run_dense(made: CompressedModel, engine: str) -> None:
    predictor = predictor_of(made)
    watch = MaskWatch(made.architecture, predictor, SPARSITY)
    (_, _), _, verdict = run(made, predictor, Scope("token"), engine)
    (_, _), _, other = run(made, predictor, Scope("token"), "reference")
    assert verdict.confidence == pytest.approx(other.confidence, abs=0.02)
    assert verdict.drift == pytest.approx(other.drift, rel=0.1, abs=0.1)
    # The same tap judged by its formula, from the model itself.
    assert verdict.lowest == watch.lowest
    opened = open_engine(made, engine=engine, plan=mask_plan(made.architecture, predictor, SPARSITY))
    watch.lowest = 1.0  # nothing is sure enough
    sequence, _, verdict = guarded_reply(opened, watch, PROMPT, 20)
    assert verdict.dense_because == UNSURE
    assert all(step.kept_weights == 1 for step in sequence.trace)
    watch.lowest = 0.0
    sequence, _, verdict = guarded_reply(opened, watch, PROMPT, 20)
    assert not verdict.dense_because
    assert any(step.kept_weights < 1 for step in sequence.trace)


def test_older_models_are_read_and_damaged_statistics_refused(made: CompressedModel) -> None:
    predictor = predictor_of(made)
    arrays = predictor.arrays()
    assert predictor.statistics is not None
    assert (predictor.statistics.lengths[0], len(predictor.statistics.errors)) == (8, 4)
    again = MaskPredictor.from_arrays(arrays, made.architecture)
    assert again.arrays().keys() == arrays.keys()
    older = {name: array for name, array in arrays.items() if "statistics." not in name}
    without = MaskPredictor.from_arrays(older, made.architecture)
    assert without.statistics is None
    with pytest.raises(InputError, match="compress it again"):
        MaskWatch(made.architecture, without, SPARSITY)
    for name, array in (
        ("errors", 0 * predictor.statistics.errors),
        ("variance", predictor.statistics.variance[1:]),
        ("held.0", predictor.statistics.held[0].astype(np.float32)),
        ("more", np.zeros(2, np.float32)),
    ):
        with pytest.raises(IntegrityError, match="compress the model again"):
            MaskPredictor.from_arrays(arrays | {f"{PREFIX}statistics.{name}": array}, made.architecture)
