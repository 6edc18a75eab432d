"""Read a compressed model's folder without torch: tensors one at a time, as numpy, straight from the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import InputError, IntegrityError, ModelError
from workbench.formats import manifest
from workbench.formats.folder import MANIFEST, check_file, is_compressed
from workbench.formats.manifest import Manifest
from workbench.models.tokenizer import TOKENIZER_FILES

WEIGHTS, CONFIG = "weights.safetensors", "config.json"

# numpy has no bf16: its bit patterns come as uint16.
_TYPES = {
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": np.uint16,
    "F32": np.float32,
    "F64": np.float64,
    "BOOL": np.bool_,
}
_MOST_HEADER = 100 << 20  # as the safetensors library itself allows


def check_folder(path: Path | str, verify: bool = True) -> tuple[Path, Manifest, dict[str, Any]]:
    """Check a folder written by ``CompressedModel.save``; return its absolute path, manifest and config.

    Args:
        path: the folder.
        verify: compare the SHA-256 of every file; sizes and names are always checked.

    Raises:
        InputError: something else is there.
        ModelError: nothing is there, or it is written in a format that this version does not read.
        IntegrityError: missing, changed or damaged files; the message names the file.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.exists():
        raise ModelError(f"There is no model '{path}': give a folder with {MANIFEST} in it.")
    if not is_compressed(folder):
        raise InputError(f"No compressed model at {folder}: a folder with {MANIFEST} in it is needed.")
    record = manifest.read(folder / MANIFEST)
    for name in (WEIGHTS, CONFIG, *TOKENIZER_FILES[:2]):
        if name not in record.files:
            raise IntegrityError(f"{folder / MANIFEST} does not list {name}: the model is incomplete.")
    for name in TOKENIZER_FILES:
        if name not in record.files and (folder / name).exists():
            raise IntegrityError(f"{folder / name} is not part of the stored model: remove it.")
    for name, file in record.files.items():
        check_file(folder, name, file.size, file.sha256 if verify else None)
    return folder, record, manifest.read_json(folder / CONFIG)


class StoredTensors:
    """Tensors of one safetensors file, by name; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            IntegrityError: a header that is damaged, or that points outside the file.
        """
        self._path = path
        self._file = path.open("rb")
        size = path.stat().st_size
        try:
            length = int.from_bytes(self._file.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise ValueError("its header has an impossible length")
            header = json.loads(self._file.read(length))
            self._begin = 8 + length
            self._entries = {
                name: _entry(entry, size - self._begin) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise IntegrityError(f"{path} is damaged: {error}. Compress the model again.") from error

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in memory of its own; bf16 as uint16 bit patterns."""
        dtype, shape, start, end = self._entries[name]
        array = np.empty(shape, dtype=dtype)
        self._file.seek(self._begin + start)
        raw: Any = array.reshape(-1).view(np.uint8)
        if self._file.readinto(raw) != end - start:
            raise IntegrityError(f"{self._path} ended early: copy the folder again.")
        return array

    def is_bf16(self, name: str) -> bool:
        return self._entries[name][0] is np.uint16

    def close(self) -> None:
        self._file.close()


def _entry(entry: Mapping[str, Any], room: int) -> tuple[Any, tuple[int, ...], int, int]:
    """Type, shape and place of one tensor, checked against the bytes that there are."""
    dtype = _TYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or not start <= end <= room:
        raise ValueError("a tensor lies outside the file")
    count = 1
    for n in shape:
        count *= n
    if count * np.dtype(dtype).itemsize != end - start:
        raise ValueError("a tensor's size does not fit its shape")
    return dtype, shape, start, end
