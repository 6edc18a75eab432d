"""Inputs of small magnitude left out, in PyTorch: the masks as hooks, and what calibration text says of them.

An input x_i of a unit is left out where |x_i| f_i <= t. What the engines do under a plan is done here on whole
windows, with thresholds that change from pass to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from workbench.analysis.blocks import block_calls, run_block
from workbench.analysis.dense_pass import DensePass
from workbench.analysis.divergence import final_states
from workbench.models.base import LoadedModel
from workbench.progress import Job

See = Callable[[int, torch.Tensor], None]
Mask = Callable[[int, torch.Tensor], torch.Tensor]


class InputMasks:
    """Context in which a model's units read their inputs as ``mask`` leaves them; the model is left as it was found.

    Windows go through the model one at a time and whole, so that the first rows of an input are the first tokens.

    Attributes:
        cuts: threshold by unit (its number in the architecture); units that are not named, or have 0, read everything.
        see: called with a unit's number and its whole input (tokens, in), ahead of the mask.
        mask: gives the input (tokens, in) of a unit as it is read; by the thresholds unless something else is put here.
    """

    def __init__(self, model: LoadedModel, first: int, factors: Mapping[int, torch.Tensor] | None = None) -> None:
        """
        Args:
            model: whose linears are hooked.
            first: tokens at the beginning of a window that are kept whole.
            factors: f float32 (in,) by unit; 1 for units that are not named.
        """
        self.cuts: dict[int, float] = {}
        self.see: See | None = None
        self.mask: Mask = self._cut
        self._first, self._model = first, model
        self._factors = {unit: f.to(model.device) for unit, f in (factors or {}).items()}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for index, unit in enumerate(self._model.architecture.units):
            # Linears of a unit share their input: it is masked once.
            held: dict[str, torch.Tensor] = {}
            for at, linear in enumerate(unit.linears):
                hook = self._hook(index, held, at == 0, at == len(unit.linears) - 1)
                self._hooks.append(self._model.linear_module(linear.id).register_forward_pre_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def sizes(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        """|x_i| f_i float32 of inputs (tokens, in)."""
        found = x.detach().float().abs()
        return found * self._factors[unit] if unit in self._factors else found

    def _hook(
        self, unit: int, held: dict[str, torch.Tensor], leads: bool, ends: bool
    ) -> Callable[[nn.Module, tuple], tuple]:
        def before(module: nn.Module, args: tuple) -> tuple:
            x: torch.Tensor = args[0]
            if not leads and held.get("x") is x:
                masked = held["masked"]
            else:
                rows = x.reshape(-1, x.shape[-1])
                if self.see is not None:
                    self.see(unit, rows)
                masked = self.mask(unit, rows).view(x.shape)
                held["x"], held["masked"] = x, masked
            if ends:
                held.clear()
            return (masked, *args[1:])

        return before

    def _cut(self, unit: int, x: torch.Tensor) -> torch.Tensor:
        cut = self.cuts.get(unit, 0.0)
        if cut <= 0:
            return x
        kept = self.sizes(unit, x) > cut
        kept[: self._first] = True
        return x * kept


class Sizes:
    """Histograms of |x_i| f_i by unit, in bins of equal ratio, from which any quantile is read to 0.1 %."""

    _LOWEST, _PER_OCTAVE, _OCTAVES = -60, 64, 100

    def __init__(self, n_units: int) -> None:
        self.counts = torch.zeros(n_units, self._PER_OCTAVE * self._OCTAVES + 1, dtype=torch.int64)

    def add(self, unit: int, sizes: torch.Tensor) -> None:
        """Count sizes float32 of any shape. What lies below the bins, zeros above all, is counted as 0, in bin 0."""
        bins = ((sizes.flatten().log2() - self._LOWEST) * self._PER_OCTAVE).clamp(-1, self.counts.shape[1] - 2)
        found = torch.bincount(bins.floor().long() + 1, minlength=self.counts.shape[1])
        self.counts[unit] += found.cpu()

    def _edges(self) -> np.ndarray:
        """Upper ends of the bins; that of bin 0 is 0."""
        octaves = np.arange(1, self.counts.shape[1], dtype=np.float64) / self._PER_OCTAVE + self._LOWEST
        return np.concatenate([[0.0], np.exp2(octaves)])

    def _below(self, unit: int) -> np.ndarray:
        """Share of the sizes up to each of the edges."""
        counts = self.counts[unit].double().numpy()
        return np.cumsum(counts) / max(counts.sum(), 1.0)

    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        """Quantiles at ascending levels, float32 (units, levels)."""
        edges, found = self._edges(), []
        for unit in range(len(self.counts)):
            below = self._below(unit)
            lower = np.concatenate([[0.0], below])
            bins = np.minimum(np.searchsorted(below, levels, side="left"), len(below) - 1)
            within = (levels - lower[bins]) / np.maximum(below[bins] - lower[bins], 1e-30)
            starts = np.concatenate([[0.0], edges])[bins]
            found.append(starts + np.clip(within, 0, 1) * (edges[bins] - starts))
        return np.stack(found).astype(np.float32)

    def share_below(self, unit: int, cut: float) -> float:
        """Share of a unit's sizes up to a threshold; 0 at 0."""
        return float(np.interp(cut, self._edges(), self._below(unit))) if cut > 0 else 0.0


