"""Second moments of what goes into the matrices of a model: what error-compensating methods weigh errors by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from workbench.errors import RecipeError
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job

_MOMENT_BYTES = 2**30  # held at a time; where all units need more, the text is run several times


class Inputs(NamedTuple):
    """Statistics of the inputs x of a unit over all tokens, on the CPU.

    Attributes:
        unit: whose linears read them.
        moment: ``E[x x^T]``, float32 (in, in).
        magnitude: ``E|x|``, float32 (in,).
    """

    unit: Unit
    moment: torch.Tensor
    magnitude: torch.Tensor


def input_moments(
    model: LoadedModel, windows: Sequence[Sequence[int]], job: Job, units: Sequence[Unit] | None = None
) -> Iterator[list[Inputs]]:
    """Yield units with statistics of their inputs, in order.

    The linears of a unit share their input, so one moment serves them all. The dense model runs over the text once
    for each list yielded: as many units as fit the bound on memory (at least one). Caller drops a list before the next.

    Args:
        model: the dense model, left as it is.
        windows: token windows, each no longer than the context.
        job: a stage for every run, advanced by window.
        units: those that are asked for; None for all.

    Raises:
        RecipeError: an activation is not finite.
    """
    pending = list(model.architecture.units if units is None else units)
    while pending:
        count, held = 0, 0
        for unit in pending:
            held += 4 * unit.linears[0].in_features ** 2
            if count and held > _MOMENT_BYTES:
                break
            count += 1
        units, pending = pending[:count], pending[count:]
        yield _run(model, windows, units, job)


def _run(model: LoadedModel, windows: Sequence[Sequence[int]], units: Sequence[Unit], job: Job) -> list[Inputs]:
    sums: dict[str, torch.Tensor] = {}
    sizes: dict[str, torch.Tensor] = {}

    def adder(unit: Unit) -> Any:
        width = unit.linears[0].in_features
        sums[unit.id] = torch.zeros(width, width, device=model.device)
        sizes[unit.id] = torch.zeros(width, device=model.device)

        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, width).float()
            sums[unit.id].addmm_(rows.T, rows)
            sizes[unit.id] += rows.abs().sum(0)

        return add

    hooks = [model.submodule(u.linears[0].path).register_forward_pre_hook(adder(u)) for u in units]
    job.stage("measure the inputs of matrices", len(windows))
    try:
        with torch.no_grad():
            for window in windows:
                ids = torch.tensor([list(window)], device=model.device)
                model.module.base_model(input_ids=ids, use_cache=False)
                job.advance()
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(map(len, windows))
    found = [Inputs(u, sums.pop(u.id).div_(tokens).cpu(), sizes.pop(u.id).div_(tokens).cpu()) for u in units]
    for unit, moment, _ in found:
        if not bool(moment.isfinite().all()):
            raise RecipeError(
                f"The activations that enter {unit.id} are not finite: {model.name} overflows on its own text. "
                "Load it in float32, or choose a method that needs no text."
            )
    return found


def input_magnitudes(model: LoadedModel, windows: Sequence[Sequence[int]], job: Job) -> dict[str, torch.Tensor]:
    """Return ``E|x|`` of every unit's input x over all tokens, float32 (in,) on the CPU, by unit id."""
    found: dict[str, torch.Tensor] = {}
    for inputs in input_moments(model, windows, job):
        found |= {one.unit.id: one.magnitude for one in inputs}
        inputs.clear()
    return found
