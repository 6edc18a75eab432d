"""Runs: what was measured, with what, where, and which artifacts it used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sqlalchemy import Connection, delete, insert, select

from workbench.errors import InputError, suggest
from workbench.store import files
from workbench.store.database import Database, artifacts, now, plain, run_artifacts, runs

if TYPE_CHECKING:
    import pandas as pd

RunKind = Literal["demo", "measure", "bench", "analysis"]
RUN_KINDS: tuple[RunKind, ...] = get_args(RunKind)
KEPT_MODEL = "kept_model"  # entry of a summary: name of the compressed model in the store's home that was measured
COLUMNS = ("id", "created_at", "kind", "name", "model", "method", "recipe_sha256")


def record(
    database: Database,
    kind: str,
    *,
    name: str,
    model: str,
    method: str,
    recipe_sha256: str | None,
    summary: Mapping[str, Any],
    environment: Mapping[str, Any],
    used: Mapping[str, Path | str],
) -> int:
    """Write one run and the artifacts it used, in one transaction; return its number."""
    _check_kind(kind)
    roles = {files.check_name("Artifact role", role): reference for role, reference in used.items()}
    values = {
        "created_at": now(),
        "kind": kind,
        "name": name,
        "model": model,
        "method": method,
        "recipe_sha256": recipe_sha256,
        "summary": plain(dict(summary), "summary"),
        "environment": plain(dict(environment), "environment"),
    }
    with database.changing() as connection:
        links = [(role, *_resolve(connection, role, reference)) for role, reference in roles.items()]
        inserted = connection.execute(insert(runs).values(**values)).inserted_primary_key
        if inserted is None:
            raise RuntimeError("The database gave the new run no number.")
        number = int(inserted[0])
        for role, artifact_kind, key in links:
            connection.execute(
                insert(run_artifacts).values(run_id=number, role=role, kind=artifact_kind, key=key),
            )
    return number


def table(
    database: Database, kind: str | None = None, model: str | None = None, limit: int | None = None
) -> pd.DataFrame:
    """Return runs, newest first: ``COLUMNS``, then one column per entry of their summaries.

    Nested entries are joined by dots (``dense.perplexity``); an entry called like one of ``COLUMNS`` becomes
    ``summary.<name>``.
    """
    import pandas as pd

    query = select(runs).order_by(runs.c.id.desc())
    if kind is not None:
        query = query.where(runs.c.kind == _check_kind(kind))
    if model is not None:
        query = query.where(runs.c.model == model)
    if limit is not None:
        if limit < 0:
            raise InputError(f"limit={limit} is not possible: give the number of runs to list, or None for all.")
        query = query.limit(limit)
    with database.reading() as connection:
        rows = connection.execute(query).all()
    records = []
    for row in rows:
        base = {column: getattr(row, column) for column in COLUMNS}
        flat = _flatten(row.summary)
        records.append(base | {f"summary.{n}" if n in COLUMNS else n: value for n, value in flat.items()})
    names = dict.fromkeys([*COLUMNS, *(name for entry in records for name in entry)])
    return pd.DataFrame(records, columns=list(names))


def load(database: Database, number: int) -> dict[str, Any]:
    """Return one run: ``COLUMNS``, ``summary``, ``environment``, and ``artifacts`` as role -> (kind, key).

    Raises:
        InputError: no such run.
    """
    with database.reading() as connection:
        row = connection.execute(select(runs).where(runs.c.id == number)).first()
        if row is None:
            raise InputError(_unknown(number))
        links = connection.execute(select(run_artifacts).where(run_artifacts.c.run_id == number)).all()
    return {
        **{column: getattr(row, column) for column in COLUMNS},
        "summary": row.summary,
        "environment": row.environment,
        "artifacts": {link.role: (link.kind, link.key) for link in links},
    }


def remove(database: Database, number: int) -> None:
    """Delete a run. Its artifacts stay until ``gc`` removes them.

    Raises:
        InputError: no such run.
    """
    with database.changing() as connection:
        connection.execute(delete(run_artifacts).where(run_artifacts.c.run_id == number))
        if connection.execute(delete(runs).where(runs.c.id == number)).rowcount == 0:
            raise InputError(_unknown(number))


def referenced(connection: Connection) -> set[tuple[str, str]]:
    """Return (kind, key) of every artifact that a run uses."""
    links = connection.execute(select(run_artifacts.c.kind, run_artifacts.c.key))
    return {(link.kind, link.key) for link in links}


def by_kept_model(connection: Connection) -> dict[str, tuple[int, ...]]:
    """Return name of a compressed model in the store's home -> the runs that measured it."""
    name = runs.c.summary[KEPT_MODEL].as_string()
    found: dict[str, tuple[int, ...]] = {}
    for number, model in connection.execute(select(runs.c.id, name).where(name.is_not(None)).order_by(runs.c.id)):
        found[model] = (*found.get(model, ()), number)
    return found


def _check_kind(kind: str) -> str:
    if kind not in RUN_KINDS:
        raise InputError(f"Unknown kind of run '{kind}': use one of {', '.join(RUN_KINDS)}." + suggest(kind, RUN_KINDS))
    return kind


def _resolve(connection: Connection, role: str, reference: Path | str) -> tuple[str, str]:
    """Return (kind, key) of an artifact named by its path in the store, its key, or ``kind/key``."""
    query = select(artifacts.c.kind, artifacts.c.key)
    if isinstance(reference, Path):
        query = query.where(artifacts.c.sha256 == reference.name)
    else:
        kind, _, key = reference.rpartition("/")
        query = query.where(artifacts.c.key == key)
        if kind:
            query = query.where(artifacts.c.kind == kind)
    found = connection.execute(query.order_by(artifacts.c.last_used_at.desc())).all()
    if not found:
        raise InputError(f"Artifact '{reference}' ({role}) is not in the store: put it there with put_artifact first.")
    if len({row.kind for row in found}) > 1 and not isinstance(reference, Path):
        kinds = ", ".join(sorted(row.kind for row in found))
        raise InputError(f"Artifact '{reference}' ({role}) is of several kinds ({kinds}): write it as kind/key.")
    return found[0].kind, found[0].key


def _flatten(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _unknown(number: int) -> str:
    return f"There is no run {number} in the store: `workbench store` lists those there are."
