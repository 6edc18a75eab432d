"""Encodings: the ways in which one matrix may be stored.

An encoding knows its tensors and metadata (what goes to disk), what they cost, and the weights they stand for. Every
count of bits in the project comes from ``stored_bits``, which is the size of the stored tensors and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import nn

from workbench.errors import EngineError, IntegrityError, suggest
from workbench.formats.codes import (
    GroupCodes,
    dequantize,
    pack,
    packed_bytes,
    quantize_groups,
    unpack,
)
from workbench.formats.limits import DENSE_BITS as DENSE_BITS
from workbench.formats.limits import MAX_BITS, MIN_BITS

ALL_ENGINES = ("reference", "cpu", "cuda")

Tensors = Mapping[str, torch.Tensor]
T = TypeVar("T")


class Encoding(ABC):
    """How one matrix of shape (out, in) is stored.

    Class attributes:
        kind: name of the encoding on disk.
        engines: names of the engines that can run it.

    Attributes:
        shape: (out_features, in_features).
        bits: width of a code, as asked for; 16 where dense.
    """

    kind: ClassVar[str]
    engines: ClassVar[tuple[str, ...]] = ALL_ENGINES

    shape: tuple[int, int]
    bits: int

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What goes to disk, by short names (``codes``, ``scales``)."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """JSON values needed beside ``tensors`` to build this encoding again; ``shape`` is among them."""

    @classmethod
    @abstractmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        """Undo ``meta`` and ``tensors``; everything read is checked.

        Raises:
            IntegrityError: metadata out of range, or tensors that do not fit it.
        """

    @abstractmethod
    def _dequantize(self) -> torch.Tensor:
        """Return the weights, float32 (out, in)."""

    def dequantize(self, bits: int | None = None) -> torch.Tensor:
        """Return the weights that the stored tensors stand for, float32 (out, in).

        Args:
            bits: which width to read, for encodings that hold several; None is the widest.

        Raises:
            EngineError: a width that this encoding does not hold.
        """
        if bits is not None and bits != self.bits:
            raise EngineError(f"This matrix is stored at {self.bits} bits only, {bits} were asked for.")
        return self._dequantize()

    @property
    def stored_bits(self) -> int:
        """Bits on disk of all stored tensors, padding included."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values())

    def read_bits(self, bits: int | None = None) -> int:
        """Stored bits that reading this matrix at a width touches; None is the widest.

        Raises:
            EngineError: a width that this encoding does not hold.
        """
        if bits is not None and bits != self.bits:
            raise EngineError(f"This matrix is stored at {self.bits} bits only, {bits} were asked for.")
        return self.stored_bits

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return a linear layer that computes with these weights, in ``dtype`` on ``device``."""
        return _linear(self._dequantize().to(device, dtype), bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A frozen ``nn.Linear`` around tensors, without initialising weights that would be thrown away."""
    out, width = weight.shape
    layer = nn.Linear(width, out, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight), requires_grad=False)
    return layer


_KINDS: dict[str, type[Encoding]] = {}


def register_encoding(cls: type[Encoding]) -> type[Encoding]:
    """Class decorator: make ``cls.kind`` known to ``from_parts``."""
    _KINDS[cls.kind] = cls
    return cls


def from_parts(kind: str, meta: Mapping[str, Any], tensors: Tensors) -> Encoding:
    """Build the encoding of that kind from what was read from disk.

    Raises:
        IntegrityError: unknown kind, or parts that do not fit one another.
    """
    if kind not in _KINDS:
        raise IntegrityError(
            f"Unknown encoding '{kind}': this version reads {', '.join(sorted(_KINDS))}."
            + suggest(kind, _KINDS)
            + " Install a newer version, or compress the model again."
        )
    return _KINDS[kind].from_parts(meta, tensors)


def meta_value(meta: Mapping[str, Any], name: str, of: type[T], valid: Callable[[T], bool] | None = None) -> T:
    """Return ``meta[name]`` if it is exactly of that type and ``valid``; otherwise raise ``IntegrityError``."""
    value = meta.get(name)
    if type(value) is not of or (valid is not None and not valid(value)):
        raise IntegrityError(f"'{name}' is {value!r}, which is not possible here.")
    return value


