"""What is remembered of text that was read at widths chosen per token: counts alone, no text and no activations.

From how often each step was taken under which thresholds follows how much larger or smaller norms are than on
calibration text, and from that thresholds that fit (``retuned``). Nothing puts them live: they make another model.
"""

from __future__ import annotations

import json
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

_SCHEMA = 1
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
        write_json(target, values | {"above": self.above.tolist(), "log_cuts": self.log_cuts.tolist()})
        return target

    @classmethod
    def load(cls, path: Path | str, model: str, selectors: Selectors) -> Self:
        """Read a log of this very model.

        Raises:
            InputError: not such a file, or of another model.
        """
        shape = (len(selectors.highest), len(selectors.widths) - 1)
        try:
            values = json.loads(Path(path).read_bytes())
            arrays = [np.array(values[name], dtype=np.float64) for name in ("above", "log_cuts")]
            tokens, name, schema = int(values["tokens"]), str(values["model"]), values["schema"]
        except OSError as error:
            raise InputError(f"Cannot read the log {path}: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no log of precision: {error}. 'generate --log' writes one.") from error
        fits = all(array.shape == shape and np.isfinite(array).all() for array in arrays)
        if schema != _SCHEMA or name != model or not fits or tokens < 0:
            raise InputError(f"{path} is the log of another model: retune the model that wrote it.")
        return cls(name, tokens, *arrays)


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
