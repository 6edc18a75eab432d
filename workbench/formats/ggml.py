"""GGUF's own codes, kept as they are: groups with a float minimum, and super-blocks of scaled scales.

Q4_0, Q5_0 and Q8_0 are plain symmetric ``groups`` and need no encoding of their own. Block layouts: ggml's
``ggml-common.h`` and ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

from workbench.formats.codes import MAX_BITS, MIN_BITS, packed_bytes, unpack
from workbench.formats.encodings import Encoding, Tensors, meta_shape, meta_value, register_encoding, take


def _spread(table: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """One entry per group to one per channel, float32 (out, in)."""
    return table.float().repeat_interleave(size, dim=1)[:, :width]


@register_encoding
class Affine(Encoding):
    """Group codes with a scale and a minimum: ``w = scale * code + minimum`` (Q4_1, Q5_1)."""

    kind = "affine"

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        minima: torch.Tensor,
        *,
        width: int,
        bits: int,
        group_size: int,
    ) -> None:
        """
        Args:
            packed: codes, uint8 (out, bytes of a row).
            scales, minima: float16 (out, n_groups).
            width: input channels.
            bits: width of a code.
            group_size: input channels per scale.
        """
        self.packed, self.scales, self.minima = packed, scales, minima
        self.shape = (packed.shape[0], width)
        self.bits, self.group_size = bits, group_size

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"codes": self.packed, "scales": self.scales, "minima": self.minima}

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        bits = meta_value(meta, "bits", int, lambda b: MIN_BITS <= b <= MAX_BITS)
        size = meta_value(meta, "group_size", int, lambda g: 1 <= g <= width)
        table = (torch.float16, (out, -(-width // size)))
        parts = take(
            tensors, {"codes": (torch.uint8, (out, packed_bytes(width, bits))), "scales": table, "minima": table}
        )
        return cls(parts["codes"], parts["scales"], parts["minima"], width=width, bits=bits, group_size=size)

    def _dequantize(self) -> torch.Tensor:
        width = self.shape[1]
        codes = unpack(self.packed, self.bits, width).float()
        return codes * _spread(self.scales, self.group_size, width) + _spread(self.minima, self.group_size, width)


@register_encoding
class SuperBlocks(Encoding):
    """Codes in groups whose scales are small integers times the scale of a super-block (Q4_K, Q5_K, Q6_K).

    ``w = super_scale * scale * code - super_minimum * minimum`` where there are minima, else
    ``w = super_scale * scale * (code - 2^(bits - 1))``.
    """

    kind = "superblocks"

    def __init__(
        self, parts: Mapping[str, torch.Tensor], *, width: int, bits: int, group_size: int, block: int
    ) -> None:
        """
        Args:
            parts: ``codes`` uint8 packed (out, bytes of a row), ``super_scales`` float16 (out, n_blocks), ``scales``
                int8 (out, n_groups), and where there are minima ``super_minima`` and ``minima`` alike.
            width: input channels, a multiple of ``block``.
            bits: width of a code.
            group_size: input channels of a group.
            block: input channels of a super-block.
        """
        self._parts = dict(parts)
        self.shape = (parts["codes"].shape[0], width)
        self.bits, self.group_size, self.block = bits, group_size, block

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._parts)

    def meta(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "block": self.block,
            "minima": "minima" in self._parts,
        }

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        bits = meta_value(meta, "bits", int, lambda b: MIN_BITS <= b <= MAX_BITS)
        block = meta_value(meta, "block", int, lambda b: 1 <= b <= width and width % b == 0)
        size = meta_value(meta, "group_size", int, lambda g: 1 <= g <= block and block % g == 0)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (out, packed_bytes(width, bits))),
            "super_scales": (torch.float16, (out, width // block)),
            "scales": (torch.int8, (out, width // size)),
        }
        if meta_value(meta, "minima", bool):
            expected["super_minima"] = expected["super_scales"]
            expected["minima"] = expected["scales"]
        return cls(take(tensors, expected), width=width, bits=bits, group_size=size, block=block)

    def _dequantize(self) -> torch.Tensor:
        width, p = self.shape[1], self._parts
        codes = unpack(p["codes"], self.bits, width).float()
        scale = _spread(p["super_scales"], self.block, width) * _spread(p["scales"], self.group_size, width)
        if "minima" not in p:
            return (codes - 2 ** (self.bits - 1)) * scale
        low = _spread(p["super_minima"], self.block, width) * _spread(p["minima"], self.group_size, width)
        return codes * scale - low