def meta_shape(meta: Mapping[str, Any]) -> tuple[int, int]:
    """Return ``meta["shape"]`` as (out, in), both at least 1."""
    shape = meta_value(meta, "shape", list, lambda s: len(s) == 2 and all(type(n) is int and n > 0 for n in s))
    return shape[0], shape[1]


def take(tensors: Tensors, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """Return ``tensors`` if they are exactly the ``expected`` types and shapes; otherwise raise ``IntegrityError``."""
    if set(tensors) != set(expected):
        raise IntegrityError(f"tensors {sorted(tensors)} were found where {sorted(expected)} belong.")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise IntegrityError(
                f"'{name}' is {found.dtype} {tuple(found.shape)} where {dtype} {shape} belongs.".replace("torch.", "")
            )
    return dict(tensors)


@register_encoding
class Dense(Encoding):
    """A matrix as it is, in bf16."""

    kind = "dense"
    bits = DENSE_BITS

    def __init__(self, weight: torch.Tensor) -> None:
        """Args: ``weight``: bf16, (out, in); kept, not copied."""
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """Round a matrix (out, in) to bf16, in memory of its own."""
        return cls(weight.detach().to(torch.bfloat16, copy=True).contiguous())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape)}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        return cls(take(tensors, {"weight": (torch.bfloat16, meta_shape(meta))})["weight"])

    def _dequantize(self) -> torch.Tensor:
        return self.weight.float()


@register_encoding
class Groups(Encoding):
    """Group codes (``formats.codes``), packed without gaps."""

    kind = "groups"

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        packed_zeros: torch.Tensor | None,
        *,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
    ) -> None:
        """
        Args:
            packed: codes, uint8 (out, bytes of a row).
            scales: float16 (out, n_groups).
            packed_zeros: zero points, uint8 (out, bytes of a row of them), or None where symmetric.
            shape: (out, in).
            bits: width of a code.
            group_size: input channels per scale.
        """
        self.packed = packed
        self.scales = scales
        self.packed_zeros = packed_zeros
        self.shape = shape
        self.bits = bits
        self.group_size = group_size

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int, group_size: int, symmetric: bool = False) -> Self:
        """Round a matrix (out, in) to the nearest group codes."""
        return cls.of_codes(quantize_groups(weight, bits, group_size, symmetric))

    @classmethod
    def of_codes(cls, codes: GroupCodes) -> Self:
        """Pack codes that some method has chosen."""
        return cls(
            pack(codes.codes, codes.bits),
            codes.scales,
            None if codes.zeros is None else pack(codes.zeros, codes.bits),
            shape=(codes.codes.shape[0], codes.codes.shape[1]),
            bits=codes.bits,
            group_size=codes.group_size,
        )

    @property
    def symmetric(self) -> bool:
        return self.packed_zeros is None

    @property
    def n_groups(self) -> int:
        """Groups in a row."""
        return self.scales.shape[1]

    @property
    def codes(self) -> GroupCodes:
        """The codes, unpacked."""
        zeros = None if self.packed_zeros is None else unpack(self.packed_zeros, self.bits, self.n_groups)
        return GroupCodes(unpack(self.packed, self.bits, self.shape[1]), self.scales, zeros, self.bits, self.group_size)

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"codes": self.packed, "scales": self.scales}
        if self.packed_zeros is not None:
            parts["zeros"] = self.packed_zeros
        return parts

    def meta(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        bits = meta_value(meta, "bits", int, lambda b: MIN_BITS <= b <= MAX_BITS)
        group_size = meta_value(meta, "group_size", int, lambda g: 1 <= g <= width)
        groups = -(-width // group_size)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (out, packed_bytes(width, bits))),
            "scales": (torch.float16, (out, groups)),
        }
        if not meta_value(meta, "symmetric", bool):
            expected["zeros"] = (torch.uint8, (out, packed_bytes(groups, bits)))
        parts = take(tensors, expected)
        return cls(
            parts["codes"],
            parts["scales"],
            parts.get("zeros"),
            shape=(out, width),
            bits=bits,
            group_size=group_size,
        )

    def _dequantize(self) -> torch.Tensor:
        return dequantize(self.codes)
