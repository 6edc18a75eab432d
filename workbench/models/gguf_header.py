"""Read the header of a GGUF file with checked arithmetic, before any other reader is trusted with it.

Format: magic, version, counts, metadata key/values, tensor table, padding, data. All integers are little-endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 had 32-bit counts and has not been written since 2023
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class ArraySize:
    """Stands for an array of the metadata, which is skipped: a vocabulary is not needed to judge a file."""

    length: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (arrays as their length alone) and tensor names with their shapes, outermost dimension first."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


class _Cursor:
    """Sequential reads that never leave the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> int:
        """Step over ``size`` bytes; return where they begin."""
        begin = self.at
        if size > len(self.data) - begin:
            raise damaged(self.path, f"its header ends early, at byte {len(self.data):,}")
        self.at = begin + size
        return begin

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.take(size))[0]

    def raw_string(self) -> bytes:
        size = self.scalar("Q")
        begin = self.take(size)
        return self.data[begin : begin + size]

    def string(self) -> str:
        try:
            return self.raw_string().decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, "a name in its header is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.raw_string().decode(errors="replace")
        if kind == _ARRAY:
            return self.skip_array()
        if kind not in _SCALARS:
            raise damaged(self.path, f"its header has a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def skip_array(self) -> ArraySize:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            self.take(length * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(length):  # ends at the end of the file: every string takes at least eight bytes
                self.take(self.scalar("Q"))
        else:
            raise damaged(self.path, f"its header has an array of unknown type {kind}")
        return ArraySize(length)


def damaged(path: Path, why: str) -> ModelError:
    """Return the error for a file that cannot be trusted."""
    return ModelError(f"{path} is not a whole GGUF file: {why}. Download it again and compare its checksum.")


def is_gguf(path: Path) -> bool:
    """Tell whether a file begins with the GGUF magic."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read and check metadata and tensor table; every tensor's bytes must lie inside the file.

    Raises:
        ModelError: not GGUF, an unknown version, or cut off anywhere.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise damaged(path, f"it has {path.stat().st_size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, path))


def _parse(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    begin = cursor.take(4)
    if cursor.data[begin : begin + 4] != MAGIC:
        raise damaged(path, "it does not begin with 'GGUF'")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ModelError(f"{path} is GGUF version {version}; versions {_VERSIONS} are read. Convert it again.")
    n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    tensors: dict[str, tuple[int, ...]] = {}
    ends: list[tuple[int, str]] = []
    for _ in range(n_tensors):
        name = cursor.string()
        if name in tensors:
            raise damaged(path, f"tensor '{name}' appears twice")
        tensors[name], size = _tensor(cursor, name)
        ends.append((cursor.scalar("Q") + size, name))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise damaged(path, f"its alignment is {alignment}")
    data_begin = -(-cursor.at // alignment) * alignment
    for end, name in ends:
        if data_begin + end > len(cursor.data):
            raise damaged(
                path, f"tensor '{name}' ends at byte {data_begin + end:,} but the file has {len(cursor.data):,} bytes"
            )
    if not tensors:
        raise damaged(path, "it holds no tensors")
    return GgufHeader(metadata, tensors)


def _tensor(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int]:
    """Read shape and type of one tensor; return the shape, outermost first, and its size in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    n_dimensions = cursor.scalar("I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise damaged(cursor.path, f"tensor '{name}' has {n_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(n_dimensions))
    kind = cursor.scalar("I")
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise damaged(cursor.path, f"tensor '{name}' has unknown type {kind}") from error
    if not all(shape) or shape[0] % block:
        raise damaged(cursor.path, f"tensor '{name}' of shape {shape[::-1]} does not fit blocks of {block} weights")
    return shape[::-1], math.prod(shape) // block * block_bytes
