"""Activations during prefill and every decoding step, streamed: what is kept is what the reducers reduce to.

A reducer sees the input of every linear (site = linear id) and the residual entering every block (site =
``blocks.<i>``), each token once, and keeps as little as it likes. Memory therefore does not grow with steps x layers x
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from workbench.progress import Job
from workbench.runtime.base import GREEDY, Sampler
from workbench.runtime.reference import ReferenceEngine

# Magnitudes from 2^-16 to 2^16 by quarter octaves: beyond, activations are as good as zero or not finite in fp16.
_LOWEST_OCTAVE, _BINS_PER_OCTAVE, _N_BINS = -16, 4, 128


class Reducer(Protocol):
    """Consumes activations as they appear."""

    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        """Take rows (n, width) of a site; the first belongs to sequence position ``start``. Do not keep ``rows``."""
        ...


class StepNorms:
    """Euclidean norm of every site's activation at every step: one number per site and token."""

    def __init__(self) -> None:
        self._found: list[tuple[str, int, torch.Tensor]] = []

    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        self._found.append((site, start, rows.float().norm(dim=1).cpu()))

    def table(self) -> pd.DataFrame:
        """Columns ``site``, ``step``, ``norm``."""
        return pd.DataFrame(
            [(site, start + i, norm) for site, start, norms in self._found for i, norm in enumerate(norms.tolist())],
            columns=["site", "step", "norm"],
        )


class ChannelMoments:
    """Per channel of chosen sites, by range of steps: extremes, moments and quantiles of all tokens seen.

    Quantiles come from counts of magnitudes in bins of a quarter octave, so memory does not grow with tokens.

    Args:
        sites: which are looked at.
        first_steps: where ranges of steps begin, ascending from 0.
    """

    def __init__(self, sites: Sequence[str], first_steps: Sequence[int]) -> None:
        self._sites, self._first = frozenset(sites), tuple(first_steps)
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._counts: dict[tuple[str, int], torch.Tensor] = {}
        self._tokens: dict[tuple[str, int], int] = {}

    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        if site not in self._sites:
            return
        ends = (*self._first[1:], start + len(rows))
        for first, end in zip(self._first, ends, strict=True):
            part = rows[max(first - start, 0) : max(end - start, 0)]
            if len(part):
                self._add((site, first), part.double())

    def _add(self, key: tuple[str, int], rows: torch.Tensor) -> None:
        magnitude = rows.abs()
        square = rows * rows  # products: powers of doubles are far slower
        powers = torch.stack([x.sum(0) for x in (magnitude, rows, square, square * rows, square * square)])
        new = torch.cat([torch.stack([rows.amin(0), rows.amax(0)]), powers])
        bins = ((magnitude.log2() - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE).floor().clamp(0, _N_BINS - 1).long()
        width = rows.shape[1]
        places = bins + torch.arange(width, device=rows.device) * _N_BINS
        counts = torch.bincount(places.flatten(), minlength=width * _N_BINS).view(width, _N_BINS).int()
        if key in self._sums:
            old = self._sums[key]
            new[0], new[1], new[2:] = torch.minimum(new[0], old[0]), torch.maximum(new[1], old[1]), new[2:] + old[2:]
            counts += self._counts[key]
        self._sums[key], self._counts[key] = new, counts
        self._tokens[key] = self._tokens.get(key, 0) + len(rows)

    def found(self, site: str, first_step: int, quantiles: Sequence[float]) -> dict[str, Any] | None:
        """Columns of a site and range, one entry per channel; None where no token fell into it.

        ``n_tokens``, ``absmax``, ``min``, ``max``, ``mean``, ``mean_abs``, ``mean_square``, ``kurtosis``, and
        ``q<digits>`` of the magnitude: the middle of the bin that holds the quantile, but never beyond ``absmax``.
        """
        key = (site, first_step)
        if key not in self._sums:
            return None
        n = self._tokens[key]
        low, high, magnitude, *powers = self._sums[key].cpu().numpy()
        mean, square, cube, fourth = (power / n for power in powers)
        variance = square - mean**2
        central = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        # Below this a variance is what rounding leaves of a constant.
        spread = variance > 1e-9 * square
        kurtosis = np.divide(central, variance**2, out=np.full(len(mean), np.nan), where=spread)
        absmax = np.maximum(np.abs(low), np.abs(high))
        columns = {"absmax": absmax, "min": low, "max": high, "mean": mean, "mean_abs": magnitude / n}
        columns |= {"mean_square": square, "kurtosis": kurtosis}
        below = self._counts[key].cpu().numpy().cumsum(axis=1)
        for level in quantiles:
            at = (below >= level * n).argmax(axis=1)
            middle = 2.0 ** (_LOWEST_OCTAVE + (at + 0.5) / _BINS_PER_OCTAVE)
            columns[f"q{f'{level:g}'.removeprefix('0.').ljust(2, '0')}"] = np.minimum(middle, absmax)
        return {"n_tokens": n} | {name: values.astype(np.float32) for name, values in columns.items()}


@contextmanager
def _tapped(engine: ReferenceEngine, reducers: Sequence[Reducer]) -> Iterator[None]:
    def see(site: str, start: int, rows: torch.Tensor) -> None:
        for reducer in reducers:
            reducer.update(site, start, rows)

    engine.set_tap(see)
    try:
        yield
    finally:
        engine.set_tap(None)


def capture_text(
    engine: ReferenceEngine, tokens: Sequence[int], reducers: Sequence[Reducer], *, prompt_length: int = 1
) -> None:
    """Feed a whole text at once: one forward pass shows all its steps, since no step sees later tokens.

    Args:
        engine: a reference engine, dense or compressed.
        tokens: at most the context length.
        reducers: what to keep.
        prompt_length: where the reply starts, for deciders of scope ``reply``.
    """
    with _tapped(engine, reducers):
        engine.hidden_states(tokens, prompt_length=prompt_length)


def capture_generation(
    engine: ReferenceEngine,
    prompt: Sequence[int],
    max_new_tokens: int,
    reducers: Sequence[Reducer],
    *,
    sampler: Sampler = GREEDY,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    job: Job | None = None,
) -> list[int]:
    """Generate, greedily or sampled, with the reducers watching prefill and every decoding step.

    Returns:
        The new tokens. The last one has been chosen but not fed, so it has no activations.
    """
    with _tapped(engine, reducers):
        sequence = engine.start(seed=seed)
        return engine.generate(sequence, prompt, max_new_tokens, sampler=sampler, stop_tokens=stop_tokens, job=job)
