"""Tuning of the scales of nested codes: the whole model at one width, against the dense model's next-token choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from workbench.analysis.divergence import dense_states, divergence, in_place_of_dense
from workbench.errors import RecipeError
from workbench.formats.nested import NestedCodes, zero_points
from workbench.models.base import LoadedModel
from workbench.progress import Job

WIDEST = 4  # bits that are tuned: above, a handful of windows is as much noise as there is to gain
# Relative change of a scale per step at 3 bits, falling to zero as a cosine; half of it for every bit more, as steps of
# the codes are.
_RATE = 4e-3
_MOMENTUM, _MEMORY = 0.8, 0.95  # of Adam; shorter than usual, since there are only some dozen steps
_FP16_TINY = 2.0**-24


def tune_scales(
    model: LoadedModel, codes: Mapping[str, NestedCodes], windows: Sequence[Sequence[int]], steps: int, job: Job
) -> dict[str, NestedCodes]:
    """Return the same codes with scales under which the model at widths up to ``WIDEST`` comes closer to the dense one.

    Per such width ``steps`` steps of Adam (Kingma and Ba 2015), each on one window, minimise the mean KL divergence of
    the dense model's next-token distribution from that of the model read at this width. Scales belong to one width,
    so widths are tuned apart; codes and zero points stay.

    Args:
        model: the dense model; left as it was, also after an error or a cancel.
        codes: by linear id, of every linear.
        windows: token windows of calibration text.
        steps: per width, at least 1.
        job: a stage per width, advanced by step.

    Raises:
        RecipeError: an output of the model is not finite.
    """
    widths = next(iter(codes.values())).widths
    scales = {name: dict(nested.scales) for name, nested in codes.items()}
    with torch.inference_mode(False):
        ids = [torch.tensor([list(window)], device=model.device) for window in windows[:steps]]
        dense = dense_states(model, windows[:steps])
        for bits in [bits for bits in widths if bits <= WIDEST]:
            job.stage(f"tune scales at {bits} bits", steps)
            tuned = {name: _Scales(nested, bits, model) for name, nested in codes.items()}
            with in_place_of_dense(model, {name: one.weight for name, one in tuned.items()}), torch.enable_grad():
                for step in range(steps):
                    at = step % len(ids)
                    for one in tuned.values():
                        one.write()
                    loss = divergence(model, dense[at], ids[at])
                    if not bool(loss.isfinite()):
                        raise RecipeError(
                            f"The outputs of {model.name} at {bits} bits are not finite: set tune_steps to 0."
                        )
                    for one in tuned.values():
                        one.rate = _RATE * 2.0 ** (3 - bits) * (1 + math.cos(math.pi * step / steps)) / 2
                    loss.backward()
                    job.advance()
            for name, one in tuned.items():
                scales[name][bits] = one.stored()
    return {name: replace(nested, scales=scales[name]) for name, nested in codes.items()}


class _Scales:
    """The scales of one linear at one width, with the state of Adam on their relative change."""

    def __init__(self, nested: NestedCodes, bits: int, model: LoadedModel) -> None:
        self._nested, self._bits = nested, bits
        self._start = nested.scales[bits].float()
        self._change, self._mean, self._square = (torch.zeros_like(self._start) for _ in range(3))
        self._steps = 0
        self.rate = 0.0
        empty = torch.empty(nested.codes.shape, dtype=model.dtype, device=model.device)
        self.weight = nn.Parameter(empty, requires_grad=True)
        # Each gradient is used and dropped as soon as it is complete: one matrix's at a time is held.
        self.weight.register_post_accumulate_grad_hook(self._take)

    def _units(self) -> torch.Tensor:
        """The weights at scale 1, by group: float32 (out, G, group size), the last group padded with zeros."""
        nested = self._nested
        top = (nested.codes >> (nested.bits - self._bits)).float()
        size = nested.group_size
        grouped = nn.functional.pad(top, (0, -top.shape[1] % size)).unflatten(1, (-1, size))
        return grouped.sub_(zero_points(nested.zeros[self._bits], self._bits).unsqueeze(2))

    def _now(self) -> torch.Tensor:
        return self._start * (1 + self._change)

    def write(self) -> None:
        """Put the weights under the present scales into the model."""
        weights = (self._units() * self._now().unsqueeze(2)).flatten(1)
        self.weight.data.copy_(weights[:, : self._nested.codes.shape[1]])

    def _take(self, weight: torch.Tensor) -> None:
        if weight.grad is None:
            return
        gradient = weight.grad.detach().to("cpu", torch.float32)
        weight.grad = None
        group = self._nested.group_size
        grouped = nn.functional.pad(gradient, (0, -gradient.shape[1] % group)).unflatten(1, (-1, group))
        relative = (grouped * self._units()).sum(2) * self._start
        self._steps += 1
        self._mean.lerp_(relative, 1 - _MOMENTUM)
        self._square.lerp_(relative.square(), 1 - _MEMORY)
        mean = self._mean / (1 - _MOMENTUM**self._steps)
        size = (self._square / (1 - _MEMORY**self._steps)).sqrt()
        self._change.sub_(self.rate * mean / (size + 1e-12))

    def stored(self) -> torch.Tensor:
        """The tuned scales, float16 (out, G)."""
        return self._now().clamp(min=_FP16_TINY, max=65504.0).half()
