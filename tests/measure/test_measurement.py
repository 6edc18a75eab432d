"""The whole measurement of one compressed model, and what it refuses before any long work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.apply.compress import compress
from workbench.apply.recipe import Budget, DamageSource, Recipe, Solution
from workbench.apply.rtn import RtnConfig
from workbench.corpus import open_text
from workbench.errors import CorpusError, EngineError, InputError
from workbench.measure import Measurement, measure
from workbench.measure.result import recipe_columns
from workbench.measure.rows import ROW_KEYS, plain, row
from workbench.models import LoadedModel, load


@pytest.fixture(scope="module")
def found(model_folder: Path, compressed_folder: Path) -> Measurement:
    # The dense model is found through the compressed one.
    return measure(
        compressed_folder,
        n_windows=3,
        window_length=64,
        pairs=2,
        new_tokens=2,
        threads=1,
        engine="reference",
        ask_questions=True,
    )


def test_the_cpu_engine_streams_the_dense_model_as_it_is_on_disk(model_folder: Path, compressed_folder: Path) -> None:
    found = measure(compressed_folder, n_windows=2, window_length=64, pairs=2, new_tokens=2, threads=1)
    dense, candidate = found.dense_row(), found.row()
    assert dense["engine"] == candidate["engine"] == "cpu"
    assert (dense["method"], candidate["activation_mode"]) == ("bf16", "int8")
    # What is read is what this engine's layout holds: rows padded to whole tiles, a byte for a zero point.
    assert candidate["effective_bits"] < candidate["read_bits"] < 2 * candidate["effective_bits"]
    assert candidate["bytes_per_token"] < dense["bytes_per_token"]
    assert 0 < candidate["kl_mean"] < 5


def test_rows_have_the_keys_of_every_bench_and_agree_with_the_parts(found: Measurement) -> None:
    dense, candidate = found.dense_row(), found.row()
    assert tuple(dense) == tuple(candidate) == ROW_KEYS
    assert (dense["method"], candidate["method"]) == ("fp32", "rtn")
    assert (dense["bits"], candidate["bits"], candidate["group_size"]) == (16, 3, 16)
    assert candidate["text"] == "prose"
    assert candidate["n_tokens"] == 3 * 63
    assert candidate["kl_mean"] == found.quality.kl_mean.value > 0
    assert candidate["perplexity"] != dense["perplexity"] > 1
    assert dense["kl_mean"] == 0
    assert candidate["peak_rss_bytes"] == found.alone.memory.peak_rss_bytes
    assert candidate["repeats"] == 2


def test_bits_and_bytes_of_a_step_are_those_of_the_disk(found: Measurement) -> None:
    dense, candidate = found.dense_row(), found.row()
    assert dense["read_bits"] == 16
    assert candidate["read_bits"] == pytest.approx(candidate["effective_bits"])
    assert 3 < candidate["effective_bits"] < 5
    assert dense["bytes_per_token"] == pytest.approx(2 * (found.sizes.unit_weights + found.sizes.output_weights))
    assert candidate["bytes_per_token"] < candidate["weight_bytes"] < dense["weight_bytes"]
    assert 0 < candidate["bandwidth_share"] < 1


def test_the_record_is_strict_json_and_warns_of_small_samples(found: Measurement) -> None:
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["recipe_sha256"] == found.recipe_sha256
    assert record["rows"][1]["delta_nll_low"] <= record["rows"][1]["delta_nll_high"]
    assert len(record["questions"]["dense"]["by_group"]) > 2
    assert any("3 windows: too few" in note for note in record["notes"])
    assert any("2 pairs: too few" in note for note in record["notes"])
    assert (
        any("Estimated, not measured" in note for note in record["notes"]) or found.alone.energy.source != "estimated"
    )


def test_another_dense_model_is_refused(
    make_model: Callable[..., LoadedModel], compressed_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has other weights: give the dense model"):
        measure(compressed_folder, make_model("llama", seed=7))
    with pytest.raises(InputError, match="No compressed model at"):
        measure(tmp_path)
    with pytest.raises(EngineError, match="No engine 'referenc'"):
        measure(compressed_folder, engine="referenc")


def test_text_that_the_recipe_was_solved_on_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = load(str(model_folder))
    used = open_text("prose", "evaluation").record(1000)
    solution = Solution(
        budget=Budget(average_bits=4.5),
        achieved_bits=4.4,
        achieved_bytes=1,
        predicted_damage=0.0,
        gap=0.0,
        unit_bits={"blocks.0.qkv": 4},
        solver="none",
        damage=DamageSource(column="kl", profile="0" * 64, text=used),
    )
    recipe = Recipe.for_model(model, RtnConfig(bits=4, unit_bits=solution.unit_bits), solution=solution)
    folder = compress(model, recipe).save(tmp_path / "leaky")
    with pytest.raises(CorpusError, match=r"shares .* documents with the text that was fitted on"):
        measure(folder, model, text="prose")


def test_recipe_columns_say_what_was_asked_for(model_folder: Path) -> None:
    model = load(str(model_folder))
    by_hand = recipe_columns(Recipe.for_model(model, RtnConfig(unit_bits={"blocks.0.o": 8})))
    assert (by_hand["variant"], by_hand["bits"]) == ("by hand", None)
    uniform = recipe_columns(Recipe.for_model(model, RtnConfig(bits=5)))
    assert (uniform["variant"], uniform["bits"], uniform["activation_bits"]) == ("uniform", 5, 16)


def test_rows_and_json_say_none_where_nothing_is_known() -> None:
    assert row(name="x")["perplexity"] is None
    assert plain({"a": float("nan"), "b": (1, float("inf")), "c": Path("x")}) == {"a": None, "b": [1, None], "c": "x"}
