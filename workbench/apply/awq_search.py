"""The search of AWQ for one unit: a scale per input channel, and a clipped range per group of weights.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", section 3.
Errors are those of the unit's outputs, ``tr(E H E^T)`` with ``H = E[x x^T]`` of its inputs: what the mean over all
calibration tokens of the squared change of the outputs is, without running them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from workbench.formats.codes import GroupCodes, group_ranges, nearest_codes, range_grid, rounded

CLIP_STEPS, CLIP_LEAST = 10, 0.5  # shares of the full range that are tried, as the authors' code does
_ROWS = 384  # of a unit that scales are judged by: all share them, so a sample says enough and large units end soon


@dataclass(frozen=True)
class Grid:
    """What weights are rounded to: see ``GroupCodes``."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int

    def nearest(self, weight: torch.Tensor) -> GroupCodes:
        return nearest_codes(weight, self.scales, self.zeros, self.bits, self.group_size)

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """What rounding to the nearest point changes, float32 (out, in)."""
        return rounded(weight, self.scales, self.zeros, self.bits, self.group_size).sub_(weight)


@dataclass(frozen=True)
class Matrix:
    """One linear of a unit in the search.

    Attributes:
        weight: float32 (out, in).
        bits: that it will have; None where it stays dense.
        clip: whether its ranges may be clipped. Not those of q and k: the error of their product is another one.
    """

    weight: torch.Tensor
    bits: int | None
    clip: bool = False


def make_grid(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, shares: torch.Tensor | None = None
) -> Grid:
    """The grid over every group's range, or over a share of it at both ends.

    Args:
        weight: float32 (out, in).
        bits, group_size, symmetric: of the grid.
        shares: float32 (out, n_groups), or None for whole ranges, which are those of round-to-nearest.
    """
    low, high = group_ranges(weight, group_size)
    if shares is not None:
        low, high = low * shares, high * shares
    return Grid(*range_grid(low, high, bits, symmetric), bits, min(group_size, weight.shape[1]))


def clip_shares(
    weight: torch.Tensor, moment: torch.Tensor, bits: int, group_size: int, symmetric: bool
) -> torch.Tensor:
    """Return the share of every group's range with the least error of what the group adds to the outputs.

    Shares do not depend on the scale of a row, so they stay right where rows are divided later.

    Args:
        weight: float32 (out, in).
        moment: ``E[x x^T]`` of its inputs, float32 (in, in), or its diagonal (in,).
        bits, group_size, symmetric: of the grid.

    Returns:
        float32 (out, n_groups), above ``CLIP_LEAST`` and at most 1.
    """
    size = min(group_size, weight.shape[1])
    blocks = group_moments(moment, size)
    low, high = group_ranges(weight, group_size)
    best, chosen = torch.full_like(low, torch.inf), torch.ones_like(low)
    for step in range(CLIP_STEPS):
        share = torch.full_like(low, 1 - (1 - CLIP_LEAST) * step / CLIP_STEPS)
        grid = Grid(*range_grid(low * share, high * share, bits, symmetric), bits, size)
        cost = _group_costs(grid.error(weight), blocks)
        chosen = torch.where(cost < best, share, chosen)
        best = torch.minimum(best, cost)
    return chosen


