"""The page's own behaviour without a browser: what stays when the store fails, and what never reaches a reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import StoreError
from workbench.store import Store
from workbench.view import dashboard

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as store:
        yield store


def record(store: Store, name: str, **summary: Any) -> int:
    rows = {"dense": {"weight_bytes": 4, "perplexity": 2.0}, "compressed": {"weight_bytes": 1, "perplexity": 2.2}}
    return store.record_run("demo", name=name, model="m", method="rtn", summary=rows | summary)


def test_pictures_and_words_follow_the_choice(store: Store) -> None:
    first = record(store, "first", recipe={"seed": 1}, bits_by_unit={"blocks.0.qkv": 4, "blocks.0.o": 16})
    second = record(store, "second")
    page = dashboard.Dashboard(store)
    assert "second" in page._summary.object
    assert page._recipe.visible is False
    page._run.value = first
    assert "first" in page._summary.object
    assert json.loads(page._recipe_file().read()) == {"seed": 1}
    assert "1 of 2 units at 4 bits, 1 of 2 units at 16 bits" in page._bits.object
    page._pareto.click_data = {"points": [{"customdata": second}]}
    assert "second" in page._summary.object
    assert page._run.value == second


def test_forged_click_is_ignored(store: Store) -> None:
    number = record(store, "only")
    page = dashboard.Dashboard(store)
    for forged in ({"points": []}, {"points": [{"customdata": [1]}]}, {"points": [{"customdata": 10**9}]}, {}):
        page._pareto.click_data = forged
        assert page._run.value == number


def test_failing_store_is_said_and_what_was_shown_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record(store, "kept")
    page = dashboard.Dashboard(store)

    def fail(*_: object, **__: object) -> None:
        raise StoreError(f"The disk is full {HOSTILE}")

    monkeypatch.setattr(store, "runs", fail)
    page.update()
    assert "The disk is full" in page._notice.object
    assert HOSTILE not in page._notice.object
    assert "kept" in page._summary.object
    monkeypatch.undo()
    page.update()
    assert page._notice.object == ""


def test_unit_without_a_place_in_the_grid_is_named(store: Store) -> None:
    record(store, "odd", bits_by_unit={f"{HOSTILE}.0.qkv": 4})
    shown = dashboard.Dashboard(store)._bits.object
    assert "is no unit" in shown
    assert HOSTILE not in shown


def test_traceback_stays_in_the_log(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Store) -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr(dashboard, "Dashboard", broken)
    shown = dashboard._page(store)
    assert "could not be made" in shown.object
    assert "script" not in shown.object
    assert HOSTILE in caplog.text
