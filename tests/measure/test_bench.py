"""Benches: found by name, checked before any work, rows of known keys, one whole JSON file; and the recipes bench."""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from workbench.errors import CorpusError, InputError, StoreError, WorkbenchError
from workbench.files import write_json
from workbench.measure import bench as benches_module
from workbench.measure import benches
from workbench.measure.bench import BENCHES, BenchContext, bench, find_bench, run_bench
from workbench.measure.rows import ROW_KEYS


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BenchContext]]:
    """A bench ``toy``, and the contexts that it was called with."""
    monkeypatch.setattr(benches_module, "_REGISTRY", {})
    for name in ("toy", "wrong-key", "wrong-text"):
        monkeypatch.setitem(BENCHES, name, "A toy.")
    calls: list[BenchContext] = []

    @bench("toy", extra_keys=["extra"])
    def toy(context: BenchContext) -> list[dict[str, object]]:
        calls.append(context)
        return [{"name": "a", "extra": float("nan")}, {"text": context.text and Path(context.text).name}]

    return calls


def test_every_module_of_a_bench_is_listed_with_what_it_says_of_itself() -> None:
    for name, what in BENCHES.items():
        assert (find_bench(name).run.__doc__ or "").partition("\n")[0] == what
    for module in pkgutil.iter_modules(benches.__path__):
        import_module(f"{benches.__name__}.{module.name}")  # raises where one registers what is not listed


def test_a_bench_that_is_not_listed_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="not in BENCHES"):
        bench("unheard-of")(lambda context: [])


def test_rows_get_all_keys_and_the_file_is_strict_json(toy: list[BenchContext], tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    found = run_bench("toy", path, quick=True, threads=1)
    assert json.loads(path.read_text()) == found
    assert tuple(found["rows"][0]) == (*ROW_KEYS, "extra")
    assert found["rows"][0]["extra"] is None
    assert found["environment"]["bench"] == "toy"
    assert toy[0].quick
    assert list(path.parent.iterdir()) == [path]


def test_inputs_and_outputs_are_checked_before_any_work(toy: list[BenchContext], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs as a whole"):
        run_bench("toy", tmp_path / "x.json", only=["awq"])
    with pytest.raises(InputError, match=r"no bench 'toi'.*Did you mean 'toy'"):
        run_bench("toi", tmp_path / "x.json")
    with pytest.raises(InputError, match="is a folder"):
        run_bench("toy", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Cannot write"):
        run_bench("toy", tmp_path / "file" / "x.json")
    with pytest.raises(CorpusError):
        run_bench("toy", tmp_path / "x.json", text=str(tmp_path / "no-such-text.txt"))
    with pytest.raises(InputError, match="threads asked for"):
        run_bench("toy", tmp_path / "x.json", threads=10_000)
    assert toy == []


def test_unknown_keys_and_other_texts_in_rows_are_defects_that_are_said(
    toy: list[BenchContext], tmp_path: Path
) -> None:
    @bench("wrong-key")
    def wrong_key(context: BenchContext) -> list[dict[str, object]]:
        return [{"perplexitty": 1}]

    @bench("wrong-text")
    def wrong_text(context: BenchContext) -> list[dict[str, object]]:
        return [{"text": "prose"}]

    text = tmp_path / "mine.txt"
    text.write_text("A text of my own. " * 100)
    with pytest.raises(WorkbenchError, match="unknown key 'perplexitty'"):
        run_bench("wrong-key")
    with pytest.raises(WorkbenchError, match=r"asked for the text 'mine\.txt' and used 'prose'"):
        run_bench("wrong-text", text=str(text))
    run_bench("toy", text=str(text))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="disk is full"):
        write_json(path, {"rows": []})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_solved_mixes_meet_the_byte_budgets_of_their_rivals(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.measure.benches import recipes as module

    monkeypatch.setattr(module, "_SOLVE_WINDOWS", 2)
    found = run_bench("recipes", model=str(model_folder), quick=True, threads=1)
    rows = {entry["variant"]: entry for entry in found["rows"]}
    assert list(rows) == ["dense", *(f"uniform {bits}" for bits in (2, 3, 4, 5, 6, 8)), "solved 3", "solved 4"]
    for bits in (3, 4):
        solved, uniform = rows[f"solved {bits}"], rows[f"uniform {bits}"]
        assert solved["weight_bytes"] <= uniform["weight_bytes"]
        assert solved["effective_bits"] <= uniform["effective_bits"]
        assert solved["rival"] == uniform["variant"]
        assert solved["kl_difference"] == pytest.approx(solved["kl_mean"] - uniform["kl_mean"])
        assert solved["calibration"] == "prose"
    damages = [rows[f"uniform {bits}"]["kl_mean"] for bits in (2, 3, 4, 5, 6, 8)]
    assert damages == sorted(damages, reverse=True)
    assert rows["dense"]["kl_mean"] == 0
