"""A mask of small inputs whose gradient is that of a sigmoid (a straight-through estimate, arXiv 1308.3432)."""

from __future__ import annotations

import torch

_WIDTH = 0.5  # of the sigmoid, in logarithms: inputs within a factor of e^(2 x 0.5) of the threshold have a say


class SoftMask(torch.autograd.Function):
    """Inputs (tokens, in) with small ones left out, the share that is, and its slope; of ln f (in,) and ln t ()."""

    @staticmethod
    def forward(ctx, x, factors, threshold, first):  # type: ignore[no-untyped-def]
        at = _distance(x, factors, threshold)
        kept = at > 0
        kept[:first] = True
        ctx.save_for_backward(x, factors, threshold)
        ctx.first = first
        counted = kept[first:]
        share = 1 - counted.sum() / max(counted.numel(), 1)
        rise = _slope(at[first:]).mean()
        ctx.mark_non_differentiable(rise)
        return x * kept, share, rise

    @staticmethod
    def backward(ctx, gradient, of_share, _):  # type: ignore[no-untyped-def]
        x, factors, threshold = ctx.saved_tensors
        at = _distance(x, factors, threshold)
        kept = at > 0
        kept[: ctx.first] = True
        slope = _slope(at)
        slope[: ctx.first] = 0
        counted = max(slope[ctx.first :].numel(), 1)
        moved = (gradient.float() * x.float() - of_share / counted) * slope
        return gradient * kept, moved.sum(0), -moved.sum(), None


def _distance(x: torch.Tensor, factors: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """ln(|x_i| f_i / t), float32; -inf becomes a number far below, which has no slope."""
    return x.detach().float().abs().clamp(min=1e-30).log() + factors.detach() - threshold.detach()


def _slope(distance: torch.Tensor) -> torch.Tensor:
    """Of the sigmoid that stands for the mask."""
    soft = torch.sigmoid(distance / _WIDTH)
    return soft * (1 - soft) / _WIDTH
