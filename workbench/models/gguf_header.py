"""Read the header of a GGUF file with checked arithmetic, before any other reader is trusted with it.

Format: magic, version, counts, metadata key/values, tensor table, padding, data. All integers are little-endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from workbench.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 had 32-bit counts and has not been written since 2023
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


# The largest vocabularies have a quarter of a million entries; arrays of a damaged file could claim any length.
_MAX_ARRAY = 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: ``shape`` outermost dimension first, ``kind`` its ggml type, ``begin`` its first byte in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    begin: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (arrays as lists) and the table of tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

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
            return self.array()
        if kind not in _SCALARS:
            raise damaged(self.path, f"its header has a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, length = self.scalar("I"), self.scalar("Q")
        if length > _MAX_ARRAY:
            raise damaged(self.path, f"its header has an array of {length:,} entries")
        if kind == _STRING:
            return [self.raw_string().decode(errors="replace") for _ in range(length)]
        if kind not in _SCALARS:
            raise damaged(self.path, f"its header has an array of unknown type {kind}")
        layout = f"<{length}{_SCALARS[kind]}"
        return list(struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout))))


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
    table: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name = cursor.string()
        if name in table:
            raise damaged(path, f"tensor '{name}' appears twice")
        table[name] = _tensor(cursor, name)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise damaged(path, f"its alignment is {alignment}")
    data_begin = -(-cursor.at // alignment) * alignment
    tensors = {name: replace(info, begin=data_begin + info.begin) for name, info in table.items()}
    for name, info in tensors.items():
        end = info.begin + info.n_bytes
        if end > len(cursor.data):
            raise damaged(path, f"tensor '{name}' ends at byte {end:,} but the file has {len(cursor.data):,} bytes")
    if not tensors:
        raise damaged(path, "it holds no tensors")
    return GgufHeader(metadata, tensors)


def _tensor(cursor: _Cursor, name: str) -> TensorInfo:
    """Read one row of the tensor table; ``begin`` is still counted from the beginning of the data."""
    n_dimensions = cursor.scalar("I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise damaged(cursor.path, f"tensor '{name}' has {n_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(n_dimensions))
    number = cursor.scalar("I")
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise damaged(cursor.path, f"tensor '{name}' has unknown type {number}") from error
    if not all(shape) or shape[0] % block:
        raise damaged(cursor.path, f"tensor '{name}' of shape {shape[::-1]} does not fit blocks of {block} weights")
    return TensorInfo(shape[::-1], kind, cursor.scalar("Q"), math.prod(shape) // block * block_bytes)
