"""The store gives back what was put, sets aside what is damaged, and refuses in words."""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from workbench.errors import InputError, StoreError
from workbench.store import PartMissing, Store
from workbench.store.database import FILE_NAME, SCHEMA_VERSION, metadata

KEY = "ab" * 32
OTHER = "cd" * 32


def writes(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def record(store: Store, **changes: object) -> int:
    values = {"name": "n", "model": "m", "method": "rtn"} | changes
    return store.record_run("demo", **values)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        yield opened


def reopened(store: Store) -> Store:
    """The same store as another process sees it."""
    return Store(store.home)


# --- where it is ----------------------------------------------------------------------------------------------------


def test_home_from_argument_environment_or_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "environment"))
    assert Store(tmp_path / "argument").info()["path"] == str(tmp_path / "argument")
    assert Store().info()["path"] == str(tmp_path / "environment")
    monkeypatch.delenv("WORKBENCH_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert Path(Store().info()["path"]).is_relative_to(tmp_path / "user")


def test_unusual_folder_names(tmp_path: Path) -> None:
    with Store(tmp_path / "a b?c#d%20é") as store:
        record(store)
        assert (store.home / FILE_NAME).is_file()


def test_home_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="a file is where a folder is needed: set WORKBENCH_HOME"):
        Store()


