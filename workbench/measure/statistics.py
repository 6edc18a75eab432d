"""The few statistics behind every claim: percentile bootstrap over blocks, Wilson's interval, a verdict.

All functions are pure and seeded, and vectorised over resamples: a resample of n blocks is a row of multinomial
counts, so that a resampled sum is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from workbench.errors import InputError

LEVEL = 0.95
_NORMAL_QUANTILE = 1.959963984540054  # of (1 + LEVEL) / 2
# 10,000 resamples put about 250 beyond each end of a 95 % interval: its ends are then known to some 6 % of 2.5 %.
RESAMPLES = 10_000
# Rows of counts held at once; bounds memory to _ROWS * n_blocks * 8 bytes.
_ROWS = 1_000


@dataclass(frozen=True)
class Interval:
    """A value with the two ends of its 95 % interval, in the value's own unit."""

    value: float
    low: float
    high: float

    def excludes(self, reference: float) -> bool:
        return self.low > reference or self.high < reference


def block_bootstrap(sums: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean per token with its percentile interval, resampling whole blocks with replacement.

    Tokens of one window depend on each other, windows hardly do: blocks keep the dependence inside.

    Args:
        sums: float (n_blocks,), sum of the quantity over the tokens of each block.
        counts: (n_blocks,), tokens of each block, all positive.
        seed: of the resampling.
        resamples: number of bootstrap draws.

    Returns:
        ``sum(sums) / sum(counts)`` and its interval; with one block the ends are NaN: nothing is known of the spread.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if sums.ndim != 1 or sums.shape != counts.shape or len(sums) == 0:
        raise InputError(f"A bootstrap needs one sum and one count per block, got {sums.shape} and {counts.shape}.")
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(value, math.nan, math.nan)
    means = [
        (drawn @ sums) / (drawn @ counts) for drawn in _resampled_counts(len(sums), seed=seed, resamples=resamples)
    ]
    return _percentiles(value, np.concatenate(means))


def median_bootstrap(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Median of independent values (n,) with its percentile interval; one value gives NaN ends."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise InputError(f"A bootstrap needs a list of values, got shape {values.shape}.")
    value = float(np.median(values))
    if len(values) < 2:
        return Interval(value, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    return _percentiles(value, np.median(values[drawn], axis=1))


def wilson(successes: int, trials: int) -> Interval:
    """Share of successes with Wilson's score interval, which stays inside [0, 1] and holds near its ends.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(f"A share needs 0 <= successes <= trials and a trial, got {successes} of {trials}.")
    share, z2 = successes / trials, _NORMAL_QUANTILE**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _NORMAL_QUANTILE / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At 0 and at n successes an end is the share itself; rounding must not put it on the other side.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


Verdict = Literal["better", "as good", "worse", "unknown"]


def verdict(difference: Interval) -> Verdict:
    """Judge a difference of which less is better: beyond the interval it is better or worse, within it as good.

    "As good" says that this sample shows no difference; how large a difference it could have missed is the interval.
    """
    if not (math.isfinite(difference.low) and math.isfinite(difference.high)):
        return "unknown"
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "as good"


def _resampled_counts(n_blocks: int, *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each block is drawn, float64 (rows, n_blocks) pieces; ``resamples`` rows in all."""
    rng = np.random.default_rng(seed)
    share = np.full(n_blocks, 1.0 / n_blocks)
    for start in range(0, resamples, _ROWS):
        yield rng.multinomial(n_blocks, share, size=min(_ROWS, resamples - start)).astype(np.float64)


def _percentiles(value: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
