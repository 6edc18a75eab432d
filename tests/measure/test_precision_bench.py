"""The bench of widths on a tiny model: the same copy at every width, and what the columns claim follows from others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.apply.compress import compress
from workbench.apply.estimators import quantiles
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.measure.bench import run_bench
from workbench.measure.benches import engine, precision, precision_targets
from workbench.measure.benches.precision_oracle import ExactChoices
from workbench.models import LoadedModel
from workbench.operate.fits import fitted
from workbench.runtime import open_engine
from workbench.runtime.precision import error_thresholds, precision_plan
from workbench.store import Store

TARGETS = (3.25, 4.75)


@pytest.fixture(scope="module")
def rows(model_folder: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_WINDOWS", (6, 96))
        patch.setattr(precision_targets, "TARGETS", TARGETS)
        patch.setattr(engine, "PAIRS_FOR_A_CLAIM", 2)
        return list(run_bench("precision", model=str(model_folder), text="pydoc", threads=1)["rows"])


def test_every_method_is_there_at_every_width_and_target(rows: list[dict[str, Any]]) -> None:
    found = [(r["method"], r["variant"], r["bits"]) for r in rows]
    widths = [
        (method, f"{bits} bits", bits)
        for method in ("rtn", "nested", "nested-anyprecision", "separate")
        for bits in (3, 4, 5, 6)
    ]
    assert found[1 : 1 + len(widths)] == widths
    assert (rows[0]["method"], rows[0]["ratio"]) == ("fp32", 1.0)
    assert rows[-1]["name"] == "llama.cpp"
    assert "GGUF" in rows[-1]["note"]  # this model has none
    between = found[1 + len(widths) : -1]
    for target in TARGETS:
        here = [(method, variant) for method, variant, bits in between if bits == target]
        assert {method for method, _ in here} == {
            *("static-llm-mq", "static-hawq", "static-learnt", "static-gain", "by-position"),
            *("random", "dynamic", "dpllm", "dpllm-oracle"),
        }
        assert ("static-gain", "first token at the widest") in here
        assert ("dynamic", "held on target") in here
        assert ("dynamic", "thresholds of calibration") in here
        assert ("dpllm-oracle", "exact errors") in here
    assert {r["text"] for r in rows[:-1]} == {"pydoc"}


def test_the_oracle_is_also_held_to_the_bits_that_estimates_read(rows: list[dict[str, Any]]) -> None:
    for target in TARGETS:
        here = {(r["method"], r["variant"]): r for r in rows if r["bits"] == target}
        published = next(r for (method, _), r in here.items() if method == "dpllm")
        equal = here["dpllm-oracle", "exact errors, as many bits as dpllm"]
        free = here["dpllm-oracle", "exact errors"]
        before, after = (abs(r["realised_bits"] - published["realised_bits"]) for r in (free, equal))
        assert after <= max(before, 0.1)  # a unit of this tiny model is several percent of its weights


def test_rows_between_widths_read_what_they_say(rows: list[dict[str, Any]]) -> None:
    for entry in rows:
        if entry["bits"] not in TARGETS:
            continue
        overhead = entry["read_bits"] - entry["realised_bits"]
        assert 0.25 < overhead < (8.0 if entry["method"].startswith("dpllm") else 0.7)  # projections weigh on 48 inputs
        if entry["method"].startswith("static"):
            assert entry["bits"] - 0.3 < entry["realised_bits"] <= entry["bits"] + 1e-9
        if entry["method"] in ("dynamic", "dpllm"):
            assert abs(entry["rival_read_bits"] - min(entry["read_bits"], 6.5)) < 0.35
            assert entry["to_rival"] == pytest.approx(np.log(entry["ratio"] / entry["rival_ratio"]), abs=1e-6)
            assert entry["to_rival_low"] <= entry["to_rival"] <= entry["to_rival_high"]
            assert entry["ms_per_token"] > 0
            assert entry["to_line"] is not None
            assert 0 < entry["selector_share"] < 1


def test_columns_follow_from_the_perplexities(rows: list[dict[str, Any]]) -> None:
    by_key = {(r["method"], r["bits"]): r for r in rows if r["bits"] in (3, 4, 5, 6, rows[0]["bits"])}
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


def test_exact_choices_are_those_of_exact_errors(tiny_model: LoadedModel) -> None:
    nested = NestedConfig(widths=(2, 3, 5), group_size=16, fit="rounded")
    precision = PrecisionConfig(targets=(2.5, 3.5), learning_steps=2, projection_rows=4, calibration_tokens=1024)
    made = compress(tiny_model, Recipe.for_model(tiny_model, nested, precision))
    assert made.selectors is not None
    plan = precision_plan(made.architecture, made.selectors, 2.8, "error")
    tokens = list(range(40, 100))
    # The first unit's inputs are the dense model's own.
    inputs: list[torch.Tensor] = []
    unit = tiny_model.architecture.units[0]
    module = tiny_model.linear_module(unit.linears[0].id)
    hook = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    with torch.no_grad():
        tiny_model.module(input_ids=torch.tensor([tokens]))
    hook.remove()
    low, high = next(c.widths for c in plan.consumers if c.target == unit.id)
    codes = [made.linears[linear.id] for linear in unit.linears]
    change = torch.cat([e.dequantize(high) - e.dequantize(low) for e in codes])  # type: ignore[call-arg]
    errors = (inputs[0] @ change.T).norm(dim=1).numpy()
    known = made.selectors.errors.copy()
    known[0] = quantiles(errors)  # so that this very text lies on both sides of the threshold
    made = dataclasses.replace(made, selectors=dataclasses.replace(made.selectors, errors=known))
    assert made.selectors is not None
    found = ExactChoices(tiny_model, made, plan, 2.8, {})(tokens)
    threshold = error_thresholds(made.architecture, made.selectors, 2.8)[unit.id]
    sure = np.abs(errors - threshold) > 1e-5
    chosen = np.array([step[unit.id] for step in found])
    np.testing.assert_array_equal(chosen[sure], (errors > threshold)[sure])
    assert 0.2 < chosen.mean() < 0.95
    # Replayed, later units' choices are those of the very run that they were made in.
    replayed = open_engine(made, engine="reference", plan=plan).score(tokens, replay=found)  # type: ignore[call-arg]
    assert np.isfinite(replayed).all()
    assert set(found[0]) == {u.id for u in tiny_model.architecture.units}


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
