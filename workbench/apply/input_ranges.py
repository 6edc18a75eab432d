"""What calibration text says about the inputs of matrices: ranges by chunk of positions, power, and a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.errors import RecipeError
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job

_ROWS = 1024  # most rows kept of a unit
_BYTES = 2**29  # of the rows of all units together


@dataclass
class InputRanges:
    """Inputs of one unit over calibration text.

    Attributes:
        low, high: float32 (chunks, in), extremes over all tokens of a chunk of positions.
        square: float32 (in,), mean square over all tokens but the first of each window, whose massive activations
            would speak for no other token.
        rows: float16 or float32 (n, in), a sample of those tokens.
    """

    low: torch.Tensor
    high: torch.Tensor
    square: torch.Tensor
    rows: torch.Tensor

    @property
    def magnitude(self) -> torch.Tensor:
        """Largest magnitude by chunk and channel, float32 (chunks, in)."""
        return torch.maximum(self.low.abs(), self.high.abs())


def input_ranges(
    model: LoadedModel, windows: Sequence[Sequence[int]], starts: Sequence[int], seed: int, job: Job
) -> dict[str, InputRanges]:
    """Run the dense model over text and return what enters each unit, by unit id.

    Args:
        model: the dense model, left as it is.
        windows: token windows, each from position 0 of a sequence.
        starts: first position of each chunk, ascending from 0; a chunk that no window reaches is as the one before.
        seed: of the rows that are kept.
        job: a stage, advanced by window.

    Raises:
        RecipeError: an activation is not finite.
    """
    units = model.architecture.units
    total = sum(4 * unit.linears[0].in_features for unit in units)
    keep = max(1, min(_ROWS, _BYTES // total) // len(windows))
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(max(len(w) - 1, 1), generator=generator)[:keep] + (len(w) > 1) for w in windows]
    found: dict[str, _Running] = {unit.id: _Running(unit, starts) for unit in units}
    current = {"window": 0}

    def watch(unit: Unit) -> Any:
        def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[unit.id].add(args[0].reshape(-1, args[0].shape[-1]), chosen[current["window"]])

        return see

    hooks = [model.submodule(u.linears[0].path).register_forward_pre_hook(watch(u)) for u in units]
    job.stage("measure the inputs of matrices", len(windows))
    try:
        with torch.no_grad():
            for i, window in enumerate(windows):
                current["window"] = i
                model.module.base_model(input_ids=torch.tensor([list(window)], device=model.device), use_cache=False)
                job.advance()
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {unit_id: running.result() for unit_id, running in found.items()}
    for unit_id, measured in ranges.items():
        if not bool(measured.magnitude.isfinite().all()):
            raise RecipeError(
                f"The activations that enter {unit_id} are not finite: {model.name} overflows on its own text. Load it "
                "in float32."
            )
    return ranges


class _Running:
    def __init__(self, unit: Unit, starts: Sequence[int]) -> None:
        width = unit.linears[0].in_features
        self.starts = [*starts, 2**62]
        self.low = torch.full((len(starts), width), torch.inf)
        self.high = torch.full((len(starts), width), -torch.inf)
        self.square = torch.zeros(width, dtype=torch.float64)
        self.count = 0
        self.rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, chosen: torch.Tensor) -> None:
        x = x.float().cpu()
        for i in range(len(self.starts) - 1):
            part = x[self.starts[i] : self.starts[i + 1]]
            if len(part):
                self.low[i] = torch.minimum(self.low[i], part.amin(0))
                self.high[i] = torch.maximum(self.high[i], part.amax(0))
        rest = x[1:] if len(x) > 1 else x
        self.square += rest.double().square().sum(0)
        self.count += len(rest)
        self.rows.append(x[chosen])

    def result(self) -> InputRanges:
        for i in range(1, len(self.low)):
            if bool((self.low[i] > self.high[i]).all()):  # no window was that long
                self.low[i], self.high[i] = self.low[i - 1], self.high[i - 1]
        return InputRanges(self.low, self.high, (self.square / max(self.count, 1)).float(), torch.cat(self.rows))
