"""What is counted of requests under predicted masks, and quantiles refitted to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.test_mask_safety import SPARSITY, made, predictor_of
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.runtime import open_engine
from workbench.runtime.mask_log import MaskLog, retuned
from workbench.runtime.mask_safety import MaskWatch, guarded_reply
from workbench.runtime.masks import mask_plan
from workbench.runtime.plan import Scope

__all__ = ["made"]  # the fixture
PROMPT = np.random.default_rng(4).integers(0, 256, 40).tolist()


def logged(
    made: CompressedModel, log: MaskLog, scope: Scope, engine: str = "reference", prompt: list[int] = PROMPT
) -> Any:
    predictor = predictor_of(made)
    opened = open_engine(made, engine=engine, plan=mask_plan(made.architecture, predictor, SPARSITY, scope=scope))
    watch = MaskWatch(made.architecture, predictor, SPARSITY)
    return guarded_reply(opened, watch, prompt, 24, guard=False, log=log)[0]


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("scope", "decisions"), [(Scope("token"), 59), (Scope("every", 8), 7), (Scope("reply"), 1)], ids=lambda v: str(v)
)
def test_every_decision_is_counted_as_it_was_taken(
    made: CompressedModel, scope: Scope, decisions: int, engine: str
) -> None:
    predictor = predictor_of(made)
    log = MaskLog.empty(made.sha256, predictor)
    sequence = logged(made, log, scope, engine)
    assert sequence.position == len(PROMPT) + 23
    assert log.decisions == decisions  # the first four positions are whole
    assert log.counts[0].sum() == decisions * made.architecture.n_heads
    assert log.counts[1].sum() == decisions * made.architecture.n_neurons
    assert log.moments[1].sum() == pytest.approx(decisions * made.architecture.hidden_size, rel=1e-3)
    left_out = np.mean([1 - step.kept_weights for step in sequence.trace[len(PROMPT) :]])
    assert log.sums["left_out"] / log.sums["steps"] == pytest.approx(left_out)
    assert (log.sums["requests"], log.sums["dense"], log.sums["confidence.count"]) == (1, 0, 1)
    if scope.kind == "token" and engine == "reference":  # what lies above the thresholds is what was kept
        program = mask_plan(made.architecture, predictor, SPARSITY, scope=scope).deciders[0].program
        masks = np.stack([step.decisions["masks"] for step in sequence.trace[4:]])
        cut = program.thresholds[1]  # type: ignore[attr-defined]
        below = np.searchsorted(predictor.quantiles[1], cut)
        kept = masks[:, 4 : 4 + made.architecture.n_neurons].sum()
        assert log.counts[1, below + 1 :].sum() <= kept <= log.counts[1, below:].sum()


def test_retuned_quantiles_are_those_of_what_was_seen(made: CompressedModel) -> None:
    predictor = predictor_of(made)
    log = MaskLog.empty(made.sha256, predictor)
    random = np.random.default_rng(0)
    taps = (random.standard_normal((400, 48)) + 1.5 * np.eye(48)[0]).astype(np.float32)  # unlike the calibration's
    log.see(made.architecture, predictor, 0, taps)
    new = retuned(predictor, log)
    scores = predictor.parts[0].scores(taps)
    levels = (np.arange(256) + 0.5) / 256
    begin = 0
    for index, size in enumerate([4, 96, 4, 96]):
        seen = scores[:, begin : begin + size].ravel()
        begin += size
        below = np.array([(seen <= cut).mean() for cut in new.quantiles[index]])
        before = np.array([(seen <= cut).mean() for cut in predictor.quantiles[index]])
        assert np.abs(below - levels).max() < max(0.04, 0.6 * np.abs(before - levels).max())
        assert (np.diff(new.quantiles[index]) >= 0).all()
    assert all(a is b for a, b in zip(new.parts, predictor.parts, strict=True))


def test_a_log_is_kept_without_text_and_belongs_to_its_model(made: CompressedModel, tmp_path: Path) -> None:
    predictor = predictor_of(made)
    log = MaskLog.empty(made.sha256, predictor)
    logged(made, log, Scope("token"))
    path = log.save(tmp_path / "log.json")
    again = MaskLog.load(path, made.sha256, predictor)
    assert (again.counts == log.counts).all()
    assert again.sums == log.sums
    values = json.loads(path.read_text())
    assert values.keys() == {"schema", "kind", "model", "sums", "counts", "ends", "moments"}
    with pytest.raises(InputError, match="too few"):
        retuned(predictor, again)
    with pytest.raises(InputError, match="another model"):
        MaskLog.load(path, "0" * 64, predictor)
    changes: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("contradicts", lambda v: v | {"counts": (-np.array(v["counts"])).tolist()}),
        ("does not hold", lambda v: v | {"ends": v["ends"][1:]}),
        ("lacks", lambda v: v | {"sums": {}}),
        ("of this version", lambda v: v | {"schema": 9}),
    )
    for message, change in changes:
        path.write_text(json.dumps(change(values)))
        with pytest.raises(InputError, match=message):
            MaskLog.load(path, made.sha256, predictor)
    path.write_text("{")
    with pytest.raises(InputError, match="nor any JSON"):
        MaskLog.load(path, made.sha256, predictor)
