"""DP-LLM with exact errors in place of estimates: what better estimators could give at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.formats.compressed import CompressedModel
from workbench.formats.nested import Nested
from workbench.models.base import LoadedModel, Unit
from workbench.runtime.plan import Plan, PositionTable
from workbench.runtime.precision import error_thresholds

_MOST_FACTOR, _HALVINGS = 4.0, 8  # of thresholds, to 1 percent


class ExactChoices:
    """Decisions of DP-LLM's rule on exact errors ``||dW x||``, to be replayed by an engine.

    The model runs in PyTorch on the very weights that are chosen token by token, so errors are of the inputs that the
    choices before lead to; activations are not rounded.

    Args:
        dense: the dense model, left as it is.
        compressed: nested codes and selectors of it.
        plan: DP-LLM's plan for the target, whose pairs of widths are decided between.
        target: average bits.
        weights: float32, by linear and width: filled here, and shared by targets.
    """

    def __init__(
        self,
        dense: LoadedModel,
        compressed: CompressedModel,
        plan: Plan,
        target: float,
        weights: dict[tuple[str, int], torch.Tensor],
    ) -> None:
        if compressed.selectors is None:
            raise ValueError("The compressed model has no selectors.")
        self._model = dense
        thresholds = error_thresholds(compressed.architecture, compressed.selectors, target)
        pairs = {consumer.target: consumer.widths for consumer in plan.consumers}
        fixed = {d.slot: d.program.values[0] for d in plan.deciders if isinstance(d.program, PositionTable)}
        self._units = [
            _Choice(unit, compressed, pairs[unit.id], thresholds[unit.id], fixed.get(unit.id), dense, weights)
            for unit in dense.architecture.units
        ]

    def read_as_many(self, bits: float, windows: Sequence[Sequence[int]]) -> None:
        """Multiply all thresholds so that windows read ``bits`` of codes on average, as near as halvings get.

        Thresholds are quantiles of errors on dense activations: low for coarse ones, whose errors are larger. Windows
        may be the very ones that are measured: what is compared is how well the same bits are spent.
        """
        low, high = 1 / _MOST_FACTOR, _MOST_FACTOR
        for _ in range(_HALVINGS):
            factor = math.sqrt(low * high)
            for unit in self._units:
                unit.factor = factor
            if float(np.mean([self._average(window) for window in windows])) > bits:
                low = factor
            else:
                high = factor

    def _average(self, tokens: Sequence[int]) -> float:
        self(tokens)
        sizes = [unit.n_weights for unit in self._model.architecture.units]
        return float(np.average([unit.bits for unit in self._units], weights=sizes))

    def __call__(self, tokens: Sequence[int]) -> list[dict[str, Any]]:
        """Decisions for each position of a window."""
        hooks = [hook for unit in self._units for hook in unit.hooks()]
        try:
            with torch.no_grad():
                ids = torch.tensor([list(tokens)], device=self._model.device)
                self._model.module.base_model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        levels = np.stack([unit.chosen for unit in self._units], axis=1)
        names = [unit.id for unit in self._units]
        return [dict(zip(names, row.tolist(), strict=True)) for row in levels]


class _Choice:
    """One unit at two widths."""

    def __init__(
        self,
        unit: Unit,
        compressed: CompressedModel,
        widths: tuple[int, ...],
        threshold: float,
        fixed: float | None,
        model: LoadedModel,
        weights: dict[tuple[str, int], torch.Tensor],
    ) -> None:
        self.id, self._threshold, self._fixed, self._widths = unit.id, threshold, fixed, widths
        self.factor = 1.0  # of the threshold
        self._modules = {linear.id: model.linear_module(linear.id) for linear in unit.linears}
        self._weights = {}
        for linear in unit.linears:
            encoding = compressed.linears[linear.id]
            if not isinstance(encoding, Nested):
                raise TypeError(f"{linear.id} is not nested.")
            for bits in widths:
                if (linear.id, bits) not in weights:
                    weights[linear.id, bits] = encoding.dequantize(bits).to(model.device)
            self._weights[linear.id] = tuple(weights[linear.id, bits] for bits in (widths[0], widths[-1]))
        self.chosen = np.zeros(0)

    @property
    def bits(self) -> float:
        """Average width of the last window's tokens."""
        low, high = self._widths[0], self._widths[-1]
        return low + (high - low) * float(self.chosen.mean())

    def hooks(self) -> list[Any]:
        """Take over the unit's linears: the first decides for all."""
        first = next(iter(self._modules))
        return [module.register_forward_hook(self._hook(name, name == first)) for name, module in self._modules.items()]

    def _hook(self, name: str, decides: bool) -> Callable[..., torch.Tensor]:
        def run(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0][0]
            if decides:
                squares = sum((x @ high.T - x @ low.T).square().sum(1) for low, high in self._weights.values())
                errors = torch.as_tensor(squares).sqrt().cpu().numpy()
                level = (
                    errors > self.factor * self._threshold
                    if self._fixed is None
                    else np.full(len(x), bool(self._fixed))
                )
                self.chosen = level.astype(np.float64)
            low, high = self._weights[name]
            wide = torch.from_numpy(self.chosen > 0).to(x.device)[:, None]
            found = torch.where(wide, x @ high.T, x @ low.T)
            bias = getattr(module, "bias", None)
            return (found if bias is None else found + bias)[None].to(output.dtype)

        return run
