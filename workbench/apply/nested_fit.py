"""Nested codes of one matrix: one parent code per weight, good at several widths at once.

Error-compensated rounding (GPTQ: Frantar et al. 2023, "Accurate Post-Training Quantization for Generative
Pre-trained Transformers", section 3) with one compensated target per width. Columns are walked once for all widths,
and the code of a column is the one that serves them best together. Then scales and zero points are solved by least
squares for those codes, the codes are improved by one pass of coordinate descent, and the scales are solved again.

Shapes: ``out`` rows, ``n`` input channels, ``B`` widths (ascending), ``G`` groups of ``n / G`` channels. All tensors
are float32 on the CPU; codes and zero points are whole or half numbers in steps of their own width's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from workbench.apply.compensate import damped, upper_factor, walk, walking_order
from workbench.errors import RecipeError
from workbench.formats.nested import NestedCodes, zero_codes, zero_points

_TINY, _LARGEST = 2.0**-24, 65504.0  # smallest positive and largest fp16: a scale is one of its values
_SHRINKS = (1.08, 1.0, 0.93, 0.86, 0.8, 0.74)  # of a group's full range; fewer, wider cells outside cost outliers only
_VOTERS = 3  # the narrowest widths choose the range: the wide ones have resolution to spare
_FINER = 4.0**0.9  # how much more the error of one bit more counts in that choice, near the 4 of equal steps
_BLOCK = 64  # columns that are moved one by one before the rest is told in one product
_RIDGE = 1e-4  # relative: keeps groups whose codes are all alike solvable
_PIECE = 2**24  # numbers in one temporary tensor


@dataclass
class Grid:
    """Scales and zero points of a matrix, both float32 (B, out, G); scales are values of fp16."""

    scales: torch.Tensor
    zeros: torch.Tensor

    def weights(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes (B, out, n) stand for, of the same shape."""
        grouped = codes.unflatten(2, (self.scales.shape[2], -1))
        return (grouped - self.zeros.unsqueeze(3)).mul_(self.scales.unsqueeze(3)).flatten(2)


