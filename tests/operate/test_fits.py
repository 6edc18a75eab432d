"""A fit that is cancelled or killed anywhere goes on after its last finished part, and gives the same bytes."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.analysis.sampled_text import SampledText
from workbench.apply import anyprecision, awq, calibration, gptq, nested, nested_tune, precision
from workbench.apply.anyprecision import AnyPrecisionConfig
from workbench.apply.awq import AwqConfig
from workbench.apply.compress import compress
from workbench.apply.config import MethodConfig
from workbench.apply.gptq import GptqConfig
from workbench.apply.nested import NestedConfig
from workbench.apply.parts import Parts
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Identity, Recipe
from workbench.apply.rtn import RtnConfig
from workbench.errors import Cancelled, RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.encodings import Groups
from workbench.models import LoadedModel, load
from workbench.operate.fits import compress_into, fit_folder, fitted, parts_key
from workbench.progress import Job, JobState
from workbench.store import Store

NESTED = NestedConfig(widths=(2, 3, 5), group_size=16, calibration_tokens=512, tune_steps=2)
DYNAMIC = PrecisionConfig(
    memory_bits=4.5, targets=(2.5, 4.0), learning_steps=2, projection_rows=4, calibration_tokens=512
)
# What a fit is made of: module, function. Each call that ends is one part of the fit, or one phase of it.
PHASES = (
    (calibration, "open_text"),
    (nested, "fit_matrix"),
    (nested_tune, "tune"),
    (precision, "run"),
    (precision, "token_gains"),
    (precision, "learn_precision"),
)


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk: every process and every attempt loads it anew."""
    model, path = make_model("llama"), tmp_path_factory.mktemp("dense")
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Counter[str]]:
    """What the uninterrupted fit gives, and how often each phase runs for it."""
    with Store(tmp_path_factory.mktemp("uninterrupted")) as store, counted() as calls:
        return bytes_of(store, folder), calls


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        yield opened


class counted:
    """Context that counts the calls of each phase that come to their end."""

    def __init__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Counter[str]:
        for module, name in PHASES:
            self._patch.setattr(module, name, self._wrapped(name, getattr(module, name)))
        return self.calls

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            self.calls[name] += 1
            return found

        return call


def bytes_of(store: Store, folder: Path, job: Job | None = None, *methods: MethodConfig) -> str:
    """The identity of what a fit gives, which holds all stored tensors."""
    model = load(str(folder))
    return fitted(store, model, Recipe.for_model(model, *(methods or (NESTED, DYNAMIC))), job).sha256


def cancel_at(stage: str, share: float) -> Job:
    """A job that is cancelled when that share of the stage is done."""

    def listen(state: JobState) -> None:
        if state.stage.startswith(stage) and state.done >= share * state.total:
            job.cancel()

    job = Job(listen)
    return job


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        ("sample text from", 0.5),
        ("measure the inputs of matrices", 0.5),
        ("fit nested codes", 0.01),
        ("fit nested codes", 0.6),
        ("tune scales at 2 bits", 1.0),
        ("tune scales at 3 bits", 0.5),
        ("unit-scores", 0.5),
        ("measure gains from 3 to 5", 0.2),
        ("learn precision for 2.5", 1.0),
        ("learn precision for 4", 0.5),
        ("measure errors of widths", 0.5),
    ],
)
def test_cancelled_anywhere_gives_the_same_bytes(
    store: Store, folder: Path, expected: tuple[str, Counter[str]], stage: str, share: float
) -> None:
    sha256, calls = expected
    with counted() as first, pytest.raises(Cancelled, match="run the same again to resume"):
        bytes_of(store, folder, cancel_at(stage, share))
    assert store.verify() == []
    with counted() as second:
        assert bytes_of(store, folder) == sha256
    assert first + second == calls  # nothing that was finished was computed again, and nothing was left out
    assert store.info()["checkpoints"] == 0
    with counted() as third:
        assert bytes_of(store, folder) == sha256
    assert third == Counter()


def test_cancelled_again_and_again(store: Store, folder: Path, expected: tuple[str, Counter[str]]) -> None:
    for stage in ("fit nested codes", "tune scales at 3 bits", "measure gains from 2 to 3", "learn precision for 4"):
        with pytest.raises(Cancelled):
            bytes_of(store, folder, cancel_at(stage, 0.5))
    assert bytes_of(store, folder) == expected[0]


