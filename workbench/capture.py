"""Activations during prefill and every decoding step, streamed: what is kept is what the reducers reduce to.

A reducer sees the input of every linear (site = linear id) and the residual entering every block (site =
``blocks.<i>``), each token once, and keeps as little as it likes. Memory therefore does not grow with steps x layers x
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import pandas as pd
import torch

from workbench.progress import Job
from workbench.runtime.base import GREEDY, Sampler
from workbench.runtime.reference import ReferenceEngine


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


class ChannelStatistics:
    """Per channel of every site: largest magnitude, mean magnitude and mean square over all tokens seen."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        magnitude = rows.double().abs()
        new = torch.stack([magnitude.amax(0), magnitude.sum(0), magnitude.square().sum(0)])
        old = self._sums.get(site)
        if old is not None:
            new[0] = torch.maximum(new[0], old[0])
            new[1:] += old[1:]
        self._sums[site] = new
        self._count[site] = self._count.get(site, 0) + len(rows)

    def table(self) -> pd.DataFrame:
        """Columns ``site``, ``channel``, ``absmax``, ``mean_abs``, ``mean_square``, ``n_tokens``."""
        frames = []
        for site, (largest, total, squares) in self._sums.items():
            n = self._count[site]
            frames.append(
                pd.DataFrame(
                    {
                        "site": site,
                        "channel": range(len(largest)),
                        "absmax": largest.cpu().numpy(),
                        "mean_abs": (total / n).cpu().numpy(),
                        "mean_square": (squares / n).cpu().numpy(),
                        "n_tokens": n,
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)


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
