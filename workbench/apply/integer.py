"""Integer activations without Tender's groups: what it is compared with, and what others use instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from workbench.apply.calibration import FEWEST_TOKENS, calibration_windows, check_finite
from workbench.apply.config import Bits, GroupSize, MethodConfig, Whole
from workbench.apply.draft import Draft
from workbench.apply.input_ranges import InputRanges, input_ranges
from workbench.apply.registry import register
from workbench.apply.tender import FittedInputs, IntegerBits, Scales, TenderConfig, fit_tender
from workbench.formats.codes import quantize_groups
from workbench.formats.hadamard import Rotation
from workbench.formats.integer import Integer, SimulatedInteger
from workbench.formats.integers import InputScheme
from workbench.models.base import Linear, Unit
from workbench.progress import Job

Activations = Literal["per-tensor", "per-token", "per-channel", "smoothquant", "plain-groups", "requantize", "rotation"]
CALIBRATED = ("per-tensor", "per-channel", "smoothquant", "requantize")
_TINY = 2.0**-100  # a step of inputs that are always zero


class IntegerConfig(MethodConfig):
    """Round weights and activations to integers.

    Attributes:
        activations: what shares a scale.
            ``per-tensor``: everything that enters a unit, calibrated.
            ``per-token``: a row, by its own range.
            ``per-channel``: a channel, calibrated. *Simulated*: such scales do not factor out of integer sums.
            ``smoothquant``: a row, after channels were divided by ``s = max|x|^a / max|w|^(1-a)`` and the weights
            multiplied (Xiao et al. 2023, section 4).
            ``plain-groups``: ``group_size`` neighbouring channels of a row, weights likewise.
            ``requantize``: Tender's groups with every group's sum scaled by itself: what its shift replaces.
            ``rotation``: a row, after a random Hadamard rotation (as QuaRot, Ashkboos et al. 2024; of every unit's
            input by itself, where QuaRot folds most of them into the weights before).
        bits: of the weights, 8 or 4; symmetric, rounded to nearest, one scale per output channel but for
            ``plain-groups``.
        activation_bits: of the activations, 8 or 4.
        group_size: of ``plain-groups``.
        smoothing: a of ``smoothquant``, 0 to 1: how much of the range is moved into the weights.
        clip: share of a row's range that is kept, for ``per-token``, ``smoothquant`` and ``rotation``. None is 1, and
            0.9 for a rotation at 4 bits, as QuaRot has it.
        scales: of ``requantize``, as in ``TenderConfig``.
        calibration_tokens: how much text is sampled from the model, where ranges are calibrated.
        output_bits: of the embedding and the output layer, which are group codes.
    """

    method: Literal["integer"] = "integer"
    activations: Activations
    bits: IntegerBits = 8
    activation_bits: IntegerBits = 8
    group_size: GroupSize = 64
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.5
    clip: Annotated[float, Field(gt=0, le=1)] | None = None
    scales: Scales = "token"
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 13824
    output_bits: Bits = 8


def static_scheme(ranges: InputRanges, bits: int) -> InputScheme:
    """One calibrated scale for all that enters a unit, at every position."""
    top = 2 ** (bits - 1) - 1
    step = (ranges.magnitude.max() / top).clamp(min=_TINY).reshape(1)
    return InputScheme(bits, (ranges.low.shape[1],), steps=step, starts=(0,), limit=float(top))


def channel_scheme(ranges: InputRanges, bits: int) -> InputScheme:
    """One calibrated scale for every channel: simulated."""
    top = 2 ** (bits - 1) - 1
    steps = (ranges.magnitude.amax(0) / top).clamp(min=_TINY)
    return InputScheme(
        bits,
        (len(steps),),
        accumulate="simulated",
        multipliers=1.0 / steps,
        steps=torch.ones(1),
        starts=(0,),
        limit=float(top),
    )


def smoothing_factors(magnitude: torch.Tensor, weight_magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s_c = max|x_c|^alpha / max|w_c|^(1 - alpha)``, float32 (in,), what inputs are divided by.

    Args:
        magnitude: float32 (in,), of the inputs over calibration text.
        weight_magnitude: float32 (in,), over all linears that share the inputs.
        alpha: 0 to 1.
    """
    factors = magnitude.clamp(min=1e-5).pow(alpha) / weight_magnitude.clamp(min=1e-5).pow(1 - alpha)
    return factors.clamp(min=1e-5)


