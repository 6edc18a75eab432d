"""How far one next-token distribution is from another, token by token: pure functions of log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rows turned into float64 at once: 8 rows of a vocabulary of 50k stay in a processor's cache.
_ROWS = 8


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


class DenseTokens:
    """The dense model's next-token distributions at some positions: what any number of candidates is compared with.

    Float32 log-probabilities sum to 1 only to some 1e-6, which is more than a small KL: both sides are normalised again
    in float64. With P = sum p, Q = sum q and ``H(x) = sum p log x``, ``KL = (H(p) - H(q)) / P - log P + log Q``, whose
    two sums are added up alike, so that the KL of equal inputs is exactly 0.

    Args:
        log_p: log-probabilities float32 (n, vocab).
        targets: int (n,), the true tokens.
    """

    def __init__(self, log_p: np.ndarray, targets: np.ndarray) -> None:
        self._targets = targets[:, None]
        self._p = np.empty(log_p.shape)
        for begin in range(0, len(log_p), _ROWS):
            rows = slice(begin, begin + _ROWS)
            self._p[rows] = log_p[rows]
            np.exp(self._p[rows], out=self._p[rows])
        self._total = self._p.sum(axis=1)
        self._own, _ = self._sums(log_p)
        self._top = log_p.argmax(axis=1)
        self._nll = np.log(self._total) - self._at_targets(log_p)

    def compare(self, log_q: np.ndarray) -> TokenQuality:
        """Compare a candidate's log-probabilities, float32 (n, vocab), at the same positions.

        Returns:
            Per-token values; NaN where a distribution is not one (NaN, or no probability at all).
        """
        cross, total = self._sums(log_q)
        with np.errstate(invalid="ignore", divide="ignore"):
            divergence = (self._own - cross) / self._total - np.log(self._total) + np.log(total)
            nll = np.log(total) - self._at_targets(log_q)
        return TokenQuality(self._nll, nll, divergence, self._top == log_q.argmax(axis=1))

    def _at_targets(self, log_q: np.ndarray) -> np.ndarray:
        return np.take_along_axis(log_q, self._targets, axis=1)[:, 0].astype(np.float64)

    def _sums(self, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``sum p log q`` and ``sum q`` of each row, float64 (n,) each."""
        cross, total = np.empty(len(log_q)), np.empty(len(log_q))
        with np.errstate(invalid="ignore", divide="ignore"):
            for begin in range(0, len(log_q), _ROWS):
                rows = slice(begin, begin + _ROWS)
                p, log = self._p[rows], log_q[rows].astype(np.float64)
                found = np.einsum("nv,nv->n", p, log)
                if not np.isfinite(found).all():
                    # Tokens that dense rules out (log p = -inf, as for padding of the vocabulary) add nothing, by the
                    # limit.
                    found = np.einsum("nv,nv->n", p, np.where(p == 0, 0.0, log))
                cross[rows], total[rows] = found, np.exp(log, out=log).sum(axis=1)
        return cross, total


def token_quality(dense: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> TokenQuality:
    """Compare two sets of log-probabilities, float32 (n, vocab), at true tokens (n,); see ``DenseTokens``."""
    return DenseTokens(dense, targets).compare(candidate)
