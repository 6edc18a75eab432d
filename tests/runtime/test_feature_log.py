"""Features of dense requests: what is kept is what the model has there, of a fair sample, and of no other request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from workbench.analysis.sparsity import score_units
from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.formats.mask_predictor import MaskPredictor
from workbench.formats.rebuild import to_model
from workbench.models import LoadedModel
from workbench.runtime import feature_log, open_engine
from workbench.runtime.feature_log import FeatureLog, FeatureReader, why_no_features
from workbench.runtime.mask_safety import MaskWatch, guarded_reply, site_of
from workbench.runtime.mask_shares import predictor_groups
from workbench.runtime.masks import mask_plan

PREFIX = 4


@pytest.fixture(scope="module", params=["unified", "per-layer"])
def made(request: pytest.FixtureRequest, make_model: Callable[..., LoadedModel]) -> CompressedModel:
    model = make_model()
    masks = PredictedSparsityConfig(
        criterion="magnitude",
        predictor=request.param,
        width=16,
        prefix=PREFIX,
        epochs=2,
        decisions_per_text=24,
        calibration_tokens=1024,
    )
    return compress(model, Recipe.for_model(model, RtnConfig(bits=8, group_size=16), masks))


def predictor_of(made: CompressedModel) -> MaskPredictor:
    assert made.mask_predictor is not None
    return made.mask_predictor


def opened(made: CompressedModel) -> tuple[FeatureLog, FeatureReader]:
    predictor = predictor_of(made)
    log = FeatureLog.empty(made.sha256, predictor)
    sites = tuple(site_of(made.architecture, part) for part in predictor.parts)
    return log, FeatureReader(made.architecture, predictor, sites, log)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_what_is_kept_of_a_dense_request_is_what_the_model_has_there(made: CompressedModel, engine: str) -> None:
    predictor, architecture = predictor_of(made), made.architecture
    mode = "fp32" if engine == "cpu" else None
    running = open_engine(
        made, engine=engine, plan=mask_plan(architecture, predictor, 0.3), activation_mode=mode, threads=1
    )
    log, reader = opened(made)
    prompt = np.random.default_rng(0).integers(0, 256, 20).tolist()
    watch = MaskWatch(architecture, predictor, 0.3)
    sequence, reply, _ = guarded_reply(running, watch, prompt, 6, important=True, features=(log, reader))
    fed = [*prompt, *reply][: sequence.position]
    assert len(log.scores) == len(fed) - PREFIX
    assert log.counts.tolist() == [len(fed) - PREFIX, 1]
    by_group: dict[tuple[int, str], np.ndarray] = {}

    def sink(block: int, kind: str, found: dict[str, torch.Tensor]) -> None:
        by_group[block, kind] = found["magnitude"][0, PREFIX:].numpy()

    score_units(to_model(made), torch.tensor([fed]), ["magnitude"], sink)  # type: ignore[arg-type]
    groups = predictor_groups(architecture, predictor)
    wanted = np.concatenate([by_group[group.block, group.kind] for group in groups], axis=1)
    np.testing.assert_allclose(log.scores.astype(np.float32), wanted, rtol=2e-3, atol=1e-4)
    assert [rows.shape for rows in log.inputs] == [(len(log.scores), part.hidden.shape[1]) for part in predictor.parts]
    # A request under masks adds nothing.
    guarded_reply(running, watch, prompt, 6, guard=False, features=(log, reader))
    assert log.counts.tolist() == [len(fed) - PREFIX, 1]
    running.close()


def test_every_token_has_the_same_chance(made: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_log, "CAPACITY", 25)
    log, _ = opened(made)
    kept: dict[int, int] = {}
    for token in range(2000):
        place = log.place()
        assert token >= 25 or place == token
        if place is not None:
            assert place < 25
            kept[place] = token
    ages = np.sort(list(kept.values())) / 2000
    # The largest gap between the sample and evenly spread tokens; 1.63 / sqrt(n) is passed by one sample in a hundred.
    assert np.abs(ages - (np.arange(25) + 0.5) / 25).max() < 1.63 / 5


def test_what_is_written_is_read_by_the_same_model_alone(made: CompressedModel, tmp_path: Path) -> None:
    predictor, path = predictor_of(made), tmp_path / "features.safetensors"
    log, _ = opened(made)
    random = np.random.default_rng(1)
    for _ in range(3):
        place = log.place()
        assert place is not None
        log.put(place, [random.normal(size=rows.shape[1]) for rows in log.inputs], np.full(log.scores.shape[1], 1e9))
        log.finish()
    again = FeatureLog.load(log.save(path), made.sha256, predictor)
    pairs = zip([*log.inputs, log.scores, log.requests], [*again.inputs, again.scores, again.requests], strict=True)
    for before, after in pairs:
        np.testing.assert_array_equal(before, after)
    assert again.requests.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="another model"):
        FeatureLog.load(path, "0" * 64, predictor)
    arrays = load_file(path)
    for name, array in (
        ("counts", np.array([2, 3])),  # fewer tokens seen than are kept
        ("requests", np.array([0, 1, 3])),
        ("scores", -arrays["scores"]),
        ("inputs.0", np.full_like(arrays["inputs.0"], np.nan)),
        ("inputs.0", arrays["inputs.0"][:, 1:]),
        ("more", np.zeros(1)),
    ):
        save_file(arrays | {name: np.ascontiguousarray(array)}, tmp_path / "bad")
        with pytest.raises(InputError, match="contradicts itself"):
            FeatureLog.load(tmp_path / "bad", made.sha256, predictor)
    (tmp_path / "text").write_text("{}")
    for other, words in (("text", "holds no features"), ("none", "Cannot read")):
        with pytest.raises(InputError, match=words):
            FeatureLog.load(tmp_path / other, made.sha256, predictor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"criterion": "plainact"}, "'magnitude'"), ({"scope": "every"}, "'token'"), ({"tuned": 5}, "tune_steps 0")],
)
def test_scores_that_are_not_known_while_running_are_named(
    made: CompressedModel, changes: dict[str, object], words: str
) -> None:
    predictor = predictor_of(made)
    assert why_no_features(predictor) is None
    why = why_no_features(replace(predictor, facts=dict(predictor.facts) | changes))
    assert why is not None
    assert words in why
