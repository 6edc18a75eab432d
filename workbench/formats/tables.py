"""Nested codes into tables: one parent of up to 8 bits whose top b bits index a table of weights, for each width b.

The stored form of Any-Precision LLM (Park et al. 2024, "Any-Precision LLM: Low-Cost Deployment of Multiple,
Different-Sized LLMs", section 4). Codes are shared by all widths, tables are not: every width has 2^b fp16 values per
output row, and reading at a width reads the top b bits of the codes and that table alone. There are no groups:

    weight_b[row, i] = table_b[row, parent[row, i] >> (parent bits - b)].
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
class TableCodes:
    """Weights of one matrix as entries of tables, at several widths.

    Attributes:
        codes: uint8 (out, in), the parent's, of as many bits as the widest width.
        tables: by width, float16 (out, 2**width).
    """

    codes: torch.Tensor
    tables: Mapping[int, torch.Tensor]

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that it may be read at, ascending."""
        return tuple(sorted(self.tables))

    @property
    def bits(self) -> int:
        """Width of the parent."""
        return max(self.tables)

    def dequantize(self, bits: int) -> torch.Tensor:
        """Return the weights at a width, float32 (out, in)."""
        top = self.codes >> (self.bits - bits)
        return self.tables[bits].float().gather(1, top.long())


@register_encoding
class NestedTables(ManyWidths):
    """Table codes, packed without gaps."""

    kind = "nested-tables"
    engines = ("reference", "cpu")

    def __init__(self, packed: torch.Tensor, tables: Mapping[int, torch.Tensor], *, shape: tuple[int, int]) -> None:
        """
        Args:
            packed: the parent's codes, uint8 (out, bytes of a row).
            tables: by width, float16 (out, 2**width).
            shape: (out, in).
        """
        self.packed = packed
        self.tables = dict(tables)
        self.shape = shape
        self.widths = tuple(sorted(tables))
        self.bits = self.widths[-1]

    @classmethod
    def of(cls, fitted: TableCodes) -> Self:
        """Pack codes that some method has chosen."""
        shape = (fitted.codes.shape[0], fitted.codes.shape[1])
        return cls(pack(fitted.codes, fitted.bits), fitted.tables, shape=shape)

    @property
    def codes(self) -> TableCodes:
        """The codes, unpacked."""
        return TableCodes(unpack(self.packed, self.bits, self.shape[1]), self.tables)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"codes": self.packed} | {f"table_{bits}": self.tables[bits] for bits in self.widths}

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "widths": list(self.widths)}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        widths = meta_value(meta, "widths", list, are_widths)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (out, packed_bytes(width, widths[-1])))
        }
        for bits in widths:
            expected[f"table_{bits}"] = (torch.float16, (out, 2**bits))
        parts = take(tensors, expected)
        return cls(parts["codes"], {bits: parts[f"table_{bits}"] for bits in widths}, shape=(out, width))

    def read_bits(self, bits: int | None = None) -> int:
        bits = self._known(bits)
        out, width = self.shape
        return 8 * (out * packed_bytes(width, bits) + self.tables[bits].numel() * self.tables[bits].element_size())
