"""What is remembered of text that was read at widths chosen per token: counts alone, no text and no activations.

From how often each step was taken under which thresholds follows how much larger or smaller norms are than on
calibration text, and from that thresholds that fit (``retuned``). Nothing puts them live: they make another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from workbench.errors import InputError
from workbench.files import check_output_file, write_json
from workbench.formats.selectors import Selectors, quantile
from workbench.models.base import Architecture
from workbench.runtime.base import StepTrace
from workbench.runtime.logs import read_log

_SCHEMA = 2
_FEWEST = 256  # tokens below which shares of tokens are too rough to move thresholds by
_TELLING = (0.02, 0.98)  # shares of tokens between which a quantile says where a norm lies


@dataclass(frozen=True)
class PrecisionLog:
    """Counts of one model, over any number of replies.

    Attributes:
        model: identity (SHA-256) of the compressed model.
        tokens: how many were read, first tokens of replies left out.
        above: float64 (U, W - 1), tokens whose norm exceeded the threshold of a step.
        log_cuts: float64 (U, W - 1), sum over tokens of the thresholds' logarithms.
    """

    model: str
    tokens: int
    above: np.ndarray
    log_cuts: np.ndarray

    @classmethod
    def empty(cls, model: str, selectors: Selectors) -> Self:
        zeros = np.zeros((len(selectors.highest), len(selectors.widths) - 1))
        return cls(model, 0, zeros, zeros)

    def added(
        self, architecture: Architecture, steps: Sequence[StepTrace], thresholds: Mapping[str, Sequence[float]]
    ) -> Self:
        """Return the log with further steps, which were read under these thresholds."""
        above, cuts = self.above.copy(), self.log_cuts.copy()
        counted = [step for step in steps if step.position > 0]
        for index, unit in enumerate(architecture.units):
            given = np.asarray(thresholds[unit.id], dtype=np.float64)
            if not np.isfinite(given).all():
                return self  # read at the widest for safety: says nothing of norms
            levels = np.array([step.decisions[unit.id] for step in counted])
            n = len(given)
            above[index, :n] += (levels[:, None] > np.arange(n)).sum(axis=0)
            cuts[index, :n] += len(counted) * np.log(np.maximum(given, 1e-30))
        return replace(self, tokens=self.tokens + len(counted), above=above, log_cuts=cuts)

    def save(self, path: Path | str) -> Path:
        """Write it as JSON, whole or not at all, replacing a file that is there."""
        target = check_output_file(path)
        values: dict[str, Any] = {"schema": _SCHEMA, "model": self.model, "tokens": self.tokens}
        write_json(target, values | {"read": self.read.tolist(), "log_cuts": self.log_cuts.tolist()})
        return target

    @property
    def read(self) -> np.ndarray:
        """Tokens that each unit read at each of its widths, narrowest first, float64 (U, W)."""
        ends = np.full((len(self.above), 1), float(self.tokens)), np.zeros((len(self.above), 1))
        return -np.diff(np.hstack([ends[0], self.above, ends[1]]), axis=1)

    @classmethod
    def load(cls, path: Path | str, model: str, selectors: Selectors) -> Self:
        """Read a log of this very model.

        Raises:
            InputError: not such a file, one that contradicts itself, or one of another model.
        """
        fields = {"schema", "model", "tokens", "read", "log_cuts"}
        values = read_log(path, "precision", model, lambda v: v.get("schema") == _SCHEMA and fields <= v.keys())
        tokens, shape = values["tokens"], (len(selectors.highest), len(selectors.widths))
        read, cuts = _array(values["read"], shape), _array(values["log_cuts"], (shape[0], shape[1] - 1))
        if read is None or cuts is None or type(tokens) is not int or tokens < 0:
            raise InputError(
                f"{path} does not hold this model's units and widths: it was changed, so begin another log."
            )
        # Every token was read once by every unit, and the thresholds of a unit's steps, summed over them, ascend.
        later = selectors.widths[2:] <= selectors.highest[:, None]
        counted = (read >= 0).all() and (read == np.rint(read)).all() and (read.sum(axis=1) == tokens).all()
        if not counted or (np.diff(cuts, axis=1)[later] < 0).any() or (tokens == 0 and cuts.any()):
            raise InputError(f"{path} contradicts itself about {tokens} tokens: it was changed, so begin another log.")
        return cls(model, tokens, tokens - np.cumsum(read, axis=1)[:, :-1], cuts)


def _array(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Finite float64 of this shape, or None where it is something else."""
    try:
        found = np.array(value, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    return found if found.shape == shape and np.isfinite(found).all() else None


def retuned(selectors: Selectors, log: PrecisionLog) -> Selectors:
    """Return selectors whose norms are scaled, unit by unit, to what the log saw.

    Of each unit the step whose share of tokens is nearest to a half tells: its threshold is the quantile of the norms
    seen that calibration has elsewhere. Units of which no step tells move by the median of the others. Gains and what
    was learnt stay.

    Raises:
        InputError: too few tokens.
    """
    if log.tokens < _FEWEST:
        raise InputError(f"The log has {log.tokens} tokens, too few to retune on: at least {_FEWEST}.")
    share = log.above / log.tokens
    factors = np.full(len(share), np.nan)
    for unit, row in enumerate(share):
        step = int(np.argmin(np.abs(row - 0.5))) if len(row) else 0
        if len(row) and _TELLING[0] < row[step] < _TELLING[1]:
            calibrated = quantile(selectors.norms[unit], 1 - row[step])
            factors[unit] = np.exp(log.log_cuts[unit, step] / log.tokens) / max(calibrated, 1e-30)
    middle = float(np.nanmedian(factors)) if np.isfinite(factors).any() else 1.0
    factors = np.where(np.isfinite(factors), factors, middle).astype(np.float32)
    return replace(selectors, norms=selectors.norms * factors[:, None], power=selectors.power * factors**2)
