"""The watch over text: silent on texts that scatter as those of calibration, and soon heard on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from workbench.apply.estimators import quantiles, spread_of_texts
from workbench.formats.selectors import Selectors
from workbench.models import LoadedModel
from workbench.runtime.precision import expected_shares
from workbench.runtime.precision_watch import PrecisionWatch

WIDTHS = (2, 3, 5)
TEXTS, TOKENS = 16, 255


def norms(n_units: int, texts: int, tokens: int, random: np.random.Generator) -> np.ndarray:
    """Norms (texts, tokens, units) as they are in texts: alike within one, and near each other."""
    of_text = 0.15 * random.normal(size=(texts, 1, n_units)) + 0.1 * random.normal(size=(texts, 1, 1))
    alone = random.normal(size=(texts, tokens, n_units))
    near = alone.copy()
    for at in range(1, tokens):
        near[:, at] = 0.6 * near[:, at - 1] + 0.8 * alone[:, at]
    return np.exp(0.3 * (of_text + near)).astype(np.float32)


@pytest.fixture(scope="module")
def selectors(make_model: Callable[..., LoadedModel]) -> Selectors:
    n = len(make_model().architecture.units)
    seen = norms(n, TEXTS, TOKENS, np.random.default_rng(0))
    by_unit = [seen[:, :, unit].reshape(-1) for unit in range(n)]
    lengths, spread = spread_of_texts(by_unit, [TOKENS] * TEXTS, TOKENS)
    steps = len(WIDTHS) - 1
    return Selectors(
        widths=np.array(WIDTHS, np.int8),
        highest=np.full(n, WIDTHS[-1], np.int8),
        norms=np.stack([quantiles(one) for one in by_unit]),
        power=np.array([np.square(one).mean() for one in by_unit], np.float32),
        gains=np.ones((n, steps), np.float32),
        targets=np.zeros(0, np.float32),
        precision=np.zeros((0, n), np.float32),
        errors=np.zeros((n, steps, 128), np.float32),
        regression=np.zeros((n, steps, 3), np.float32),
        texts=np.array(TEXTS, np.int32),
        lengths=lengths,
        spread=spread,
    )


def cuts(selectors: Selectors, levels: tuple[float, float]) -> np.ndarray:
    return np.stack([np.quantile(kept, levels) for kept in selectors.norms])


def watched(
    model: LoadedModel, selectors: Selectors, text: np.ndarray, levels: tuple[float, float] = (0.4, 0.9)
) -> PrecisionWatch:
    """A text (T, U) seen eight tokens at a time, under thresholds that move on the way."""
    watch, base = PrecisionWatch(model.architecture, selectors), cuts(selectors, levels)
    for begin in range(0, len(text), 8):
        now = base * np.exp(0.2 * np.sin(begin / 40))
        piece = text[begin : begin + 8]
        watch.see((piece[:, :, None] > now).sum(axis=2), expected_shares(selectors, now))
    return watch


@pytest.mark.parametrize("levels", [(0.4, 0.9), (0.97, 0.995)])
def test_texts_like_those_of_calibration_are_seldom_called_unlike(
    tiny_model: LoadedModel, selectors: Selectors, levels: tuple[float, float]
) -> None:
    """One in a hundred by design: more than four in a hundred would come about once in 300 times."""
    texts = norms(len(tiny_model.architecture.units), 100, 300, np.random.default_rng(1))
    alarms = [bool(watched(tiny_model, selectors, text, levels).outside) for text in texts]
    assert sum(alarms) <= 4
    independent = dataclasses.replace(
        selectors, spread=(1 / 12 / selectors.lengths[None]).repeat(len(selectors.norms), 0)
    )
    naive = [bool(watched(tiny_model, independent, text, levels).outside) for text in texts[:30]]
    assert np.mean(naive) > 0.15  # what tokens that were independent would give


def test_units_whose_norms_moved_are_named(tiny_model: LoadedModel, selectors: Selectors) -> None:
    """Two units of twelve, in opposite directions, so that the average of bits stays: which one moved more is named."""
    units = [unit.id for unit in tiny_model.architecture.units]
    texts = norms(len(units), 30, 250, np.random.default_rng(2))
    texts[:, :, 3] *= 2.5
    texts[:, :, 7] /= 1.3
    found = [watched(tiny_model, selectors, text).outside for text in texts]
    assert np.mean([units[3] in one for one in found]) > 0.9
    assert {name for one in found for name in one} <= {units[3], units[7]}
    assert np.mean([one[:1] == (units[3],) for one in found]) > 0.9
    watch = watched(tiny_model, selectors, texts[0])
    read, expected = watch.bits[watch.index(units[3])]
    assert read > expected + 0.5


def test_more_of_the_same_text_tells_more_but_never_all(tiny_model: LoadedModel, selectors: Selectors) -> None:
    """The effective sample size grows with tokens and stays far below their number."""
    size = 1 / 12 / selectors.spread.mean(axis=0)
    assert (np.diff(size) > 0).all()
    assert (size < selectors.lengths / 2).all()
    assert selectors.lengths.tolist() == [31, 63, 127, 255]


def test_shares_are_counted_beside_what_is_predicted(tiny_model: LoadedModel, selectors: Selectors) -> None:
    text = norms(len(selectors.norms), 1, 160, np.random.default_rng(3))[0]
    watch = PrecisionWatch(tiny_model.architecture, selectors)
    at = cuts(selectors, (0.5, 0.8))
    shares = expected_shares(selectors, at)
    watch.see((text[:, :, None] > at).sum(axis=2), shares)
    np.testing.assert_array_equal(watch.above, (text[:, :, None] > at).sum(axis=0))
    np.testing.assert_allclose(watch.expected, 160 * shares)
    np.testing.assert_allclose(shares, np.tile([0.5, 0.2], (len(at), 1)), atol=0.01)


def test_models_that_know_no_scatter_are_not_watched(tiny_model: LoadedModel, selectors: Selectors) -> None:
    n = len(selectors.norms)
    old = dataclasses.replace(
        selectors, texts=np.zeros((), np.int32), lengths=np.zeros(0, np.int32), spread=np.zeros((n, 0), np.float32)
    )
    arrays = {k: v for k, v in selectors.arrays().items() if k.split(".")[1] not in ("texts", "lengths", "spread")}
    back = Selectors.from_arrays(arrays, tiny_model.architecture)
    for name, array in old.arrays().items():
        np.testing.assert_array_equal(back.arrays()[name], array)
    strange = 4 * norms(n, 1, 400, np.random.default_rng(4))[0]
    assert not watched(tiny_model, back, strange).outside
    assert watched(tiny_model, selectors, strange).outside
