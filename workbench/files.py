"""Files that are either the old version or the whole new one, and checks of output paths before long work."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from workbench.errors import InputError, StoreError


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
        raise StoreError(f"Cannot write to {target.parent} ({error.strerror}): choose another folder.") from error
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
        raise StoreError(f"Cannot write {path} ({error.strerror}): free some space or choose another place.") from error
    finally:
        with contextlib.suppress(OSError):  # what could not be written beside need not be removed
            beside.unlink(missing_ok=True)
