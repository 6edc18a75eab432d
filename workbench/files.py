"""Files that are either the old version or the whole new one, and checks of output paths before long work."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from workbench.errors import InputError, StoreError

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose a folder on another disk",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.EACCES: "no permission to write there: choose another folder",
    errno.EPERM: "no permission to write there: choose another folder",
    errno.ENOTDIR: "a file is in the way: choose another folder",
    errno.EEXIST: "a file is in the way: choose another folder",
    errno.EISDIR: "a folder is in the way: choose another name",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}


def refusal(path: Path, error: Exception) -> StoreError:
    """Return the one-line error for a disk that refuses to write ``path``."""
    number = error.errno if isinstance(error, OSError) else None
    if f"(os error {errno.ENOSPC})" in str(error):  # safetensors wraps the system's error in its own
        number = errno.ENOSPC
    reason = _REASONS.get(number or 0, f"{' '.join(str(error).split())}: choose another folder")
    return StoreError(f"Cannot write {path}: {reason}.")


def check_output_file(path: str | Path, *, suffixes: tuple[str, ...] = ()) -> Path:
    """Return the absolute path if a file can be written there; call it before long work. Makes missing parents.

    Args:
        path: the file; one that is there will be replaced.
        suffixes: allowed endings, such as ``.json``; empty for any.

    Raises:
        InputError: a folder is in the way, or the ending is not allowed.
        StoreError: the place cannot be written to.
    """
    target = Path(path).expanduser().absolute()
    if suffixes and target.suffix not in suffixes:
        raise InputError(f"Cannot write '{target.name}': the name must end in {' or '.join(suffixes)}.")
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file.")
    probe = target.parent / f".{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise refusal(target, error) from error
    return target


def check_folder(path: str | Path) -> Path:
    """Return the absolute path of a folder that files can be written to, making it; call it before long work.

    Raises:
        InputError: a file is in the way.
        StoreError: the place cannot be written to.
    """
    folder = Path(path).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder.")
    return check_output_file(folder / "probe").parent


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one move: beside it, flushed to the disk, then renamed.

    Raises:
        StoreError: the disk refuses; what was there stays.
    """
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    data = content.encode() if isinstance(content, str) else content
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise refusal(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # what could not be written beside need not be removed
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON values for people and programs, as ``write_whole``; ``ValueError`` for NaN, which JSON has not."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
