"""Files that are either whole or not there: scratch paths, flushing, checksums, and what a refusing disk means."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import InputError, StoreError

COMPRESSED = "compressed"  # folder of the compressed models that a sitting keeps in the store's home

_NAME = re.compile(r"[a-z0-9_-]{1,128}")
_ELSEWHERE = "set WORKBENCH_HOME to a folder that you can write to"
_MAKE_ROOM = "free some space (`workbench store gc` helps), or set WORKBENCH_HOME to another disk"
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", _MAKE_ROOM),
    errno.EDQUOT: ("the disk quota is used up", _MAKE_ROOM),
    errno.EFBIG: ("the file is larger than allowed here", _MAKE_ROOM),
    errno.EROFS: ("the disk is read-only", _ELSEWHERE),
    errno.EACCES: ("no permission", _ELSEWHERE),
    errno.EPERM: ("no permission", _ELSEWHERE),
    errno.ENOTDIR: ("a file is where a folder is needed", _ELSEWHERE),
    errno.EEXIST: ("a file is where a folder is needed", _ELSEWHERE),
    errno.ENAMETOOLONG: ("the path is too long", _ELSEWHERE),
    errno.EIO: ("the disk reports an error", "check the disk, or set WORKBENCH_HOME to another one"),
}


def check_name(what: str, name: str) -> str:
    """Return ``name`` if it is safe as one path component: 1 to 128 of a-z, 0-9, '_' and '-'.

    Raises:
        InputError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{what} '{name}' is not possible in the store: use 1 to 128 of a-z, 0-9, '_' and '-'.")
    return name


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn a refusal of the disk into a ``StoreError`` that says what was being done and what to do about it.

    Other ``OSError``s pass: they are defects. Libraries written in Rust (safetensors) wrap a full disk in their own
    exception, known by its text alone.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        reason, advice = _REFUSALS[error.errno]
        raise StoreError(f"{doing} failed, {reason}: {advice}.") from error
    except Exception as error:
        if f"(os error {errno.ENOSPC})" not in str(error):
            raise
        reason, advice = _REFUSALS[errno.ENOSPC]
        raise StoreError(f"{doing} failed, {reason}: {advice}.") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names inside a folder, are on the disk itself."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and journals their names
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each flushed into the one above; a folder that exists is left as it is."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished, flushed file its name, replacing what had it."""
    make_folder(target.parent)
    os.replace(temporary, target)
    sync(target.parent)


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """Yield a new path inside the store's ``tmp/``; whatever is still there at the end is removed."""
    path = home / "tmp" / f"{os.getpid()}-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it; nothing there is fine."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may be removing the same
    else:
        path.unlink(missing_ok=True)


def set_aside(home: Path, path: Path) -> Path | None:
    """Move a damaged file into ``quarantine/``; None where another process was first."""
    target = home / "quarantine" / f"{path.name}-{uuid.uuid4().hex[:8]}"
    make_folder(target.parent)
    try:
        os.replace(path, target)
    except FileNotFoundError:
        return None
    os.utime(target)  # its age in quarantine counts from now
    return target


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what disappears meanwhile counts nothing."""
    total = 0
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        try:
            total += 0 if entry.is_dir() else entry.stat().st_size
        except FileNotFoundError:
            continue
    return total


def newest_change(path: Path) -> float:
    """Latest modification time (seconds since the epoch) of a file, or of a folder and everything in it."""
    latest = 0.0
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        try:
            latest = max(latest, entry.stat().st_mtime)
        except FileNotFoundError:
            continue
    return latest
