"""The codes inside a GGUF tensor, without dequantizing: integers, scales and minima as numpy arrays.

Layouts of ggml's blocks (``ggml-common.h``, ``dequantize_row_*`` in ``ggml-quants.c``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind

from workbench.errors import ModelError
from workbench.models.gguf_header import GgufHeader, TensorInfo
from workbench.models.gguf_model import config_of, layout_of, state_name

CODED = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
_SMALL, _LARGE = 32, 256  # weights of a plain block and of a super-block


@dataclass(frozen=True)
class StoredCodes:
    """One matrix as stored; every array has one row per output.

    Attributes:
        codes: uint8 (out, in).
        bits: width of a code.
        group_size: input channels per scale.
        scales: float16 (out, groups), or int8 where there are super-blocks.
        minima: float16 added to ``scale * code``, int8 (to be subtracted) in super-blocks, or None where the codes are
            centred on ``2^(bits - 1)``.
        super_scales, super_minima: float16 (out, super-blocks), or None.
    """

    codes: np.ndarray
    bits: int
    group_size: int
    scales: np.ndarray
    minima: np.ndarray | None = None
    super_scales: np.ndarray | None = None
    super_minima: np.ndarray | None = None


def read_codes(path: Path, header: GgufHeader) -> dict[str, StoredCodes | np.ndarray]:
    """Return every matrix of a file by state-dict name: codes, or float32 (out, in) where it is stored as floats.

    Rows are in transformers' order.

    Raises:
        ModelError: a type of codes that is not read without dequantizing.
    """
    data = np.memmap(path, mode="r", dtype=np.uint8)
    layout = layout_of(header, config_of(path, header))
    found: dict[str, StoredCodes | np.ndarray] = {}
    for name, info in header.tensors.items():
        if len(info.shape) != 2:
            continue
        raw = np.asarray(data[info.begin : info.begin + info.n_bytes]).reshape(math.prod(info.shape[:-1]), -1)
        key = state_name(path, header.architecture, name)
        if info.kind in CODED:
            codes = split_blocks(raw, info.kind)
            arrays = {
                field: layout(name, value) for field, value in vars(codes).items() if isinstance(value, np.ndarray)
            }
            found[key] = StoredCodes(**{**vars(codes), **arrays})
        else:
            found[key] = layout(name, _floats(path, name, info, raw))
    return found


def _floats(path: Path, name: str, info: TensorInfo, raw: np.ndarray) -> np.ndarray:
    if info.kind == Kind.F32:
        return raw.view(np.float32).reshape(info.shape)
    if info.kind == Kind.F16:
        return raw.view(np.float16).astype(np.float32).reshape(info.shape)
    if info.kind == Kind.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(info.shape)
    raise ModelError(
        f"{path}: '{name}' is stored as {info.kind.name}, whose codes are not imported. Use a file of "
        f"{', '.join(kind.name for kind in CODED)}, or compress the model with another method."
    )


def split_blocks(raw: np.ndarray, kind: Kind) -> StoredCodes:
    """Take the blocks of one matrix apart, uint8 (out, bytes of a row)."""
    out = raw.shape[0]
    if kind in (Kind.Q4_K, Kind.Q5_K):
        return _k_blocks(raw.reshape(out, -1, 144 if kind == Kind.Q4_K else 176), kind)
    if kind == Kind.Q6_K:
        return _q6_k(raw.reshape(out, -1, 210))
    has_minimum, five = kind in (Kind.Q4_1, Kind.Q5_1), kind in (Kind.Q5_0, Kind.Q5_1)
    head = 4 if has_minimum else 2
    blocks = raw.reshape(out, -1, 34 if kind == Kind.Q8_0 else head + 4 * five + 16)
    scales = _halves(blocks[:, :, :2])
    minima = _halves(blocks[:, :, 2:4]) if has_minimum else None
    if kind == Kind.Q8_0:
        codes = (blocks[:, :, 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
        return StoredCodes(codes.reshape(out, -1), 8, _SMALL, scales)
    low = blocks[:, :, head + 4 * five :]
    codes = np.concatenate([low & 15, low >> 4], axis=2)
    if five:
        high = np.unpackbits(blocks[:, :, head : head + 4], axis=2, bitorder="little")
        codes |= high << 4
    return StoredCodes(codes.reshape(out, -1), 5 if five else 4, _SMALL, scales, minima)


def _halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)[:, :, 0]


def _k_blocks(blocks: np.ndarray, kind: Kind) -> StoredCodes:
    """Q4_K and Q5_K: eight groups of 32 with 6-bit scales and minima, packed into 12 bytes."""
    out = blocks.shape[0]
    s = blocks[:, :, 4:16]
    first, second, third = s[:, :, :4], s[:, :, 4:8], s[:, :, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=2)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=2)
    low = blocks[:, :, -128:].reshape(out, -1, 4, 1, 32)
    codes = np.concatenate([low & 15, low >> 4], axis=3).reshape(out, -1, 8, 32)
    if kind == Kind.Q5_K:
        high = blocks[:, :, 16:48].reshape(out, -1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(8, 1)
        codes = codes | ((high & 1) << 4)
    return StoredCodes(
        codes.reshape(out, -1),
        5 if kind == Kind.Q5_K else 4,
        32,
        scales.reshape(out, -1).astype(np.int8),
        minima.reshape(out, -1).astype(np.int8),
        _halves(blocks[:, :, :2]),
        _halves(blocks[:, :, 2:4]),
    )


def _q6_k(blocks: np.ndarray) -> StoredCodes:
    """Q6_K: sixteen groups of 16 with int8 scales; codes centred on 32."""
    out = blocks.shape[0]
    low = blocks[:, :, :128].reshape(out, -1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=3).reshape(out, -1, 2, 4, 32)
    high = blocks[:, :, 128:192].reshape(out, -1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    codes = low | ((high & 3) << 4)
    scales = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8)
    return StoredCodes(
        codes.reshape(out, -1), 6, 16, scales.reshape(out, -1), None, _halves(blocks[:, :, 208:210]), None
    )
