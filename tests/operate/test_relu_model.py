"""A small ReLU model made from text: what it is, what is said of it, and that an interrupted training loses nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.corpus import windows
from workbench.errors import Cancelled, CorpusError, InputError
from workbench.files import check_folder
from workbench.models import LoadedModel, load
from workbench.models.relu import new_relu_model, train_tokenizer
from workbench.operate import relu_model, relu_training
from workbench.operate.relu_model import RECORD, ReluModel, ReluOptions, make_relu_model, unigram_nll
from workbench.operate.relu_training import PATIENCE, TrainingOptions, look, rate, train
from workbench.progress import Job, JobState
from workbench.runtime import open_engine
from workbench.store import Store

TRAINING = TrainingOptions(steps=150, batch=4, length=32, learning_rate=4e-3, check_every=25)
SMALL = ReluOptions(blocks=2, hidden=32, vocabulary=300, training=TRAINING)
FEW = replace(SMALL, training=replace(TRAINING, steps=12, check_every=4))
SUBJECTS = ("the red fox", "a grey cat", "one old dog", "the small bird")
VERBS = ("jumps over", "sleeps beside", "looks at")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        yield opened


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repetitive text: what follows is mostly decided by what precedes, and hardly by frequency."""
    rng = np.random.default_rng(0)
    lines = [f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(SUBJECTS)}." for _ in range(500)]
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def made(story: Path, tmp_path_factory: pytest.TempPathFactory) -> ReluModel:
    """A model trained to an end."""
    place = tmp_path_factory.mktemp("made")
    with Store(place / "home") as store:
        return make_relu_model(store, place / "relu", replace(SMALL, text=str(story)), threads=1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def held_out(story: Path, model: LoadedModel, options: ReluOptions) -> tuple[list[Any], list[Any]]:
    """The windows that end the training and those that are measured, cut again."""
    corpus = relu_model.open_text(str(story), "calibration")
    _, tail = relu_model._cut(corpus)
    found = [window.tokens for window in windows(tail, model, options.training.length)]
    return found[: len(found) // 2], found[len(found) // 2 :]


class Memory:
    """A place for states in memory."""

    def __init__(self) -> None:
        self.parts: dict[str, bytes] = {}
        self.written: list[str] = []

    def read_bytes(self, part: str) -> bytes | None:
        return self.parts.get(part)

    def write_bytes(self, part: str, content: bytes, ending: str = ".safetensors") -> None:
        self.parts[part] = content
        self.written.append(part)

    def drop(self, part: str) -> None:
        del self.parts[part]


# --- what is made ----------------------------------------------------------------------------------------------------


def test_it_learns_and_loads_back(made: ReluModel) -> None:
    assert made.perplexity < 0.5 * made.unigram_perplexity
    model = load(made.folder)
    arch = model.architecture
    assert (arch.family, arch.activation, arch.gated, arch.tied_embeddings) == ("opt", "relu", False, True)
    assert (arch.n_blocks, arch.hidden_size, arch.n_neurons, arch.n_heads) == (2, 32, 128, 4)
    assert arch.context_length == TRAINING.length
    assert model.n_parameters == made.n_parameters
    assert arch.vocab_size == len(model.tokenizer) == made.vocabulary <= SMALL.vocabulary
    assert model.bos is not None
    assert model.stop_tokens == (model.bos,)
    assert model.encode("the red fox.")[0] == model.bos
    # Whatever was in the text or not, byte by byte.
    assert model.decode(model.encode("Ünlike: 未知\n", bos=False)) == "Ünlike: 未知\n"


def test_both_engines_run_it_and_it_predicts_the_story(made: ReluModel, story: Path) -> None:
    model = load(made.folder)
    _, measured = held_out(story, model, SMALL)
    scores = {}
    for name in ("reference", "cpu"):
        engine = open_engine(model, engine=name)
        try:
            scores[name] = np.stack([engine.score(window) for window in measured])
            likely = int(np.argmax(engine.prefill(engine.start(), model.encode("the red fox jumps"))))
        finally:
            engine.close()
        begins = model.decode([likely]).strip()
        assert begins
        assert "over".startswith(begins)
    np.testing.assert_allclose(scores["cpu"], scores["reference"], atol=0.05)
    # The engine knows nothing of how the perplexity was computed that is told.
    assert math.exp(-scores["reference"].mean()) == pytest.approx(made.perplexity, rel=1e-4)


def test_what_is_told_equals_a_count_by_hand(made: ReluModel, story: Path) -> None:
    model = load(made.folder)
    _, measured = held_out(story, model, SMALL)
    assert made.seen.n_tokens == sum(len(window) - 1 for window in measured)
    read: list[list[torch.Tensor]] = [[], []]
    for block in range(2):
        layer: Any = model.block(block)
        layer.fc2.register_forward_pre_hook(lambda _m, inputs, block=block: read[block].append(inputs[0]))
    for window in measured:
        model.module(input_ids=torch.tensor([window]))
    for block in range(2):
        values = torch.cat(read[block])
        assert values.shape == (sum(map(len, measured)), 128)
        assert (values >= 0).all()
        assert made.seen.zeros[block] == pytest.approx((values == 0).double().mean().item(), abs=1e-4)
        assert made.seen.silent[block] == pytest.approx((values == 0).all(dim=0).double().mean().item(), abs=1e-9)
        assert 0.1 < made.seen.zeros[block] < 1


def test_unigram_is_the_entropy_of_the_frequencies() -> None:
    # 3 of 0 and 1 of 1, each counted once more: shares 4/6 and 2/6.
    got = unigram_nll(np.array([0, 0, 0, 1]), [(9, 0, 1), (9, 0, 0)], 2)
    assert got == pytest.approx(-(3 * math.log(4 / 6) + math.log(2 / 6)) / 4)


def test_a_weight_on_activations_makes_more_of_them_zero(made: ReluModel, story: Path, store: Store) -> None:
    options = replace(SMALL, text=str(story), training=replace(TRAINING, sparsity=1.0))
    sparse = make_relu_model(store, store.home / "sparse", options, threads=1)
    assert np.mean(sparse.seen.zeros) > np.mean(made.seen.zeros) + 0.05
    assert sparse.perplexity < sparse.unigram_perplexity


def test_the_folder_says_how_it_was_made(made: ReluModel, story: Path) -> None:
    said = json.loads((made.folder / RECORD).read_text("utf-8"))
    assert said["options"]["text"] == str(story)
    assert said["teacher"] is None
    assert said["training_text"]["n_tokens"] == made.tokens
    assert set(said["training_text"]["documents"]).isdisjoint(said["held_out_text"]["documents"])
    assert said["zero_neurons"] == list(made.seen.zeros)
    assert said["perplexity"] == made.perplexity


def test_a_file_is_cut_and_nothing_is_in_both_parts(story: Path) -> None:
    whole = relu_model.open_text(str(story), "calibration")
    head, tail = relu_model._cut(whole)
    first, last = head.documents[0].text, tail.documents[0].text
    assert first + last == whole.documents[0].text
    assert first.endswith("\n")
    assert 0.12 < len(last) / len(first + last) < 0.2


# --- text of a teacher -----------------------------------------------------------------------------------------------


def test_text_is_sampled_from_the_teacher_once(
    make_model: Callable[..., LoadedModel], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second round is another text than the first, and both are of the asked length at least.
    monkeypatch.setattr(relu_model, "_ROUND", 512)
    teacher = make_model("llama")
    notes: list[str] = []
    options = replace(FEW, tokens=1024)
    first = make_relu_model(store, store.home / "a", options, teacher=teacher, threads=1, job=Job(on_note=notes.append))
    said = json.loads((first.folder / RECORD).read_text("utf-8"))
    assert said["teacher"]["weights"] == teacher.fingerprint.weights
    documents = said["training_text"]["documents"]
    assert len(set(documents)) == len(documents) == 16
    assert set(documents).isdisjoint(said["held_out_text"]["documents"])
    assert said["training_text"]["split"] == "calibration"
    assert said["held_out_text"]["split"] == "tuning"

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr("workbench.analysis.sampled_text.open_text", never)
    again = make_relu_model(store, store.home / "b", options, teacher=teacher, threads=1)
    assert files(again.folder) == files(first.folder)
    monkeypatch.undo()
    monkeypatch.setattr(relu_model, "_ROUND", 512)
    other = make_relu_model(store, store.home / "c", replace(options, seed=1), teacher=teacher, threads=1)
    said = json.loads((other.folder / RECORD).read_text("utf-8"))
    assert set(documents).isdisjoint(said["training_text"]["documents"])


# --- interruptions ---------------------------------------------------------------------------------------------------


def cancel_at(step: int) -> Job:
    """A job that is cancelled when so many training steps are done."""

    def listen(state: JobState) -> None:
        if state.stage == "train the ReLU model" and state.done >= step:
            job.cancel()

    job = Job(listen)
    return job


@pytest.mark.parametrize(("stops", "left"), [((2,), 12), ((5,), 8), ((4, 9), 4), ((12,), 0)])
def test_an_interrupted_training_ends_in_the_same_bytes(
    stops: tuple[int, ...], left: int, story: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(FEW, text=str(story))
    whole = make_relu_model(store, store.home / "whole", options, threads=1)
    for stop in stops:
        with pytest.raises(Cancelled, match="resume"):
            make_relu_model(store, store.home / "parts", options, threads=1, job=cancel_at(stop))
        assert not (store.home / "parts").exists()
        assert len(list((store.home / "checkpoints").glob("*/*"))) <= 1  # only the last state is kept
    steps: list[int] = []
    one_step = relu_training._step
    monkeypatch.setattr(relu_training, "_step", lambda *given: steps.append(given[-1]) or one_step(*given))
    notes: list[str] = []
    resumed = make_relu_model(store, store.home / "parts", options, threads=1, job=Job(on_note=notes.append))
    assert len(steps) == left
    assert [re.findall(r"from step (\d+) of 12", note) for note in notes] == [[str(12 - left)]] * (left < 12)
    assert files(resumed.folder) == files(whole.folder)
    assert not list((store.home / "checkpoints").glob("*/*"))


def test_a_state_that_is_damaged_is_not_gone_on_from(story: Path, store: Store) -> None:
    options = replace(FEW, text=str(story))
    whole = make_relu_model(store, store.home / "whole", options, threads=1)
    with pytest.raises(Cancelled):
        make_relu_model(store, store.home / "parts", options, threads=1, job=cancel_at(6))
    (state,) = (store.home / "checkpoints").glob("*/*")
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    assert files(make_relu_model(store, store.home / "parts", options, threads=1).folder) == files(whole.folder)


def test_other_options_do_not_go_on_from_each_others_state(story: Path, store: Store) -> None:
    options = replace(FEW, text=str(story))
    with pytest.raises(Cancelled):
        make_relu_model(store, store.home / "parts", options, threads=1, job=cancel_at(6))
    notes: list[str] = []
    other = replace(options, training=replace(options.training, learning_rate=1e-3))
    make_relu_model(store, store.home / "other", other, threads=1, job=Job(on_note=notes.append))
    assert not notes


def test_the_callers_threads_and_random_stream_stay(story: Path, store: Store) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    make_relu_model(store, store.home / "relu", replace(FEW, text=str(story)), threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


# --- the training itself ---------------------------------------------------------------------------------------------


def test_training_ends_when_watched_text_gains_nothing_and_the_best_weights_are_kept() -> None:
    """Noise can be learnt by heart and not learnt from: the loss on other noise rises."""
    rng = np.random.default_rng(1)
    tokenizer = train_tokenizer(["ab " * 50], 257)
    noise = rng.integers(1, 257, size=200)
    watched = [(0, *rng.integers(1, 257, size=15).tolist()) for _ in range(8)]
    module = new_relu_model(tokenizer, blocks=1, hidden=16, heads=2, context=16, seed=0)
    options = TrainingOptions(steps=400, batch=8, length=16, learning_rate=1e-2, check_every=4)
    place, notes = Memory(), list[str]()
    done = train(module, noise, watched, 0, options, place, Job(on_note=notes.append))
    losses = [row[2] for row in done.checks]
    best = int(np.argmin(losses))
    assert done.steps < options.steps
    assert len(losses) == best + 1 + PATIENCE
    assert done.best_step == done.checks[best][0]
    assert look(module, watched, Job()).nll == pytest.approx(losses[best], rel=1e-6)
    assert notes == [
        f"Stopped at step {done.steps}: the loss on text held out has not fallen since step {done.best_step}."
    ]
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert list(place.parts) == [f"state-{done.steps}"]
    assert len(place.written) == len(losses)


def test_the_learning_rate_rises_and_falls() -> None:
    options = TrainingOptions(steps=200, learning_rate=1.0)
    rates = [rate(options, step) for step in range(200)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.1)
    assert all(np.diff(rates[:top]) > 0)
    assert all(np.diff(rates[top + 1 :]) < 0)
    assert 0.1 <= rates[-1] < 0.102


def test_the_same_text_gives_the_same_tokenizer(story: Path) -> None:
    text = story.read_text("utf-8")
    one, two = (train_tokenizer([text], 400).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hidden": 30}, InputError, "multiple of the heads"),
        ({"blocks": 0}, InputError, "0 blocks"),
        ({"vocabulary": 256}, InputError, "256 is too small"),
        ({"text": "self"}, CorpusError, "give the teacher"),
        ({"text": "nowhere.txt"}, CorpusError, "nowhere.txt"),
        ({"training": replace(TRAINING, length=4096)}, CorpusError, "8,192, two windows"),
    ],
)
def test_what_cannot_be_made_is_refused(
    changes: dict[str, Any], error: type[Exception], words: str, story: Path, store: Store
) -> None:
    with pytest.raises(error, match=words):
        make_relu_model(store, store.home / "relu", replace(FEW, **{"text": str(story), **changes}))
    assert not (store.home / "relu").exists()


@pytest.mark.parametrize(("held_out", "words"), [(48, "one window of 32"), (24, "too short")])
def test_too_little_to_hold_out_is_refused(held_out: int, words: str, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 6 * held_out, "utf-8")  # one token per byte: the vocabulary holds no pairs
    options = replace(FEW, text=str(path), vocabulary=257, training=replace(FEW.training, length=32))
    with pytest.raises(CorpusError, match=words):
        make_relu_model(store, store.home / "relu", options)


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"batch": 0}, {"length": 1}, {"learning_rate": 0.0}, {"sparsity": -1.0}, {"seed": -1}]
)
def test_training_that_is_not_possible_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(InputError, match=name):
        TrainingOptions(**changes)


def test_a_folder_that_holds_something_is_refused_before_anything_is_done(story: Path, store: Store) -> None:
    there = check_folder(store.home / "there")
    (there / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="empty folder"):
        make_relu_model(store, there, replace(FEW, text=str(story)), job=cancel_at(0))
    assert files(there) == {"note.txt": b"mine"}
