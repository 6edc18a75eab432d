"""Nested codes: one parent of up to 8 bits whose top b bits are the b-bit weights, for every b."""

from __future__ import annotations

import torch

from workbench.errors import EngineError
from workbench.formats.codes import MIN_BITS, GroupCodes, dequantize, packed_bytes
from workbench.formats.encodings import Groups, register_encoding


def truncate(codes: GroupCodes, bits: int) -> torch.Tensor:
    """Weights that the top ``bits`` bits of parent codes stand for, float32 (out, in).

    With ``d = parent bits - bits`` and ``c`` the parent code, the weight is ``(2^d floor(c / 2^d) + (2^d - 1) / 2 -
    zero) * scale``: the bits left out are replaced by their mean, so that no width is biased.
    """
    step = 2 ** (codes.bits - bits)
    top = GroupCodes(codes.codes // step * step, codes.scales, codes.zeros, codes.bits, codes.group_size)
    scales = codes.scales.float().repeat_interleave(codes.group_size, dim=1)[:, : codes.codes.shape[1]]
    return dequantize(top) + (step - 1) / 2 * scales


@register_encoding
class Nested(Groups):
    """Group codes that may be read at any width from 2 bits up to their own."""

    kind = "nested"

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that it may be read at."""
        return tuple(range(MIN_BITS, self.bits + 1))

    def dequantize(self, bits: int | None = None) -> torch.Tensor:
        if bits is None or bits == self.bits:
            return self._dequantize()
        self._check(bits)
        return truncate(self.codes, bits)

    def read_bits(self, bits: int | None = None) -> int:
        if bits is None or bits == self.bits:
            return self.stored_bits
        self._check(bits)
        out, width = self.shape
        return self.stored_bits - 8 * out * (packed_bytes(width, self.bits) - packed_bytes(width, bits))

    def _check(self, bits: int) -> None:
        if bits not in self.widths:
            raise EngineError(f"This matrix is nested from {MIN_BITS} to {self.bits} bits, {bits} were asked for.")
