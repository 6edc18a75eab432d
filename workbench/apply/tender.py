"""Tender: integer activations in channel groups whose scales are powers of two apart (Lee et al. 2024, ISCA).

Channels of similar range share a scale; scales of neighbouring groups differ by a factor of two, so that one 32-bit sum
runs through all groups and is shifted by one bit where the next begins, instead of being scaled anew. The engine does
exactly that. Of each linear there is one order of channels, from the largest scale to the smallest.

Two ways of scaling a row:

* ``chunk``, as published: a calibrated scale for each chunk of positions. The first position is a chunk of its own, for
  what it carries (massive activations) is like no other's. Positions beyond those calibrated use the last chunk's.
* ``token``: the groups as calibrated, and the scale from the row's own range. Gated MLPs need it: what enters ``down``
  differs from token to token by more than 8 bits hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from workbench.analysis.outliers import power_of_two_groups
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.configs import MOST_GROUPS as MOST_GROUPS
from workbench.apply.configs import IntegerBits as IntegerBits
from workbench.apply.configs import Scales as Scales
from workbench.apply.configs import TenderConfig as TenderConfig
from workbench.apply.draft import Draft
from workbench.apply.input_ranges import InputRanges, input_ranges
from workbench.apply.registry import register
from workbench.corpus import TextRecord
from workbench.errors import RecipeError
from workbench.formats.codes import quantize_groups
from workbench.formats.integer import Integer
from workbench.formats.integers import MOST, InputScheme
from workbench.models.base import Linear, LoadedModel, Unit
from workbench.progress import Job

_GAIN = 0.02  # share of the predicted error that one more group has to take off: each costs a shift of every sum
_JUDGES = 2  # calibration windows on which round-up and round-down are compared; the paper takes one


# Pure functions -------------------------------------------------------------------------------------------------------


def chunk_starts(chunk_tokens: int, length: int) -> tuple[int, ...]:
    """First positions of chunks that text of ``length`` tokens calibrates: 0, 1, then every ``chunk_tokens``."""
    return tuple(sorted({0, *(s for s in (1, *range(chunk_tokens, length, chunk_tokens)) if s < length)}))


def channel_bias(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Middle of each channel's range, ``(max + min) / 2`` over all chunks but the first position's, float32 (in,).

    Rounded to what is stored (fp16); where that does not hold a middle, none is taken off.
    """
    rest = slice(1, None) if len(low) > 1 else slice(None)
    middle = ((high[rest].amax(0) + low[rest].amin(0)) / 2).half().float()
    return torch.where(middle.isfinite(), middle, 0.0)


def group_powers(magnitude: torch.Tensor, groups: int) -> torch.Tensor:
    """Power of two by which each channel's scale exceeds the smallest group's, int64 (in,), in 0 .. groups - 1.

    The largest group has the highest power, the smallest that has channels 0.

    Args:
        magnitude: float32 (in,), at least 0.
        groups: at least 1.
    """
    group = torch.from_numpy(power_of_two_groups(magnitude.numpy(), groups))
    return group.max() - group


