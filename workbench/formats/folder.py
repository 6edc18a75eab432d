"""Folders that are either whole or not there: checked before long work, written beside, renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import InputError, IntegrityError, StoreError
from workbench.files import refusal as refusal

MANIFEST = "compressed.json"
_SPARE_BYTES = 1 << 20  # beside the weights: JSON, tokenizer, file system blocks


def is_compressed(path: Path | str) -> bool:
    """Tell whether ``path`` is a folder that holds a compressed model (it is not verified here)."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def check_output_folder(path: Path | str, *, need_bytes: int = 0, overwrite: bool = False) -> Path:
    """Return the absolute path if a compressed model can be written there; call it before long work.

    Nothing is left behind, whether the answer is yes or no.

    Args:
        path: the folder to be made; its parents may be missing. An empty folder is fine.
        need_bytes: expected size of the result.
        overwrite: accept a compressed model that is already there, which will then be replaced as a whole.

    Raises:
        InputError: something else is already there.
        StoreError: no permission, a read-only disk, or not enough space.
    """
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} is not a possible folder name: choose another.")
    target = Path(path).expanduser().absolute()
    try:
        _check_free_name(target, overwrite)
        above = target.parent
        while not above.exists():
            above = above.parent
        probe = above / f".{uuid.uuid4().hex}"
        probe.mkdir()
        probe.rmdir()
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise refusal(target, error) from error
    if free < need_bytes + _SPARE_BYTES:
        raise StoreError(
            f"Cannot write {target}: {(need_bytes + _SPARE_BYTES) / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are "
            "free: free some space, or choose a folder on another disk."
        )
    return target


def _check_free_name(target: Path, overwrite: bool) -> None:
    """Raise ``InputError`` where something is in the way that may not be replaced."""
    if is_compressed(target):
        if not overwrite:
            raise InputError(
                f"{target} already holds a compressed model: choose another folder, or allow overwriting "
                "(--overwrite, overwrite=True)."
            )
    elif target.is_dir():
        if any(target.iterdir()):
            raise InputError(
                f"{target} exists and is not a compressed model: choose a new or empty folder. Nothing was changed."
            )
    elif target.exists() or target.is_symlink():
        raise InputError(f"{target} is a file: choose a new or empty folder. Nothing was changed.")


@contextmanager
def new_folder(path: Path | str, *, need_bytes: int = 0, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside ``path``; when the block ends well, it is flushed and takes that name.

    When the block raises, the hidden folder is removed and ``path`` is as before. A process that is killed leaves at
    most a hidden ``.<name>.<random>`` folder beside it.

    Raises:
        InputError, StoreError: as ``check_output_folder``, or the disk refuses on the way.
    """
    target = check_output_folder(path, need_bytes=need_bytes, overwrite=overwrite)
    token = uuid.uuid4().hex
    temporary = target.parent / f".{target.name}.{token}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        _rename(temporary, target, target.parent / f".{target.name}.old-{token}")
        _sync(target.parent)
    except OSError as error:
        raise refusal(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, target: Path, aside: Path) -> None:
    """Give ``temporary`` the name ``target``. A model that has it steps aside first, and back if that fails."""
    if not is_compressed(target):
        os.replace(temporary, target)  # onto nothing or an empty folder
        return
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names inside a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and journals their names
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_name(name: str) -> bool:
    """Tell whether a name found in a file is one path component, so that it cannot lead out of its folder."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")


def check_file(folder: Path, name: str, size: int, sha256: str | None) -> Path:
    """Return the path of a stored file after checking that it is what was written.

    Args:
        folder: where it lies.
        name: as recorded.
        size: recorded bytes.
        sha256: recorded checksum, or None to leave the content unread.

    Raises:
        IntegrityError: a name that leads elsewhere, a missing file, another size, or another content.
    """
    again = "Compress the model again, or copy the folder again."
    if not plain_name(name):
        raise IntegrityError(f"{folder / MANIFEST} names the file '{name}', which is outside its folder. {again}")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(f"{path} is missing, or is a link and not a file. {again}")
    found = path.stat().st_size
    if found != size:
        raise IntegrityError(f"{path} has {found} bytes where {size} were written. {again}")
    if sha256 is not None and file_sha256(path) != sha256:
        raise IntegrityError(f"{path} does not match its checksum: its content was changed or damaged. {again}")
    return path
