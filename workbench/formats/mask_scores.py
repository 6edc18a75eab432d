"""What a mask predictor computes: scores of units from a tap, in one place for what is stored and for what runs."""

from __future__ import annotations

from typing import Protocol

import numpy as np

_EPSILON = 1e-12  # keeps a tap of zeros from being divided by zero


class PredictorWeights(Protocol):
    """``hidden`` int8 (H, width), ``rows`` int8 (units, H), and steps, biases and means float32, as in ``MaskPart``."""

    @property
    def hidden(self) -> np.ndarray: ...

    @property
    def hidden_steps(self) -> np.ndarray: ...

    @property
    def hidden_bias(self) -> np.ndarray: ...

    @property
    def rows(self) -> np.ndarray: ...

    @property
    def row_steps(self) -> np.ndarray: ...

    @property
    def mean(self) -> np.ndarray: ...


def by_rms(taps: np.ndarray) -> np.ndarray:
    """Floating-point taps (n, width), each over its root mean square, of the type that they came in."""
    return taps / np.sqrt(np.square(taps).mean(axis=1, keepdims=True) + taps.dtype.type(_EPSILON))


def hidden_of(weights: PredictorWeights, taps: np.ndarray) -> np.ndarray:
    """Hidden activations float32 (n, H) of taps (n, width)."""
    taps = by_rms(taps.astype(np.float32))
    inner = (taps @ weights.hidden.T.astype(np.float32)) * weights.hidden_steps + weights.hidden_bias
    return np.maximum(inner, np.float32(0))


def scores_of(weights: PredictorWeights, hidden: np.ndarray) -> np.ndarray:
    """Predicted scores float32 (n, units) of hidden activations (n, H).

    Activations are rounded first (``rounded``): sums are exact integers, so that engines which add in another order
    decide alike.
    """
    codes, steps = rounded(hidden)
    # Products are at most 127 * 128 and float32 holds integers up to 2^24: 1,024 of them add up exactly.
    exact = np.float32 if hidden.shape[1] <= 1024 else np.float64
    sums = (codes.astype(exact) @ weights.rows.T.astype(exact)).astype(np.float32)
    scores: np.ndarray = (sums * steps[:, None]) * weights.row_steps + weights.mean
    return scores


def rounded(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes float32 (n, H) of 0 to 127 and steps float32 (n,): hidden activations of at least 0 as codes times steps.

    A step is the 127th part of a row's highest. A row with anything that is not finite has no codes and a NaN step.
    """
    most = hidden.max(axis=1).astype(np.float32)
    finite = np.isfinite(hidden).all(axis=1)
    top = np.where(finite, most, np.float32(0))
    # Capped: 127 / top overflows below 4e-37.
    with np.errstate(over="ignore"):
        inverse = np.float32(127) / np.where(top > 0, top, np.float32(1))
    inverse = np.minimum(inverse, np.finfo(np.float32).max)
    codes = np.rint(np.where(finite[:, None], hidden, np.float32(0)) * inverse[:, None])
    return codes, np.where(finite, top / np.float32(127), np.float32(np.nan))
