"""The bench of widths on a tiny model: the same copy at every width, and what the columns claim follows from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.apply.recipe import Recipe
from workbench.measure.bench import run_bench
from workbench.models import LoadedModel
from workbench.operate.fits import fitted
from workbench.store import Store


@pytest.fixture(scope="module")
def rows(model_folder: Path) -> list[dict[str, Any]]:
    return list(run_bench("precision", model=str(model_folder), threads=1)["rows"])


def test_every_method_is_there_at_every_width(rows: list[dict[str, Any]]) -> None:
    found = [(r["method"], r["bits"]) for r in rows[1:]]
    methods = ("rtn", "nested", "nested-anyprecision", "separate")
    assert found == [(method, bits) for method in methods for bits in (3, 4, 5, 6)]
    assert (rows[0]["method"], rows[0]["ratio"]) == ("fp32", 1.0)
    assert {r["text"] for r in rows} == {"prose"}


def test_columns_follow_from_the_perplexities(rows: list[dict[str, Any]]) -> None:
    by_key = {(r["method"], r["bits"]): r for r in rows}
    dense = rows[0]["perplexity"]
    for (method, bits), entry in by_key.items():
        assert entry["ratio"] == pytest.approx(entry["perplexity"] / dense, rel=1e-6)
        if method.startswith("nested") or method == "separate":
            rtn = by_key["rtn", bits]
            expected = 1 - np.log(entry["ratio"]) / np.log(rtn["ratio"])
            assert entry["gap_closed"] == pytest.approx(expected, rel=1e-6)
        if method == "nested":
            alone = by_key["separate", bits]
            assert entry["to_separate"] == pytest.approx(entry["perplexity"] / alone["perplexity"] - 1, abs=1e-9)


def test_nested_rows_share_one_file_and_read_what_plain_codes_read(rows: list[dict[str, Any]]) -> None:
    nested = {r["bits"]: r for r in rows if r["method"] == "nested"}
    plain = {r["bits"]: r for r in rows if r["method"] == "rtn"}
    assert len({r["weight_bytes"] for r in nested.values()}) == 1
    for bits, entry in nested.items():
        assert entry["read_bits"] == pytest.approx(plain[bits]["read_bits"])
    assert nested[6]["kl_mean"] < nested[3]["kl_mean"]


def test_rows_of_tables_are_counted_with_their_tables(rows: list[dict[str, Any]]) -> None:
    tables = {r["bits"]: r for r in rows if r["method"] == "nested-anyprecision"}
    assert len({r["weight_bytes"] for r in tables.values()}) == 1
    assert {r["group_size"] for r in tables.values()} == {None}
    # A row has some 50 inputs here: 2^b values of 16 bits beside them are more than the codes.
    assert all(bits + 16 * 2**bits / 96 <= r["read_bits"] <= bits + 16 * 2**bits / 48 for bits, r in tables.items())
    assert tables[6]["kl_mean"] < tables[3]["kl_mean"]


def test_a_fit_is_made_once(tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.apply.rtn import RtnConfig
    from workbench.operate import fits

    recipe = Recipe.for_model(tiny_model, RtnConfig(bits=4, group_size=16))
    with Store(tmp_path) as store:
        first = fitted(store, tiny_model, recipe)
        monkeypatch.setattr(fits, "compress", lambda *_, **__: pytest.fail("made again"))
        again = fitted(store, tiny_model, recipe)
        assert again.sha256 == first.sha256
        assert again.fit_seconds == pytest.approx(first.fit_seconds)
        other = Recipe.for_model(tiny_model, RtnConfig(bits=3, group_size=16))
        with pytest.raises(pytest.fail.Exception):
            fitted(store, tiny_model, other)
