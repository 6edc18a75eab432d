"""Encodings whose inputs are integers too: weight codes, and how the inputs are rounded (``formats.integers``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from workbench.errors import IntegrityError, RecipeError
from workbench.formats.codes import GroupCodes, dequantize, pack, packed_bytes, unpack
from workbench.formats.encodings import Encoding, Tensors, meta_shape, meta_value, register_encoding, take
from workbench.formats.hadamard import Rotation
from workbench.formats.integers import INTEGER_BITS, Accumulate, InputScheme, products, round_rows
from workbench.formats.paley import factors_of

_SHORT = 2**15  # widths whose channel numbers fit int16


@register_encoding
class Integer(Encoding):
    """Symmetric integer weights that are multiplied with integer inputs.

    ``y = sum * weight scale * input scale + offset``, where the offset is what the inputs' bias contributes,
    ``bias @ W^T`` with the original weights. Everything of the inputs is stored beside each linear, though the linears
    of a unit share it: 16 to 48 bits for each input channel, all counted.
    """

    kind = "integer"
    engines: ClassVar[tuple[str, ...]] = ("reference", "cpu")
    accumulates: ClassVar[tuple[Accumulate, ...]] = ("doubling", "apart")

    def __init__(self, codes: GroupCodes, scheme: InputScheme, offset: torch.Tensor | None) -> None:
        """
        Args:
            codes: symmetric, 4 or 8 bits, (out, in); channels as they come, one group per row or groups that are the
                scheme's sections. They stand for the weights times what the scheme's multipliers divide by, rotated
                as the inputs are.
            scheme: of the inputs.
            offset: float32 (out,), added to the products; exactly where the scheme has a bias.

        Raises:
            RecipeError: parts that contradict one another, or sums that could leave 32 bits.
        """
        self.codes, self.scheme, self.offset = codes, scheme, offset
        self.shape = (codes.codes.shape[0], codes.codes.shape[1])
        self.bits = codes.bits
        scheme.check(codes.bits)
        if scheme.accumulate not in self.accumulates:
            raise RecipeError(f"An encoding '{self.kind}' does not accumulate '{scheme.accumulate}'.")
        groups = codes.scales.shape[1]
        if codes.zeros is not None or scheme.width != self.shape[1] or (offset is None) != (scheme.bias is None):
            raise RecipeError("Integer products need symmetric codes that fit their inputs, and an offset for a bias.")
        sizes = [min(codes.group_size, self.shape[1] - i * codes.group_size) for i in range(groups)]
        if groups > 1 and (scheme.accumulate != "apart" or scheme.order is not None or list(scheme.channels) != sizes):
            raise RecipeError("Groups of weights must be the sections of their inputs.")

    @property
    def activation_bits(self) -> int:
        """Bits of the inputs' codes."""
        return self.scheme.bits

    def tensors(self) -> dict[str, torch.Tensor]:
        s = self.scheme
        parts = {"codes": pack(self.codes.codes, self.bits), "scales": self.codes.scales}
        if s.order is not None:
            parts["order"] = s.order.to(_order_type(self.shape[1]))
        if s.bias is not None and self.offset is not None:
            parts |= {"bias": s.bias.half(), "offset": self.offset}
        if s.multipliers is not None:
            parts["multipliers"] = s.multipliers
        if s.steps is not None:
            parts["steps"] = s.steps
        if s.rotation is not None:
            parts["signs"] = pack((s.rotation.signs < 0).to(torch.uint8)[None], 1)[0]
        return parts

    def meta(self) -> dict[str, Any]:
        s = self.scheme
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.codes.group_size,
            "activation_bits": s.bits,
            "accumulate": s.accumulate,
            "channels": list(s.channels),
            "powers": list(s.powers),
            "starts": list(s.starts),
            "clip": float(s.clip),
            "limit": float(s.limit),
            "order": s.order is not None,
            "bias": s.bias is not None,
            "multipliers": s.multipliers is not None,
            "factors": list(s.rotation.factors) if s.rotation is not None else [],
        }

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        bits = meta_value(meta, "bits", int, lambda b: b in INTEGER_BITS)
        group_size = meta_value(meta, "group_size", int, lambda g: 1 <= g <= width)
        channels, powers, starts, factors = (
            _numbers(meta, name) for name in ("channels", "powers", "starts", "factors")
        )
        if factors and (factors != factors_of(width)):
            raise IntegrityError(f"'factors' is {list(factors)}, which rotates no row of {width}.")
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (out, packed_bytes(width, bits))),
            "scales": (torch.float16, (out, -(-width // group_size))),
        }
        if meta_value(meta, "order", bool):
            expected["order"] = (_order_type(width), (width,))
        if meta_value(meta, "bias", bool):
            expected |= {"bias": (torch.float16, (width,)), "offset": (torch.float32, (out,))}
        if meta_value(meta, "multipliers", bool):
            expected["multipliers"] = (torch.float32, (width,))
        if starts:
            expected["steps"] = (torch.float32, (len(starts),))
        if factors:
            expected["signs"] = (torch.uint8, (packed_bytes(width, 1),))
        parts = take(tensors, expected)
        rotation = None
        if factors:
            rotation = Rotation(1 - 2 * unpack(parts["signs"][None], 1, width)[0].float(), factors)
        scheme = InputScheme(
            meta_value(meta, "activation_bits", int),
            channels,
            powers,
            meta_value(meta, "accumulate", str),  # type: ignore[arg-type]
            parts["order"].long() if "order" in parts else None,
            parts["bias"].float() if "bias" in parts else None,
            parts.get("multipliers"),
            parts.get("steps"),
            starts,
            meta_value(meta, "clip", float),
            meta_value(meta, "limit", float, lambda v: v >= 0),
            rotation,
        )
        codes = GroupCodes(unpack(parts["codes"], bits, width), parts["scales"], None, bits, group_size)
        try:
            return cls(codes, scheme, parts.get("offset"))
        except RecipeError as error:
            raise IntegrityError(str(error)) from error

    def _dequantize(self) -> torch.Tensor:
        """The weights in the inputs' own terms: multipliers and rotation undone."""
        weight = dequantize(self.codes)
        if self.scheme.multipliers is not None and self.scheme.accumulate != "simulated":
            weight = weight * self.scheme.multipliers
        return weight if self.scheme.rotation is None else self.scheme.rotation.inverse(weight)

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return IntegerLinear(self, bias, dtype, device)


@register_encoding
class SimulatedInteger(Integer):
    """Inputs with a scale for every channel: *simulated*, since no sum of integers can be scaled by it afterwards."""

    kind = "integer-simulated"
    engines = ("reference",)
    accumulates: ClassVar[tuple[Accumulate, ...]] = ("simulated",)


class IntegerLinear(nn.Module):
    """The layer that computes with an ``Integer`` encoding, exactly as its integers say, in floating point types.

    Attributes:
        first_position: of the first row of the next input in its sequence; whoever runs text in pieces sets it.
        clamped, beyond: int64 (tokens,) of the last call, see ``formats.integers.Rounded``.
    """

    def __init__(self, encoding: Integer, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = encoding.shape
        self.scheme = encoding.scheme.to(device)
        self.dtype = dtype
        self.first_position = 0
        self.clamped = self.beyond = torch.zeros(0, dtype=torch.int64)
        codes = encoding.codes.codes.to(device).double() - 2 ** (encoding.bits - 1)
        self._weights = codes if self.scheme.order is None else codes[:, self.scheme.order]
        self._scales = encoding.codes.scales.to(device).float()
        self._factors = self.scheme.place_multipliers().to(device)
        added = [part.to(device).float() for part in (bias, encoding.offset) if part is not None]
        self._added = sum(added[1:], added[0]) if added else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float()
        length = x.shape[-2] if x.dim() > 1 else 1
        positions = self.first_position + torch.arange(length, device=x.device).repeat(len(rows) // length)
        rounded = round_rows(self.scheme, rows, positions, self._factors)
        self.clamped, self.beyond = rounded.clamped, rounded.beyond
        y = products(self.scheme, rounded, self._weights, self._scales)
        if self._added is not None:
            y = y + self._added
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def _order_type(width: int) -> torch.dtype:
    return torch.int16 if width <= _SHORT else torch.int32


def _numbers(meta: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(meta_value(meta, name, list, lambda values: all(type(v) is int and v >= 0 for v in values)))
