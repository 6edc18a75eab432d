"""Choosing the next token. One definition for every engine, so that a seed means the same everywhere."""

from __future__ import annotations

import numpy as np

from workbench.errors import EngineError
from workbench.runtime.base import Sampler


def sample(logits: np.ndarray, sampler: Sampler, rng: np.random.Generator) -> int:
    """Return a token id from logits (vocab,) float32.

    Greedy takes the largest logit, the lowest id on ties. Otherwise: scale by temperature, keep the ``top_k``
    largest, keep the smallest set whose probability reaches ``top_p``, and draw by inverting the cumulative
    distribution at one uniform number, so that one step uses exactly one draw.

    Raises:
        EngineError: a logit is NaN.
    """
    if np.isnan(logits).any():
        raise EngineError("The model's logits are NaN: the weights are damaged or overflow in this dtype.")
    if sampler.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampler.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampler.top_k:
        order = order[: sampler.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    cumulative = np.cumsum(weights) / weights.sum()
    if sampler.top_p < 1:
        kept = int(np.searchsorted(cumulative, sampler.top_p, side="left")) + 1
        order, cumulative = order[:kept], cumulative[:kept] / cumulative[min(kept, len(cumulative)) - 1]
    return int(order[min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(order) - 1)])
