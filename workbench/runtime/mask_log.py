"""What is remembered of text that ran under predicted masks: counts and sums of features, no text.

Where scores lay between the quantiles that the model keeps gives quantiles of the text that was read, so that a
sparsity is held on such text too (``retuned``). The network itself stays: what its scores should have been is not known
while weights are left out (``feature_log`` is of requests that run dense). Nothing puts them live: they make another
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from workbench.errors import InputError
from workbench.files import check_output_file, write_json
from workbench.formats.mask_predictor import MaskPredictor
from workbench.formats.mask_scores import by_rms
from workbench.formats.selectors import quantile_levels
from workbench.models.base import Architecture
from workbench.runtime.base import StepTrace
from workbench.runtime.logs import read_log
from workbench.runtime.mask_shares import predictor_groups

_SCHEMA, _KIND = 1, "predicted masks"
_FEWEST = 256  # decisions below which quantiles are too rough


@dataclass
class MaskLog:
    """Counts of one model, over any number of requests; G groups, K quantiles.

    Attributes:
        model: identity (SHA-256) of the compressed model.
        counts: int64 (G, K + 1), scores by how many of the group's quantiles lie below them.
        ends: float64 (G, 2), least and largest score seen; 0 before the first.
        moments: float64 (2, width), sums of the first part's tap, divided by its root mean square, and of its squares.
        sums: requests, dense requests, decisions; steps of replies and the weights left out in them; confidences and
            drifts (their number, sum and sum of squares).
    """

    model: str
    counts: np.ndarray
    ends: np.ndarray
    moments: np.ndarray
    sums: dict[str, float]

    @classmethod
    def empty(cls, model: str, predictor: MaskPredictor) -> Self:
        groups, count = predictor.quantiles.shape
        moments = np.zeros((2, predictor.parts[0].hidden.shape[1]))
        counts = np.zeros((groups, count + 1), dtype=np.int64)
        return cls(model, counts, np.zeros((groups, 2)), moments, dict.fromkeys(_SUMS, 0.0))

    @property
    def decisions(self) -> int:
        return int(self.sums["decisions"])

    def see(self, architecture: Architecture, predictor: MaskPredictor, part: int, taps: np.ndarray) -> None:
        """Count the decisions of one part at its taps (n, width)."""
        if not len(taps):
            return
        stored = predictor.parts[part]
        if part == 0:
            rows = by_rms(np.asarray(taps, dtype=np.float64))
            self.moments += np.stack([rows.sum(axis=0), np.square(rows).sum(axis=0)])
            self.sums["decisions"] += len(taps)
        scores, begin = stored.scores(taps), 0
        groups = predictor_groups(architecture, predictor)
        for index in range(*stored.groups):
            found = scores[:, begin : begin + groups[index].size].ravel()
            begin += groups[index].size
            seen = self.counts[index].any()
            low, high = float(found.min()), float(found.max())
            self.ends[index] = (min(low, self.ends[index, 0]), max(high, self.ends[index, 1])) if seen else (low, high)
            places = np.searchsorted(predictor.quantiles[index], found, side="left")
            self.counts[index] += np.bincount(places, minlength=self.counts.shape[1])

    def finish(self, steps: Sequence[StepTrace], confidence: float | None, drift: float | None, *, dense: bool) -> None:
        """Count a request by the steps of its reply and what its prompt was judged."""
        self.sums["requests"] += 1
        self.sums["dense"] += dense
        self.sums["steps"] += len(steps)
        self.sums["left_out"] += sum(1 - step.kept_weights for step in steps)
        for name, value in (("confidence", confidence), ("drift", drift)):
            if value is not None:
                self.sums[f"{name}.count"] += 1
                self.sums[f"{name}.sum"] += value
                self.sums[f"{name}.squares"] += value * value

    def save(self, path: Path | str) -> Path:
        """Write it as JSON, whole or not at all, replacing a file that is there."""
        target = check_output_file(path)
        values: dict[str, Any] = {"schema": _SCHEMA, "kind": _KIND, "model": self.model, "sums": self.sums}
        values |= {name: getattr(self, name).tolist() for name in ("counts", "ends", "moments")}
        write_json(target, values)
        return target

    @classmethod
    def load(cls, path: Path | str, model: str, predictor: MaskPredictor) -> Self:
        """Read a log of this very model.

        Raises:
            InputError: not such a file, one that contradicts itself, or one of another model.
        """
        values = read_log(
            path, "predicted masks", model, lambda v: (v.get("schema"), v.get("kind")) == (_SCHEMA, _KIND)
        )
        empty = cls.empty(model, predictor)
        try:
            found = {n: np.array(values[n], dtype=np.float64) for n in ("counts", "ends", "moments")}
            sums = {name: float(values["sums"][name]) for name in _SUMS}
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path} lacks a part of a log: it was changed, so begin another log.") from None
        fits = all(array.shape == getattr(empty, name).shape for name, array in found.items())
        numbers = [*sums.values(), *(float(array.sum()) for array in found.values())]
        if not fits or not np.isfinite(numbers).all():
            raise InputError(f"{path} does not hold this model's groups: it was changed, so begin another log.")
        counts = np.rint(found["counts"]).astype(np.int64)
        whole = (counts == found["counts"]).all() and (counts >= 0).all()
        if not whole or (counts.any(axis=1) != (sums["decisions"] > 0)).any() or (np.diff(found["ends"]) < 0).any():
            raise InputError(f"{path} contradicts itself about its decisions: it was changed, so begin another log.")
        return cls(model, counts, found["ends"], found["moments"], sums)


_SUMS = (
    *("requests", "dense", "decisions", "steps", "left_out"),
    *("confidence.count", "confidence.sum", "confidence.squares", "drift.count", "drift.sum", "drift.squares"),
)


def retuned(predictor: MaskPredictor, log: MaskLog) -> MaskPredictor:
    """Return a predictor whose quantiles are those of the scores that the log saw: other thresholds, the same network.

    Raises:
        InputError: too few decisions.
    """
    if log.decisions < _FEWEST:
        raise InputError(f"The log has {log.decisions} decisions, too few to retune on: at least {_FEWEST}.")
    levels = quantile_levels(predictor.quantiles.shape[1])
    found = np.empty_like(predictor.quantiles)
    for index, (kept, counts, ends) in enumerate(zip(predictor.quantiles, log.counts, log.ends, strict=True)):
        shares = np.concatenate([[0.0], np.cumsum(counts)[:-1] / counts.sum(), [1.0]])
        values = np.concatenate([[min(ends[0], kept[0])], kept, [max(ends[1], kept[-1])]])
        inside = np.flatnonzero(np.diff(shares, prepend=-1.0) > 0)  # where no score lay says nothing
        first = int(np.searchsorted(shares, 0.0, side="right")) - 1  # the last place that none lay below
        inside = np.unique(np.concatenate([[first], inside[inside > first]]))
        found[index] = np.maximum.accumulate(np.interp(levels, shares[inside], np.clip(values, *ends)[inside]))
    return replace(predictor, quantiles=found)