def group_moments(moment: torch.Tensor, group_size: int) -> torch.Tensor:
    """The blocks of a moment (in, in) on its diagonal, (n_groups, group_size, group_size); a short last one padded.

    Of a moment that is a diagonal (in,) itself: (n_groups, group_size).
    """
    n = moment.shape[0]
    if moment.dim() == 1:
        return functional.pad(moment, (0, -n % group_size)).unflatten(0, (-1, group_size))
    padded = functional.pad(moment, (0, -n % group_size, 0, -n % group_size))
    grouped = padded.unflatten(1, (-1, group_size)).unflatten(0, (-1, group_size))
    return grouped.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _group_costs(error: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """``e_g H_gg e_g^T`` of every row's groups: error (out, in) to (out, n_groups)."""
    size = blocks.shape[1]
    grouped = functional.pad(error, (0, -error.shape[1] % size)).unflatten(1, (-1, size)).transpose(0, 1)
    if blocks.dim() == 2:
        return (grouped.square() @ blocks.unsqueeze(2)).squeeze(2).T
    return ((grouped @ blocks) * grouped).sum(2).T


def weight_magnitude(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean over all rows of a weight's magnitude over the largest of its group, by input channel, float32 (in,)."""
    total, rows = torch.zeros(weights[0].shape[1]), 0
    for weight in weights:
        width = weight.shape[1]
        size = min(group_size, width)
        grouped = functional.pad(weight.abs(), (0, -width % size)).unflatten(1, (-1, size))
        grouped = grouped / grouped.amax(2, keepdim=True).clamp(min=1e-12)
        total += grouped.flatten(1)[:, :width].sum(0)
        rows += len(weight)
    return total / rows


def input_scales(magnitude: torch.Tensor, alpha: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """``s = m^alpha``, or ``m^alpha / w^(1 - alpha)`` with the weights' magnitudes, normalised; float32 (in,).

    Normalised by ``sqrt(max s * min s)``, so that no scale is far from 1; alpha = 0 without weights is no scaling.

    Args:
        magnitude: mean magnitude of each input, (in,); a channel that is never active counts as the weakest that is.
        alpha: 0 to 1.
        weights: ``weight_magnitude``, or None.
    """
    active = magnitude[magnitude > 0]
    least = float(active.min()) if len(active) else 1.0
    scales = magnitude.clamp(min=max(least, 1e-12)) ** alpha
    if weights is not None:
        scales = scales / weights.clamp(min=1e-4) ** (1 - alpha)
    scales = scales.clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


@dataclass(frozen=True)
class Options:
    """How a unit is searched; see ``AwqConfig``."""

    group_size: int
    symmetric: bool
    alpha_steps: int
    weight_factor: bool
    clip: bool
    joint: bool
    alpha: float | None = None


# Squared error of a module's output with other weights (out, in), one for each linear of a unit.
Judge = Callable[[Sequence[torch.Tensor]], float]


@dataclass(frozen=True)
class Found:
    """What the search of a unit found.

    Attributes:
        scales: of its inputs, float32 (in,); None where they stay as they are.
        alpha: the exponent behind them, None without scales.
        shares: of each linear's ranges, float32 (out, n_groups), None where they are not clipped.
        error: of the unit's outputs, in the search's own measure (whatever judged the scales).
        before: the same with neither scales nor clipping.
    """

    scales: torch.Tensor | None
    alpha: float | None
    shares: list[torch.Tensor | None]
    error: float
    before: float


def search_unit(
    matrices: Sequence[Matrix],
    moment: torch.Tensor,
    magnitude: torch.Tensor,
    options: Options,
    tie: Callable[[torch.Tensor], torch.Tensor] | None,
    check: Callable[[], None] = lambda: None,
    judge: Judge | None = None,
) -> Found:
    """Find the input scales, then the clipped ranges, of the linears of one unit.

    Args:
        matrices: the linears, which share their inputs.
        moment: ``E[x x^T]`` of the inputs, float32 (in, in); or its diagonal (in,), with which the error is the
            expected one if rounding errors of different channels have nothing to do with one another.
        magnitude: mean magnitude of each input, float32 (in,).
        options: of the search.
        tie: makes scales such that they can be folded away (``Fold.tie``); None where nothing takes them.
        check: called between two tries; may raise.
        judge: what scales are judged by in place of the unit's own outputs. As it costs more, every second exponent is
            tried, and then the neighbours of the best.
    """
    joint = options.clip and options.joint
    before, _ = _error(matrices, moment, None, options, False)
    scales, alpha = None, None
    if tie is not None:
        stride = max(1, sum(len(m.weight) for m in matrices) // _ROWS)  # one for all, so that each keeps its part
        few = [replace(m, weight=m.weight[::stride]) for m in matrices]
        weights = [m.weight for m in few if m.bits is not None]
        factor = weight_magnitude(weights, options.group_size) if options.weight_factor and weights else None

        def scales_of(exponent: float) -> torch.Tensor:
            return tie(input_scales(magnitude, exponent, factor))

        def measured(scales: torch.Tensor | None) -> float:
            check()
            if judge is None:
                return _error(few, moment, scales, options, joint)[0]
            return judge(_changed(matrices, moment, scales, options, joint))

        alpha = options.alpha
        if alpha is None:
            alpha = _best_exponent(options.alpha_steps, lambda a: measured(scales_of(a)), measured(None), judge is None)
        if alpha is not None:
            scales = scales_of(alpha)
    error, shares = _error(matrices, moment, scales, options, options.clip)
    return Found(scales, alpha, shares, error, before)


def _best_exponent(steps: int, error: Callable[[float], float], without: float, every: bool) -> float | None:
    """The exponent of least error among ``steps`` from 0 up to but not 1; None where no scales at all are as good.

    Args:
        steps: exponents.
        error: of one.
        without: error without scales.
        every: try every one; else every second, and then the neighbours of the best.
    """
    errors: dict[int, float] = {}

    def tried(step: int) -> float:
        if step not in errors:
            errors[step] = error(step / steps)
        return errors[step]

    best = min(range(0, steps, 1 if every else 2), key=tried)
    if not every:
        best = min((step for step in (best, best - 1, best + 1) if 0 <= step < steps), key=tried)
    return best / steps if errors[best] < without else None


def scaled_moment(moment: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The moment (in, in), or its diagonal (in,), of inputs that were divided by scales (in,)."""
    if scales is None:
        return moment
    return moment / scales.square() if moment.dim() == 1 else moment / scales / scales.unsqueeze(1)


def rounding_error(
    matrix: Matrix, scales: torch.Tensor | None, options: Options, shares: torch.Tensor | None
) -> torch.Tensor:
    """What rounding changes in scaled weights, float32 (out, in); not of a matrix that stays dense."""
    assert matrix.bits is not None
    weight = matrix.weight if scales is None else matrix.weight * scales
    return make_grid(weight, matrix.bits, options.group_size, options.symmetric, shares).error(weight)


def _rounded(
    matrices: Sequence[Matrix], moment: torch.Tensor, scales: torch.Tensor | None, options: Options, clip: bool
) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Of each matrix the shares that its ranges are clipped to, and what rounding changes; None where it has none.

    ``moment`` is that of the scaled inputs.
    """
    for matrix in matrices:
        share = None
        if matrix.bits is None:
            yield None, None
            continue
        if clip and matrix.clip:
            weight = matrix.weight if scales is None else matrix.weight * scales
            share = clip_shares(weight, moment, matrix.bits, options.group_size, options.symmetric)
        yield share, rounding_error(matrix, scales, options, share)


def _changed(
    matrices: Sequence[Matrix], moment: torch.Tensor, scales: torch.Tensor | None, options: Options, clip: bool
) -> list[torch.Tensor]:
    """What the weights of scaled inputs are once rounded, for inputs as they were, float32 (out, in) each."""
    errors = _rounded(matrices, scaled_moment(moment, scales), scales, options, clip)
    found = []
    for matrix, (_, error) in zip(matrices, errors, strict=True):
        if error is None:
            found.append(matrix.weight)
        elif scales is None:
            found.append(matrix.weight + error)
        else:
            found.append((matrix.weight * scales + error) / scales)
    return found


def _error(
    matrices: Sequence[Matrix], moment: torch.Tensor, scales: torch.Tensor | None, options: Options, clip: bool
) -> tuple[float, list[torch.Tensor | None]]:
    """``sum over linears of tr(E H E^T)`` and the shares that their ranges were clipped to."""
    moment = scaled_moment(moment, scales)
    total, shares = 0.0, []
    for share, error in _rounded(matrices, moment, scales, options, clip):
        shares.append(share)
        if error is None:
            continue
        if moment.dim() == 1:
            total += float((error.square() @ moment).sum(dtype=torch.float64))
        else:
            total += float(((error @ moment) * error).sum(dtype=torch.float64))
    return total, shares