@pytest.mark.parametrize("home", ["/proc/nowhere/store", "/dev/null/store", "/" + "x" * 300])
def test_home_that_cannot_be_made(home: str) -> None:
    with pytest.raises(StoreError, match="set WORKBENCH_HOME"):
        Store(Path(home))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="set WORKBENCH_HOME to a folder that you can write to"):
        Store(tmp_path / "home")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_read_only_disk(store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """An existing store on a disk that has become read-only is refused when opened, not at the first result."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(StoreError, match="set WORKBENCH_HOME to a folder that you can write to"):
        Store(store.home)


def test_read_only_database(store: Store) -> None:
    def read_only(connection: object, *_: object) -> None:
        connection.execute("PRAGMA query_only = ON")  # type: ignore[attr-defined]

    store.close()
    event.listen(Engine, "connect", read_only)
    try:
        with pytest.raises(StoreError, match="set WORKBENCH_HOME to another folder that you can write to"):
            record(reopened(store))
    finally:
        event.remove(Engine, "connect", read_only)


def test_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="the file is not a database: move it away"):
        Store(tmp_path)


def test_newer_schema_is_refused_and_left_alone(store: Store) -> None:
    with store._database.changing() as connection:
        connection.execute(text(f"UPDATE workbench_schema SET version = {SCHEMA_VERSION + 1}"))
    with pytest.raises(StoreError, match=r"newer workbench.*update the package"):
        reopened(store)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url", "cannot be read"),
        ("nosuchdb://host/name", "cannot be read"),
        ("mysql+pymysql_missing://u@h/n", "cannot be read"),
    ],
)
def test_bad_database_url(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store(tmp_path, url=url)


def test_database_elsewhere_and_journal_warning(store: Store, tmp_path: Path) -> None:
    """SQLite in memory cannot switch to write-ahead logging, as a network drive cannot."""
    assert store.info()["journal_mode"] == "wal"
    assert store.info()["warnings"] == []
    with Store(tmp_path / "other", url="sqlite://") as other:
        record(other)
        assert not (tmp_path / "other" / FILE_NAME).exists()
        (warning,) = other.info()["warnings"]
        assert "Write-ahead logging could not be switched on" in warning


def test_every_table_has_a_form_for_postgresql() -> None:
    for table in metadata.sorted_tables:
        assert str(CreateTable(table, if_not_exists=True).compile(dialect=postgresql.dialect()))


# --- artifacts ------------------------------------------------------------------------------------------------------


def test_artifact_reads_back_also_in_another_process(store: Store) -> None:
    assert store.artifact("profile", KEY) is None
    path = store.put_artifact("profile", KEY, writes(b"content"), {"seed": 1})
    assert path.is_relative_to(store.home / "objects")
    for opened in (store, reopened(store)):
        assert opened.artifact("profile", KEY) == path
        assert path.read_bytes() == b"content"
    assert store.artifact("recipe", KEY) is None
    (listed,) = store.artifacts()
    assert (listed.bytes, listed.provenance) == (7, {"seed": 1})
    assert (datetime.now(UTC) - listed.created_at).total_seconds() < 60


def test_putting_again_replaces(store: Store) -> None:
    store.put_artifact("profile", KEY, writes(b"old"))
    store.put_artifact("profile", KEY, writes(b"new"))
    path = store.artifact("profile", KEY)
    assert path is not None
    assert path.read_bytes() == b"new"
    assert [removal.what for removal in store.gc()] == ["object"]


@pytest.mark.parametrize("damage", [b"CONTENT", b"cont", b"", None])
@pytest.mark.parametrize("seen_before", [True, False])
def test_damaged_object_is_set_aside_and_made_anew(
    store: Store, caplog: pytest.LogCaptureFixture, damage: bytes | None, seen_before: bool
) -> None:
    path = store.put_artifact("profile", KEY, writes(b"content"))
    number = record(store, artifacts={"profile": path})
    if seen_before:
        assert store.artifact("profile", KEY) == path
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
        os.utime(path, ns=(1, 1))
    assert len(store.verify()) == 1
    with caplog.at_level(logging.WARNING):
        assert store.artifact("profile", KEY) is None
    assert "will be computed again" in caplog.text
    assert store.artifacts() == []
    assert store.info()["quarantined"] == (0 if damage is None else 1)
    assert store.run(number)["artifacts"] == {"profile": ("profile", KEY)}
    assert len(store.verify()) == 1, "what a run uses is missing"
    again = store.put_artifact("profile", KEY, writes(b"content"))
    assert again.read_bytes() == b"content"
    assert store.verify() == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../etc/passwd", "A", "a.b", "a\n", "x" * 129, "a b"])
def test_names_stay_inside_the_store(store: Store, name: str) -> None:
    for call in (
        lambda: store.artifact(name, KEY),
        lambda: store.artifact("profile", name),
        lambda: store.put_artifact(name, KEY, writes(b"")),
        lambda: store.put_artifact("profile", name, writes(b"")),
        lambda: store.checkpoint(name),
        lambda: record(store, artifacts={name: KEY}),
    ):
        with pytest.raises(InputError, match="is not possible in the store"):
            call()


def test_tampered_row_does_not_leave_the_store(store: Store) -> None:
    store.put_artifact("profile", KEY, writes(b"content"))
    with store._database.changing() as connection:
        connection.execute(text("UPDATE artifacts SET sha256 = '../../../../etc/passwd'"))
    with pytest.raises(StoreError, match="no SHA-256"):
        store.artifact("profile", KEY)


# --- a disk that refuses --------------------------------------------------------------------------------------------


def nothing_written(store: Store) -> bool:
    files = [path for path in store.home.rglob("*") if path.is_file() and not path.name.startswith(FILE_NAME)]
    return not files and store.artifacts() == [] and store.verify() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_when_flushing(store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="free some space"):
            store.put_artifact("profile", KEY, writes(b"content"))
        with pytest.raises(StoreError, match="free some space"):
            store.checkpoint(KEY).write("part", pd.DataFrame({"a": [1]}))
        assert nothing_written(store)
    assert store.put_artifact("profile", KEY, writes(b"content")).read_bytes() == b"content"


class WrappedError(Exception):
    """As safetensors reports a full disk."""


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), WrappedError("I/O error: No space left (os error 28)")],
)
def test_full_disk_while_writing(store: Store, error: Exception) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(StoreError, match="the disk is full: free some space"):
        store.put_artifact("profile", KEY, write)
    assert nothing_written(store)


def test_full_disk_when_renaming(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StoreError, match="free some space"):
            store.put_artifact("profile", KEY, writes(b"content"))
    assert nothing_written(store)


def test_full_disk_in_the_database(store: Store) -> None:
    def tiny(connection: object, *_: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]  # no smaller than it is now

    event.listen(Engine, "connect", tiny)
    try:
        with reopened(store) as small, pytest.raises(StoreError, match="the disk is full"):
            record(small, environment={"much": "x" * 100_000})
    finally:
        event.remove(Engine, "connect", tiny)
    assert store.runs().empty
    assert store.verify() == []


@pytest.mark.parametrize(
    "error", [ValueError("defect"), FileNotFoundError(errno.ENOENT, "defect"), KeyboardInterrupt()]
)
def test_other_errors_of_a_writer_pass_and_leave_nothing(store: Store, error: BaseException) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        store.put_artifact("profile", KEY, write)
    assert nothing_written(store)


# --- checkpoints ----------------------------------------------------------------------------------------------------

TABLE = pd.DataFrame({"unit": ["blocks.0.qkv", None], "bits": [2, 3], "kl": [0.1, math.nan]}, index=[5, 6])


def test_a_part_that_a_later_one_replaces_is_dropped(store: Store) -> None:
    checkpoint = store.checkpoint(KEY)
    checkpoint.drop("state-1")  # nothing is there yet
    for part in ("state-1", "state-2"):
        checkpoint.write_bytes(part, part.encode())
    checkpoint.drop("state-1")
    checkpoint.drop("state-1")
    other = reopened(store).checkpoint(KEY)
    assert other.read_bytes("state-1") is None
    assert other.read_bytes("state-2") == b"state-2"
    assert len(other) == 1


def test_checkpoint_parts_read_back_exactly(store: Store) -> None:
    checkpoint = store.checkpoint(KEY)
    parts = ["blocks.0/qkv", "../outside", "日本語", "x" * 500]
    for part in parts:
        assert not checkpoint.has(part)
        checkpoint.write(part, TABLE)
    other = reopened(store).checkpoint(KEY)
    for part in parts:
        assert other.has(part)
        pd.testing.assert_frame_equal(other.read(part), TABLE.reset_index(drop=True))
    assert not store.checkpoint(OTHER).has(parts[0])
    assert store.verify() == []
    checkpoint.discard()
    checkpoint.discard()
    assert not other.has(parts[0])
    assert store.info()["checkpoints"] == 0
    assert list((store.home / "tmp").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_damaged_part_is_absent(store: Store, caplog: pytest.LogCaptureFixture, keep: int) -> None:
    checkpoint = store.checkpoint(KEY)
    checkpoint.write("part", TABLE)
    (path,) = (store.home / "checkpoints" / KEY).iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert len(store.verify()) == 1
    assert not checkpoint.has("part")
    assert "will be computed again" in caplog.text
    assert store.verify() == []
    with pytest.raises(PartMissing, match="compute it again"):
        checkpoint.read("part")
    checkpoint.write("part", TABLE)
    assert checkpoint.has("part")


# --- runs -----------------------------------------------------------------------------------------------------------


def test_run_reads_back(store: Store) -> None:
    path = store.put_artifact("profile", KEY, writes(b"content"))
    number = store.record_run(
        "measure",
        name="first",
        model="smollm2-135m",
        method="rtn",
        recipe_sha256=OTHER,
        summary={"kl_mean": np.float32(0.5), "n": np.int64(3), "none": math.nan, "dense": {"perplexity": 28.0}},
        environment={"threads": 2, "versions": {"torch": "2"}},
        artifacts={"by-path": path, "by-key": KEY, "by-kind": f"profile/{KEY}"},
    )
    run = reopened(store).run(number)
    assert run["summary"] == {"kl_mean": 0.5, "n": 3, "none": None, "dense": {"perplexity": 28.0}}
    assert run["environment"]["versions"] == {"torch": "2"}
    assert run["artifacts"] == dict.fromkeys(["by-path", "by-key", "by-kind"], ("profile", KEY))
    assert run["recipe_sha256"] == OTHER
    assert run["created_at"].tzinfo is not None


def test_runs_table(store: Store) -> None:
    assert list(store.runs().columns)[:3] == ["id", "created_at", "kind"]
    for number in range(4):
        store.record_run(
            "bench" if number % 2 else "measure",
            name=str(number),
            model="a" if number < 2 else "b",
            method="rtn",
            summary={"kl": number / 10, "model": "clash", "dense": {"ms": number}},
        )
    table = store.runs()
    assert list(table["name"]) == ["3", "2", "1", "0"]
    assert list(table["kl"]) == [0.3, 0.2, 0.1, 0.0]
    assert list(table["dense.ms"]) == [3, 2, 1, 0]
    assert set(table["model"]) == {"a", "b"}
    assert set(table["summary.model"]) == {"clash"}
    assert str(table["created_at"].dt.tz) == "UTC"
    assert list(store.runs(kind="bench", model="b")["name"]) == ["3"]
    assert list(store.runs(limit=2)["name"]) == ["3", "2"]


def test_deleted_run_is_gone_and_its_number_is_not_given_again(store: Store) -> None:
    number = record(store)
    store.delete_run(number)
    assert store.runs().empty
    assert record(store) > number
    for call in (store.run, store.delete_run):
        with pytest.raises(InputError, match=f"no run {number} in the store"):
            call(number)


def test_refused_runs_leave_nothing(store: Store) -> None:
    store.put_artifact("profile", KEY, writes(b"one"))
    store.put_artifact("weights", KEY, writes(b"two"))
    with pytest.raises(InputError, match="Did you mean 'measure'"):
        store.record_run("mesure", name="", model="", method="")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is not in the store"):
        record(store, artifacts={"profile": OTHER})
    with pytest.raises(InputError, match="is not in the store"):
        record(store, artifacts={"recipe": Path("/tmp/recipe.json")})
    with pytest.raises(InputError, match="of several kinds"):
        record(store, artifacts={"profile": KEY})
    with pytest.raises(InputError, match=r"summary\.f is a function, which JSON cannot hold"):
        record(store, summary={"f": lambda: None})
    with pytest.raises(InputError, match="limit=-1"):
        store.runs(limit=-1)
    assert store.runs().empty
