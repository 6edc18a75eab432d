"""Finished files, named by what they depend on and stored by what they contain.

An artifact is one file. Its row says kind, key (what it depends on) and SHA-256 (what it contains); the file is
``objects/ab/abcdef...``. The row is written after the file, and nothing is returned whose checksum was not verified.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from workbench.errors import StoreError
from workbench.store import files
from workbench.store.database import Database, artifacts, now, plain, run_artifacts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """One row: ``bytes`` and ``sha256`` of the file, times in UTC, ``provenance`` as given when it was put."""

    kind: str
    key: str
    sha256: str
    bytes: int
    created_at: datetime
    last_used_at: datetime
    provenance: dict[str, Any]


class Artifacts:
    """The artifacts of one store.

    Args:
        home: the store's folder.
        database: its tables.
    """

    def __init__(self, home: Path, database: Database) -> None:
        self._home = home
        self._database = database
        self._verified: dict[str, tuple[int, int, int]] = {}  # sha256 -> the file as it was when its bytes were read

    def path(self, sha256: str) -> Path:
        """Where the file of that content is."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise StoreError(
                f"The store names a file by '{sha256}', which is no SHA-256: run `workbench store verify`."
            )
        return self._home / "objects" / sha256[:2] / sha256

    def find(self, kind: str, key: str) -> Path | None:
        """Return the file of an artifact, verified, or None. A damaged file is set aside and its rows dropped."""
        files.check_name("Artifact kind", kind)
        files.check_name("Artifact key", key)
        this = (artifacts.c.kind == kind) & (artifacts.c.key == key)
        with self._database.reading() as connection:
            sha256 = connection.execute(select(artifacts.c.sha256).where(this)).scalar()
        if sha256 is None or (not self.intact(sha256) and self._drop_damaged(sha256)):
            return None
        with self._database.changing() as connection:
            connection.execute(update(artifacts).where(this).values(last_used_at=now()))
        return self.path(sha256)

    def put(self, kind: str, key: str, write: Callable[[Path], None], provenance: Mapping[str, Any]) -> Path:
        """Store the file that ``write`` makes at the path it is given; return where it is.

        Raises:
            StoreError: the disk refuses. Nothing is left behind.
        """
        files.check_name("Artifact kind", kind)
        files.check_name("Artifact key", key)
        details = plain(dict(provenance), "provenance")
        doing = f"Writing {kind} to the store {self._home}"
        with files.scratch(self._home) as temporary:
            with files.disk_errors(doing):
                write(temporary)
                if not temporary.is_file():
                    raise StoreError(f"{doing} failed: its writer made no file.")
                files.sync(temporary)
                sha256, size = files.sha256_of(temporary), temporary.stat().st_size
            target, moment = self.path(sha256), now()
            values = {"sha256": sha256, "bytes": size, "created_at": moment, "last_used_at": moment}
            with self._database.changing() as connection:
                with files.disk_errors(doing):
                    files.publish(temporary, target)
                this = (artifacts.c.kind == kind) & (artifacts.c.key == key)
                changed = connection.execute(update(artifacts).where(this).values(**values, provenance=details))
                if changed.rowcount == 0:
                    connection.execute(insert(artifacts).values(kind=kind, key=key, **values, provenance=details))
        return target

    def rows(self, kind: str | None = None) -> list[Artifact]:
        """Return all artifacts (of a kind), least recently used first."""
        query = select(artifacts).order_by(artifacts.c.last_used_at, artifacts.c.id)
        if kind is not None:
            query = query.where(artifacts.c.kind == kind)
        with self._database.reading() as connection:
            return [_artifact(row) for row in connection.execute(query)]

    def intact(self, sha256: str, *, again: bool = False) -> bool:
        """Whether the file of that content is there and has that content.

        A file is read once per process as long as its inode, size and modification time stay; ``again`` reads it
        anyway.
        """
        path = self.path(sha256)
        try:
            status = path.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if not again and self._verified.get(sha256) == seen:
                return True
            with files.disk_errors(f"Reading {path}"):
                same = files.sha256_of(path) == sha256
        except (FileNotFoundError, IsADirectoryError):
            return False
        if same:
            self._verified[sha256] = seen
        return same

    def drop_unused(self, kind: str, key: str) -> bool:
        """Remove an artifact, and its file unless another one has the same content. False where a run uses it."""
        this = (artifacts.c.kind == kind) & (artifacts.c.key == key)
        link = (run_artifacts.c.kind == kind) & (run_artifacts.c.key == key)
        with self._database.changing() as connection:
            sha256 = connection.execute(select(artifacts.c.sha256).where(this)).scalar()
            if sha256 is None or connection.execute(select(run_artifacts.c.run_id).where(link)).first() is not None:
                return False
            connection.execute(delete(artifacts).where(this))
        self.remove_unnamed(sha256)
        return True

    def remove_unnamed(self, sha256: str) -> bool:
        """Remove a file if no row names it; a step after dropping the row, so that no row names a file that is gone."""
        with self._database.changing() as connection:
            if connection.execute(select(artifacts.c.id).where(artifacts.c.sha256 == sha256)).first() is not None:
                return False
            with files.disk_errors(f"Removing {self.path(sha256)}"):
                files.remove(self.path(sha256))
        return True

    def _drop_damaged(self, sha256: str) -> bool:
        """Set a damaged or missing file aside and drop the rows that name it. False where it has been made anew."""
        path = self.path(sha256)
        with self._database.changing() as connection:
            if self.intact(sha256, again=True):
                return False
            with files.disk_errors(f"Setting the damaged {path} aside"):
                moved = files.set_aside(self._home, path)
            connection.execute(delete(artifacts).where(artifacts.c.sha256 == sha256))
        what = "is missing" if moved is None else f"does not match its checksum and was moved to {moved}"
        log.warning("Stored file %s %s; what it held will be computed again.", path, what)
        return True


def _artifact(row: Row[Any]) -> Artifact:
    return Artifact(
        kind=row.kind,
        key=row.key,
        sha256=row.sha256,
        bytes=row.bytes,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        provenance=row.provenance,
    )
