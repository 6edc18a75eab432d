"""Tuning of group scales: the whole model in codes, against the dense model's next-token distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from workbench.analysis.divergence import divergence, in_place_of_dense
from workbench.models.base import LoadedModel
from workbench.progress import Job

_MOMENTUM, _MEMORY = 0.8, 0.95  # of Adam; shorter than usual, since there are only some dozen steps
_FP16_TINY = 2.0**-24


# Relative change of a scale in the first step at 3 bits; half of it for every bit more, as steps of the codes are.
_RATE = 4e-3


class NotFinite(ArithmeticError):
    """The model's outputs in codes overflow."""


def tuning_rate(bits: int) -> float:
    """The first step's relative change of scales at a width."""
    return _RATE * 2.0 ** (3 - bits)


def tune(
    model: LoadedModel,
    scales: Mapping[str, Scales],
    windows: Sequence[torch.Tensor],
    dense: Sequence[torch.Tensor],
    *,
    steps: int,
    rate: float,
    job: Job,
    vectors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Take steps of Adam (Kingma and Ba 2015) on the scales, each on one window, for the mean KL from dense to coded.

    Args:
        model: the dense model; left as it was, also after an error or a cancel.
        scales: of every linear, by linear id; moved.
        windows: token ids (1, tokens).
        dense: ``analysis.divergence.dense_states`` of each.
        steps: at least 1.
        rate: relative change of a scale in the first step; falls to zero as a cosine.
        job: advanced by step.
        vectors: norms and biases that belong to the codes, by state-dict name.

    Raises:
        NotFinite: an output of the model in codes is not finite.
    """
    weights = {name: one.weight for name, one in scales.items()}
    with in_place_of_dense(model, weights, vectors), torch.enable_grad():
        for step in range(steps):
            at = step % len(windows)
            for one in scales.values():
                one.write()
                one.rate = rate * (1 + math.cos(math.pi * step / steps)) / 2
            loss = divergence(model, dense[at], windows[at])
            if not bool(loss.isfinite()):
                raise NotFinite
            loss.backward()
            job.advance()


class Scales:
    """The scales of one linear, with the state of Adam on their relative change.

    Attributes:
        weight: the weights under the present scales, as ``write`` left them.
        rate: of the next step.
    """

    def __init__(
        self, units: Callable[[], torch.Tensor], scales: torch.Tensor, shape: tuple[int, int], model: LoadedModel
    ) -> None:
        """
        Args:
            units: gives the weights at scale 1 by group, float32 (out, G, group size), padded with zeros.
            scales: to begin with, (out, G).
            shape: of the weights, (out, in).
            model: whose dtype and device are used.
        """
        self._units, self._shape = units, shape
        self._start = scales.float()
        self._change, self._mean, self._square = (torch.zeros_like(self._start) for _ in range(3))
        self._steps = 0
        self.rate = 0.0
        empty = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.weight = nn.Parameter(empty, requires_grad=True)
        # Each gradient is used and dropped as soon as it is complete: one matrix's at a time is held.
        self.weight.register_post_accumulate_grad_hook(self._take)

    def _now(self) -> torch.Tensor:
        return self._start * (1 + self._change)

    def write(self) -> None:
        """Put the weights under the present scales into the model."""
        weights = (self._units() * self._now().unsqueeze(2)).flatten(1)
        self.weight.data.copy_(weights[:, : self._shape[1]])

    def _take(self, weight: torch.Tensor) -> None:
        if weight.grad is None:
            return
        gradient = weight.grad.detach().to("cpu", torch.float32)
        weight.grad = None
        units = self._units()
        relative = (by_group(gradient, units.shape[2]) * units).sum(2) * self._start
        self._steps += 1
        self._mean.lerp_(relative, 1 - _MOMENTUM)
        self._square.lerp_(relative.square(), 1 - _MEMORY)
        mean = self._mean / (1 - _MOMENTUM**self._steps)
        size = (self._square / (1 - _MEMORY**self._steps)).sqrt()
        self._change.sub_(self.rate * mean / (size + 1e-12))

    def stored(self) -> torch.Tensor:
        """The tuned scales, float16 (out, G)."""
        return self._now().clamp(min=_FP16_TINY, max=65504.0).half()


def by_group(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Cut rows (out, in) into groups, (out, G, group size); the last is padded with zeros."""
    return nn.functional.pad(values, (0, -values.shape[1] % group_size)).unflatten(1, (-1, group_size))