def measure_sizes(
    model: LoadedModel, masks: InputMasks, windows: Sequence[Sequence[int]], first: int, job: Job, into: Sizes
) -> Sizes:
    """Count the sizes of all inputs of windows of text, under whatever thresholds the masks have, ``first`` left out.

    Args:
        model: as it is to be looked at; the job is advanced by window.
        masks: entered.
        windows: token windows.
        first: tokens of each that are not counted.
        job: progress and cancel, between windows.
        into: added to, and returned.
    """

    def see(unit: int, x: torch.Tensor) -> None:
        into.add(unit, masks.sizes(unit, x[first:]))

    masks.see = see
    try:
        with torch.no_grad():
            for window in windows:
                final_states(model, torch.tensor([list(window)], device=model.device))
                job.advance()
    finally:
        masks.see = None
    return into


def column_norms(model: LoadedModel) -> dict[int, torch.Tensor]:
    """Euclidean norm of every column of each unit's weights as they are now, its linears taken as one; by unit.

    float32 (in,) on the CPU, divided by their geometric mean so that half precision holds them; columns of zeros get
    the smallest of the others, since a factor of 0 would leave a channel out that was not to be.
    """
    found = {}
    for index, unit in enumerate(model.architecture.units):
        squares = torch.zeros(unit.linears[0].in_features, dtype=torch.float64)
        for linear in unit.linears:
            squares += model.linear_module(linear.id).weight.detach().double().square().sum(0).cpu()
        norms = squares.sqrt()
        positive = norms[norms > 0]
        if not len(positive):
            found[index] = torch.ones_like(norms).float()
            continue
        found[index] = (norms.clamp(min=float(positive.min())) / positive.log().mean().exp()).float()
    return found


def unit_damage(
    dense: DensePass, masks: InputMasks, unit: int, cuts: Sequence[float], tick: Callable[[float], None]
) -> list[float]:
    """KL from the model without sparsity, nats per token, with this unit alone at each of some thresholds.

    Args:
        dense: states of the windows at the unit's block.
        masks: entered; left without thresholds.
        unit: its number.
        cuts: thresholds.
        tick: told the share that is done.
    """
    found = []
    try:
        for done, cut in enumerate(cuts):
            tick(done / len(cuts))
            masks.cuts = {unit: cut}
            found.append(dense.kl())
    finally:
        masks.cuts = {}
    return found


class BlockErrors:
    """How far a block's output moves when its units leave inputs out, the inputs of the block being those without.

    Args:
        model: as it is to be looked at.
        windows: token windows.
        masks: entered, without thresholds.
        first: tokens of each window that are not looked at.
    """

    def __init__(self, model: LoadedModel, windows: Sequence[Sequence[int]], masks: InputMasks, first: int) -> None:
        self._model, self._masks, self._first = model, masks, first
        with torch.no_grad():
            self._calls = [block_calls(model, window)[0] for window in windows]
        self._block, self._whole = -1, list[torch.Tensor]()

    def __call__(self, block: int, cuts: Mapping[int, float]) -> float:
        """Mean over tokens of the Euclidean norm of the change of the block's output."""
        if block != self._block:
            self._masks.cuts = {}
            self._whole, self._block = self._outputs(block), block
        self._masks.cuts = dict(cuts)
        try:
            found = self._outputs(block)
        finally:
            self._masks.cuts = {}
        norms = [(now - whole)[self._first :].norm(dim=1).mean() for now, whole in zip(found, self._whole, strict=True)]
        return float(torch.stack(norms).mean())

    @torch.no_grad()
    def _outputs(self, block: int) -> list[torch.Tensor]:
        return [run_block(self._model, block, *calls[block])[0].float() for calls in self._calls]
