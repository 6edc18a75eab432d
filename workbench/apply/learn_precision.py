"""Phase 2 of dynamic precision: the average width that each unit should be read at, learnt for a target.

After DP-LLM (Kwon et al. 2025, arXiv 2508.06041): every unit holds one number p, its average width, and is run on
weights interpolated between the two widths around p. All weights are frozen; p alone is learnt, by

    loss = divergence from the dense model + alpha * (average of p over all weights - target)^2.

Weights are interpolated instead of outputs, which is the same for a linear map and takes one product instead of two; the
gradient of p is then <dL/dW, W_high - W_low>.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from workbench.apply.nested_tune import divergence, hidden_states, in_place_of_dense
from workbench.errors import RecipeError
from workbench.formats.nested import NestedCodes
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job

_MOMENTUM, _MEMORY = 0.8, 0.95  # of Adam; shorter than usual, since there are only some dozen steps


@dataclass(frozen=True)
class Learning:
    """How p is learnt.

    Attributes:
        steps: of Adam, one window each.
        rate: of the logit of p's place between the unit's lowest and highest width, per step; falls to zero as a cosine.
        alpha: weight of the squared distance of the average from the target, bits squared.
    """

    steps: int = 24
    rate: float = 0.15
    alpha: float = 1.0


def learn_precision(
    model: LoadedModel,
    codes: Mapping[str, NestedCodes],
    highest: Mapping[str, int],
    windows: Sequence[Sequence[int]],
    target: float,
    learning: Learning,
    job: Job,
    start: Mapping[str, float] | None = None,
) -> dict[str, float]:
    pieces = [_Unit(unit, codes, highest[unit.id], model) for unit in model.architecture.units]
    sizes = torch.tensor([float(piece.unit.n_weights) for piece in pieces])
    sizes /= sizes.sum()
    low = torch.tensor([float(piece.lowest) for piece in pieces])
    high = torch.tensor([float(piece.highest) for piece in pieces])
    wanted = torch.full_like(low, target) if start is None else torch.tensor([start[p.unit.id] for p in pieces])
    free = high > low
    with torch.inference_mode(False):
        share = ((wanted - low) / (high - low).clamp(min=1)).clamp(0.02, 0.98)
        z = torch.logit(share)
        mean, square = torch.zeros_like(z), torch.zeros_like(z)
        ids = [torch.tensor([list(window)], device=model.device) for window in windows[: learning.steps]]
        job.stage(f"learn precision for {target:g} bits", learning.steps)
        weights = {name: w for piece in pieces for name, w in piece.weights.items()}
        dense = {}
        for step in range(learning.steps):
            at = step % len(ids)
            if at not in dense:
                with torch.no_grad():
                    dense[at] = hidden_states(model, ids[at])
            s = torch.sigmoid(z)
            p = low + s * (high - low)
            for piece, value in zip(pieces, p.tolist(), strict=True):
                piece.write(value)
            with in_place_of_dense(model, weights), torch.enable_grad():
                loss = divergence(model, dense[at], ids[at])
                if not bool(loss.isfinite()):
                    raise RecipeError("not finite")
                loss.backward()
            g = torch.tensor([piece.gradient for piece in pieces])
            average = float((sizes * p).sum())
            g = g + 2 * learning.alpha * (average - target) * sizes
            gz = g * (high - low) * s * (1 - s)
            mean.lerp_(gz, 1 - _MOMENTUM)
            square.lerp_(gz.square(), 1 - _MEMORY)
            size = (square / (1 - _MEMORY ** (step + 1))).sqrt()
            rate = learning.rate * (1 + math.cos(math.pi * step / learning.steps)) / 2
            z = z - torch.where(free, rate * (mean / (1 - _MOMENTUM ** (step + 1))) / (size + 1e-12), torch.zeros(()))
            job.advance()
            learn_precision.log.append((step, float(loss.detach()), average))
            if learn_precision.verbose:
                print(step, float(loss.detach()), average, flush=True)
        p = low + torch.sigmoid(z) * (high - low)
    return {piece.unit.id: float(value) for piece, value in zip(pieces, p, strict=True)}


learn_precision.log = []
learn_precision.verbose = False


class _Unit:
    def __init__(self, unit: Unit, codes: Mapping[str, NestedCodes], highest: int, model: LoadedModel) -> None:
        self.unit, self._model = unit, model
        self._codes = {linear.id: codes[linear.id] for linear in unit.linears}
        self.widths = [b for b in next(iter(self._codes.values())).widths if b <= highest]
        self.lowest, self.highest = self.widths[0], self.widths[-1]
        self.gradient = 0.0
        self.weights = {}
        self._change = {}
        for name, nested in self._codes.items():
            empty = torch.empty(nested.codes.shape, dtype=model.dtype, device=model.device)
            weight = nn.Parameter(empty, requires_grad=True)
            weight.register_post_accumulate_grad_hook(self._taker(name))
            self.weights[name] = weight

    def write(self, value: float) -> None:
        below = max(b for b in self.widths if b <= value + 1e-6)
        if below == self.highest and len(self.widths) > 1:
            below = self.widths[-2]
        above = min((b for b in self.widths if b > below), default=below)
        share = (value - below) / max(above - below, 1)
        self.gradient = 0.0
        for name, nested in self._codes.items():
            first = nested.dequantize(below)
            change = nested.dequantize(above).sub_(first) if above > below else torch.zeros_like(first)
            self._change[name] = change.to(torch.bfloat16)
            self.weights[name].data.copy_(first.add_(change, alpha=share))
        self._step = max(above - below, 1)

    def _taker(self, name):
        def take(weight):
            gradient, weight.grad = weight.grad, None
            self.gradient += float(gradient.flatten() @ self._change.pop(name).float().flatten()) / self._step

        return take
