"""``self``: text sampled from the model itself, the text that its own replies look like.

Best for calibration and training where the training data of a model is unknown (LLM-QAT, Liu et al. 2023, section
3.1: data-free sampling of the next token from the full distribution).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from workbench.corpus.base import Corpus, Document, Split
from workbench.errors import CorpusError
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine

if TYPE_CHECKING:
    from workbench.models import LoadedModel
    from workbench.models.base import TextModel
    from workbench.runtime.base import Engine

DEFAULT_TOKENS = 8192
DEFAULT_LENGTH = 576  # leaves room for a window of 512: text encoded again can be a few tokens shorter
_BATCH = 8
NOT_FINITE = "The model's logits are not finite, so no text can be sampled from it."

# Chat models never saw an empty page, and some models have no beginning token: their documents continue one of these in
# turn. A third is not English: a model that is fitted to its English alone loses what else it can.
NEUTRAL_STARTS = (
    *("The", "In", "これは", "When", "It", "Le", "There are", "How"),
    *("这是", "For example,", "A", "El"),
)


def sample_corpus(
    model: LoadedModel, split: Split, n_tokens: int | None, seed: int, length: int | None, job: Job | None
) -> Corpus:
    """Sample documents at temperature 1 from the whole distribution, without ends, so that each has its full length.

    Args:
        model: sampled from; its dtype and what runs it (``sampled_by``) are part of what determines the text.
        split: each split has its own random stream, so splits share no document.
        n_tokens: how many tokens to sample in all, rounded up to whole batches of eight documents.
        seed: the same seed gives the same text on the same machine and versions.
        length: tokens per document.
        job: advanced, and asked whether to stop, at every token of a batch.

    A model on another device than the CPU is sampled there, in batches as large as its cache allows
    (``corpus.device_batches``): other text than the same model gives on the CPU, from the same starts.

    Raises:
        CorpusError: a length or number of tokens that is not possible.
        Cancelled: the job was cancelled.
    """
    length = DEFAULT_LENGTH if length is None else length
    n_tokens = DEFAULT_TOKENS if n_tokens is None else n_tokens
    starts = _starts(model)
    longest = model.architecture.context_length - max(map(len, starts))
    length = min(length, longest)
    if length < 1 or n_tokens < 1:
        raise CorpusError(f"Cannot sample {n_tokens} tokens in documents of {length}: both must be at least 1.")
    count = -(-n_tokens // (length * _BATCH)) * _BATCH
    begun = [starts[i % len(starts)] for i in range(count)]
    job = job or Job()
    if model.device.type == "cpu":
        texts = _by_engine(model, split, seed, begun, length, job)
    else:
        from workbench.corpus.device_batches import sample_on_device

        rows = sample_on_device(model, begun, length, _barred(model), lambda at: _stream(split, seed, at), job)
        texts = [model.decode(row) for row in rows]
    named = enumerate(texts)
    return Corpus("self", split, tuple(Document(f"self/{split}/{i:04d}", t, "self", "unknown") for i, t in named))


def sampled_by(model: LoadedModel) -> str:
    """What runs a model while it is sampled: its text depends on it, so whatever keeps such text has it in its key."""
    return choose_engine("auto", model) if model.device.type == "cpu" else f"batches on {model.device.type}"


def _by_engine(
    model: LoadedModel, split: Split, seed: int, starts: list[list[int]], length: int, job: Job
) -> list[str]:
    """Texts of an engine, a batch after the other."""
    batches = len(starts) // _BATCH
    job.stage(f"sample text from {model.name}", batches * length)
    texts: list[str] = []
    engine = open_engine(model)
    try:
        for batch in range(batches):
            here = starts[batch * _BATCH : (batch + 1) * _BATCH]
            texts += _sample_batch(engine, _stream(split, seed, batch), here, length, job)
    finally:
        engine.close()
    return texts


def _stream(split: Split, seed: int, batch: int) -> int:
    """A 63-bit seed of its own for every batch of every split."""
    digest = hashlib.sha256(f"{split}/{seed}/{batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _starts(model: LoadedModel) -> list[list[int]]:
    """What documents begin with, in turn."""
    if model.bos is not None and getattr(model.tokenizer, "chat_template", None) is None:
        return [[model.bos]]
    return [model.encode(start) for start in NEUTRAL_STARTS]


def _sample_batch(engine: Engine, seed: int, starts: list[list[int]], length: int, job: Job) -> list[str]:
    """Sample ``_BATCH`` texts side by side; the job may stop between two tokens."""
    model = engine.model
    barred = _barred(model)
    rng = np.random.default_rng(seed)
    sequences = [engine.start() for _ in range(_BATCH)]
    logits = np.stack([engine.prefill(sequence, start) for sequence, start in zip(sequences, starts, strict=True)])
    replies: list[list[int]] = [[] for _ in sequences]
    for step in range(length):
        tokens = _draw(logits, barred, rng)
        for reply, token in zip(replies, tokens, strict=True):
            reply.append(token)
        job.advance()
        if step + 1 < length:
            logits = engine.step(sequences, tokens)
    return [model.decode([*start, *reply]) for start, reply in zip(starts, replies, strict=True)]


def _barred(model: TextModel) -> list[int]:
    """Tokens that are never drawn: ends and other special ones would leave the text, and ids past the tokenizer's own
    have no text at all."""
    unprintable = {*model.stop_tokens, *model.tokenizer.all_special_ids}
    return sorted(unprintable | set(range(len(model.tokenizer), model.architecture.vocab_size)))


def _draw(logits: np.ndarray, barred: list[int], rng: np.random.Generator) -> list[int]:
    """One token per row of logits (n, vocab), from the whole distribution but the barred tokens."""
    weights = logits.copy()
    weights[:, barred] = -np.inf
    weights -= weights.max(axis=1, keepdims=True)
    np.exp(weights, out=weights)
    weights = np.cumsum(weights, axis=1, dtype=np.float64)
    if not (weights[:, -1] > 0).all():
        raise CorpusError(NOT_FINITE)
    drawn = rng.random(len(weights)) * weights[:, -1]
    return [int(np.searchsorted(row, value, side="right")) for row, value in zip(weights, drawn, strict=True)]
