"""Text from a model at one width or at widths chosen per token, and thresholds refitted to it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workbench.apply.compress import compress
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.cli.sparse import Sparse
from workbench.formats.compressed import CompressedModel
from workbench.models import load
from workbench.runtime.base import StepTrace
from workbench.runtime.mask_safety import Verdict
from workbench.runtime.plan import Scope

Command = Callable[..., Any]
NESTED = NestedConfig(widths=(2, 3, 5), group_size=16, fit="rounded")
ASKED = ("Hello", "--new-tokens", "64", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A compressed model that chooses widths per token."""
    model = load(str(tiny_folder))
    folder = tmp_path_factory.mktemp("compressed") / "dynamic"
    precision = PrecisionConfig(targets=(), calibration_tokens=1024)
    return compress(model, Recipe.for_model(model, NESTED, precision)).save(folder)


@pytest.fixture
def dynamic(made: Path, tmp_path: Path) -> Path:
    """The same, in a folder that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "dynamic"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_nested_model_is_read_at_a_width(workbench: Command, tiny_folder: Path, tmp_path: Path) -> None:
    recipe, folder = tmp_path / "nested.json", tmp_path / "nested"
    method = {"method": "nested", "widths": [3, 8], "group_size": 16, "fit": "rounded"}
    recipe.write_text(json.dumps({"model": str(tiny_folder), "methods": [method]}))
    made = workbench("compress", tiny_folder, "--recipe", recipe, "--out", folder, "--json")
    assert made.code == 0, made.err
    asked = ("Hello", "--new-tokens", "16", "--json")
    by_width = {w: workbench("generate", folder, *asked, "--width", w).json for w in (3, 8)}
    assert {w: found["width"] for w, found in by_width.items()} == {3: 3, 8: 8}
    assert by_width[8]["tokens"] == workbench("generate", folder, *asked).json["tokens"]
    assert by_width[3]["tokens"] != by_width[8]["tokens"]
    refused = workbench("generate", folder, *asked, "--width", "4")
    assert refused.code == 2
    assert "offers 3, 8" in refused.err
    refused = workbench("generate", folder, *asked, "--target", "4")
    assert refused.code == 2
    assert "dynamic-precision" in refused.err


def test_the_command_that_compress_names_next_runs(workbench: Command, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "dynamic.json"
    chosen = {"method": "dynamic-precision", "targets": [], "calibration_tokens": 1024}
    recipe.write_text(json.dumps({"model": "any", "methods": [NESTED.model_dump(mode="json"), chosen]}))
    done = workbench("compress", tiny_folder, "--recipe", recipe, "--out", tmp_path / "small")
    (line,) = (line for line in done.out.splitlines() if "workbench generate" in line)
    _, *words = shlex.split(line)
    assert words[-2:] == ["--target", "3.5"]
    assert workbench(*words, "--new-tokens", "4").code == 0


def test_a_target_of_average_bits_is_chosen_when_generating(workbench: Command, dynamic: Path) -> None:
    realised = [workbench("generate", dynamic, *ASKED, "--target", t).json["realised_bits"] for t in ("2", "3.5", "5")]
    assert realised[0] < 2.3 < realised[1] < 4.7 < realised[2] <= 5  # the first token is read at the widest
    plain = workbench("generate", dynamic, *ASKED, "--target", "5").json["tokens"]
    assert plain == workbench("generate", dynamic, *ASKED).json["tokens"]  # the widest unless something else is said
    for arguments, message in (
        (("--target", "9"), "2 to 5 bits"),
        (("--target", "3", "--width", "3"), "exclude each other"),
    ):
        refused = workbench("generate", dynamic, *ASKED, *arguments)
        assert refused.code == 2
        assert message in refused.line


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A compressed model that may leave inputs out."""
    model = load(str(tiny_folder))
    cuts = InputSparsityConfig(allocation="uniform", targets=(0.3, 0.6), calibration_tokens=1024)
    recipe = Recipe.for_model(model, RtnConfig(bits=8, group_size=16), cuts)
    return compress(model, recipe).save(tmp_path_factory.mktemp("compressed") / "sparse")


