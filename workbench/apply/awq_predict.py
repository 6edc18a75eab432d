"""What rounding weights is expected to do to a unit's outputs, from what is known of its inputs by channel.

Rounding leaves an error E on the weights (out, in) of a unit, whose inputs x were divided by scales s. If the errors of
different channels have nothing to do with one another, the expected squared change of the outputs is

    sum_c E[x_c^2] / s_c^2 * sum_r E_rc^2,

and with no rounding at all, channels likewise apart, the outputs have ``sum_c E[x_c^2] * sum_r W_rc^2``. The quotient
of the two is the *relative error* here. It needs one number a channel where the search itself takes second moments, so
it follows a control at once, for a model of any size. Clipping and error compensation make errors of channels depend
on one another; what a recipe does to the model's predictions is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.apply.awq import AwqConfig, matrix_of, search_options
from workbench.apply.awq_search import rounding_error, scaled_moment, search_unit
from workbench.apply.folding import find_fold
from workbench.apply.salient import SalientConfig, top_channels
from workbench.models.base import LoadedModel, Unit

WEIGHTS = 2**16  # of a unit that are rounded to predict: rows alike in what matters here, so a sample says enough


@dataclass(frozen=True)
class KnownInputs:
    """What is known of a unit's inputs.

    Attributes:
        square: ``E[x_c^2]``, float32 (in,).
        magnitude: ``E|x_c|``, float32 (in,).
    """

    square: torch.Tensor
    magnitude: torch.Tensor


@dataclass(frozen=True)
class PredictedUnit:
    """What a recipe is expected to do to one unit.

    Attributes:
        unit: id.
        error: relative error of its outputs.
        rounded: the same with plain rounding to nearest at the same bits and group size.
        channels: what each input channel adds to ``error``, float32 (in,); 0 of those that are kept.
        scales: of the inputs, float32 (in,), or None.
        alpha: the exponent behind them, or None.
        kept: channels in high precision, int64 ascending; empty where they are drawn at random, which is predicted
            as the mean over all draws.
    """

    unit: str
    error: float
    rounded: float
    channels: torch.Tensor
    scales: torch.Tensor | None
    alpha: float | None
    kept: torch.Tensor


def predict_unit(
    model: LoadedModel,
    unit: Unit,
    inputs: KnownInputs,
    config: AwqConfig,
    protected: SalientConfig | None = None,
    *,
    weights: int = WEIGHTS,
) -> PredictedUnit:
    """Predict the relative error of one unit.

    Args:
        model: the dense model, left as it is.
        unit: of it.
        inputs: of the unit.
        config: bits, grid, scales and clipping; ``unit_bits`` is not looked at.
        protected: which share of the channels is kept in high precision, and what chooses them.
        weights: at most about so many are rounded.
    """
    full = [(linear, model.linear_module(linear.id).weight.detach()) for linear in unit.linears]
    rows, width = sum(len(weight) for _, weight in full), full[0][1].shape[1]
    # One stride for all linears, so that each keeps its part; at least a few rows of the smallest.
    stride = max(1, min(rows * width // weights, min(len(weight) for _, weight in full) // 4))
    few = [(linear, weight[::stride].to("cpu", torch.float32)) for linear, weight in full]
    matrices = [matrix_of(linear, weight, config.bits) for linear, weight in few]
    fold = find_fold(model.architecture, unit) if config.scale else None
    options = search_options(config)
    found = search_unit(matrices, inputs.square, inputs.magnitude, options, fold.tie if fold else None)
    power = float((torch.stack([m.weight.square().sum(0) for m in matrices]).sum(0) * inputs.square).sum())
    power = power or 1.0  # inputs that are always zero: nothing is lost
    channels = torch.zeros(width)
    for matrix, shares in zip(matrices, found.shares, strict=True):
        if matrix.bits is not None:
            channels += rounding_error(matrix, found.scales, options, shares).square().sum(0)
    channels *= scaled_moment(inputs.square, found.scales) / power
    kept = torch.zeros(0, dtype=torch.int64)
    if protected is not None:
        if protected.by == "random":
            channels *= 1 - len(top_channels(channels, protected.share)) / width
        else:
            norms = torch.stack([weight.float().square().sum(0).cpu() for _, weight in full]).sum(0)
            kept = top_channels(inputs.magnitude if protected.by == "activation" else norms, protected.share)
            channels[kept] = 0.0
    return PredictedUnit(
        unit.id,
        float(channels.sum()),
        found.before / power,
        channels,
        found.scales,
        found.alpha,
        kept,
    )