def order_by_power(powers: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """Order of channels from the largest scale to the smallest, channels per section, and the sections' powers.

    Groups without channels have no section: the one after them is shifted by as many bits as boundaries are passed.
    """
    order = torch.argsort(powers, descending=True, stable=True)
    values, counts = torch.unique(powers, return_counts=True)
    return order, tuple(counts.flip(0).tolist()), tuple(values.flip(0).tolist())


def token_error(rows: torch.Tensor, powers: torch.Tensor, weight_power: torch.Tensor) -> float:
    """Predicted squared error of the products with scales by token, up to a constant.

    A row's step is its range over the powers; rounding leaves a twelfth of a step squared on each channel, which the
    weights carry to the outputs: ``sum_t step_t^2 sum_c 4^power_c |W_c|^2``.

    Args:
        rows: float32 (n, in), inputs.
        powers: int64 (in,).
        weight_power: float32 (in,), squared length of each channel's weights.
    """
    steps = (rows.abs() * torch.exp2(-powers.float())).amax(1)
    return float(steps.double().square().mean() * (weight_power * torch.exp2(2.0 * powers)).double().sum())


def chunk_error(steps: torch.Tensor, powers: torch.Tensor, weight_power: torch.Tensor) -> float:
    """The same with calibrated steps, float32 (chunks,), of the smallest group."""
    return float(steps.double().square().mean() * (weight_power * torch.exp2(2.0 * powers)).double().sum())


def fits(powers: torch.Tensor, bits: int, weight_bits: int) -> bool:
    """Whether no sum over these groups can leave 32 bits."""
    _, channels, of = order_by_power(powers)
    return InputScheme(bits, channels, of).reach(weight_bits) <= MOST


def choose_groups(
    make: Callable[[int], torch.Tensor], error: Callable[[torch.Tensor], float], allowed: Callable[[torch.Tensor], bool]
) -> torch.Tensor:
    """Return the powers with the fewest groups beyond which no number takes ``_GAIN`` off the predicted error.

    Args:
        make: number of groups to powers.
        error: of powers, predicted.
        allowed: whether sums fit.
    """
    best, least = make(1), math.inf
    for groups in range(1, MOST_GROUPS + 1):
        powers = make(groups)
        if not allowed(powers):
            break
        predicted = error(powers)
        if predicted < least * (1 - _GAIN) or groups == 1:
            best, least = powers, predicted
    return best


def tender_scheme(
    ranges: InputRanges,
    weight_power: torch.Tensor,
    config: TenderConfig,
    starts: Sequence[int],
    *,
    centred: bool,
    down: bool = False,
) -> InputScheme:
    """Choose bias, groups and scales of one unit's inputs.

    Args:
        ranges: of calibration text.
        weight_power: float32 (in,), squared length of each channel's weights over the unit's linears.
        config: what is asked for.
        starts: first position of each chunk.
        centred: take channels' middles off.
        down: round-down: every group takes the scale below.

    Raises:
        RecipeError: as many groups as asked for could overflow a sum.
    """
    bias = channel_bias(ranges.low, ranges.high) if centred else None
    shift = 0.0 if bias is None else bias
    magnitude = torch.maximum((ranges.high - shift).abs(), (ranges.low - shift).abs())  # (chunks, in)
    top = 2 ** (config.activation_bits - 1) - 1
    rows = ranges.rows.float() - shift

    def powers_of(groups: int) -> torch.Tensor:
        if config.scales == "chunk":  # one order for all chunks: a channel's group is that of its worst
            largest = magnitude.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            return group_powers((magnitude / largest).amax(0), groups)
        spread = ranges.square if bias is None else (ranges.square - bias.square()).clamp(min=0)
        return group_powers(spread.sqrt(), groups)

    def steps_of(powers: torch.Tensor) -> torch.Tensor:
        steps = (magnitude * torch.exp2(-powers.float())).amax(1) / top
        return (steps / 2 if down else steps).clamp(min=2.0**-100)  # inputs that are always zero have a step too

    def error(powers: torch.Tensor) -> float:
        if config.scales == "chunk":
            return chunk_error(steps_of(powers), powers, weight_power)
        return token_error(rows, powers, weight_power)

    def allowed(powers: torch.Tensor) -> bool:
        return fits(powers, config.activation_bits, config.bits)

    if config.groups is None:
        powers = choose_groups(powers_of, error, allowed)
    else:
        powers = powers_of(config.groups)
        if not allowed(powers):
            raise RecipeError(f"groups={config.groups} is not possible: sums could leave 32 bits; take fewer.")
    order, channels, of = order_by_power(powers)
    scheme = InputScheme(config.activation_bits, channels, of, order=order if len(channels) > 1 else None, bias=bias)
    if config.scales == "token":
        return scheme
    return replace(scheme, steps=steps_of(powers), starts=tuple(starts), limit=float(2 * top if down else top))


# The method -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedInputs:
    """What ``fit`` found: how inputs are rounded, by unit id, and the text that said so (None: none was needed)."""

    schemes: Mapping[str, InputScheme]
    text: TextRecord | None


@register(TenderConfig)
class Tender:
    """Handler of ``TenderConfig``."""

    def fit(self, draft: Draft, config: TenderConfig, *, seed: int, job: Job) -> FittedInputs:
        """Calibrate on text sampled from the model, which is left as it was.

        Raises:
            RecipeError: an activation is not finite, or the groups asked for do not fit 32 bits.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``.
        """
        check_finite(draft.model)
        windows, text = calibration_windows(draft.model, config.calibration_tokens, seed, job, parts=draft.parts)
        return FittedInputs(fit_tender(draft, config, windows, seed, job), text)

    def apply(self, draft: Draft, config: TenderConfig, fitted: FittedInputs, *, job: Job) -> None:
        draft.encode_linears(lambda linear, weight: encode(weight, fitted.schemes[linear.unit], config.bits), job)
        draft.encode_outputs(config.output_bits, 64, False, job)


def fit_tender(
    draft: Draft, config: TenderConfig, windows: Sequence[Sequence[int]], seed: int, job: Job
) -> dict[str, InputScheme]:
    """Schemes by unit id, from windows of calibration text."""
    model = draft.model
    starts = chunk_starts(config.chunk_tokens, max(map(len, windows)))
    ranges = input_ranges(model, windows, starts, seed, job)

    def schemes(down: bool) -> dict[str, InputScheme]:
        return {
            unit.id: tender_scheme(
                ranges[unit.id],
                weight_power(draft, unit),
                config,
                starts,
                centred=is_centred(config, unit),
                down=down,
            )
            for unit in model.architecture.units
        }

    if config.scales == "token" or config.rounding == "up":
        return schemes(False)
    if config.rounding == "down":
        return schemes(True)
    found = {}
    job.stage("compare roundings", 2)
    for down in (False, True):
        candidate = schemes(down)
        found[loss(draft, candidate, config.bits, windows[:_JUDGES])] = candidate
        job.advance()
    return found[min(found)]


def is_centred(config: TenderConfig, unit: Unit) -> bool:
    """Whether the middles of a unit's input channels are taken off: of those that come from a norm, where asked for."""
    asked = config.bias == "norms" or (config.bias == "auto" and config.scales == "chunk")
    return asked and unit.kind in ("qkv", "gate_up")


def weight_power(draft: Draft, unit: Unit) -> torch.Tensor:
    """Squared length of each input channel's weights, over the linears of a unit, float32 (in,)."""
    return torch.stack([draft.weight(linear.path).square().sum(0) for linear in unit.linears]).sum(0)


def encode(weight: torch.Tensor, scheme: InputScheme, bits: int) -> Integer:
    """Round a matrix (out, in) symmetrically, one scale per output channel, for inputs rounded by ``scheme``."""
    offset = None if scheme.bias is None else weight @ scheme.bias
    return Integer(quantize_groups(weight, bits, weight.shape[1], True), scheme, offset)


def loss(draft: Draft, schemes: Mapping[str, InputScheme], bits: int, windows: Sequence[Sequence[int]]) -> float:
    """Mean cross entropy over windows, nats, with linears as their encodings compute; the model is left as it was."""

    def made(linear: Linear) -> torch.nn.Module:
        dense = draft.model.linear_module(linear.id)
        encoding = encode(draft.weight(linear.path), schemes[linear.unit], bits)
        return encoding.module(getattr(dense, "bias", None), draft.model.dtype, draft.model.device)

    total = 0.0
    with _replaced(draft.model, made), torch.no_grad():
        for window in windows:
            ids = torch.tensor([list(window)], device=draft.model.device)
            logits = draft.model.module(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    return total / len(windows)


@contextmanager
def _replaced(model: LoadedModel, made: Callable[[Linear], torch.nn.Module]):  # type: ignore[no-untyped-def]
    """Run the model with other layers for its linears; its own come back as the very same objects."""
    dense = {linear.path: model.submodule(linear.path) for linear in model.architecture.linears}
    try:
        for linear in model.architecture.linears:
            model.module.set_submodule(linear.path, made(linear))
        yield
    finally:
        for path, module in dense.items():
            model.module.set_submodule(path, module)
