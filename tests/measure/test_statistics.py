"""Intervals: they cover what they should, shrink with data, and say when nothing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.measure.statistics import Interval, block_bootstrap, median_bootstrap, verdict, wilson


def test_block_bootstrap_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        counts = rng.integers(50, 200, size=48)
        block_effect = rng.normal(0.3, 0.5, size=48)  # dependence inside a block, which a token bootstrap would miss
        sums = block_effect * counts + rng.normal(0, np.sqrt(counts))
        found = block_bootstrap(sums, counts, seed=trial, resamples=1000)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_block_bootstrap_value_weighs_blocks_by_their_tokens() -> None:
    found = block_bootstrap(np.array([10.0, 0.0]), np.array([10, 90]))
    assert found.value == pytest.approx(0.1)
    assert found.low <= found.value <= found.high


def test_block_bootstrap_is_a_function_of_its_seed() -> None:
    sums, counts = np.random.default_rng(1).normal(size=40), np.full(40, 7)
    assert block_bootstrap(sums, counts, seed=3) == block_bootstrap(sums, counts, seed=3)
    assert block_bootstrap(sums, counts, seed=3) != block_bootstrap(sums, counts, seed=4)


def test_one_block_gives_no_interval_and_no_verdict() -> None:
    found = block_bootstrap(np.array([1.0]), np.array([4]))
    assert found.value == 0.25
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert verdict(found) == "unknown"


def test_median_bootstrap_ignores_one_interrupted_pair() -> None:
    ratios = np.full(21, 0.9) + np.random.default_rng(0).normal(0, 0.01, 21)
    disturbed = ratios.copy()
    disturbed[3] = 40.0
    assert median_bootstrap(disturbed).value == pytest.approx(median_bootstrap(ratios).value, abs=0.01)
    assert median_bootstrap(disturbed).high < 1


@given(trials=st.integers(1, 500), data=st.data())
def test_wilson_holds_the_share_and_stays_a_share(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    found = wilson(successes, trials)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low < 2 / math.sqrt(trials)


def test_wilson_agrees_with_a_published_example() -> None:
    # 81 of 263 (Newcombe 1998, "Two-sided confidence intervals for the single proportion", table 1): 0.2553 to 0.3662.
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(-2, -1, "better"), (1, 2, "worse"), (-1, 1, "as good"), (0, 1, "as good")]
)
def test_verdict_is_beyond_or_within_the_interval(low: float, high: float, expected: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high)) == expected


def test_statistics_refuse_what_has_no_meaning() -> None:
    with pytest.raises(InputError, match="one sum and one count"):
        block_bootstrap(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match="0 <= successes"):
        wilson(3, 2)
    with pytest.raises(InputError, match="list of values"):
        median_bootstrap(np.empty(0))
