"""Integer activations: how the inputs of a linear are rounded, and the exact product that follows.

The definition that engines must agree with. Inputs x (tokens, in) are rotated where the scheme says so, then
``v = (x - bias) * multiplier``, ``code = clamp(round(v / step), -2^(bits-1), 2^(bits-1) - 1)``. Channels lie in
sections, and the step of a section is a power of two times that of the last. What follows is one of

* ``doubling`` (Tender, Lee et al. 2024, section 4): one 32-bit sum through all sections, from the largest scale to the
  smallest, doubled as often as the step halves: ``sum <- (sum << d) + codes_s @ weights_s``;
* ``apart``: every section's sum becomes fp32 and is scaled by itself (explicit requantization, or groups whose scales
  are no powers of two);
* ``simulated``: a scale for every channel. That does not factor out of a sum of integers, so it is computed in floating
  point and no hardware for integers could run it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from workbench.errors import RecipeError
from workbench.formats.hadamard import Rotation

Accumulate = Literal["doubling", "apart", "simulated"]
INTEGER_BITS = (4, 8)
MOST = 2**31 - 1  # of a 32-bit sum
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class InputScheme:
    """How the inputs of one linear are rounded.

    Attributes:
        bits: of the activations' codes, 4 or 8.
        channels: channels of each section; they sum to ``in``.
        powers: of two, by which the step of each section exceeds the step of the row; descending to 0.
        accumulate: what happens between sections, see above.
        order: int64 (in,), the channel at each place, sections one after another; None: as they come.
        bias: float32 (in,), taken off the inputs; None: nothing.
        multipliers: float32 (in,), of the inputs, beside the powers; None: one.
        steps: float32 (chunks,), calibrated, by chunk of positions; None: of every row's own range (of every section's
            where sections are ``apart`` and no powers of two relate them).
        starts: first position of each chunk, ascending from 0. The last chunk has no end: positions beyond those
            calibrated are rounded as its are.
        clip: share of a row's own range that is kept, in (0, 1].
        limit: inputs of more steps than this are counted as beyond calibration; 0: not counted.
        rotation: of the inputs, before anything else.
    """

    bits: int
    channels: tuple[int, ...]
    powers: tuple[int, ...] = (0,)
    accumulate: Accumulate = "doubling"
    order: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    multipliers: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    starts: tuple[int, ...] = ()
    clip: float = 1.0
    limit: float = 0.0
    rotation: Rotation | None = None

    @property
    def width(self) -> int:
        """Inputs of the linear."""
        return sum(self.channels)

    @property
    def doublings(self) -> tuple[int, ...]:
        """How often the sum is doubled ahead of each section."""
        return (0, *(before - after for before, after in pairwise(self.powers)))

    @property
    def scaled_apart(self) -> bool:
        """Whether every section of a row has a range of its own."""
        return self.accumulate == "apart" and self.steps is None and not any(self.powers)

    def place_multipliers(self) -> torch.Tensor:
        """Factor of the inputs by channel, float32 (in,): the multiplier over the power of its section."""
        powers = torch.repeat_interleave(torch.tensor(self.powers), torch.tensor(self.channels))
        at_place = _two_to(-powers)
        factors = at_place
        if self.order is not None:
            factors = torch.empty_like(at_place)
            factors[self.order] = at_place
        return factors if self.multipliers is None else factors * self.multipliers

    def reach(self, weight_bits: int) -> int:
        """Largest magnitude that a sum can take, with weights in the unsigned form that x86 multiplies."""
        most = 2 ** (self.bits - 1) * (2**weight_bits - 1)
        total = 0
        for count, doublings in zip(self.channels, self.doublings, strict=True):
            total = max(total, most * count) if self.accumulate == "apart" else (total << doublings) + most * count
        return total

    def check(self, weight_bits: int) -> None:
        """Raise ``RecipeError`` where the scheme contradicts itself or a sum could leave 32 bits."""
        if self.bits not in INTEGER_BITS or weight_bits not in INTEGER_BITS:
            raise RecipeError(f"Integer products have 4 or 8 bits, not {self.bits} and {weight_bits}.")
        if len(self.powers) != len(self.channels) or min(self.channels, default=0) < 1:
            raise RecipeError("Every section needs channels and a power.")
        if min(self.doublings) < 0 or self.powers[-1] != 0 or max(self.powers) > 30:
            raise RecipeError(f"Powers of sections descend from at most 30 to 0, got {list(self.powers)}.")
        if self.steps is not None and (len(self.starts) != len(self.steps) or not bool((self.steps > 0).all())):
            raise RecipeError("Every chunk of positions needs a step above 0.")
        if (self.steps is None) != (not self.starts) or (
            self.starts and list(self.starts) != sorted({0, *self.starts})
        ):
            raise RecipeError(f"Chunks of positions start at 0 and ascend, got {list(self.starts)}.")
        if self.scaled_apart and self.order is not None:
            raise RecipeError("Sections with ranges of their own take channels as they come.")
        if self.order is not None and not torch.equal(self.order.sort().values, torch.arange(self.width)):
            raise RecipeError("The order of channels must name each once.")
        if not (math.isfinite(self.clip) and 0 < self.clip <= 1):
            raise RecipeError(f"clip={self.clip} is not possible: it is a share in (0, 1].")
        if self.accumulate != "simulated" and self.reach(weight_bits) > MOST:
            raise RecipeError(
                f"Sums of {len(self.channels)} groups over {self.width} channels can reach "
                f"{self.reach(weight_bits):,}, which 32 bits do not hold: take fewer groups."
            )

    def to(self, device: torch.device) -> InputScheme:
        """The same with tensors on another device."""
        moved = {
            name: value.to(device)
            for name in ("order", "bias", "multipliers", "steps")
            if (value := getattr(self, name)) is not None
        }
        rotation = None if self.rotation is None else self.rotation.to(device)
        return replace(self, rotation=rotation, **moved)


@dataclass(frozen=True)
class Rounded:
    """Rows of integers.

    Attributes:
        codes: float64 (tokens, in), whole numbers, in the order of sections.
        scales: float32 (tokens, 1), or (tokens, sections) where sections are apart: what a code's step is worth.
        clamped: int64 (tokens,), codes that were clamped, where scales are calibrated (a clip of a row's own range
            clamps by design).
        beyond: int64 (tokens,), inputs beyond the calibrated range.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    clamped: torch.Tensor
    beyond: torch.Tensor


