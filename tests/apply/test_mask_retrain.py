"""A predictor trained on from logged features: better on such text, of the same shape, and by its own thresholds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workbench.apply.compress import compress
from workbench.apply.mask_retrain import retrained
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.formats.mask_predictor import MaskPredictor
from workbench.models import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.feature_log import FeatureLog, FeatureReader
from workbench.runtime.mask_safety import MaskWatch, guarded_reply, site_of
from workbench.runtime.mask_shares import expected_left_out, mask_thresholds
from workbench.runtime.masks import mask_plan


def unlike(seed: int, count: int = 40) -> list[int]:
    """Text of a few tokens alone, which a model hardly samples."""
    return np.random.default_rng(seed).choice([40, 41, 50, 60, 61, 62], count).tolist()


@pytest.fixture(scope="module")
def made(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    model = make_model()
    masks = PredictedSparsityConfig(
        criterion="magnitude", width=16, prefix=4, epochs=2, decisions_per_text=24, calibration_tokens=1024
    )
    return compress(model, Recipe.for_model(model, RtnConfig(bits=8, group_size=16), masks))


def predictor_of(made: CompressedModel) -> MaskPredictor:
    assert made.mask_predictor is not None
    return made.mask_predictor


@pytest.fixture(scope="module")
def log(made: CompressedModel) -> FeatureLog:
    predictor = predictor_of(made)
    found = FeatureLog.empty(made.sha256, predictor)
    sites = tuple(site_of(made.architecture, part) for part in predictor.parts)
    reader = FeatureReader(made.architecture, predictor, sites, found)
    engine = open_engine(made, plan=mask_plan(made.architecture, predictor, 0.3), threads=1)
    for seed in range(24):
        guarded_reply(engine, None, unlike(seed), 1, important=True, features=(found, reader))
    engine.close()
    return found


def test_it_predicts_such_text_better_and_holds_its_share_there(made: CompressedModel, log: FeatureLog) -> None:
    predictor = predictor_of(made)
    found = retrained(made.architecture, predictor, log, epochs=30)
    assert found.after < found.before
    again = retrained(made.architecture, predictor, log, epochs=30)
    for name, array in found.predictor.arrays().items():
        np.testing.assert_array_equal(array, again.predictor.arrays()[name], err_msg=name)
    shapes = [{n: a.shape[1:] for n, a in one.arrays().items()} for one in (predictor, found.predictor)]
    assert shapes[0] == shapes[1]
    engine = open_engine(made, plan=mask_plan(made.architecture, found.predictor, 0.3), threads=1)
    sequence = engine.start()
    engine.generate(sequence, unlike(99, 60), 1)
    left_out = np.mean([1 - step.kept_weights for step in sequence.trace[4:]])
    engine.close()
    wanted = expected_left_out(
        made.architecture, found.predictor, mask_thresholds(made.architecture, found.predictor, 0.3)
    )
    assert left_out == pytest.approx(wanted, abs=0.04)
    assert 0.5 < MaskWatch(made.architecture, found.predictor, 0.3).lowest < 1


def test_a_model_with_it_is_written_and_read(made: CompressedModel, log: FeatureLog, tmp_path: Path) -> None:
    found = retrained(made.architecture, predictor_of(made), log, epochs=2)
    other = replace(made, mask_predictor=found.predictor, folder=None, recorded_sha256=None)
    again = CompressedModel.load(other.save(tmp_path / "model"))
    assert again.mask_predictor is not None
    for name, array in found.predictor.arrays().items():
        np.testing.assert_array_equal(array, again.mask_predictor.arrays()[name], err_msg=name)


def test_too_little_and_what_is_not_known_is_refused(made: CompressedModel, log: FeatureLog) -> None:
    predictor = predictor_of(made)
    few = replace(log, inputs=[rows[:200] for rows in log.inputs], scores=log.scores[:200], requests=log.requests[:200])
    with pytest.raises(InputError, match="200 tokens in"):
        retrained(made.architecture, predictor, few)
    with pytest.raises(InputError, match="in 1 requests"):
        retrained(made.architecture, predictor, replace(log, requests=np.full_like(log.requests, 7)))
    other = replace(predictor, facts=dict(predictor.facts) | {"criterion": "plainact"})
    with pytest.raises(InputError, match="not known while running"):
        retrained(made.architecture, other, log)
