"""The store: runs in a database, artifacts and checkpoints as files, safe against a kill at any moment.

Everything that is kept is written to a temporary file, flushed, renamed, and only then named in the database.
Everything that is read is verified against its checksum; what fails is set aside and computed again. Nothing is ever
unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import platformdirs
from sqlalchemy import func, select

from workbench.errors import StoreError
from workbench.store import cleaning, database, files, runs
from workbench.store.artifacts import Artifact, Artifacts
from workbench.store.checkpoint import Checkpoint, PartMissing
from workbench.store.cleaning import Removal
from workbench.store.runs import RUN_KINDS, RunKind

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RUN_KINDS", "Artifact", "Checkpoint", "PartMissing", "Removal", "RunKind", "Store", "default_home"]


def default_home() -> Path:
    """Where the store is when nobody says otherwise: ``WORKBENCH_HOME``, else the user's data folder."""
    named = os.environ.get("WORKBENCH_HOME")
    return Path(named).expanduser() if named else platformdirs.user_data_path("compression-workbench", appauthor=False)


class Store:
    """One store. May be used from several threads, and by several processes at once.

    Args:
        home: folder of the store, made if it is not there; None for ``default_home()``.
        url: SQLAlchemy URL of another database for the tables (PostgreSQL); None for SQLite in ``home``.

    Raises:
        StoreError: the folder cannot be made or written to, or the database cannot be opened.
    """

    def __init__(self, home: Path | None = None, url: str | None = None) -> None:
        self.home = (Path(home).expanduser() if home is not None else default_home()).absolute()
        doing = f"Opening the store {self.home}"
        try:
            with files.disk_errors(doing):
                for folder in ("objects", "checkpoints", "tmp"):
                    files.make_folder(self.home / folder)
                with files.scratch(self.home) as probe:
                    probe.touch()
        except OSError as error:
            raise StoreError(f"{doing} failed ({error.strerror}): set WORKBENCH_HOME to another folder.") from error
        self._database = database.Database(self.home, url)
        self._artifacts = Artifacts(self.home, self._database)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def artifact(self, kind: str, key: str) -> Path | None:
        """Return the verified file of an artifact, or None where there is none (or a damaged one, now set aside).

        The file belongs to the store: read it, never write to it.
        """
        return self._artifacts.find(kind, key)

    def put_artifact(
        self, kind: str, key: str, write: Callable[[Path], None], provenance: Mapping[str, Any] | None = None
    ) -> Path:
        """Store one file under a kind and a key, replacing what had them.

        Args:
            kind: what it is (``profile``); 1 to 128 of a-z, 0-9, '_' and '-'.
            key: what it depends on, all of it (``Provenance.key``); the same alphabet.
            write: makes the file at the path it is given, which does not exist yet.
            provenance: how it came about, JSON values.

        Returns:
            The file in the store.

        Raises:
            StoreError: the disk refuses. Nothing is left behind.
        """
        return self._artifacts.put(kind, key, write, provenance or {})

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """Return what is stored (of a kind), least recently used first. Files are not read."""
        return self._artifacts.rows(kind)

    def checkpoint(self, key: str) -> Checkpoint:
        """Return the place for finished parts of the analysis or fit of that key."""
        return Checkpoint(self.home, key)

    def model_folder(self, name: str) -> Path:
        """Where a sitting keeps its compressed model of that name, replaced by every run; ``gc`` bounds them all."""
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".")
        return self.home / files.COMPRESSED / (plain or "model")

    def record_run(
        self,
        kind: RunKind,
        *,
        name: str,
        model: str,
        method: str,
        recipe_sha256: str | None = None,
        summary: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        artifacts: Mapping[str, Path | str] | None = None,
        measured: Path | str | None = None,
    ) -> int:
        """Record one run.

        Args:
            kind: one of ``RUN_KINDS``.
            name: for people.
            model: the model's short name.
            method: what was done to it.
            recipe_sha256: ``Recipe.sha256``, or None where there is no recipe.
            summary: the numbers that tables and dashboards show. NaN and infinity are kept as None.
            environment: ``measure.environment()``.
            artifacts: role to an artifact in this store: its path, its key, or ``kind/key``.
            measured: folder of the compressed model that was measured; one that the store keeps (``model_folder``) is
                removed last by ``gc``.

        Returns:
            The run's number.

        Raises:
            InputError: an unknown kind, a value without a JSON form, or an artifact that is not in the store.
        """
        summary = dict(summary or {})
        if measured is not None and Path(measured).absolute().parent == self.home / files.COMPRESSED:
            summary[runs.KEPT_MODEL] = Path(measured).name
        return runs.record(
            self._database,
            kind,
            name=name,
            model=model,
            method=method,
            recipe_sha256=recipe_sha256,
            summary=summary,
            environment=environment or {},
            used=artifacts or {},
        )

    def runs(self, kind: RunKind | None = None, model: str | None = None, limit: int | None = None) -> pd.DataFrame:
        """Return runs, newest first: id, created_at (UTC), kind, name, model, method, recipe_sha256, then one column
        per entry of their summaries (nested ones joined by dots; ``summary.<name>`` where the name is taken).
        """
        return runs.table(self._database, kind, model, limit)

    def run(self, number: int) -> dict[str, Any]:
        """Return one run: the first columns of ``runs``, its ``summary`` and ``environment`` as they were given, and
        its ``artifacts``, role to (kind, key), for ``Store.artifact``.

        Raises:
            InputError: no such run.
        """
        return runs.load(self._database, number)

    def delete_run(self, number: int) -> None:
        """Delete a run; what it used may then be removed by ``gc``. ``InputError`` where there is no such run."""
        runs.remove(self._database, number)

    def info(self) -> dict[str, Any]:
        """Return where the store is, how much it holds (counts and bytes), and ``warnings`` (a list of sentences)."""
        with self._database.reading() as connection:
            n_runs = connection.execute(select(func.count()).select_from(database.runs)).scalar_one()
        rows = self._artifacts.rows()
        checkpoints = cleaning.kept_checkpoints(self.home)
        models = cleaning.kept_models(self.home, self._database)
        quarantined = list((self.home / "quarantine").glob("*"))
        warnings = self._database.warnings()
        if quarantined:
            warnings.append(
                f"{len(quarantined)} damaged file(s) were set aside in {self.home / 'quarantine'}: check the disk. "
                "`workbench store gc` removes them after a day."
            )
        return {
            "path": str(self.home),
            "database": self._database.url,
            "schema_version": database.SCHEMA_VERSION,
            "journal_mode": self._database.journal_mode,
            "runs": n_runs,
            "artifacts": len(rows),
            "artifact_bytes": sum({row.sha256: row.bytes for row in rows}.values()),
            "compressed_models": len(models),
            "compressed_bytes": sum(model.bytes for model in models),
            "checkpoints": len(checkpoints),
            "checkpoint_bytes": sum(checkpoint.bytes for checkpoint in checkpoints),
            "quarantined": len(quarantined),
            "bytes": files.size_of(self.home),
            "warnings": warnings,
        }

    def verify(self) -> list[str]:
        """Read every stored file and return one sentence for each problem; nothing is changed."""
        problems = []
        for row in self._artifacts.rows():
            if not self._artifacts.path(row.sha256).is_file():
                problems.append(f"The file of {row.kind}/{row.key} is missing.")
            elif not self._artifacts.intact(row.sha256, again=True):
                problems.append(f"The file of {row.kind}/{row.key} does not match its checksum.")
        with self._database.reading() as connection:
            named = runs.referenced(connection)
        gone = named - {(row.kind, row.key) for row in self._artifacts.rows()}
        problems += [f"A run uses {kind}/{key}, which is not in the store." for kind, key in sorted(gone)]
        for folder in sorted((self.home / "checkpoints").glob("*")):
            problems += Checkpoint(self.home, folder.name).problems()
        return problems

    def gc(
        self, max_bytes: int | None = None, older_than_days: float | None = None, dry_run: bool = False
    ) -> list[Removal]:
        """Remove what is not needed, and return what was removed.

        Always: temporary files, checkpoints and quarantined files untouched for a day, and files that no artifact
        names. An artifact that a run uses stays, whatever the bounds; a compressed model that a run measured goes only
        when the bound cannot be met otherwise, and the run keeps its numbers.

        Args:
            max_bytes: remove least recently used artifacts, compressed models and parts of unfinished work until the
                rest of them is at most this large.
            older_than_days: remove those that were last used longer ago.
            dry_run: remove nothing, only say what would be.
        """
        return cleaning.clean(
            self.home,
            self._database,
            self._artifacts,
            max_bytes=max_bytes,
            older_than_days=older_than_days,
            dry_run=dry_run,
        )
