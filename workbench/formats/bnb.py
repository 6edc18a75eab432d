"""Encodings of bitsandbytes: its own packed tensors, run by its own kernels.

bitsandbytes is an optional rival, so it is imported when an encoding is made or run and not before. Its constant
tables (the NF4 levels, the map of nested statistics) are part of the format and are not stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from workbench.errors import EngineError, IntegrityError
from workbench.formats.encodings import Encoding, Tensors, meta_shape, meta_value, register_encoding, take
from workbench.formats.limits import BLOCK_SIZES

if TYPE_CHECKING:
    from types import ModuleType

_NESTED_BLOCK = 256  # block size of the statistics' own statistics, fixed inside bitsandbytes
_PACKED_ROWS = 32  # rows that its AVX512-BF16 kernel interleaves


class _Once(logging.Filter):
    """Let each message through once: bitsandbytes repeats some at every product."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


_once = _Once()


def bitsandbytes() -> ModuleType:
    """Import bitsandbytes, or raise ``EngineError`` saying how to get it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise EngineError(
            f"bitsandbytes cannot be imported ({error}): install it with pip install 'compression-workbench[bench]', "
            "or use method 'rtn'."
        ) from error
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_once)  # adding it again changes nothing
    return bitsandbytes


def check_nf4_blocks(in_features: int, block_size: int) -> None:
    """Raise ``EngineError`` where NF4 blocks do not divide the rows.

    bitsandbytes lets blocks run on over row ends, but its CPU kernels then read them back wrongly (in version 0.50
    with more than twice the error of the codes), so such a model is refused rather than shown as worse than it is.
    """
    if in_features % block_size == 0:
        return
    fitting = [str(size) for size in BLOCK_SIZES if in_features % size == 0]
    raise EngineError(
        f"bitsandbytes cannot run a matrix of {in_features} input features in NF4 blocks of {block_size} on the CPU: "
        f"the block must divide the row; {'choose block_size ' + ' or '.join(fitting) if fitting else 'use rtn'}."
    )


@register_encoding
class Nf4(Encoding):
    """4-bit NormalFloat codes in blocks of a row (QLoRA, Dettmers et al. 2023, section 3)."""

    kind = "bnb-nf4"
    engines = ("reference",)
    bits = 4

    def __init__(self, tensors: Tensors, *, shape: tuple[int, int], block_size: int) -> None:
        """
        Args:
            tensors: ``codes`` uint8 (out * in / 2, 1), two to a byte, and ``absmax`` float32 (n_blocks,); or,
                where the statistics are quantized too, ``absmax`` uint8 (n_blocks,) with ``nested_absmax`` float32
                (ceil(n_blocks / 256),) and ``offset`` float32 (1,).
            shape: (out, in).
            block_size: weights per ``absmax``.
        """
        self._tensors = dict(tensors)
        self.shape = shape
        self.block_size = block_size

    @classmethod
    def of(cls, weight: torch.Tensor, block_size: int = 64, double_quant: bool = False) -> Self:
        """Quantize a matrix (out, in), on the CPU.

        Args:
            weight: any float dtype.
            block_size: weights per statistic, one of ``BLOCK_SIZES`` that divides ``in``.
            double_quant: store the statistics in 8 bits (section 3 of QLoRA).

        Raises:
            EngineError: as ``check_nf4_blocks``, or bitsandbytes is missing.
        """
        check_nf4_blocks(weight.shape[1], block_size)
        functional = bitsandbytes().functional
        codes, state = functional.quantize_4bit(
            weight.detach().float().contiguous(),
            blocksize=block_size,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        tensors = {"codes": codes, "absmax": state.absmax}
        if double_quant:
            tensors |= {"nested_absmax": state.state2.absmax, "offset": state.offset.reshape(1)}
        return cls(tensors, shape=(weight.shape[0], weight.shape[1]), block_size=block_size)

    @property
    def double_quant(self) -> bool:
        return "offset" in self._tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._tensors)

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "block_size": self.block_size, "double_quant": self.double_quant}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        shape = meta_shape(meta)
        block_size = meta_value(meta, "block_size", int, lambda size: size in BLOCK_SIZES)
        if shape[1] % block_size:
            raise IntegrityError(f"blocks of {block_size} do not divide rows of {shape[1]}.")
        n_weights = shape[0] * shape[1]
        blocks = n_weights // block_size
        # The kernels read as many bytes as the shape says, so a short tensor must never reach them.
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"codes": (torch.uint8, (n_weights // 2, 1))}
        if meta_value(meta, "double_quant", bool):
            expected["absmax"] = (torch.uint8, (blocks,))
            expected["nested_absmax"] = (torch.float32, (-(-blocks // _NESTED_BLOCK),))
            expected["offset"] = (torch.float32, (1,))
        else:
            expected["absmax"] = (torch.float32, (blocks,))
        return cls(take(tensors, expected), shape=shape, block_size=block_size)

    def _quant_state(self, device: torch.device) -> Any:
        """bitsandbytes' own description of the codes, on tensors of its own: its CPU kernel rewrites them in place."""
        functional = bitsandbytes().functional
        parts = {name: t.to(device, copy=True) for name, t in self._tensors.items() if name != "codes"}
        nested = None
        if self.double_quant:
            nested = functional.QuantState(
                absmax=parts["nested_absmax"],
                blocksize=_NESTED_BLOCK,
                code=functional.create_dynamic_map().to(device),
                dtype=torch.float32,
            )
        return functional.QuantState(
            absmax=parts["absmax"],
            shape=torch.Size(self.shape),
            code=functional.get_4bit_type("nf4", device=device),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=torch.float32,
            offset=parts["offset"][0] if self.double_quant else None,
            state2=nested,
        )

    def _dequantize(self) -> torch.Tensor:
        codes = self._tensors["codes"]
        return bitsandbytes().functional.dequantize_4bit(codes, self._quant_state(codes.device))

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return a ``bitsandbytes.nn.Linear4bit``. On CPUs with AVX512-BF16 its kernel multiplies in bf16."""
        out, width = self.shape
        bnb = bitsandbytes()
        layer = bnb.nn.Linear4bit(
            width,
            out,
            bias=bias is not None,
            compute_dtype=dtype,
            compress_statistics=self.double_quant,
            quant_type="nf4",
            device="meta",
        )
        state = self._quant_state(device)
        layer.weight = bnb.nn.Params4bit(
            self._tensors["codes"].to(device),
            requires_grad=False,
            quant_state=state,
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type="nf4",
            bnb_quantized=True,
            module=layer,
        )
        layer.quant_state = state
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        if out % _PACKED_ROWS:
            # Its AVX512-BF16 kernel takes whole tiles only and stops at others; its general CPU kernel takes all.
            layer.support_avx512bf16_for_cpu = False
        return layer


@register_encoding
class Int8(Encoding):
    """One int8 scale per row, activations rounded to int8 per token (LLM.int8(), Dettmers et al. 2022, section 3)."""

    kind = "bnb-int8"
    engines = ("reference",)
    bits = 8

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, *, threshold: float = 0.0) -> None:
        """
        Args:
            codes: int8 (out, in).
            absmax: float32 (out,), largest magnitude of each row; a weight is ``code * absmax / 127``.
            threshold: activations beyond it are multiplied in full precision; 0 for none.
        """
        self.codes = codes
        self.absmax = absmax
        self.threshold = threshold
        self.shape = (codes.shape[0], codes.shape[1])

    @classmethod
    def of(cls, weight: torch.Tensor, threshold: float = 0.0) -> Self:
        """Quantize a matrix (out, in) of any float dtype, on the CPU. bitsandbytes rounds it to fp16 first."""
        codes, absmax, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.detach().half().contiguous())
        return cls(codes, absmax, threshold=threshold)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes, "absmax": self.absmax}

    def meta(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "threshold": self.threshold}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        threshold = meta_value(meta, "threshold", float, lambda t: 0 <= t < float("inf"))
        expected = {"codes": (torch.int8, (out, width)), "absmax": (torch.float32, (out,))}
        parts = take(tensors, expected)
        return cls(parts["codes"], parts["absmax"], threshold=threshold)

    def _dequantize(self) -> torch.Tensor:
        return bitsandbytes().functional.int8_vectorwise_dequant(self.codes, self.absmax)

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return a ``bitsandbytes.nn.Linear8bitLt``. Its kernel rounds activations to fp16 and then to int8."""
        out, width = self.shape
        bnb = bitsandbytes()
        layer = bnb.nn.Linear8bitLt(
            width, out, bias=bias is not None, has_fp16_weights=False, threshold=self.threshold, device="meta"
        )
        codes, absmax = self.codes.to(device), self.absmax.to(device, copy=True)
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        return layer
