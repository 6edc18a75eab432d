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
    """Predicted scores float32 (n, units) of hidden activations (n, H)."""
    return weights.mean + (hidden @ weights.rows.T.astype(np.float32)) * weights.row_steps
