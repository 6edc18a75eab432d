"""The bench of quantizers on a tiny model: who is there, and what the columns claim follows from others."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.measure.bench import run_bench
from workbench.measure.benches import engine, quantization, quantization_methods

SCHEMES = ("per-tensor", "per-token", "per-channel", "smoothquant", "plain-groups", "requantize", "rotation")
METHODS = ("rtn", "awq", "gptq", "gptaq", "awq+gptq", "awq+gptaq", "learnt")
GROUP_SIZE = 48  # the tiny model's rows


@pytest.fixture(scope="module")
def patched() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "_WINDOWS", (6, 96))
        patch.setattr(quantization, "_QUICK_WINDOWS", (4, 64))
        patch.setattr(quantization_methods, "_GROUP_SIZE", GROUP_SIZE)
        patch.setattr(engine, "PAIRS_FOR_A_CLAIM", 2)
        patch.setattr(engine, "_NEW_TOKENS", 8)
        patch.setattr(quantization_methods, "_TOKENS", 512)
        yield patch


@pytest.fixture(scope="module")
def rows(model_folder: Path, patched: Any) -> list[dict[str, Any]]:
    return list(run_bench("quantization", model=str(model_folder), threads=1)["rows"])


@pytest.fixture(scope="module")
def quick(model_folder: Path, patched: Any) -> list[dict[str, Any]]:
    return list(run_bench("quantization", model=str(model_folder), text="pydoc", threads=1, quick=True)["rows"])


def test_every_method_is_there_on_both_texts(rows: list[dict[str, Any]]) -> None:
    for text in ("prose", "pydoc"):
        here = [r for r in rows if r["text"] == text]
        assert here[0]["method"] == "bf16"
        ours = [r for r in here if r["name"] == "workbench"]
        uniform = {(r["method"], r["bits"]) for r in ours if r["variant"] == "uniform" and r["activation_bits"] == 16}
        assert uniform == {(method, bits) for method in METHODS for bits in (3, 4)}
        assert {r["variant"] for r in here if r["method"] == "salient"} == {"by activation", "by weight", "by random"}
        if find_spec("bitsandbytes") is not None:
            # NF4 needs rows of whole blocks of 64, which this model has not.
            assert {r["method"] for r in here if r["name"] == "bitsandbytes"} == {"int8"}
        for bits in (8, 4):
            integer = [r for r in ours if r["activation_bits"] == bits]
            assert {r["method"] for r in integer if r["method"] != "tender"} == set(SCHEMES)
            assert [r["variant"] for r in integer if r["method"] == "tender"] == ["scales by token", "scales by chunk"]
            assert {r["bits"] for r in integer} == {bits}


def test_quick_keeps_the_rows_of_the_claim(quick: list[dict[str, Any]]) -> None:
    assert [(r["method"], r["bits"]) for r in quick] == [
        ("bf16", 16),
        ("bf16", 16),
        *[(method, bits) for bits in (3, 4) for method in ("rtn", "awq", "awq+gptaq", "learnt")],
        *[(method, 8) for method in ("per-tensor", "per-token", "tender")],
    ]
    assert {r["text"] for r in quick} == {"pydoc"}


def test_methods_can_be_measured_alone(model_folder: Path, patched: Any) -> None:
    def run(*only: str, text: str | None = "pydoc") -> list[tuple[str, int]]:
        found = run_bench("quantization", model=str(model_folder), text=text, threads=1, quick=True, only=only)["rows"]
        assert found[0]["method"] == found[1]["method"] == "bf16"
        return [(r["method"], r["bits"]) for r in found if r["text"] == "pydoc"][2:]

    # Quick leaves out gptq, and 4 bits of activations.
    assert run("gptq", "per-token") == [("gptq", 3), ("gptq", 4), ("per-token", 8), ("per-token", 4)]
    assert run("shift", text=None) == [("awq", 3), ("awq", 3), ("gptq", 3), ("gptq", 3)]
    with pytest.raises(InputError, match=r"no method 'gptk'.*Did you mean 'gptq'"):
        run("gptk")


def test_columns_follow_from_one_another(rows: list[dict[str, Any]]) -> None:
    for entry in rows:
        assert entry["ratio"] == pytest.approx(np.exp(entry["delta_nll"]))
        assert entry["delta_nll_low"] <= entry["delta_nll"] <= entry["delta_nll_high"]
        rtn = [r for r in rows if (r["method"], r["bits"], r["text"]) == ("rtn", entry["bits"], entry["text"])]
        if rtn and entry["method"] != "rtn" and entry["activation_bits"] == 16:
            assert entry["gap_closed"] == pytest.approx(1 - entry["delta_nll"] / rtn[0]["delta_nll"], rel=1e-6)
        if entry["activation_bits"] == 16 and entry["bits"] in (3, 4) and entry["method"] != "salient":
            assert entry["effective_bits"] == pytest.approx(entry["bits"] + 0.4, abs=0.1)  # rows of 48 and 96
        if entry["method"] == "salient":
            assert entry["effective_bits"] > 3.5
            assert entry["decode_tokens_per_s"] is None


def test_rivals_are_paired_on_the_same_text(rows: list[dict[str, Any]]) -> None:
    judged = [r for r in rows if r["rival"] is not None]
    for entry in judged:
        assert entry["to_rival_low"] <= entry["to_rival"] <= entry["to_rival_high"]
    salient = [r for r in judged if r["method"] == "salient"]
    assert {(r["variant"], r["text"]) for r in salient} == {
        (f"by {by}", text) for by in ("weight", "random") for text in ("prose", "pydoc")
    }
    for entry in salient:
        best = next(
            r for r in rows if (r["method"], r["variant"], r["text"]) == ("salient", "by activation", entry["text"])
        )
        assert entry["to_rival"] == pytest.approx(entry["delta_nll"] - best["delta_nll"], abs=1e-6)


def test_the_shift_compares_domains_on_each_text(rows: list[dict[str, Any]]) -> None:
    shifted = [r for r in rows if (r["variant"] or "").startswith("fitted on") and r["rival"] is not None]
    assert {(r["method"], r["text"], r["calibration"]) for r in shifted} == {
        (method, text, other) for method in ("awq", "gptq") for text, other in (("prose", "pydoc"), ("pydoc", "prose"))
    }
    for entry in shifted:
        assert entry["rival"].startswith(f"{entry['method']}, fitted on {entry['text']}")
        assert entry["decode_tokens_per_s"] is None


def test_integer_activations_are_judged_by_tender_and_tender_by_rows(rows: list[dict[str, Any]]) -> None:
    for entry in (r for r in rows if r["activation_bits"] in (4, 8) and r["name"] == "workbench"):
        bits = entry["bits"]
        tender = entry["method"] == "tender"
        assert entry["rival"] == (f"per-token, {bits} bits" if tender else f"tender, scales by token, {bits} bits")
        assert entry["to_rival_low"] <= entry["to_rival"] <= entry["to_rival_high"]
        simulated = entry["method"] == "per-channel"
        assert (entry["engine"] == "reference") == simulated
        if simulated:
            assert entry["prefill_tokens_per_s"] is None
        else:
            assert entry["prefill_to_rival_low"] <= entry["prefill_to_rival_ratio"] <= entry["prefill_to_rival_high"]


def test_the_faster_bf16_is_what_prompts_are_compared_with(rows: list[dict[str, Any]]) -> None:
    both = [r for r in rows if r["method"] == "bf16" and r["text"] == "prose"]
    assert [r["name"] for r in both] == ["workbench", "transformers"]
    faster = max(both, key=lambda r: r["prefill_tokens_per_s"])
    assert faster["prefill_speed_ratio"] == 1
    assert both[1]["decode_tokens_per_s"] is None


def test_speed_is_beside_bf16_and_rounding(rows: list[dict[str, Any]], quick: list[dict[str, Any]]) -> None:
    for entry in (*rows, *quick):
        if entry["prefill_tokens_per_s"] is not None:
            assert entry["prefill_speed_low"] <= entry["prefill_speed_ratio"] <= entry["prefill_speed_high"]
        if entry["decode_tokens_per_s"] is None:
            continue
        assert entry["ms_per_token"] == pytest.approx(1000 / entry["decode_tokens_per_s"])
        assert entry["prefill_tokens_per_s"] > 0
        assert entry["speed_low"] <= entry["speed_ratio"] <= entry["speed_high"]
        if entry["bits"] in (3, 4) and entry["activation_bits"] == 16 and entry["method"] != "rtn":
            assert entry["time_to_rtn_low"] <= entry["time_to_rtn_ratio"] <= entry["time_to_rtn_high"]
    fitted = [r for r in quick if r["method"] == "awq"]
    assert all(r["fit_seconds"] > 0 and r["calibration"] == "self" for r in fitted)
