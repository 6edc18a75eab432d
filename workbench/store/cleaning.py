"""What may be removed from a store, and removing it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from workbench.errors import InputError
from workbench.store import files, runs
from workbench.store.artifacts import Artifact, Artifacts
from workbench.store.database import Database, now

ABANDONED_AFTER_S = 24 * 3600  # no single file takes a day to write; a killed process leaves its own behind


@dataclass(frozen=True)
class Removal:
    """One thing removed (or, in a dry run, to be removed).

    ``what`` is ``artifact``, ``compressed`` (a compressed model), ``object`` (a file that no artifact names), ``tmp``,
    ``checkpoint`` or ``quarantine``; ``bytes`` is what the disk gets back, 0 where another artifact keeps the same
    file; ``runs`` are the runs that measured a compressed model, whose numbers stay.
    """

    what: str
    name: str
    bytes: int
    runs: tuple[int, ...] = ()


@dataclass(frozen=True)
class KeptFolder:
    """A folder in the store's home, last used when it last grew: a compressed model, which ``runs`` measured, or a
    checkpoint, which none did; ``what`` as in ``Removal``."""

    what: str
    path: Path
    bytes: int
    last_used_at: datetime
    runs: tuple[int, ...] = ()


def clean(
    home: Path,
    database: Database,
    artifacts: Artifacts,
    *,
    max_bytes: int | None,
    older_than_days: float | None,
    dry_run: bool,
) -> list[Removal]:
    """Remove what a killed process left behind, then what is least recently used; see ``Store.gc``."""
    for name, value in (("max_bytes", max_bytes), ("older_than_days", older_than_days)):
        if value is not None and value < 0:
            raise InputError(f"{name}={value} is not possible: it must be at least 0.")
    removed = list(_abandoned(home, dry_run))
    removed += _unnamed(home, artifacts, dry_run)
    rows = artifacts.rows()
    holders = Counter(row.sha256 for row in rows)
    gone = {removal.name for removal in removed if removal.what == "checkpoint"}  # in a dry run it is still there
    checkpoints = [folder for folder in kept_checkpoints(home) if folder.path.name not in gone]
    folders = [*kept_models(home, database), *checkpoints]
    for found in _dispensable(database, rows, folders, max_bytes, older_than_days):
        if isinstance(found, KeptFolder):
            if dry_run or _drop_folder(home, database, found):
                removed.append(Removal(found.what, found.path.name, found.bytes, found.runs))
            continue
        holders[found.sha256] -= 1
        freed = 0 if holders[found.sha256] else found.bytes
        if dry_run or artifacts.drop_unused(found.kind, found.key):
            removed.append(Removal("artifact", f"{found.kind}/{found.key}", freed))
    return removed


def kept_checkpoints(home: Path) -> list[KeptFolder]:
    """Return the parts of unfinished work, least recently grown first."""
    return _folders("checkpoint", home / "checkpoints")


def kept_models(home: Path, database: Database) -> list[KeptFolder]:
    """Return the compressed models in the store's home, least recently made first."""
    with database.reading() as connection:
        measured = runs.by_kept_model(connection)
    found = _folders("compressed", home / files.COMPRESSED)
    return [replace(model, runs=measured.get(model.path.name, ())) for model in found]


def _folders(what: str, place: Path) -> list[KeptFolder]:
    found = []
    for path in place.glob("[!.]*"):
        changed = datetime.fromtimestamp(files.newest_change(path), UTC)
        found.append(KeptFolder(what, path, files.size_of(path), changed))
    return sorted(found, key=lambda folder: (folder.last_used_at, folder.path.name))


def _dispensable(
    database: Database,
    rows: list[Artifact],
    folders: list[KeptFolder],
    max_bytes: int | None,
    older_than_days: float | None,
) -> Iterator[Artifact | KeptFolder]:
    """Yield what to remove, least recently used first: what is too old, then what is above the bound.

    Compressed models that a run measured come last, and for the bound alone.
    """
    with database.reading() as connection:
        used = runs.referenced(connection)
    holders = Counter(row.sha256 for row in rows)
    total = sum({row.sha256: row.bytes for row in rows}.values()) + sum(folder.bytes for folder in folders)
    oldest = None if older_than_days is None else now() - timedelta(days=older_than_days)
    free: list[Artifact | KeptFolder] = [row for row in rows if (row.kind, row.key) not in used]
    free += [folder for folder in folders if not folder.runs]
    free.sort(key=lambda entry: entry.last_used_at)
    for entry in [*free, *(folder for folder in folders if folder.runs)]:
        measured = isinstance(entry, KeptFolder) and bool(entry.runs)
        too_old = oldest is not None and entry.last_used_at < oldest and not measured
        too_much = max_bytes is not None and total > max_bytes
        if not (too_old or too_much):
            continue
        if isinstance(entry, KeptFolder):
            total -= entry.bytes
        else:
            holders[entry.sha256] -= 1
            total -= 0 if holders[entry.sha256] else entry.bytes
        yield entry


def _drop_folder(home: Path, database: Database, folder: KeptFolder) -> bool:
    """Remove a folder as a whole; False where it grew, was made again or was measured since it was chosen."""
    with database.changing() as connection, files.disk_errors(f"Removing {folder.path}"):
        changed = datetime.fromtimestamp(files.newest_change(folder.path), UTC) != folder.last_used_at
        measured = runs.by_kept_model(connection).get(folder.path.name, ()) if folder.what == "compressed" else ()
        if changed or measured != folder.runs:
            return False
        with files.scratch(home) as temporary:  # out of sight first, so that nobody opens half a model
            try:
                folder.path.rename(temporary)
            except FileNotFoundError:
                return False
    return True


def _abandoned(home: Path, dry_run: bool) -> Iterator[Removal]:
    limit = time.time() - ABANDONED_AFTER_S
    # A process that is killed while it writes a compressed model leaves a hidden folder beside it.
    places = (
        ("tmp", "tmp", "*"),
        ("checkpoint", "checkpoints", "*"),
        ("quarantine", "quarantine", "*"),
        ("tmp", files.COMPRESSED, ".*"),
    )
    for what, folder, pattern in places:
        for path in sorted((home / folder).glob(pattern)):
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
