"""Nested codes: one parent of up to 8 bits whose top b bits are the b-bit weights, for each of several widths b.

Codes are shared by all widths; the grid is not. Every width has its own fp16 scale and its own zero point per group of
input channels, and reading at a width reads those alone. At width b a weight stands for

    scale_b * (c_b - zero_b),   c_b = parent >> (parent bits - b),   zero_b = (k_b + 2^(b-1) - 1) / 2,

with ``k_b`` an integer of b bits: zero points lie half a step apart, around the middle of the codes. Half steps are
what lets cells of two widths coincide (``zero_{b+1} = 2 zero_b + 1/2``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from workbench.formats.codes import pack, packed_bytes, unpack
from workbench.formats.encodings import Tensors, meta_shape, meta_value, register_encoding, take
from workbench.formats.widths import ManyWidths, are_widths


@dataclass(frozen=True)
class NestedCodes:
    """Low-bit weights of one matrix, at several widths.

    Attributes:
        codes: uint8 (out, in), the parent's, of as many bits as the widest width.
        scales: by width, float16 (out, n_groups).
        zeros: by width, uint8 (out, n_groups), below 2**width; see ``zero_points``.
        group_size: input channels per scale.
    """

    codes: torch.Tensor
    scales: Mapping[int, torch.Tensor]
    zeros: Mapping[int, torch.Tensor]
    group_size: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that it may be read at, ascending."""
        return tuple(sorted(self.scales))

    @property
    def bits(self) -> int:
        """Width of the parent."""
        return max(self.scales)

    def dequantize(self, bits: int) -> torch.Tensor:
        """Return the weights at a width, float32 (out, in)."""
        top = (self.codes >> (self.bits - bits)).float()
        zeros = zero_points(self.zeros[bits], bits)
        return (top - self._spread(zeros)) * self._spread(self.scales[bits].float())

    def cut(self, bits: int) -> NestedCodes:
        """Return the same weights at every width up to ``bits``, one of the widths, and none beyond."""
        kept = [width for width in self.widths if width <= bits]
        return NestedCodes(
            self.codes >> (self.bits - bits),
            {width: self.scales[width] for width in kept},
            {width: self.zeros[width] for width in kept},
            self.group_size,
        )

    def _spread(self, of_group: torch.Tensor) -> torch.Tensor:
        return of_group.repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]


def zero_points(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """What stored zero points stand for, float32: ``(k + 2^(bits-1) - 1) / 2``, in steps of the codes of that width."""
    return (stored.float() + (2 ** (bits - 1) - 1)) / 2


def zero_codes(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest stored zero points, uint8, of zero points in steps of the codes of that width."""
    return (2 * zeros - (2 ** (bits - 1) - 1)).round().clamp(0, 2**bits - 1).to(torch.uint8)


@register_encoding
class Nested(ManyWidths):
    """Nested codes, packed without gaps."""

    kind = "nested"

    def __init__(
        self,
        packed: torch.Tensor,
        scales: Mapping[int, torch.Tensor],
        packed_zeros: Mapping[int, torch.Tensor],
        *,
        shape: tuple[int, int],
        group_size: int,
    ) -> None:
        """
        Args:
            packed: the parent's codes, uint8 (out, bytes of a row).
            scales: by width, float16 (out, n_groups).
            packed_zeros: by width, uint8 (out, bytes of a row of them).
            shape: (out, in).
            group_size: input channels per scale.
        """
        self.packed = packed
        self.scales = dict(scales)
        self.packed_zeros = dict(packed_zeros)
        self.shape = shape
        self.widths = tuple(sorted(scales))
        self.bits = self.widths[-1]
        self.group_size = group_size

    @classmethod
    def of(cls, nested: NestedCodes) -> Self:
        """Pack codes that some method has chosen."""
        return cls(
            pack(nested.codes, nested.bits),
            nested.scales,
            {bits: pack(zeros, bits) for bits, zeros in nested.zeros.items()},
            shape=(nested.codes.shape[0], nested.codes.shape[1]),
            group_size=nested.group_size,
        )

    @property
    def codes(self) -> NestedCodes:
        """The codes, unpacked."""
        groups = self.scales[self.bits].shape[1]
        zeros = {bits: unpack(packed, bits, groups) for bits, packed in self.packed_zeros.items()}
        return NestedCodes(unpack(self.packed, self.bits, self.shape[1]), self.scales, zeros, self.group_size)

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"codes": self.packed}
        for bits in self.widths:
            parts |= {f"scales_{bits}": self.scales[bits], f"zeros_{bits}": self.packed_zeros[bits]}
        return parts

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "widths": list(self.widths), "group_size": self.group_size}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        widths = meta_value(meta, "widths", list, are_widths)
        group_size = meta_value(meta, "group_size", int, lambda g: 1 <= g <= width)
        groups = -(-width // group_size)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (out, packed_bytes(width, widths[-1])))
        }
        for bits in widths:
            expected[f"scales_{bits}"] = (torch.float16, (out, groups))
            expected[f"zeros_{bits}"] = (torch.uint8, (out, packed_bytes(groups, bits)))
        parts = take(tensors, expected)
        return cls(
            parts["codes"],
            {bits: parts[f"scales_{bits}"] for bits in widths},
            {bits: parts[f"zeros_{bits}"] for bits in widths},
            shape=(out, width),
            group_size=group_size,
        )

    def read_bits(self, bits: int | None = None) -> int:
        bits = self._known(bits)
        out, width = self.shape
        grid = (self.scales[bits], self.packed_zeros[bits])
        return 8 * (out * packed_bytes(width, bits) + sum(t.numel() * t.element_size() for t in grid))