def round_rows(
    scheme: InputScheme, x: torch.Tensor, positions: torch.Tensor, factors: torch.Tensor | None = None
) -> Rounded:
    """Round rows of inputs. Each row's result depends on that row and its position alone.

    Args:
        scheme: how.
        x: float32 (tokens, in). A row that is not finite gives scales of NaN.
        positions: int64 (tokens,), in the sequence.
        factors: ``scheme.place_multipliers()``, where the caller has them.
    """
    top = 2 ** (scheme.bits - 1) - 1
    bad = ~x.isfinite().all(dim=1, keepdim=True)
    if scheme.rotation is not None:
        x = scheme.rotation(x)
    factors = scheme.place_multipliers().to(x.device) if factors is None else factors
    values = x if scheme.bias is None else x - scheme.bias
    values = values * factors
    if scheme.order is not None:
        values = values[:, scheme.order]
    if scheme.steps is not None:
        starts = torch.tensor(scheme.starts[1:], device=x.device)
        steps = scheme.steps[torch.bucketize(positions, starts, right=True)].unsqueeze(1)
        at_place = steps
    else:
        magnitudes = values.abs()
        parts = magnitudes.split(scheme.channels, dim=1) if scheme.scaled_apart else [magnitudes]
        steps = torch.stack([part.amax(dim=1) for part in parts], dim=1) * scheme.clip / top
        at_place = steps
        if scheme.scaled_apart:
            counts = torch.tensor(scheme.channels, device=x.device)
            at_place = steps.repeat_interleave(counts, dim=1)
    inverse = torch.where(at_place > 0, (1.0 / at_place).clamp(max=_LARGEST), 0.0)
    exact = (values * inverse).round()
    codes = exact.clamp(-top - 1, top)
    static = scheme.steps is not None
    clamped = ((exact != codes) & ~bad).sum(dim=1) if static else torch.zeros_like(positions)
    beyond = ((exact.abs() > scheme.limit) & ~bad).sum(dim=1) if static and scheme.limit else clamped * 0
    codes = torch.where(bad, 0.0, codes).double()
    scales = steps
    if scheme.accumulate == "apart" and not scheme.scaled_apart:
        scales = steps * _two_to(torch.tensor(scheme.powers, device=x.device))
    return Rounded(codes, torch.where(bad, torch.nan, scales), clamped, beyond)


def integer_sums(
    codes: np.ndarray, weights: np.ndarray, channels: Sequence[int], doublings: Sequence[int]
) -> np.ndarray:
    """The sum as a processing element accumulates it, section after section: the reference of every engine.

    Args:
        codes: int64 (tokens, in), in the order of sections.
        weights: int64 (out, in), likewise.
        channels, doublings: of each section.

    Returns:
        int64 (tokens, out).
    """
    total = np.zeros((len(codes), len(weights)), np.int64)
    begin = 0
    for count, doubling in zip(channels, doublings, strict=True):
        end = begin + count
        total = (total << doubling) + codes[:, begin:end] @ weights[:, begin:end].T
        begin = end
    return total


def products(scheme: InputScheme, rows: Rounded, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply rounded rows with weights, float32 (tokens, out).

    Whole numbers below 2^53 are exact in float64, so that matrix products of floating point give the integer sums.

    Args:
        scheme: of the rows.
        rows: what ``round_rows`` gave.
        weights: float64 (out, in), codes less their zero point, in the order of sections.
        scales: float32 (out, 1), or (out, sections) where weights have groups of their own.
    """
    device = rows.codes.device
    if scheme.accumulate == "apart":
        total = torch.zeros(len(rows.codes), len(weights), dtype=torch.float64, device=device)
        begin = 0
        for i, count in enumerate(scheme.channels):
            end = begin + count
            sums = (rows.codes[:, begin:end] @ weights[:, begin:end].T).float().double()
            own = scales[:, i if scales.shape[1] > 1 else 0] * rows.scales[:, i : i + 1]
            total = (total + sums * own.double()).float().double()
            begin = end
        return total.float()
    powers = torch.tensor(scheme.powers, device=device).repeat_interleave(torch.tensor(scheme.channels, device=device))
    shifted = rows.codes * _two_to(powers).double()
    if scheme.accumulate == "simulated":
        factors = scheme.place_multipliers().to(device)
        return ((shifted / factors.double()) @ weights.T * scales.T.double() * rows.scales.double()).float()
    return (shifted @ weights.T).float() * (scales.T * rows.scales)


def _two_to(powers: torch.Tensor) -> torch.Tensor:
    """Exact powers of two, float32."""
    return torch.ldexp(torch.ones(powers.shape, device=powers.device), powers)
