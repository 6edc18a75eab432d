"""The tables that name what the store holds, and the transactions on them.

Every change is one short transaction that begins by taking the same row, so changes of all processes happen one after
another: that makes "rename a file and name it in a table" one step, and "nobody names it, remove it" another. The SQL
is the common subset: SQLite in the store's folder by default, PostgreSQL by its URL.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Column,
    Connection,
    DateTime,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.schema import CreateIndex, CreateTable

from workbench.errors import InputError, StoreError

SCHEMA_VERSION = 1
FILE_NAME = "workbench.sqlite"
BUSY_TIMEOUT_S = 30  # far longer than any transaction here, short enough to end as an error
_OTHER_HOME = "set WORKBENCH_HOME to another folder"

_ADVICE = {
    "database is locked": "another process holds it: wait for it or end it, then try again",
    "readonly database": f"it is read-only: {_OTHER_HOME} that you can write to",
    "disk is full": f"the disk is full: free some space, or {_OTHER_HOME}",
    "unable to open": f"it cannot be opened: {_OTHER_HOME} that you can write to",
    "not a database": f"the file is not a database: move it away, or {_OTHER_HOME}",
    "malformed": f"the file is damaged: move it away to begin a new one, or {_OTHER_HOME}",
    "disk i/o error": f"the disk reports an error: check it, or {_OTHER_HOME}",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, kept as UTC without a zone (the one form all databases agree on), given back with its zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


metadata = MetaData()

schema = Table(
    "workbench_schema",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("changes", BigInteger, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("kind", String(128), nullable=False, index=True),
    Column("name", String, nullable=False),
    Column("model", String, nullable=False, index=True),
    Column("method", String, nullable=False),
    Column("recipe_sha256", String(64)),
    Column("summary", JSON, nullable=False),
    Column("environment", JSON, nullable=False),
    sqlite_autoincrement=True,  # the number of a deleted run is never given again: reports quote it
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(128), nullable=False),
    Column("key", String(128), nullable=False, index=True),
    Column("sha256", String(64), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_used_at", UtcDateTime, nullable=False),
    Column("provenance", JSON, nullable=False),
    UniqueConstraint("kind", "key"),
)

# A run names an artifact by kind and key, not by row: an artifact that was damaged and made anew is still the run's.
run_artifacts = Table(
    "run_artifacts",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("role", String(128), primary_key=True),
    Column("kind", String(128), nullable=False),
    Column("key", String(128), nullable=False),
)


def now() -> datetime:
    """The present moment, UTC."""
    return datetime.now(UTC)


class Database:
    """Connections to the store's tables, made if they are not there.

    Args:
        home: the store's folder; holds the SQLite file unless ``url`` names another database.
        url: an SQLAlchemy URL, or None.

    Raises:
        StoreError: the database cannot be opened, or was written by a newer workbench.
    """

    def __init__(self, home: Path, url: str | None = None) -> None:
        self.journal_mode: str | None = None
        try:
            self._engine = create_engine(url or URL.create("sqlite", database=str(home / FILE_NAME)))
        except (ArgumentError, NoSuchModuleError) as error:
            raise StoreError(
                f"The store's database URL cannot be read ({error}): write it as postgresql+psycopg://user@host/name."
            ) from error
        except ModuleNotFoundError as error:
            raise StoreError(
                f"The store's database URL needs the Python package '{error.name}': install it with pip."
            ) from error
        self.url = self._engine.url.render_as_string(hide_password=True)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", self._configure_sqlite)
        try:
            self._prepare()
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection to read from."""
        with self._errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def changing(self) -> Iterator[Connection]:
        """Yield a transaction that no other change overlaps, in any process; keep it short."""
        with self._errors(), self._engine.begin() as connection:
            connection.execute(update(schema).values(changes=schema.c.changes + 1))
            yield connection

    def warnings(self) -> list[str]:
        """What is not as it should be, one sentence each."""
        if self.journal_mode in (None, "wal"):
            return []
        return [
            f"Write-ahead logging could not be switched on for {self.url} (journal mode '{self.journal_mode}'), as on "
            "network drives: readers and writers wait for each other. Set WORKBENCH_HOME to a folder on a local disk."
        ]

    def _configure_sqlite(self, connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        self.journal_mode = _switch_on_wal(connection)

    def _prepare(self) -> None:
        """Make the tables. The version is written last: without it, what is there is the start of an earlier try."""
        with self._errors():
            version = self._version()
            if version is None:
                try:
                    with self._engine.begin() as connection:
                        for table in metadata.sorted_tables:
                            connection.execute(CreateTable(table, if_not_exists=True))
                            for index in table.indexes:
                                connection.execute(CreateIndex(index, if_not_exists=True))
                        connection.execute(insert(schema).values(id=1, version=SCHEMA_VERSION, changes=0))
                except IntegrityError:
                    version = self._version()  # another process was first
        if version is not None and version > SCHEMA_VERSION:
            raise StoreError(
                f"The store {self.url} was written by a newer workbench (its schema is {version}, this one reads "
                f"{SCHEMA_VERSION}): update the package, or {_OTHER_HOME}."
            )

    def _version(self) -> int | None:
        if not inspect(self._engine).has_table(schema.name):
            return None
        with self._engine.connect() as connection:
            return connection.execute(select(schema.c.version)).scalar()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            said = str(error.orig).strip()
            advice = next((text for sign, text in _ADVICE.items() if sign in said.lower()), "")
            raise StoreError(f"The store's database {self.url} refuses ({said}): {advice or _OTHER_HOME}.") from error


def _switch_on_wal(connection: sqlite3.Connection) -> str:
    """Ask for write-ahead logging; return the journal mode in force.

    The switch needs the file alone for a moment, and SQLite does not always wait for it: two processes that begin a
    store together meet here.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def plain(value: Any, where: str) -> Any:
    """Return ``value`` as JSON can hold it: numpy scalars as numbers, paths and moments as text.

    JSON has no NaN or infinity: they become None.

    Raises:
        InputError: something that has no JSON form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(entry, f"{where}.{name}") for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, where) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item(), where)
    raise InputError(f"{where} is a {type(value).__name__}, which JSON cannot hold: give numbers, text, lists, dicts.")
