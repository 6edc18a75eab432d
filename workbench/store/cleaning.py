"""What may be removed from a store, and removing it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from workbench.errors import InputError
from workbench.store import files, runs
from workbench.store.artifacts import Artifact, Artifacts
from workbench.store.database import Database, now

ABANDONED_AFTER_S = 24 * 3600  # no single file takes a day to write; a killed process leaves its own behind


@dataclass(frozen=True)
class Removal:
    """One thing removed (or, in a dry run, to be removed).

    ``what`` is ``artifact``, ``object`` (a file that no artifact names), ``tmp``, ``checkpoint`` or ``quarantine``;
    ``bytes`` is what the disk gets back, 0 where another artifact keeps the same file.
    """

    what: str
    name: str
    bytes: int


def clean(
    home: Path,
    database: Database,
    artifacts: Artifacts,
    *,
    max_bytes: int | None,
    older_than_days: float | None,
    dry_run: bool,
) -> list[Removal]:
    """Remove what a killed process left behind, then artifacts that no run uses; see ``Store.gc``."""
    for name, value in (("max_bytes", max_bytes), ("older_than_days", older_than_days)):
        if value is not None and value < 0:
            raise InputError(f"{name}={value} is not possible: it must be at least 0.")
    removed = list(_abandoned(home, dry_run))
    removed += _unnamed(home, artifacts, dry_run)
    rows = artifacts.rows()
    holders = Counter(row.sha256 for row in rows)
    for row in _dispensable(database, rows, max_bytes, older_than_days):
        holders[row.sha256] -= 1
        freed = 0 if holders[row.sha256] else row.bytes
        if dry_run or artifacts.drop_unused(row.kind, row.key):
            removed.append(Removal("artifact", f"{row.kind}/{row.key}", freed))
    return removed


def _dispensable(
    database: Database, rows: list[Artifact], max_bytes: int | None, older_than_days: float | None
) -> Iterator[Artifact]:
    """Yield artifacts to remove, least recently used first: those too old, then those above the bound."""
    with database.reading() as connection:
        used = runs.referenced(connection)
    holders = Counter(row.sha256 for row in rows)
    total = sum({row.sha256: row.bytes for row in rows}.values())
    oldest = None if older_than_days is None else now() - timedelta(days=older_than_days)
    for row in rows:
        if (row.kind, row.key) in used:
            continue
        too_old = oldest is not None and row.last_used_at < oldest
        too_much = max_bytes is not None and total > max_bytes
        if too_old or too_much:
            holders[row.sha256] -= 1
            total -= 0 if holders[row.sha256] else row.bytes
            yield row


def _abandoned(home: Path, dry_run: bool) -> Iterator[Removal]:
    limit = time.time() - ABANDONED_AFTER_S
    for what, folder in (("tmp", "tmp"), ("checkpoint", "checkpoints"), ("quarantine", "quarantine")):
        for path in sorted((home / folder).glob("*")):
            if files.newest_change(path) < limit:
                size = files.size_of(path)
                if not dry_run:
                    with files.disk_errors(f"Removing {path}"):
                        files.remove(path)
                yield Removal(what, path.name, size)


def _unnamed(home: Path, artifacts: Artifacts, dry_run: bool) -> Iterator[Removal]:
    """Yield files of artifacts whose process was killed between renaming the file and naming it."""
    named = {row.sha256 for row in artifacts.rows()}
    for path in sorted((home / "objects").glob("??/*")):
        if path.name not in named:
            size = files.size_of(path)
            if dry_run or artifacts.remove_unnamed(path.name):
                yield Removal("object", path.name, size)
