"""Whether text is like the calibration text, told from the widths that every unit chose.

A unit's choice at a token says between which thresholds the norm of its input lies, so the share of tokens above a
threshold is a quantile of that norm. Calibration predicts those shares for any thresholds. Its tokens are not
independent: within one text they are alike, so that a text of hundreds of tokens tells about the average as much as a
dozen tokens drawn from everywhere. How far texts scatter was measured on the texts of calibration, by unit and by
number of tokens (``Selectors.spread``); the band is made of that.

What is compared is how often estimates exceed thresholds, not how good the estimates are: true errors are not known
while running. Text inside the band can be estimated badly, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from workbench.formats.selectors import Selectors
from workbench.models.base import Architecture

_FALSE = 0.01  # of texts like those of calibration, the share that may be called unlike


class PrecisionWatch:
    """Compares what units chose with what calibration predicts.

    Each choice counts as its mid-rank among the predicted ones (Bross 1958, "ridit"): the predicted share of lower
    levels and half that of its own. Its mean is 1/2 under any thresholds. Looked at as often as ``Selectors.lengths``
    says, and then whenever the tokens have doubled, the mean of a unit is compared with its scatter over the texts of
    calibration at as many tokens: Student's t with one degree of freedom less than texts. False alarms are shared out
    (Bonferroni): evenly over the L looks that calibration measured and those after them together, of which the k-th has
    1 / (k (k + 1)), and in each look evenly over the units.

    Args:
        architecture: of the model.
        selectors: its statistics.

    Attributes:
        tokens: how many were seen, first tokens of texts left out.
        above: float64 (U, W - 1), tokens that took a step.
        expected: float64 (U, W - 1), how many calibration predicts.
        outside: ids of the units that left the band, the farthest first; empty until some have, and then they stay.
    """

    def __init__(self, architecture: Architecture, selectors: Selectors) -> None:
        self.tokens = 0
        self.above = np.zeros((len(selectors.highest), len(selectors.widths) - 1))
        self.expected = np.zeros_like(self.above)
        self.outside: tuple[str, ...] = ()
        self._architecture, self._selectors = architecture, selectors
        self._has = selectors.widths[1:] <= selectors.highest[:, None]
        # Shares are known to half a step of the quantiles that calibration kept.
        self._finest = 0.5 / selectors.norms.shape[1]
        self._ranks = np.zeros(len(self.above))  # beyond 1/2, summed over tokens
        self._variance = np.zeros(len(self.above))  # of one token's, summed likewise
        self._looks = _looks(selectors)
        self._next = next(self._looks, None)

    def see(self, levels: np.ndarray, shares: np.ndarray) -> None:
        """Take in tokens.

        Args:
            levels: int64 (n, U), steps that each unit took at each token.
            shares: float64 (U, W - 1), predicted share of tokens that take each step, under the thresholds in force.
        """
        steps = np.arange(shares.shape[1])
        self.tokens += len(levels)
        self.above += (levels[:, :, None] > steps).sum(axis=0)
        self.expected += len(levels) * shares
        taken = np.where(self._has, np.clip(shares, self._finest, 1 - self._finest), 0.0)
        ends = np.ones((len(taken), 1)), np.zeros((len(taken), 1))
        chance = -np.diff(np.hstack([ends[0], taken, ends[1]]), axis=1)
        rank = 0.5 - np.cumsum(chance, axis=1) + chance / 2  # of a level, how far below the middle
        self._ranks -= rank[np.arange(len(rank)), levels].sum(axis=0)
        self._variance += len(levels) * (chance * rank**2).sum(axis=1)
        due = 0
        while self._next is not None and self.tokens >= self._next[1]:
            due, self._next = self._next[0], next(self._looks, None)
        if due:
            self._look(due)

    def index(self, unit: str) -> int:
        """The row of a unit."""
        return [one.id for one in self._architecture.units].index(unit)

    @property
    def bits(self) -> np.ndarray:
        """Average width that each unit read, and the predicted one, float64 (U, 2)."""
        widths = self._selectors.widths.astype(np.float64)
        both = np.stack([self.above, self.expected], axis=2) / max(self.tokens, 1)
        return widths[0] + np.einsum("s,usb->ub", np.diff(widths), both)

    def _look(self, number: int) -> None:
        from scipy.special import stdtrit

        lengths, spread = self._selectors.lengths, self._selectors.spread.astype(np.float64)
        at, later = min(number, len(lengths)) - 1, max(number - len(lengths), 0)
        deciding = (self._variance > 0) & (spread[:, at] > 0)
        if self.outside or not deciding.any():
            return
        # Ranks of single tokens are spread evenly and have the variance 1/12, those of levels less.
        scatter = 12 * spread[:, at] * self._variance / self.tokens
        far = np.abs(self._ranks / self.tokens) / np.sqrt(np.where(deciding, scatter, np.inf))
        allowed = _FALSE / (len(lengths) + 1) / (later * (later + 1) or 1) / deciding.sum()
        band = float(stdtrit(int(self._selectors.texts) - 1, 1 - allowed / 2))
        order = np.argsort(-far, kind="stable")
        self.outside = tuple(self._architecture.units[unit].id for unit in order if far[unit] > band)


def _looks(selectors: Selectors) -> Iterator[tuple[int, int]]:
    """Number of each look, and of the tokens it is taken at; none where texts say nothing of their scatter."""
    if selectors.texts < 2 or not len(selectors.lengths):
        return
    last = int(selectors.lengths[-1])
    lengths = itertools.chain(map(int, selectors.lengths), (last << more for more in itertools.count(1)))
    yield from enumerate(lengths, start=1)
