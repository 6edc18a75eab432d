"""What encodings share that hold one parent code whose top bits are the codes of narrower widths."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import torch

from workbench.errors import EngineError
from workbench.formats.codes import MAX_BITS, MIN_BITS
from workbench.formats.encodings import Encoding


class WidthCodes(Protocol):
    """Unpacked codes that are read at any of several widths."""

    def dequantize(self, bits: int) -> torch.Tensor:
        """Return the weights at a width, float32 (out, in)."""
        ...


class ManyWidths(Encoding):
    """An encoding that is read at any of ``widths`` (ascending), of which the last is the parent's and the default."""

    widths: tuple[int, ...]

    @property
    @abstractmethod
    def codes(self) -> WidthCodes:
        """The codes, unpacked."""

    def _dequantize(self) -> torch.Tensor:
        return self.codes.dequantize(self.bits)

    def dequantize(self, bits: int | None = None) -> torch.Tensor:
        return self.codes.dequantize(self._known(bits))

    def _known(self, bits: int | None) -> int:
        if bits is None:
            return self.bits
        if bits not in self.widths:
            widths = ", ".join(map(str, self.widths))
            raise EngineError(f"This matrix may be read at {widths} bits, {bits} were asked for.")
        return bits


def are_widths(found: list[Any]) -> bool:
    """Whether metadata names widths: whole numbers that codes can have, ascending, each once."""
    known = all(type(bits) is int and MIN_BITS <= bits <= MAX_BITS for bits in found)
    return known and len(found) > 0 and found == sorted(set(found))
