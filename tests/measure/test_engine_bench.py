"""The bench of the cpu engine on a tiny model: every row measured, each against the rival of the same rounds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from workbench.measure.bench import run_bench
from workbench.measure.spawn import run_child


@pytest.fixture(scope="module")
def rows(model_folder: Path) -> list[dict[str, Any]]:
    bench = importlib.import_module("workbench.measure.benches.engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PAIRS_FOR_A_CLAIM", 2)
        patch.setattr(bench, "_NEW_TOKENS", 4)
        patch.setattr(bench, "PREFILL_TOKENS", 32)
        return list(run_bench("engine", model=str(model_folder), threads=1, quick=True)["rows"])


def test_all_rows_of_a_quick_run_are_measured(rows: list[dict[str, Any]]) -> None:
    names = [(r["name"], r["method"], r["bits"]) for r in rows]
    assert names == [
        ("workbench", "bf16", 16),
        ("workbench", "rtn", 4),
        ("workbench", "nested", 3),
        ("workbench", "nested", 4),
        ("workbench", "nested", 8),
        ("transformers", "bf16", 16),
    ]
    for entry in rows:
        assert entry["decode_tokens_per_s"] > 0
        assert entry["prefill_tokens_per_s"] > 0
        assert entry["repeats"] == 2


def test_more_planes_are_more_bytes_and_less_damage(rows: list[dict[str, Any]]) -> None:
    nested = [r for r in rows if r["method"] == "nested"]
    assert nested[0]["bytes_per_token"] < nested[1]["bytes_per_token"] < nested[2]["bytes_per_token"]
    assert nested[0]["read_bits"] < nested[1]["read_bits"] < nested[2]["read_bits"]
    # Each width has scales of its own: a step reads those of its width, the file holds all.
    assert nested[2]["read_bits"] < nested[2]["effective_bits"] == nested[0]["effective_bits"]
    assert nested[0]["kl_mean"] > nested[1]["kl_mean"] > nested[2]["kl_mean"] > 0


def test_speeds_stand_beside_the_rival_of_the_same_rounds(rows: list[dict[str, Any]]) -> None:
    for entry in rows:
        if entry["name"] == "transformers":
            assert entry["rival"] is None
        else:
            assert entry["rival"] == "transformers bf16"
            assert entry["speed_low"] <= entry["speed_ratio"] <= entry["speed_high"]
    # All rows are held against one measured bandwidth. So small a model lies in the caches, so a share may be above 1.
    mine = [r for r in rows if r["name"] != "transformers"]
    bandwidths = [r["bytes_per_token"] / (r["ms_per_token"] / 1000) / r["bandwidth_share"] for r in mine]
    assert bandwidths == pytest.approx([bandwidths[0]] * len(mine), rel=1e-6)
    assert 1e8 < bandwidths[0] < 1e13


def test_memory_is_that_of_a_process_without_torch(compressed_folder: Path) -> None:
    answer = run_child(
        "workbench.measure.lean_child",
        {"folder": str(compressed_folder), "threads": 1, "prompt": [1, 2, 3], "new_tokens": 5},
        threads=1,
    )
    assert answer["torch"] is False
    assert answer["peak_rss_bytes"] < answer["engine_bytes"] + answer["cache_bytes"] + 120e6
