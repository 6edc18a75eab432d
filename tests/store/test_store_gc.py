"""``gc`` bounds the store, least recently used first, and never takes what a run uses."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.store import Store, artifacts, cleaning, database

DAY_S = 24 * 3600


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened


def put(store: Store, key: str, data: bytes) -> Path:
    return store.put_artifact("blob", key, lambda path: _write(path, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def keys(store: Store) -> list[str]:
    return [artifact.key for artifact in store.artifacts()]


def use(store: Store, *names: str) -> int:
    return store.record_run("demo", name="", model="", method="", artifacts={name: name for name in names})


def object_bytes(store: Store) -> int:
    return sum(path.stat().st_size for path in (store.home / "objects").rglob("*") if path.is_file())


def grow_old(*paths: Path) -> None:
    for path in paths:
        for entry in [path, *path.rglob("*")]:
            os.utime(entry, (time.time() - 2 * DAY_S,) * 2)


def test_least_recently_used_go_first(store: Store) -> None:
    for name in "abcd":
        put(store, name, name.encode() * 10)
    assert store.artifact("blob", "a") is not None
    removed = store.gc(max_bytes=25)
    assert [(removal.name, removal.bytes) for removal in removed] == [("blob/b", 10), ("blob/c", 10)]
    assert keys(store) == ["d", "a"]
    assert object_bytes(store) == 20
    assert store.verify() == []
    assert store.gc(max_bytes=25) == []


def test_what_a_run_uses_stays_until_the_run_is_deleted(store: Store) -> None:
    for name in "abc":
        put(store, name, name.encode() * 10)
    number = use(store, "a", "b")
    store.gc(max_bytes=0, older_than_days=0)
    assert sorted(keys(store)) == ["a", "b"]
    path = store.artifact(*store.run(number)["artifacts"]["a"])
    assert path is not None
    assert path.read_bytes() == b"a" * 10
    store.delete_run(number)
    store.gc(max_bytes=0)
    assert keys(store) == []
    assert object_bytes(store) == 0


def test_shared_content_stays_for_the_other(store: Store) -> None:
    put(store, "a", b"same" * 5)
    path = put(store, "b", b"same" * 5)
    use(store, "b")
    (removal,) = store.gc(max_bytes=0)
    assert (removal.name, removal.bytes) == ("blob/a", 0)
    assert store.artifact("blob", "b") == path


def test_older_than_days(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def ten_days_ago() -> datetime:
        return database.now() - timedelta(days=10)

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "now", ten_days_ago)
        put(store, "old", b"old")
        put(store, "touched", b"touched")
    put(store, "new", b"new")
    assert store.artifact("blob", "touched") is not None
    assert store.gc(older_than_days=11) == []
    assert [removal.name for removal in store.gc(older_than_days=9)] == ["blob/old"]


def test_abandoned_files_go_after_a_day(store: Store) -> None:
    store.checkpoint("old").write("part", pd.DataFrame({"a": [1]}))
    store.checkpoint("new").write("part", pd.DataFrame({"a": [1]}))
    temporary = store.home / "tmp" / "killed"
    temporary.write_bytes(b"half")
    path = put(store, "damaged", b"content")
    path.write_bytes(b"CONTENTS")
    assert store.artifact("blob", "damaged") is None
    assert store.gc() == []
    grow_old(temporary, store.home / "checkpoints" / "old", *(store.home / "quarantine").iterdir())
    assert [removal.what for removal in store.gc()] == ["tmp", "checkpoint", "quarantine"]
    assert not temporary.exists()
    assert store.checkpoint("new").has("part")
    assert not store.checkpoint("old").has("part")


def test_checkpoint_that_still_grows_is_not_abandoned(store: Store) -> None:
    checkpoint = store.checkpoint("running")
    checkpoint.write("first", pd.DataFrame({"a": [1]}))
    grow_old(store.home / "checkpoints" / "running")
    checkpoint.write("second", pd.DataFrame({"a": [2]}))
    assert store.gc() == []
    assert checkpoint.has("first")


def test_parts_of_unfinished_work_count_under_the_bound(store: Store) -> None:
    store.checkpoint("fit").write_bytes("old", b"x" * 30)
    grow_old(store.home / "checkpoints" / "fit")
    store.checkpoint("fit").write_bytes("new", b"x" * 30)  # it grows still: a day has not passed
    put(store, "a", b"a" * 10)
    assert store.gc(max_bytes=70) == []
    planned = store.gc(max_bytes=60, dry_run=True)
    assert [(removal.what, removal.name, removal.bytes) for removal in planned] == [("checkpoint", "fit", 60)]
    assert store.gc(max_bytes=60) == planned
    assert store.checkpoint("fit").read_bytes("new") is None
    assert keys(store) == ["a"]
    store.checkpoint("fit").write_bytes("old", b"x")
    grow_old(store.home / "checkpoints" / "fit")
    assert [removal.name for removal in store.gc(max_bytes=0, dry_run=True)] == ["fit", "blob/a"]


def test_unnamed_objects_go_at_once(store: Store) -> None:
    orphan = store.home / "objects" / "ab" / ("ab" * 32)
    orphan.parent.mkdir()
    orphan.write_bytes(b"renamed, then killed")
    kept = put(store, "a", b"kept")
    assert [removal.what for removal in store.gc()] == ["object"]
    assert not orphan.exists()
    assert kept.exists()


def test_run_recorded_meanwhile_keeps_its_artifact(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run recorded between choosing what to remove and removing it still wins."""
    put(store, "a", b"content")
    choose = cleaning._dispensable

    def choose_then_record(*args: object) -> Iterator[artifacts.Artifact]:
        chosen = list(choose(*args))  # type: ignore[arg-type]
        assert [row.key for row in chosen] == ["a"]
        use(store, "a")
        return iter(chosen)

    monkeypatch.setattr(cleaning, "_dispensable", choose_then_record)
    assert store.gc(max_bytes=0) == []
    assert store.artifact("blob", "a") is not None