@register(IntegerConfig)
class IntegerMethod:
    """Handler of ``IntegerConfig``."""

    def fit(self, draft: Draft, config: IntegerConfig, *, seed: int, job: Job) -> FittedInputs:
        """Choose how the inputs of each unit are rounded.

        Raises:
            RecipeError: an activation is not finite.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``.
        """
        units = draft.model.architecture.units
        if config.activations not in CALIBRATED:
            return FittedInputs({unit.id: _own_ranges(unit, config, seed) for unit in units}, None)
        check_finite(draft.model)
        windows, text = calibration_windows(draft.model, config.calibration_tokens, seed, job, parts=draft.parts)
        if config.activations == "requantize":
            return FittedInputs(_requantized(draft, config, windows, seed, job), text)
        ranges = input_ranges(draft.model, windows, (0, 1), seed, job)
        return FittedInputs({unit.id: self._calibrated(draft, unit, ranges[unit.id], config) for unit in units}, text)

    def apply(self, draft: Draft, config: IntegerConfig, fitted: FittedInputs, *, job: Job) -> None:
        draft.encode_linears(lambda linear, weight: _encode(linear, weight, config, fitted), job)
        draft.encode_outputs(config.output_bits, 64, False, job)

    @staticmethod
    def _calibrated(draft: Draft, unit: Unit, ranges: InputRanges, config: IntegerConfig) -> InputScheme:
        if config.activations == "per-tensor":
            return static_scheme(ranges, config.activation_bits)
        if config.activations == "per-channel":
            return channel_scheme(ranges, config.activation_bits)
        weights = torch.stack([draft.weight(linear.path).abs().amax(0) for linear in unit.linears]).amax(0)
        factors = smoothing_factors(ranges.magnitude.amax(0), weights, config.smoothing)
        return InputScheme(config.activation_bits, (len(factors),), multipliers=1.0 / factors, clip=config.clip or 1.0)


def _own_ranges(unit: Unit, config: IntegerConfig, seed: int) -> InputScheme:
    """Schemes that need no text: rows, or groups of channels of rows, by their own ranges."""
    width = unit.linears[0].in_features
    bits, clip = config.activation_bits, config.clip
    if config.activations == "plain-groups":
        size = min(config.group_size, width)
        channels = tuple(min(size, width - begin) for begin in range(0, width, size))
        return InputScheme(bits, channels, (0,) * len(channels), "apart", clip=clip or 1.0)
    if config.activations == "rotation":
        rotation = Rotation.random(width, seed)
        return InputScheme(bits, (width,), clip=clip or (0.9 if bits == 4 else 1.0), rotation=rotation)
    return InputScheme(bits, (width,), clip=clip or 1.0)


def _requantized(
    draft: Draft, config: IntegerConfig, windows: list[tuple[int, ...]], seed: int, job: Job
) -> dict[str, InputScheme]:
    tender = TenderConfig(bits=config.bits, activation_bits=config.activation_bits, scales=config.scales)
    schemes = fit_tender(draft, tender, windows, seed, job)
    return {unit: replace(scheme, accumulate="apart") for unit, scheme in schemes.items()}


def _encode(linear: Linear, weight: torch.Tensor, config: IntegerConfig, fitted: FittedInputs) -> Integer:
    scheme = fitted.schemes[linear.unit]
    offset = None if scheme.bias is None else weight @ scheme.bias
    if scheme.rotation is not None:
        weight = scheme.rotation(weight)
    elif scheme.multipliers is not None and scheme.accumulate != "simulated":
        weight = weight / scheme.multipliers
    group = config.group_size if config.activations == "plain-groups" else weight.shape[1]
    codes = quantize_groups(weight, config.bits, group, True)
    kind = SimulatedInteger if scheme.accumulate == "simulated" else Integer
    return kind(codes, scheme, offset)
