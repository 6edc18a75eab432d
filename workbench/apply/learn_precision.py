"""Phase 2 of DP-LLM: the average width that each unit should be read at, learnt for a target.

After Kwon et al. 2025 (arXiv 2508.06041): every unit holds one number p, its average width, and is run on weights
interpolated between the two widths around p. All weights are frozen; p alone is learnt, by

    loss = divergence from the dense model + alpha * (average of p over all weights - target)^2.

Two things differ from the paper. Weights are interpolated instead of outputs, which is the same for a linear map and
takes one product instead of two; the gradient of p is then <dL/dW, W_high - W_low>. And where the paper has the
cross-entropy of a text, this has the divergence from the dense model: on text that the model sampled itself, the one is
the other, up to a constant and the noise of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from workbench.analysis.divergence import divergence, in_place_of_dense
from workbench.errors import RecipeError
from workbench.formats.nested import NestedCodes
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job

_MOMENTUM, _MEMORY = 0.8, 0.95  # of Adam; shorter than usual, since there are only some dozen steps
# Change of the logit of p's place between the unit's widths, per step; falls to zero as a cosine. 0.4 and 0.8 gave the
# same divergence on SmolLM2-135M at 3.5 bits.
_RATE = 0.4
# Weight of the squared distance from the target: one bit takes off some 0.2 nats, so 20 holds the average within 0.01.
_ALPHA = 20.0
_MARGIN = 0.02  # p starts this share of its range away from its ends, where its logit would be infinite


def learn_precision(
    model: LoadedModel,
    codes: Mapping[str, NestedCodes],
    highest: Mapping[str, int],
    windows: Sequence[Sequence[int]],
    dense: Sequence[torch.Tensor],
    target: float,
    steps: int,
    job: Job,
) -> dict[str, float]:
    """Learn the average width of every unit for a target.

    Args:
        model: the dense model; left as it was, also after an error or a cancel.
        codes: of every linear, by id.
        highest: widest width of each unit, by id.
        windows: token windows of calibration text; each step takes the next.
        dense: of each window, what ``dense_states`` gave.
        target: average bits over all weights of the units.
        steps: of Adam, one window each.
        job: a stage, advanced by step.

    Returns:
        Average width by unit id, between the narrowest and the unit's highest.

    Raises:
        RecipeError: an output of the model is not finite.
    """
    units = [_Unit(unit, codes, highest[unit.id], model) for unit in model.architecture.units]
    weights = {name: weight for unit in units for name, weight in unit.weights.items()}
    shares = torch.tensor([float(unit.n_weights) for unit in units])
    shares /= shares.sum()
    low = torch.tensor([float(unit.widths[0]) for unit in units])
    span = torch.tensor([float(unit.widths[-1] - unit.widths[0]) for unit in units])
    mean, square = torch.zeros(len(units)), torch.zeros(len(units))
    start = ((target - low) / span.clamp(min=1)).clamp(_MARGIN, 1 - _MARGIN)
    place = torch.logit(start)
    job.stage(f"learn precision for {target:g} bits", steps)
    with torch.inference_mode(False):
        for step in range(steps):
            at = step % len(windows)
            ids = torch.tensor([list(windows[at])], device=model.device)
            share = torch.sigmoid(place)
            precision = low + share * span
            for unit, value in zip(units, precision.tolist(), strict=True):
                unit.write(value)
            with in_place_of_dense(model, weights), torch.enable_grad():
                loss = divergence(model, dense[at], ids)
                if not bool(loss.isfinite()):
                    raise RecipeError(f"The outputs of {model.name} at {target:g} bits are not finite.")
                loss.backward()
            gradient = torch.tensor([unit.gradient for unit in units])
            gradient += 2 * _ALPHA * float(shares @ precision - target) * shares
            gradient *= span * share * (1 - share)
            mean.lerp_(gradient, 1 - _MOMENTUM)
            square.lerp_(gradient.square(), 1 - _MEMORY)
            size = (square / (1 - _MEMORY ** (step + 1))).sqrt()
            rate = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
            place = place - rate * mean / (1 - _MOMENTUM ** (step + 1)) / (size + 1e-12)
            job.advance()
    precision = low + torch.sigmoid(place) * span
    return {unit.id: float(value) for unit, value in zip(units, precision, strict=True)}


class _Unit:
    """One unit on interpolated weights, with the gradient of its precision."""

    def __init__(self, unit: Unit, codes: Mapping[str, NestedCodes], highest: int, model: LoadedModel) -> None:
        self.id, self.n_weights = unit.id, unit.n_weights
        self._codes = {linear.id: codes[linear.id] for linear in unit.linears}
        offered = codes[unit.linears[0].id].widths
        self.widths = [bits for bits in offered if bits <= highest]
        self.gradient = 0.0  # of the loss by bits
        self.weights: dict[str, nn.Parameter] = {}
        self._changes: dict[str, torch.Tensor] = {}  # by one bit more, bf16
        for name, nested in self._codes.items():
            empty = torch.empty(nested.codes.shape, dtype=model.dtype, device=model.device)
            weight = nn.Parameter(empty, requires_grad=True)
            # Each gradient is used and dropped as soon as it is complete: one matrix's at a time is held.
            weight.register_post_accumulate_grad_hook(self._taker(name))
            self.weights[name] = weight

    def write(self, value: float) -> None:
        """Interpolate the weights for a precision."""
        self.gradient = 0.0
        step = max(0, min(sum(bits <= value for bits in self.widths), len(self.widths) - 1) - 1)
        below, above = self.widths[step], self.widths[min(step + 1, len(self.widths) - 1)]
        for name, nested in self._codes.items():
            weight = nested.dequantize(below)
            change = nested.dequantize(above).sub_(weight).div_(max(above - below, 1))
            self._changes[name] = change.to(torch.bfloat16)
            self.weights[name].data.copy_(weight.add_(change, alpha=value - below))

    def _taker(self, name: str) -> Callable[[torch.Tensor], None]:
        def take(weight: torch.Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                change = self._changes.pop(name).float().flatten()
                self.gradient += float(gradient.detach().to("cpu", torch.float32).flatten() @ change)

        return take
