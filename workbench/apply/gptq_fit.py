"""Error-compensated codes of one matrix on a given grid of group codes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from workbench.apply import nested_fit
from workbench.apply.compensate import drift_factor, upper_factor, walk, walking_order
from workbench.formats.codes import GroupCodes


@dataclass(frozen=True)
class Target:
    """What the rounding of a unit's linears is judged by.

    Attributes:
        moment: ``H = E[x' x'^T]`` of the inputs that it will get, damped, float32 (in, in).
        drift: ``E[(x - x') x'^T]`` with x what the dense model has there, float32 (in, in); None for x' = x.
    """

    moment: torch.Tensor
    drift: torch.Tensor | None = None


def compensated(
    weight: torch.Tensor, grid: GroupCodes, target: Target, *, act_order: bool = True, refit: bool = False
) -> GroupCodes:
    """Choose codes on a grid so that the outputs stay: ``E||W x - Q x'||^2`` small.

    Args:
        weight: float32 (out, in), finite.
        grid: whose scales, zero points, bits and group size are taken; its codes are not looked at.
        target: of the inputs.
        act_order: strong inputs first.
        refit: solve the scales for the codes, all groups of a row together.

    Raises:
        RecipeError: the moment is not positive definite.
    """
    n = weight.shape[1]
    order = walking_order(target.moment) if act_order else torch.arange(n)
    upper = upper_factor(target.moment[order][:, order])
    drift = None if target.drift is None else drift_factor(upper, target.drift[order][:, order])
    groups = (order // grid.group_size).tolist()
    scales = grid.scales.float().T.contiguous()
    top = 2**grid.bits - 1
    middle = torch.full_like(scales, 2 ** (grid.bits - 1))
    zeros = middle if grid.zeros is None else grid.zeros.float().T.contiguous()
    columns = weight.T[order].contiguous()
    codes = torch.empty_like(columns)

    def residual(i: int, wanted: torch.Tensor) -> torch.Tensor:
        scale, zero = scales[groups[i]], zeros[groups[i]]
        codes[i] = (wanted / scale).round_().add_(zero).clamp_(0, top)
        return wanted - (codes[i] - zero) * scale

    walk(columns, upper, residual, drift)
    found = torch.empty_like(codes)
    found[order] = codes
    chosen = GroupCodes(found.T.to(torch.uint8).contiguous(), grid.scales, grid.zeros, grid.bits, grid.group_size)
    return _refitted(weight, chosen, target) if refit else chosen


def _refitted(weight: torch.Tensor, codes: GroupCodes, target: Target) -> GroupCodes:
    """The same codes under the scales that keep the outputs best, all groups of a row solved for together."""
    if target.drift is not None:  # what on the inputs x' gives the outputs of W on x: W + W D H^-1
        factor = torch.linalg.cholesky(target.moment)
        weight = weight + torch.cholesky_solve((weight @ target.drift).T, factor).T
    size = codes.group_size
    zeros = torch.full_like(codes.scales, 2 ** (codes.bits - 1)) if codes.zeros is None else codes.zeros
    grid = nested_fit.Grid(codes.scales.float().unsqueeze(0), zeros.float().unsqueeze(0))
    padded = nested_fit.pad_weight(codes.codes, size).float().unsqueeze(0)
    h = nested_fit.pad_moment(target.moment, size)
    scales = nested_fit.solve_scales(nested_fit.pad_weight(weight, size), h, padded, grid).scales[0].half()
    return replace(codes, scales=scales)