def test_a_killed_fit_resumes(tmp_path: Path, folder: Path, expected: tuple[str, Counter[str]]) -> None:
    home = tmp_path / "killed"
    for stage in ("fit nested codes", "learn precision for 4"):
        process = subprocess.Popen(
            [sys.executable, __file__, str(home), str(folder), stage, str(torch.get_num_threads())],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.kill()
        process.communicate()
    with Store(home) as store, counted() as calls:
        assert store.verify() == []
        assert bytes_of(store, folder) == expected[0]
        assert calls == Counter({"learn_precision": 1})
        assert store.info()["checkpoints"] == 0


@pytest.mark.parametrize(
    ("methods", "stage", "module", "counts"),
    [
        ((AwqConfig(bits=3, group_size=16, calibration_tokens=512),), "search scales", awq, "search_unit"),
        (
            (
                AwqConfig(bits=3, group_size=16, calibration_tokens=512, joint=False),
                GptqConfig(asymmetric=True, calibration_tokens=512),
            ),
            "compensate errors",
            gptq,
            "_codes",
        ),
        ((AnyPrecisionConfig(widths=(2, 3), calibration_tokens=512),), "fit tables", anyprecision, "fit_tables"),
    ],
    ids=["awq", "gptq", "anyprecision"],
)
def test_other_fits_resume_too(
    store: Store,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    methods: tuple[MethodConfig, ...],
    stage: str,
    module: Any,
    counts: str,
) -> None:
    function, calls = getattr(module, counts), []

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        calls.append(counts)
        return found

    monkeypatch.setattr(module, counts, counting)
    with Store(tmp_path / "uninterrupted") as other:
        sha256 = bytes_of(other, folder, None, *methods)
    needed = len(calls)
    calls.clear()
    with pytest.raises(Cancelled):
        bytes_of(store, folder, cancel_at(stage, 0.4), *methods)
    assert len(calls) > 0
    assert bytes_of(store, folder, None, *methods) == sha256
    assert len(calls) == needed
    assert store.info()["checkpoints"] == 0


def test_a_whole_recipe_into_a_folder_resumes_and_says_so(
    store: Store, folder: Path, tmp_path: Path, expected: tuple[str, Counter[str]]
) -> None:
    model = load(str(folder))
    recipe = Recipe.for_model(model, NESTED, DYNAMIC)
    with pytest.raises(Cancelled):
        compress_into(store, model, recipe, tmp_path / "out", job=cancel_at("measure gains from 3 to 5", 0.1))
    assert store.info()["checkpoints"] == 1
    assert not (tmp_path / "out").exists()
    notes: list[str] = []
    with counted() as calls:
        made = compress_into(store, load(str(folder)), recipe, tmp_path / "out", job=Job(on_note=notes.append))
    assert made.sha256 == expected[0]
    stored, parts = notes
    assert stored == "Going on from the stored fit of nested."
    assert re.fullmatch(r"Going on after an interrupted fit of dynamic-precision: \d+ finished parts kept\.", parts)
    assert calls == Counter({"token_gains": 1, "learn_precision": 2})
    assert store.info()["checkpoints"] == 0


AWQ = AwqConfig(bits=3, group_size=16, calibration_tokens=512, joint=False, alpha_steps=4)
GPTQ = GptqConfig(calibration_tokens=512)


def hand_written(*methods: MethodConfig) -> Recipe:
    return Recipe(model="by hand", methods=methods)


def test_a_method_that_is_added_goes_on_from_what_is_stored(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever fitted what stands before it, and however the recipe says it: the bytes are those of one whole fit."""
    recipe = hand_written(AWQ, GPTQ)
    whole = compress(load(str(folder)), recipe)
    compress_into(store, load(str(folder)), hand_written(AWQ), tmp_path / "awq")
    monkeypatch.setattr(awq, "search_unit", lambda *_: pytest.fail("searched again"))
    notes: list[str] = []
    made = compress_into(store, load(str(folder)), recipe, tmp_path / "both", job=Job(on_note=notes.append))
    assert notes == ["Going on from the stored fit of awq."]
    assert made.sha256 == whole.sha256
    assert made.recipe == recipe.model_dump(mode="json")
    assert CompressedModel.load(tmp_path / "both").sha256 == whole.sha256
    model = load(str(folder))
    assert fitted(store, model, Recipe.for_model(model, AWQ, GPTQ)).linears.keys() == made.linears.keys()
    monkeypatch.setattr(gptq, "_codes", lambda *_: pytest.fail("compensated again"))
    again = compress_into(store, load(str(folder)), recipe, tmp_path / "again", job=Job(on_note=notes.append))
    assert again.sha256 == whole.sha256
    assert "nothing is computed again" in notes[-1]


def test_a_recipe_for_another_model_does_not_find_a_stored_fit(store: Store, folder: Path, tmp_path: Path) -> None:
    model = load(str(folder))
    compress_into(store, model, hand_written(AWQ), tmp_path / "awq")
    foreign = Identity(architecture=model.fingerprint.architecture, weights="0" * 64)
    other = hand_written(AWQ).model_copy(update={"fingerprint": foreign})
    with pytest.raises(RecipeError, match="other weights"):
        compress_into(store, model, other, tmp_path / "other")
    made = compress_into(store, model, other, tmp_path / "other", allow_other_weights=True)
    assert made.recipe["fingerprint"]["weights"] == "0" * 64


def test_a_stored_fit_of_an_older_version_of_a_method_is_not_taken(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(folder))
    old = fit_folder(store, model, Recipe.for_model(model, AWQ))
    monkeypatch.setattr(AwqConfig, "version", AwqConfig.version + 1)
    assert fit_folder(store, model, Recipe.for_model(model, AWQ)) != old


def test_a_fit_on_another_device_is_another(store: Store, folder: Path) -> None:
    model = load(str(folder))
    moved = replace(model, device=torch.device("cuda"))
    learnt, rounded = (Recipe.for_model(model, method) for method in (AWQ, RtnConfig(group_size=16)))
    assert fit_folder(store, moved, learnt) != fit_folder(store, model, learnt)
    assert fit_folder(store, moved, rounded) == fit_folder(store, model, rounded)
    assert parts_key(moved, learnt) != parts_key(model, learnt)
    assert SampledText(moved, "tuning", 64).provenance.key != SampledText(model, "tuning", 64).provenance.key


def test_a_damaged_stored_fit_is_made_again(
    store: Store, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, recipe = load(str(folder)), hand_written(AWQ)
    made = compress_into(store, model, recipe, tmp_path / "first")
    stored = fit_folder(store, model, Recipe.for_model(model, AWQ)) / "weights.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\0\0")
    assert compress_into(store, model, recipe, tmp_path / "second").sha256 == made.sha256
    assert "damaged" in caplog.text
    CompressedModel.load(stored.parent)


def test_what_takes_seconds_is_not_stored(store: Store, folder: Path, tmp_path: Path) -> None:
    compress_into(store, load(str(folder)), hand_written(RtnConfig(group_size=16)), tmp_path / "rtn")
    assert store.info()["compressed_models"] == 0


def test_what_the_parts_depend_on_is_in_their_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(str(folder))
    recipe = Recipe.for_model(model, NESTED, DYNAMIC)
    keys = {
        parts_key(model, recipe),
        parts_key(model, recipe.without_last()),
        parts_key(model, recipe.model_copy(update={"seed": 1})),
        parts_key(model, Recipe.for_model(model, NESTED.model_copy(update={"tune_steps": 3}), DYNAMIC)),
        parts_key(load(str(folder), dtype="bfloat16"), recipe),
    }
    monkeypatch.setattr(NestedConfig, "version", 2)
    keys.add(parts_key(model, recipe))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(parts_key(model, recipe))
    assert len(keys) == 7


def test_parts_read_back_exactly(store: Store) -> None:
    parts = Parts(store.checkpoint("fit"))
    assert parts.find("a") is None
    whole = torch.randn(6, 8)
    parts.keep("a", {"top": whole[:3], "half": whole[3:].bfloat16(), "none": torch.zeros(0)}, {"x": [0.1, None]})
    parts.keep_encodings("b", {"blocks.0.q": Groups.of(whole, 3, 4, False), "blocks.0.k": Groups.of(whole, 4, 8, True)})
    later = Parts(store.checkpoint("fit"))
    found = later.find("a")
    assert found is not None
    assert found.facts == {"x": [0.1, None]}
    assert torch.equal(found.tensors["top"], whole[:3])
    assert torch.equal(found.tensors["half"], whole[3:].bfloat16())
    assert found.tensors["none"].shape == (0,)
    kept = later.encodings("b")
    assert kept is not None
    assert torch.equal(kept["blocks.0.q"].dequantize(), Groups.of(whole, 3, 4, False).dequantize())
    assert kept["blocks.0.k"].meta() == Groups.of(whole, 4, 8, True).meta()
    assert later.earlier_s > 0
    assert Parts().find("a") is None  # without a place nothing is kept


def test_fit_seconds_count_what_interrupted_fits_took(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    fit = nested.fit_matrix

    def slow(*args: Any) -> Any:
        clock[0] += 100
        return fit(*args)

    monkeypatch.setattr(nested, "fit_matrix", slow)
    model = load(str(folder))
    recipe = Recipe.for_model(model, NESTED)
    with pytest.raises(Cancelled):
        fitted(store, model, recipe, cancel_at("tune scales at 2 bits", 0.5))
    assert fitted(store, load(str(folder)), recipe).fit_seconds == 100 * len(model.architecture.units)


if __name__ == "__main__":
    where, source, at, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))  # parts belong to a number of threads, which other tests may have set

    def stop(state: JobState) -> None:
        if state.stage.startswith(at) and state.done >= 0.5 * state.total:
            sys.stdout.write("stopped\n")
            sys.stdout.flush()
            signal.pause()

    with Store(Path(where)) as kept:
        bytes_of(kept, Path(source), Job(stop))