def test_a_sparsity_is_held_when_generating(workbench: Command, sparse: Path, dynamic: Path) -> None:
    asked = (*ASKED, "--engine", "reference")
    found = [workbench("generate", sparse, *asked, "--sparsity", s).json for s in ("0", "0.3", "0.45", "0.6")]
    assert [f["sparsity"] for f in found] == [0, 0.3, 0.45, 0.6]
    for one in found:
        assert one["expected_sparsity"] == pytest.approx(one["sparsity"], abs=5e-3)
        assert one["effective_sparsity"] == pytest.approx(one["sparsity"], abs=0.1)
    plain = workbench("generate", sparse, *asked).json
    assert found[0]["tokens"] == plain["tokens"] != found[3]["tokens"]
    assert "sparsity" not in plain
    said = ("generate", sparse, "Hello", "--new-tokens", "8", "--engine", "reference", "--sparsity", "0.3")
    assert "30.0% asked for." in workbench(*said).err
    assert "with --sparsity" in workbench(*said[:-2]).err
    free = workbench(*said, "--no-hold")
    assert "30.0% expected from the calibration text" in free.err
    for model, arguments, message in (
        (sparse, ("--sparsity", "0.7"), "give 0 to 0.6"),
        (sparse, ("--sparsity", "-0.1"), "give a share from 0 to below 1"),
        (Path("nowhere"), ("--sparsity", "1.5"), "give a share from 0 to below 1"),  # before anything is read
        (sparse, ("--sparsity", "0.3", "--width", "3"), "neither --width nor --target"),
        (sparse, ("--sparsity", "0.3", "--target", "3"), "neither --width nor --target"),
        (sparse, ("--hold",), "--target"),
        (dynamic, ("--sparsity", "0.3"), "'input-sparsity'"),
    ):
        refused = workbench("generate", model, *asked, *arguments)
        assert refused.code != 0
        assert message in refused.line


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A compressed model that predicts which heads and neurons matter."""
    model = load(str(tiny_folder))
    masks = PredictedSparsityConfig(width=16, prefix=4, epochs=2, decisions_per_text=24, calibration_tokens=1024)
    recipe = Recipe.for_model(model, RtnConfig(bits=8, group_size=16), masks)
    return compress(model, recipe).save(tmp_path_factory.mktemp("compressed") / "masked")


SCOPES = ("token", "every:8", "reply")


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_predicted_sparsity_is_held_when_generating(workbench: Command, masked: Path, engine: str) -> None:
    asked = (*ASKED, "--engine", engine, "--no-guard")
    found = [workbench("generate", masked, *asked, "--sparsity", s).json for s in ("0", "0.2", "0.4")]
    shares = [one["effective_sparsity"] for one in found]
    assert found[0]["expected_sparsity"] == 0 == shares[0]
    assert shares[0] < shares[1] < shares[2]
    for one in found[1:]:  # of all weights, keys and values included: less than of heads and neurons
        assert 0.5 * one["sparsity"] < one["expected_sparsity"] < one["sparsity"]
        assert one["effective_sparsity"] == pytest.approx(one["expected_sparsity"], abs=0.1)
        assert (one["scope"], one["prefix"]) == ("token", 4)
        assert (one["deciding_share"] is None) == (engine == "reference")
        assert engine == "reference" or 0 < one["deciding_share"] < 1
    plain = workbench("generate", masked, *ASKED, "--engine", engine).json
    assert found[0]["tokens"] == plain["tokens"] != found[2]["tokens"]
    by_scope = {s: workbench("generate", masked, *asked, "--sparsity", "0.4", "--scope", s) for s in SCOPES}
    assert {s: one.json["scope"] for s, one in by_scope.items()} == {s: s for s in SCOPES}
    assert by_scope["reply"].json["prefix"] == 0
    assert len({one.json["effective_sparsity"] for one in by_scope.values()}) == len(SCOPES)
    said = workbench("generate", masked, "Hello", "--new-tokens", "8", *asked[-3:], "--sparsity", "0.2")
    assert "(20% of the heads and neurons) asked for." in said.err
    assert "after the first 4 tokens" not in said.err  # the reply lies after them
    short = workbench("generate", masked, "Hi", "--raw", "--new-tokens", "8", *asked[-3:], "--sparsity", "0.2")
    assert "after the first 4 tokens of the text, which stay whole" in short.err
    assert "a sparsity of 0 was asked for" in workbench("generate", masked, *asked[-3:], "Hi", "--sparsity", "0").err
    said = workbench("generate", masked, "Hello", "--new-tokens", "8", *asked[-3:], "--sparsity", "0.2", "--no-hold")
    assert "(20% of the heads and neurons) expected from held-out text" in said.err
    held, free = (workbench("generate", masked, *asked, "--sparsity", "0.4", h).json for h in ("--hold", "--no-hold"))
    assert held == found[2] | {"ms_per_token": held["ms_per_token"], "deciding_share": held["deciding_share"]}
    assert (held["held"], free["held"]) == (True, False)
    assert held["effective_sparsity"] != free["effective_sparsity"]
    refused = workbench("generate", masked, *asked, "--sparsity", "0.4", "--scope", "reply", "--hold")
    assert "decides once" in refused.line
    said = workbench("generate", masked, "Hello", "--new-tokens", "1", *asked[-3:], "--sparsity", "0.2")
    assert "took no step" in said.err


def test_what_runs_dense_says_why(workbench: Command, masked: Path) -> None:
    asked = ("generate", masked, "Hello", "--new-tokens", "16", "--engine", "reference", "--sparsity", "0.3")
    found = workbench(*asked, "--important", "--json").json
    assert (found["dense_because"], found["effective_sparsity"]) == ("important", 0)
    said = workbench(*asked, "--important").err
    assert "Nothing was left out, the request ran dense: important." in said
    assert "expected" not in said
    found = workbench(*asked, "--json").json
    assert 0.5 < found["confidence"] < 1
    assert found["dense_because"] == ("low confidence" if found["confidence"] < found["lowest_confidence"] else None)
    assert workbench(*asked, "--no-guard", "--json").json["dense_because"] is None
    safe = workbench(*asked, "--fail-safe", "--json").json
    if found["dense_because"] is None and abs(found["drift"]) > found["drift_band"]:
        assert safe["dense_because"] == "unlike the calibration text"
    else:
        assert safe["dense_because"] == found["dense_because"]


def test_a_share_that_is_missed_is_said_once_there_is_enough_text(masked: Path) -> None:
    predictor = CompressedModel.load(masked).mask_predictor
    assert predictor is not None
    step = StepTrace(position=0, token=0, seconds=0.0, read_bytes=0)

    def left_out(share: float, count: int) -> list[StepTrace]:
        return [replace(step, position=at, kept_weights=1 - share) for at in range(count)]

    inputs = Sparse(engine=None, asked=0.4, wanted=0.4, expected=0.4)  # type: ignore[arg-type]
    assert inputs.missed(left_out(0.42, 40), 5) == ""
    assert inputs.missed(left_out(0.3, 10), 5) == ""
    assert "30.0% of the blocks' weights were left out, 40.0% was asked for" in inputs.missed(left_out(0.3, 40), 5)
    assert "--log" not in inputs.missed(left_out(0.3, 40), 5)
    masks = replace(inputs, predictor=predictor, scope=Scope("token"))
    text = left_out(0.0, 4) + left_out(0.4, 40)[4:]  # the prefix of 4 tokens is whole
    assert masks.missed(text, 2) == ""
    short = masks.missed(left_out(0.0, 4) + left_out(0.3, 40)[4:], 2)
    assert "after the first 4 tokens" in short
    assert "--log" in short
    assert "calibration_tokens" in short
    dense = replace(masks, verdict=Verdict(dense_because="important"))
    assert dense.missed(left_out(0.0, 40), 2) == ""


def test_a_predictor_is_retuned_from_logged_counts(workbench: Command, masked: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log.json", tmp_path / "retuned"
    asked = ("generate", masked, "--engine", "reference", "--sparsity", "0.3", "--no-guard", "--log", log)
    assert workbench(*asked, "Hello", "--new-tokens", "64").code == 0
    refused = workbench("retune", masked, "--log", log, "--out", out)
    assert refused.code == 2
    assert "too few" in refused.line
    before, kept = files(masked), json.loads(log.read_text())["sums"]["decisions"]
    for word in ("Why", "What", "Who", "Where", "When"):
        assert workbench(*asked, word, "--new-tokens", "80").code == 0
    done = workbench("retune", masked, "--log", log, "--out", out, "--json").json
    assert done["tokens"] >= 256 > kept
    assert files(masked) == before
    found = {m: workbench("generate", m, *ASKED, *asked[2:7]).json for m in (masked, out)}
    assert found[out]["expected_sparsity"] == pytest.approx(found[masked]["expected_sparsity"], abs=0.02)
    assert found[out]["effective_sparsity"] != found[masked]["effective_sparsity"]
    assert "another model" in workbench("retune", out, "--log", log, "--out", tmp_path / "more").line


def test_a_predictor_is_trained_on_from_features_of_dense_requests(
    workbench: Command, masked: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model, kept, out = load(str(tiny_folder)), tmp_path / "kept.safetensors", tmp_path / "retuned"
    masks = PredictedSparsityConfig(
        criterion="magnitude", width=16, prefix=4, epochs=1, decisions_per_text=8, calibration_tokens=1024
    )
    recipe = Recipe.for_model(model, RtnConfig(bits=8, group_size=16), masks)
    able = compress(model, recipe).save(tmp_path / "able")
    asked = ("--sparsity", "0.3", "--log-features", kept, "--new-tokens", "40", "--json")
    refused = workbench("generate", masked, "Hello", "--important", *asked)
    assert refused.code == 2
    assert "criterion 'magnitude'" in refused.line
    assert "only with --sparsity" in workbench("generate", able, "Hello", "--log-features", kept).line
    assert workbench("generate", able, "Hello", "--no-guard", *asked).code == 0  # under masks: nothing is kept
    refused = workbench("retune", able, "--features", kept, "--out", out)
    assert refused.code == 2
    assert "0 tokens in 0 requests" in refused.line
    for word in range(17):
        assert workbench("generate", able, f"What is {word}?", "--important", *asked).code == 0
    done = workbench("retune", able, "--features", kept, "--out", out, "--json")
    if done.code == 0:
        assert done.json["error_after"] < done.json["error_before"]
        assert done.json["tokens"] > 256
        assert workbench("generate", out, "Hello", "--sparsity", "0.3", "--new-tokens", "8").code == 0
    else:
        assert "no better" in done.line
        assert not out.exists()
    assert "Give one of" in workbench("retune", able, "--out", tmp_path / "x").line
    assert "Give one of" in workbench("retune", able, "--out", tmp_path / "x", "--log", kept, "--features", kept).line
    plain = compress(model, Recipe.for_model(model, RtnConfig(bits=8, group_size=16))).save(tmp_path / "plain")
    assert "predicts no masks" in workbench("retune", plain, "--features", kept, "--out", tmp_path / "x").line


def test_a_predicted_sparsity_that_cannot_be_is_refused(workbench: Command, masked: Path, sparse: Path) -> None:
    for model, arguments, message in (
        (masked, ("--sparsity", "0.9"), "is not possible here"),
        (masked, ("--sparsity", "-0.1"), "from 0 to below 1"),
        (masked, ("--sparsity", "0.3", "--scope", "every"), "every:8"),
        (masked, ("--sparsity", "0.3", "--scope", "every:0"), "allowed are token"),
        (masked, ("--scope", "reply"), "only with --sparsity"),
        (masked, ("--important",), "only with --sparsity"),
        (sparse, ("--sparsity", "0.3", "--important"), "'predicted-sparsity'"),
        (sparse, ("--sparsity", "0.3", "--log", "counts.json"), "'predicted-sparsity'"),
        (sparse, ("--sparsity", "0.3", "--scope", "reply"), "'predicted-sparsity'"),
    ):
        refused = workbench("generate", model, *ASKED, "--engine", "reference", *arguments)
        assert refused.code != 0
        assert message in refused.line


def test_compress_names_a_sparsity_to_try(workbench: Command, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "sparse.json"
    cuts = {"method": "input-sparsity", "allocation": "uniform", "targets": [0.3], "calibration_tokens": 1024}
    recipe.write_text(json.dumps({"model": "any", "methods": [{"method": "rtn", "group_size": 16}, cuts]}))
    done = workbench("compress", tiny_folder, "--recipe", recipe, "--out", tmp_path / "small")
    (line,) = (line for line in done.out.splitlines() if "workbench generate" in line)
    _, *words = shlex.split(line)
    assert words[-2:] == ["--sparsity", "0.3"]
    assert workbench(*words, "--new-tokens", "4", "--engine", "reference").code == 0


def test_what_needs_a_target_is_not_ignored_without_one(workbench: Command, dynamic: Path, tmp_path: Path) -> None:
    log = tmp_path / "new" / "counts.json"
    for option in (("--no-hold",), ("--hold",), ("--fail-safe",), ("--log", log)):
        refused = workbench("generate", dynamic, *ASKED, *option)
        assert refused.code == 2
        assert refused.line.startswith(f"Error: {option[0]} ")
        assert "--target" in refused.line
    assert not log.parent.exists()


def test_what_is_no_compressed_model_is_told_from_what_is_not_there(
    workbench: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    nothing, empty = tmp_path / "nothing", tmp_path / "empty"
    empty.mkdir()
    log = tmp_path / "log.json"
    commands: tuple[tuple[Callable[[Path], tuple[object, ...]], str], ...] = (
        (lambda model: ("generate", model, *ASKED, "--target", "3"), "--target"),
        (lambda model: ("generate", model, *ASKED, "--width", "3"), "--width"),
        (lambda model: ("generate", model, *ASKED, "--sparsity", "0.3"), "--sparsity"),
        (lambda model: ("retune", model, "--log", log, "--out", tmp_path / "o"), "retune"),
        (lambda model: ("measure", model), "measure"),
    )
    for words, name in commands:
        for model, cause, code in (
            (nothing, "There is no model", 3),
            (empty, "no model at all", 2),
            (tiny_folder, "dense", 2),
        ):
            refused = workbench(*words(model))
            assert refused.code == code
            assert cause in refused.line
            assert f"{name} reads" in refused.line
            assert ("compress it first" in refused.line) == (cause == "dense")
            assert ("--target" in refused.line) == (name == "--target")


def test_a_log_is_kept_and_retunes(workbench: Command, dynamic: Path, tmp_path: Path) -> None:
    log, retuned = tmp_path / "counts.json", tmp_path / "retuned"
    asked = ("generate", dynamic, *ASKED, "--target", "3", "--log", log)
    for _ in range(2):
        assert workbench(*asked).code == 0
    few = workbench("retune", dynamic, "--log", log, "--out", retuned)
    assert "too few" in few.line
    assert not retuned.exists()
    for _ in range(4):
        assert workbench(*asked).code == 0
    done = workbench("retune", dynamic, "--log", log, "--out", retuned, "--json")
    assert done.code == 0, done.err
    assert Path(done.json["out"]) == retuned
    assert done.json["tokens"] == json.loads(log.read_text())["tokens"]
    assert done.json["sha256"] != done.json["retuned_from"]
    assert workbench("generate", retuned, *ASKED, "--target", "3").json["realised_bits"] == pytest.approx(3, abs=0.5)
    for refused in (
        workbench("retune", retuned, "--log", log, "--out", tmp_path / "again"),
        workbench("generate", retuned, *ASKED, "--target", "3", "--log", log),
    ):
        assert refused.code == 2
        assert "another model" in refused.line


def test_retuning_never_replaces_what_it_reads(workbench: Command, dynamic: Path, tmp_path: Path) -> None:
    log = tmp_path / "counts.json"
    for _ in range(6):
        assert workbench("generate", dynamic, *ASKED, "--target", "3", "--log", log).code == 0
    before = files(dynamic)
    link = tmp_path / "link"
    link.symlink_to(dynamic)
    for out in (dynamic, dynamic / ".." / "dynamic", link):
        refused = workbench("retune", dynamic, "--log", log, "--out", out, "--overwrite")
        assert refused.code == 2
        assert "another folder" in refused.line
    assert files(dynamic) == before
    other = tmp_path / "other"
    assert workbench("retune", dynamic, "--log", log, "--out", other).code == 0
    inside = shutil.copy(log, other / "counts.json")
    assert "lies in" in workbench("retune", dynamic, "--log", inside, "--out", other, "--overwrite").line
    assert workbench("retune", dynamic, "--log", log, "--out", other, "--overwrite").code == 0


def test_impossible_precision_is_refused_before_anything_is_fitted(workbench: Command, tmp_path: Path) -> None:
    """The model is not even looked for: there is none."""
    recipe = tmp_path / "r.json"
    precision = {"method": "dynamic-precision"}
    for methods, words in (
        ([precision], "put 'nested'"),
        ([precision, {"method": "nested"}], "before"),
        ([{"method": "nested"}, precision, precision], "twice"),
        ([{"method": "rtn"}, precision], "put 'nested'"),
        ([{"method": "nested", "widths": [4]}, precision], "two or more"),
        ([{"method": "nested"}, {**precision, "targets": [3.5, 6.5]}], "6.5"),
        ([{"method": "nested"}, {**precision, "targets": [5], "memory_bits": 4.5}], "between 3 and 4.5"),
        ([{"method": "nested"}, {**precision, "targets": [7], "memory_bits": 9}], "between 3 and 6"),
        ([{"method": "nested"}, {**precision, "memory_bits": 2, "targets": []}], "nearest is 3"),
        ([{"method": "nested"}, {**precision, "targets": 3.5}], "a list is needed"),
    ):
        recipe.write_text(json.dumps({"model": "none", "methods": methods}))
        refused = workbench("compress", tmp_path / "none", "--recipe", recipe, "--out", tmp_path / "o")
        assert refused.code == 2
        assert words in refused.line
        assert "tuple" not in refused.line
