"""How far one next-token distribution is from another, token by token: pure functions of log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rows turned into float64 at once: 16 rows of a vocabulary of 50k stay in a processor's cache.
_ROWS = 16


@dataclass(frozen=True)
class TokenQuality:
    """Quality of consecutive tokens; all arrays (n,).

    Attributes:
        nll_dense: float64, negative natural-log probability of the true token under dense.
        nll_candidate: float64, the same under the candidate.
        kl: float64, KL(dense || candidate) over the full vocabulary, nats.
        agree: bool, both give the highest probability to the same token.
    """

    nll_dense: np.ndarray
    nll_candidate: np.ndarray
    kl: np.ndarray
    agree: np.ndarray


def token_quality(dense: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> TokenQuality:
    """Compare two sets of next-token distributions.

    Float32 log-probabilities sum to 1 only to some 1e-6, which is more than a small KL: both are normalised again in
    float64, so that the KL of equal inputs is exactly 0 and a small one is right. With P = sum p and Q = sum q,
    ``KL = sum (p / P) (log p - log q) - log P + log Q``.

    Args:
        dense: log-probabilities float32 (n, vocab).
        candidate: the same of the candidate.
        targets: int (n,), the true tokens.

    Returns:
        Per-token values; NaN where a distribution is not one (NaN, or no probability at all).
    """
    divergence, total_p, total_q = (np.empty(len(targets)) for _ in range(3))
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        divergence[rows], total_p[rows], total_q[rows] = _divergence(dense[rows], candidate[rows])
    pick = targets[:, None]
    return TokenQuality(
        nll_dense=np.log(total_p) - np.take_along_axis(dense, pick, axis=1)[:, 0].astype(np.float64),
        nll_candidate=np.log(total_q) - np.take_along_axis(candidate, pick, axis=1)[:, 0].astype(np.float64),
        kl=divergence,
        agree=dense.argmax(axis=1) == candidate.argmax(axis=1),
    )


def _divergence(dense: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL, sum of p and sum of q for each row, float64 (n,) each."""
    log_p, log_q = dense.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = log_p - log_q
        p = np.exp(log_p, out=log_p)
        total_p, total_q = p.sum(axis=1), np.exp(log_q, out=log_q).sum(axis=1)
        # Tokens that dense rules out (log p = -inf, as for padding of the vocabulary) add nothing, by the limit.
        if np.isnan(difference).any() or np.isinf(difference).any():
            difference = np.where(p == 0, 0.0, difference)
        divergence = np.einsum("nv,nv->n", p, difference) / total_p - np.log(total_p) + np.log(total_q)
    return divergence, total_p, total_q