def round_matrix(weight: torch.Tensor, widths: Sequence[int], group_size: int) -> NestedCodes:
    """Choose nested codes by the weights alone: on the nearest-range grid, the codes that are nearest together.

    Args:
        weight: float32 (out, in), finite.
        widths: ascending, at least two.
        group_size: input channels per scale; need not divide ``in``.

    Raises:
        RecipeError: a weight is not finite, or too large for fp16 scales.
    """
    group_size = min(group_size, weight.shape[1])
    padded = pad_weight(weight, group_size)
    grid = start_grid(padded, torch.ones(padded.shape[1]), widths, group_size)
    rows = max(1, _PIECE // (8 * padded.shape[1]))
    codes = []
    for begin in range(0, len(padded), rows):
        part = slice(begin, begin + rows)
        steps = padded[part].unflatten(1, (-1, group_size)) / grid.scales[:, part].unsqueeze(3)
        wanted = (steps + grid.zeros[:, part].unsqueeze(3)).flatten(2)
        codes.append(choose(wanted, widths)[-1])
    return _pack(torch.cat(codes)[:, : weight.shape[1]], grid, widths, group_size)


def fit_matrix(
    weight: torch.Tensor, moment: torch.Tensor, widths: Sequence[int], group_size: int, damping: float
) -> NestedCodes:
    """Choose nested codes that keep the matrix's outputs, ``tr((W - Q) H (W - Q)^T)`` small at every width.

    Args:
        weight: float32 (out, in), finite.
        moment: second moment of its inputs, ``E[x x^T]``, float32 (in, in), finite. May have dead inputs.
        widths: ascending, at least two.
        group_size: input channels per scale; need not divide ``in``.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        RecipeError: a weight is not finite, or too large for fp16 scales.
    """
    group_size = min(group_size, weight.shape[1])
    padded, h = pad_weight(weight, group_size), pad_moment(damped(moment, damping), group_size)
    power = functional.pad(moment.diagonal(), (0, h.shape[0] - moment.shape[0]))
    grid = start_grid(padded, power, widths, group_size)
    codes = _compensate(padded, h, grid, widths)
    grid = _solve_grid(padded, h, codes, grid, widths)
    codes = _descend(padded, h, codes, grid, widths)
    grid = solve_scales(padded, h, codes, grid)
    return _pack(codes[-1][:, : weight.shape[1]], grid, widths, group_size)


def pad_moment(h: torch.Tensor, group_size: int) -> torch.Tensor:
    """Pad a moment (n, n) to whole groups.

    The padding is almost weightless and tied to nothing, so that no scale and no other column follows it, and the
    matrix stays positive definite.
    """
    n = h.shape[0]
    mean = float(h.diagonal().mean())
    padded = functional.pad(h, (0, -n % group_size, 0, -n % group_size))
    padded.diagonal()[n:] = 1e-6 * mean
    return padded


def start_grid(weight: torch.Tensor, power: torch.Tensor, widths: Sequence[int], group_size: int) -> Grid:
    """Cut one range per group into 2^b cells at every width b.

    The range is the group's from min to max and half a cell of the narrowest width at either end, times the shrink
    with the least ``sum_b 4^(0.9 b) sum_j power_j error_bj^2`` over the narrowest widths. All zero points follow from
    the narrowest width's, so that the cells of all widths line up.

    Args:
        weight: float32 (out, n), n a multiple of ``group_size``.
        power: mean square of each input, float32 (n,).
        widths: ascending.
        group_size: input channels per scale.

    Raises:
        RecipeError: a weight is not finite, or too large for fp16 scales.
    """
    if not bool(weight.isfinite().all()):
        raise RecipeError("A weight is NaN or infinite: the model is damaged and cannot be quantized.")
    groups = weight.unflatten(1, (-1, group_size))
    power = power.view(1, -1, group_size)
    low, high = groups.amin(2), groups.amax(2)
    centre, narrowest = (low + high) / 2, widths[0]
    cells = 2.0**narrowest
    # Zero points reach a quarter of the range to either side of its middle: a group far from zero needs more range.
    reach = torch.maximum(high, -low) / (0.75 - 1 / cells)
    full = torch.maximum((high - low) * (cells / (cells - 1)), reach).clamp(min=2.0**-23)
    if bool((full * max(_SHRINKS) / cells > _LARGEST).any()):
        raise RecipeError("A weight is too large for an fp16 scale: this model cannot be stored in nested codes.")

    def grid(span: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = (span / 2**bits).half().float().clamp(min=_TINY)
        stored = zero_codes((cells - 1) / 2 - centre / span * cells, narrowest)
        return scales, (zero_points(stored, narrowest) + 0.5) * 2.0 ** (bits - narrowest) - 0.5

    best, chosen = torch.full_like(full, torch.inf), full
    for shrink in _SHRINKS:
        span, cost = full * shrink, torch.zeros_like(full)
        for bits in widths[:_VOTERS]:
            scales, zeros = (part.unsqueeze(2) for part in grid(span, bits))
            rounded = (groups / scales + zeros).round_().clamp_(0, 2**bits - 1).sub_(zeros).mul_(scales)
            cost += rounded.sub_(groups).square_().mul_(power).sum(2) * _FINER**bits
        chosen = torch.where(cost < best, span, chosen)
        best = torch.minimum(best, cost)
    grids = [grid(chosen, bits) for bits in widths]
    return Grid(torch.stack([scales for scales, _ in grids]), torch.stack([zeros for _, zeros in grids]))


def importance(widths: Sequence[int]) -> list[float]:
    """Weight of each width's squared error, measured in steps of its own codes.

    From the second width on a quarter per bit, which is equal weight of errors in units of the weights. The narrowest
    would dominate at that rate: it keeps 0.6, which costs it little and gives the others back most of what nesting
    takes.
    """
    return [0.6] + [4.0 ** (widths[1] - bits) for bits in widths[1:]]


def choose(wanted: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Return nested codes, float32 (B, ...), with the least ``sum_b importance_b (wanted_b - code_b)^2``.

    Tries four codes of the narrowest width around the wanted one, all children of each where the next width has one
    bit more, and below that the child nearest to what its width wants. Compensation moves the targets of the widths
    apart, hence four and not two.

    Args:
        wanted: real-valued codes, float32 (B, ...).
        widths: ascending, at least two.
    """
    weights = importance(widths)
    lowest = wanted[0].floor().clamp_(1, 2 ** widths[0] - 3)
    codes = torch.stack((lowest - 1, lowest, lowest + 1, lowest + 2))
    cost = (codes - wanted[0]).square_().mul_(weights[0])
    for i in range(1, len(widths)):
        children = 2 ** (widths[i] - widths[i - 1])
        if i == 1 and children == 2:
            first = codes * 2
            codes, cost = torch.cat((first, first + 1)), torch.cat((cost, cost))
        else:
            first = codes * children
            codes = torch.minimum(torch.maximum(wanted[i].round(), first), first + (children - 1))
        cost.add_((codes - wanted[i]).square_(), alpha=weights[i])
    best = cost.min(0, keepdim=True).indices  # twenty times as fast as argmin along rows
    parent = codes.gather(0, best)[0]
    return torch.stack([(parent * 2.0 ** (bits - widths[-1])).floor_() for bits in widths])


def _compensate(weight: torch.Tensor, h: torch.Tensor, grid: Grid, widths: Sequence[int]) -> torch.Tensor:
    """Codes (B, out, n): each column's error, at every width, is made up for by the columns that follow."""
    order = walking_order(h)
    targets = weight.T[order].unsqueeze(1).repeat(1, len(widths), 1)  # (n, B, out)
    columns = _Columns(grid, order)
    codes = torch.empty_like(targets)

    def residual(i: int, target: torch.Tensor) -> torch.Tensor:
        scales, zeros, inverse_scales = columns[i]
        codes[i] = choose(torch.addcmul(zeros, target, inverse_scales), widths)
        return torch.addcmul(target, scales, codes[i] - zeros, value=-1)

    walk(targets, upper_factor(h[order][:, order]), residual)
    return _in_place_of(order, codes)


def _descend(
    weight: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: Grid, widths: Sequence[int]
) -> torch.Tensor:
    """One pass of coordinate descent: each column's codes (B, out, n) anew, given all the others as they are.

    With ``R = (W - Q) H`` the best real value of column j is ``Q_j + R_j / H_jj``; a move of Q_j by d takes
    ``d H_j`` from R.
    """
    n = h.shape[0]
    order = walking_order(h)
    h = h[order][:, order]
    values = grid.weights(codes)
    rest = (((weight - values)[:, :, order]) @ h).permute(2, 0, 1).contiguous()
    values = values[:, :, order].permute(2, 0, 1).contiguous()
    columns = _Columns(grid, order)
    found = torch.empty_like(values)
    diagonal = h.diagonal().tolist()
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        moves = torch.empty_like(values[begin:end])
        for i in range(begin, end):
            scales, zeros, inverse_scales = columns[i]
            wanted = torch.add(values[i], rest[i], alpha=1 / diagonal[i])
            found[i] = choose(torch.addcmul(zeros, wanted, inverse_scales), widths)
            move = moves[i - begin] = (found[i] - zeros).mul_(scales).sub_(values[i])
            rest[i + 1 : end].addcmul_(h[i, i + 1 : end].view(-1, 1, 1), move, value=-1)
        rest[end:].flatten(1).addmm_(h[begin:end, end:].T, moves.flatten(1), alpha=-1)
    return _in_place_of(order, found)


class _Columns:
    """The grid of every column in walking order: scales, zero points and 1 / scales, each (B, out)."""

    def __init__(self, grid: Grid, order: torch.Tensor) -> None:
        self._parts = [
            part.permute(2, 0, 1).contiguous() for part in (grid.scales, grid.zeros, grid.scales.reciprocal())
        ]
        self._groups = (order // (len(order) // grid.scales.shape[2])).tolist()

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scales, zeros, inverse_scales = self._parts
        group = self._groups[i]
        return scales[group], zeros[group], inverse_scales[group]


def _in_place_of(order: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns in walking order (n, B, out) back to (B, out, n)."""
    placed = torch.empty_like(columns)
    placed[order] = columns
    return placed.permute(1, 2, 0).contiguous()


def _solve_grid(weight: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: Grid, widths: Sequence[int]) -> Grid:
    """Zero points, then scales, by least squares in the norm of H: a scale and an offset of every group of a row.

    With the zero points rounded to what can be stored, the scales are solved again: their equations are those of the
    codes around the middle, moved by ``d`` = zero - middle.
    """
    groups = grid.scales.shape[2]
    fitted = Grid(grid.scales.clone(), grid.zeros.clone())
    ones = h.unflatten(1, (groups, -1)).sum(2).unflatten(0, (groups, -1))  # H 1_g, by group of channels
    pairs = ones.sum(1)  # 1_f^T H 1_g
    targets = (weight @ h).unflatten(1, (groups, -1))
    for k, bits in enumerate(widths):
        middle = (2**bits - 1) / 2
        for part in _pieces(len(weight), h.shape[0], 2 * groups):
            c = codes[k, part] - middle  # around the middle, scale and offset are nearly independent
            target, grouped = targets[part], c.unflatten(1, (groups, -1))
            gram = _gram(c, h, groups)
            mixed = torch.einsum("rfj,fjg->rfg", grouped, ones)  # c_f^T H 1_g
            both = pairs.expand(len(c), -1, -1)
            left = torch.cat((torch.cat((gram, mixed), 2), torch.cat((mixed.transpose(1, 2), both), 2)), 1)
            along, across = (target * grouped).sum(2), target.sum(2)
            found = _solve(left, torch.cat((along, across), 1))
            scales = _sane(found[:, :groups], grid.scales[k, part])
            zeros = zero_points(zero_codes(middle - found[:, groups:] / scales, bits), bits)
            d = zeros - middle
            moved = mixed * d.unsqueeze(1)
            gram = gram - moved - moved.transpose(1, 2) + both * d.unsqueeze(1) * d.unsqueeze(2)
            fitted.zeros[k, part] = zeros
            fitted.scales[k, part] = _stored(_solve(gram, along - d * across), grid.scales[k, part])
    return fitted


def solve_scales(weight: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: Grid) -> Grid:
    """Scales alone by least squares in the norm of H, all groups of a row together."""
    groups = grid.scales.shape[2]
    unscaled = Grid(torch.ones_like(grid.scales), grid.zeros).weights(codes)
    target = (weight @ h).unflatten(1, (groups, -1))
    scales = grid.scales.clone()
    for k in range(len(codes)):
        for part in _pieces(len(weight), h.shape[0], groups):
            c = unscaled[k, part]
            right = (target[part] * c.unflatten(1, (groups, -1))).sum(2)
            scales[k, part] = _stored(_solve(_gram(c, h, groups), right), grid.scales[k, part])
    return Grid(scales, grid.zeros)


def _gram(c: torch.Tensor, h: torch.Tensor, groups: int) -> torch.Tensor:
    """``c_f^T H c_g`` of every row's pairs of groups: c (rows, n) to (rows, G, G)."""
    grouped = c.unflatten(1, (groups, -1))
    size = grouped.shape[2]
    gram = c.new_empty(len(c), groups, groups)
    for g in range(groups):  # symmetric: half of the products
        later = grouped[:, g:]
        row = ((grouped[:, g] @ h[g * size : (g + 1) * size, g * size :]).view_as(later) * later).sum(2)
        gram[:, g, g:] = gram[:, g:, g] = row
    return gram


def _solve(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve every row's normal equations (rows, m, m) x = (rows, m), in float64."""
    left = left + torch.diag_embed(left.diagonal(dim1=1, dim2=2) * _RIDGE + 1e-12)
    return torch.linalg.solve(left.double(), right.double()).float()


def _sane(found: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Keep the scale of a group whose equations say nothing (all codes alike): it would move far."""
    return torch.where((found > 0.3 * before) & (found < 3 * before), found, before)


def _stored(found: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The values of fp16 nearest to sane scales."""
    return _sane(found, before).clamp(min=_TINY, max=_LARGEST).half().float()


def _pieces(rows: int, n: int, unknowns: int) -> list[slice]:
    """Slices of rows, each so few that equations in so many unknowns fit the bound on temporary memory."""
    step = max(1, _PIECE // max(n, unknowns**2))
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def pad_weight(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Pad rows to whole groups with their last weight, which widens no group's range."""
    return torch.cat([weight, weight[:, -1:].expand(-1, -weight.shape[1] % group_size)], 1)


def _pack(parent: torch.Tensor, grid: Grid, widths: Sequence[int], group_size: int) -> NestedCodes:
    return NestedCodes(
        codes=parent.to(torch.uint8).contiguous(),
        scales={bits: grid.scales[k].half() for k, bits in enumerate(widths)},
        zeros={bits: zero_codes(grid.zeros[k], bits) for k, bits in enumerate(widths)},
        group_size=group_size,
    )