@pytest.mark.parametrize("bounds", [{"max_bytes": -1}, {"older_than_days": -0.5}])
def test_negative_bounds(store: Store, bounds: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least 0"):
        store.gc(**bounds)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    used=st.sets(st.integers(0, 5)),
    bound=st.integers(0, 150),
)
def test_bound_holds(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], used: set[int], bound: int) -> None:
    with Store(tmp_path_factory.mktemp("store")) as store:
        for number, size in enumerate(sizes):
            put(store, str(number), bytes([number]) * size)
        kept = {str(number) for number in used if number < len(sizes)}
        if kept:
            use(store, *kept)
        promised = store.gc(max_bytes=bound, dry_run=True)
        before = object_bytes(store)
        assert len(store.artifacts()) == len(sizes)
        assert store.gc(max_bytes=bound) == promised
        assert before - object_bytes(store) == sum(removal.bytes for removal in promised)
        assert kept <= set(keys(store))
        assert object_bytes(store) <= bound or set(keys(store)) == kept
        assert store.verify() == []


def keep_model(store: Store, name: str, size: int, age_days: float) -> Path:
    folder = store.model_folder(name)
    folder.mkdir(parents=True)
    _write(folder / "weights.safetensors", bytes(size))
    for entry in (folder / "weights.safetensors", folder):
        os.utime(entry, (time.time() - age_days * DAY_S,) * 2)
    return folder


def measured(store: Store, folder: Path) -> int:
    return store.record_run("measure", name="", model="", method="rtn", summary={"kl": 0.1}, measured=folder)


def test_compressed_models_are_counted_and_bounded(store: Store) -> None:
    for name, age in (("old", 3), ("new", 1)):
        keep_model(store, name, 100, age)
    put(store, "artifact", b"a" * 50)
    before = store.info()
    assert (before["compressed_models"], before["compressed_bytes"], before["artifact_bytes"]) == (2, 200, 50)
    assert [(r.what, r.name, r.bytes) for r in store.gc(max_bytes=150)] == [("compressed", "old", 100)]
    assert store.info()["compressed_bytes"] == 100
    assert store.model_folder("new").is_dir()
    assert not list((store.home / "tmp").iterdir())
    assert store.gc(max_bytes=150) == []


def test_a_measured_model_goes_last_and_only_for_the_bound(store: Store) -> None:
    folder = keep_model(store, "measured", 100, 9)
    run = measured(store, folder)
    keep_model(store, "unused", 100, 1)
    put(store, "artifact", b"a" * 50)
    assert [removal.name for removal in store.gc(max_bytes=100, older_than_days=5)] == ["unused", "blob/artifact"]
    assert folder.is_dir()
    assert store.gc(older_than_days=5) == []
    promised = store.gc(max_bytes=99, dry_run=True)
    assert folder.is_dir()
    (removal,) = store.gc(max_bytes=99)
    assert [removal] == promised
    assert (removal.what, removal.name, removal.bytes, removal.runs) == ("compressed", "measured", 100, (run,))
    assert not folder.exists()
    assert store.run(run)["summary"]["kl"] == 0.1


def test_a_model_is_free_once_its_runs_are_deleted(store: Store) -> None:
    run = measured(store, keep_model(store, "model", 10, 9))
    store.delete_run(run)
    assert [(removal.name, removal.runs) for removal in store.gc(older_than_days=5)] == [("model", ())]


def test_a_model_elsewhere_is_not_the_stores(store: Store, tmp_path: Path) -> None:
    run = measured(store, tmp_path / "elsewhere" / "model")
    assert store.run(run)["summary"] == {"kl": 0.1}


def test_a_model_made_again_meanwhile_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = keep_model(store, "model", 10, 9)
    choose = cleaning._dispensable

    def choose_then_write(*args: object) -> Iterator[object]:
        chosen = list(choose(*args))  # type: ignore[arg-type]
        _write(folder / "weights.safetensors", bytes(20))
        return iter(chosen)

    monkeypatch.setattr(cleaning, "_dispensable", choose_then_write)
    assert store.gc(max_bytes=0) == []
    assert folder.is_dir()


def test_half_written_models_of_a_killed_process_go_after_a_day(store: Store) -> None:
    half = store.model_folder("model").with_name(".model.0123")
    half.mkdir(parents=True)
    _write(half / "weights.safetensors", b"half")
    assert store.gc(max_bytes=0) == []
    grow_old(half)
    assert [(removal.what, removal.name) for removal in store.gc()] == [("tmp", ".model.0123")]
    assert store.info()["compressed_models"] == 0


@pytest.mark.parametrize("name", ["../x", "..", ".hidden", "", "a/b", "Modèle 1"])
def test_model_folders_stay_inside(store: Store, name: str) -> None:
    folder = store.model_folder(name)
    assert folder.parent == store.home / "compressed"
    assert not folder.name.startswith(".")
    assert folder.resolve() == folder
