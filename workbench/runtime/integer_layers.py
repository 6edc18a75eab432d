"""Layers with integer inputs in the reference engine: where their rows lie in the sequence, and what they counted."""

from __future__ import annotations

import torch

from workbench.errors import EngineError
from workbench.formats.integer import IntegerLinear
from workbench.models.base import LoadedModel
from workbench.runtime.plan import Plan


class IntegerLayers:
    """The integer layers of a model; none where it has none.

    Args:
        model: as it runs.
    """

    def __init__(self, model: LoadedModel) -> None:
        layers = {linear.id: model.linear_module(linear.id) for linear in model.architecture.linears}
        self._units = {
            linear.unit for linear in model.architecture.linears if isinstance(layers[linear.id], IntegerLinear)
        }
        self._all = {name: layer for name, layer in layers.items() if isinstance(layer, IntegerLinear)}
        first = [unit.linears[0].id for unit in model.architecture.units]
        self._first = [self._all[name] for name in first if name in self._all]  # linears of a unit share their inputs

    def check(self, plan: Plan) -> None:
        """Raise ``EngineError`` where a plan chooses widths of linears that have integer inputs."""
        for consumer in plan.consumers:
            if consumer.kind == "width" and consumer.target in self._units:
                raise EngineError(
                    f"{consumer.target} is stored for integer inputs and has one width: leave it out of the plan's "
                    "width consumers."
                )

    def begin(self, position: int) -> None:
        """Say at which position of the sequence the next rows start."""
        for layer in self._all.values():
            layer.first_position = position

    def counts(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes clamped and inputs beyond calibration by the last n rows, int64 (n,) each."""
        clamped = beyond = torch.zeros(n, dtype=torch.int64)
        for layer in self._first:
            clamped, beyond = clamped + layer.clamped.cpu(), beyond + layer.beyond.cpu()
        return clamped, beyond
