"""A small ReLU model made here: text sampled from a teacher (or given), a tokenizer, a training, a folder to load.

It is for work on sparsity where no ReLU model is at hand: most of its neurons are exactly zero at any one token, and
how many is counted. It writes plausible words and no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from workbench.analysis.profile import library_versions
from workbench.analysis.sampled_text import SampledText, sampled_corpus
from workbench.corpus import NAMES, Corpus, Document, Split, TextRecord, open_text, require_disjoint, windows
from workbench.errors import CorpusError, InputError
from workbench.files import write_json
from workbench.formats.folder import check_output_folder, new_folder
from workbench.models.base import LoadedModel
from workbench.models.build import plain_config
from workbench.models.relu import new_relu_model, train_tokenizer
from workbench.models.settle import wrap
from workbench.models.tokenizer import save_tokenizer
from workbench.operate.jobs import analyze
from workbench.operate.relu_training import Seen, Trained, TrainingOptions, look, train
from workbench.progress import Job
from workbench.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # raised when the same options give other bytes
RECORD = "training.json"
DEFAULT_TOKENS = 27648
# Sampled at once, and kept: three batches, so that documents begin with each of the neutral starts equally often.
_ROUND = 13824
_HELD_LENGTH = 256  # tokens of a held-out window at most: sampled documents have some 900, and tails are dropped
_HELD_OUT = 1 / 6  # of a file, and of what is sampled on top of the text to train on


@dataclass(frozen=True)
class ReluOptions:
    """What to make.

    Attributes:
        text: ``self`` (sampled from the teacher), ``prose``, ``pydoc``, ``hf:...``, or a file, whose last sixth is held
            out. Other texts are trained on in their split ``calibration``, and ``tuning`` is held out.
        tokens: of the teacher, to sample for training; a sixth of it is sampled on top to be held out.
        blocks, hidden, heads: sizes of the model; its MLP has ``4 * hidden`` neurons.
        vocabulary: entries of the tokenizer at most.
        training: how it is trained; ``training.length`` is also the context, since its positions are learnt.
        seed: of sampling and weights; ``training.seed`` of the rest.
    """

    text: str = "self"
    tokens: int = DEFAULT_TOKENS
    blocks: int = 4
    hidden: int = 128
    heads: int = 4
    vocabulary: int = 2048
    training: TrainingOptions = field(default_factory=TrainingOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.seed < 0:
            raise InputError(f"tokens {self.tokens} and seed {self.seed} are not possible: at least 1 and 0.")


@dataclass(frozen=True)
class ReluModel:
    """What was made. Figures are of held-out text that neither trained the model nor ended its training.

    Attributes:
        folder: ``models.load`` reads it.
        n_parameters: a tied output layer counted once.
        vocabulary: entries of the tokenizer.
        tokens: of its own tokenizer, in the training text.
        trained: steps, and the losses on the way.
        seen: loss and zeros on the measured windows.
        unigram_nll: of the same tokens by their frequency in the training text, nats per token.
        seconds: of this call.
    """

    folder: Path
    n_parameters: int
    vocabulary: int
    tokens: int
    trained: Trained
    seen: Seen
    unigram_nll: float
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.seen.nll)

    @property
    def unigram_perplexity(self) -> float:
        return math.exp(self.unigram_nll)

    def to_json(self) -> dict[str, Any]:
        """Figures as JSON values, times and places left out: the same training gives the same."""
        return {
            "n_parameters": self.n_parameters,
            "vocabulary": self.vocabulary,
            "training_tokens": self.tokens,
            "steps": self.trained.steps,
            "best_step": self.trained.best_step,
            "checks": [list(row) for row in self.trained.checks],
            "measured_tokens": self.seen.n_tokens,
            "perplexity": self.perplexity,
            "unigram_perplexity": self.unigram_perplexity,
            "zero_neurons": list(self.seen.zeros),
            "silent_neurons": list(self.seen.silent),
        }


def make_relu_model(
    store: Store,
    folder: Path | str,
    options: ReluOptions | None = None,
    *,
    teacher: LoadedModel | None = None,
    threads: int | None = None,
    job: Job | None = None,
) -> ReluModel:
    """Train a small ReLU model of OPT's architecture and write it as a folder that ``models.load`` reads.

    Called again after an interruption it goes on after the last sampled text or check, to the same bytes: the same
    options, text, threads and versions of the libraries give the same files.

    Args:
        store: keeps sampled text, and the training's state until it ends.
        folder: new or empty; it is whole or not there.
        options: what to make.
        teacher: sampled from; needed by the text ``self`` and by no other.
        threads: of the training, which is part of what decides the bytes; PyTorch's own number if not given. One is
            fastest where other work fills the cores: the matrices are small, and threads wait for one another.
        job: progress, notes of what need not be done again, and cancel.

    Raises:
        InputError: sizes that are not possible, or something that is already in the folder.
        CorpusError: a text that cannot be read or is too short.
        StoreError: the disk refuses.
        Cancelled: by ``job``; finished parts are kept.
    """
    options, job, started = options or ReluOptions(), job or Job(), time.monotonic()
    target = check_output_folder(folder)
    training, held_out = _texts(store, options, teacher, job)
    tokenizer = train_tokenizer((document.text for document in training.documents), options.vocabulary)
    module = new_relu_model(
        tokenizer,
        blocks=options.blocks,
        hidden=options.hidden,
        heads=options.heads,
        context=options.training.length,
        seed=options.seed,
    )
    model = wrap(module, tokenizer, target.name, str(target))
    length = min(options.training.length, _HELD_LENGTH)
    (end,) = model.stop_tokens
    stream = _stream(training, tokenizer, end, options.training.length)
    held = [window.tokens for window in windows(held_out, model, length)]
    if len(held) < 2:
        raise CorpusError(
            f"The text held out, '{held_out.name}' ({held_out.split}), has one window of {length} tokens: two are "
            "needed, one to end the training by and one to measure on. Give a longer text, or train on shorter windows."
        )
    watched, measured = held[: len(held) // 2], held[len(held) // 2 :]

    with _threads(threads):
        place = store.checkpoint(_key(options, training, held_out))
        trained = train(module, stream, watched, end, options.training, place, job)
        seen = look(module, measured, job)
    made = ReluModel(
        folder=target,
        n_parameters=model.n_parameters,
        vocabulary=len(tokenizer),
        tokens=len(stream),
        trained=trained,
        seen=seen,
        unigram_nll=unigram_nll(stream, measured, len(tokenizer)),
        seconds=time.monotonic() - started,
    )
    records = (training.record(len(stream)), held_out.record(sum(map(len, held))))
    with new_folder(target, need_bytes=4 * made.n_parameters) as temporary:
        write_json(temporary / "config.json", plain_config(module))
        # The output layer is the embedding. Without the format transformers takes a file for another framework's.
        tensors = {name: one for name, one in module.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(tokenizer, temporary)
        write_json(temporary / RECORD, _record(made, options, teacher, *records))
    place.discard()
    return replace(made, seconds=time.monotonic() - started)


def unigram_nll(stream: np.ndarray, measured: Iterable[tuple[int, ...]], vocabulary: int) -> float:
    """Return the mean negative log-likelihood of the windows' tokens but the first, by their frequency in a text.

    Args:
        stream: int64 (n,), the text whose tokens are counted; every token is counted once more than it occurs.
        measured: windows.
        vocabulary: how many tokens there are.
    """
    counts = np.bincount(stream, minlength=vocabulary) + 1.0
    log_shares = np.log(counts / counts.sum())
    tokens = np.concatenate([np.asarray(window[1:]) for window in measured])
    return float(-log_shares[tokens].mean())


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let PyTorch use so many threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _texts(store: Store, options: ReluOptions, teacher: LoadedModel | None, job: Job) -> tuple[Corpus, Corpus]:
    """The text to train on and the text held out, which share no document."""
    if options.text == "self":
        if teacher is None:
            raise CorpusError("The text 'self' is sampled from a model: give the teacher.")
        held_tokens = math.ceil(options.tokens * _HELD_OUT)
        training = _sampled(store, teacher, "calibration", options.tokens, options.seed, job)
        held_out = _sampled(store, teacher, "tuning", held_tokens, options.seed, job)
    elif options.text in NAMES or options.text.startswith("hf:"):
        training = open_text(options.text, "calibration", n_tokens=options.tokens)
        held_out = open_text(options.text, "tuning", n_tokens=math.ceil(options.tokens * _HELD_OUT))
    else:
        training, held_out = _cut(open_text(options.text, "calibration"))
    require_disjoint(training.record(0), held_out)
    return training, held_out


def _sampled(store: Store, teacher: LoadedModel, split: Split, n_tokens: int, seed: int, job: Job) -> Corpus:
    """Text of the teacher in rounds, each of which the store keeps."""
    documents: list[Document] = []
    rounds, kept = -(-n_tokens // _ROUND), 0
    for number in range(rounds):
        own = int.from_bytes(hashlib.sha256(f"relu/{seed}/{number}".encode()).digest()[:4], "big")
        wanted = min(_ROUND, n_tokens - number * _ROUND)
        found = analyze(store, SampledText(teacher, split, wanted, seed=own), job)
        kept += found.cached
        corpus = sampled_corpus(found.profile)
        documents += [replace(one, name=f"{one.name}/{number}") for one in corpus.documents]
    if kept:
        purpose = "train on" if split == "calibration" else "measure on"
        job.note(f"Text to {purpose} was sampled before: {kept} of {rounds} round{'s' * (rounds > 1)} kept.")
    return Corpus("self", split, tuple(documents))


def _cut(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """A file's beginning and its last sixth, cut at the end of a line or else of a word."""
    (document,) = corpus.documents
    text = document.text
    place = round(len(text) * (1 - _HELD_OUT))
    end = text.rfind("\n", len(text) // 2, place)
    end = end if end >= 0 else text.rfind(" ", len(text) // 2, place)
    place = end + 1 if end >= 0 else place
    head, tail = replace(document, text=text[:place]), replace(document, text=text[place:])
    return replace(corpus, documents=(head,)), Corpus(corpus.name, "tuning", (tail,))


def _stream(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, end: int, length: int) -> np.ndarray:
    """All documents one after the other, int64 (n,), an end of text after each."""
    ids: list[int] = []
    for document in corpus.documents:
        ids += [*tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"], end]
    if len(ids) < 2 * length:
        raise CorpusError(
            f"'{corpus.name}' ({corpus.split}) has {len(ids):,} tokens of the new tokenizer: at least {2 * length:,}, "
            "two windows, are needed to train. Give a longer text, or train on shorter windows."
        )
    return np.asarray(ids, dtype=np.int64)


def _key(options: ReluOptions, training: Corpus, held_out: Corpus) -> str:
    """Name of the checkpoint: everything that the training's state depends on."""
    parts = {
        "kind": "relu-model",
        "version": VERSION,
        "options": asdict(options),
        "texts": [training.sha256, held_out.sha256],
        "threads": torch.get_num_threads(),  # sums are split among them, and rounded so
        "versions": {**library_versions(), "tokenizers": metadata.version("tokenizers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _record(
    made: ReluModel, options: ReluOptions, teacher: LoadedModel | None, training: TextRecord, held_out: TextRecord
) -> dict[str, Any]:
    """What the folder says of its own making."""
    origin = None
    if options.text == "self" and teacher is not None:
        origin = {"name": teacher.name, "source": teacher.source, **asdict(teacher.fingerprint)}
    return {
        "version": VERSION,
        "options": asdict(options),
        "teacher": origin,
        "training_text": training.model_dump(mode="json"),
        "held_out_text": held_out.model_dump(mode="json"),
        **made.to_json(),
    }
