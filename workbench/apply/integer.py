"""Integer activations without Tender's groups: what it is compared with, and what others use instead."""

from __future__ import annotations

from dataclasses import replace

import torch

from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.configs import Activations as Activations
from workbench.apply.configs import IntegerConfig as IntegerConfig
from workbench.apply.draft import Draft
from workbench.apply.input_ranges import InputRanges, input_ranges
from workbench.apply.registry import register
from workbench.apply.tender import FittedInputs, TenderConfig, fit_tender
from workbench.formats.codes import quantize_groups
from workbench.formats.hadamard import Rotation
from workbench.formats.integer import Integer, SimulatedInteger
from workbench.formats.integers import InputScheme
from workbench.models.base import Linear, Unit
from workbench.progress import Job

CALIBRATED = ("per-tensor", "per-channel", "smoothquant", "requantize")
_TINY = 2.0**-100  # a step of inputs that are always zero


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
