"""An engine whose logits are a function of the token and its position: everything it does is known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from workbench.models.base import Fingerprint
from workbench.runtime.base import StepTrace
from workbench.runtime.plan import Plan


def byte_model(bos: int | None = None) -> Any:
    """The part of a LoadedModel that the measures read: one token per UTF-8 byte."""

    def encode(text: str, *, bos: bool = True) -> list[int]:
        return ([model.bos] if bos and model.bos is not None else []) + list(text.encode())

    model = SimpleNamespace(
        name="bytes",
        bos=bos,
        stop_tokens=(0,),
        fingerprint=Fingerprint("architecture", "weights"),
        tokenizer=None,
        encode=encode,
        encode_chat=encode,
        decode=lambda ids: bytes(ids).decode("utf-8", "replace"),
    )
    return model


class FakeEngine:
    """``logits(tokens, position) -> (vocab,)`` is all there is to it; ``tokens`` are those up to the position."""

    name, activation_mode, plan = "fake", "fp32", Plan()

    def __init__(
        self,
        logits: Callable[[Sequence[int], int], np.ndarray],
        *,
        vocab_size: int = 256,
        context_length: int = 512,
        chunks: Sequence[int] = (),
        model: Any = None,
    ) -> None:
        self._logits, self._chunks = logits, list(chunks)
        self.vocab_size, self.context_length = vocab_size, context_length
        self.model = model or byte_model()

    def start(self, *, seed: int = 0, replay: Any = None) -> Any:
        return SimpleNamespace(tokens=[], prompt_length=0, trace=[])

    def prefill(self, sequence: Any, tokens: Sequence[int]) -> np.ndarray:
        sequence.prompt_length = len(tokens)
        sequence.tokens += tokens
        return self._logits(sequence.tokens, len(sequence.tokens) - 1).astype(np.float32)

    def step(self, sequences: Sequence[Any], tokens: Sequence[int]) -> np.ndarray:
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.trace.append(StepTrace(len(sequence.tokens), token, 0.0, 1000))
            sequence.tokens.append(token)
        return np.stack([self._logits(s.tokens, len(s.tokens) - 1) for s in sequences]).astype(np.float32)

    def log_probabilities(
        self, tokens: Sequence[int], *, prompt_length: int = 1, chunk: int = 128
    ) -> Iterator[tuple[int, np.ndarray]]:
        first, sizes = 0, [*self._chunks, *[chunk] * len(tokens)]
        while first < len(tokens):
            count = min(sizes.pop(0), len(tokens) - first)
            rows = np.stack([self._logits(tokens[: p + 1], p) for p in range(first, first + count)])
            yield first, (rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))).astype(np.float32)
            first += count

    def score(self, tokens: Sequence[int], *, prompt_length: int = 1) -> np.ndarray:
        rows = np.concatenate([rows for _, rows in self.log_probabilities(tokens)])
        return rows[np.arange(len(tokens) - 1), list(tokens[1:])]


def random_logits(seed: int, vocab_size: int = 256, scale: float = 1.0) -> Callable[[Sequence[int], int], np.ndarray]:
    """Logits that depend on the last token only: a random matrix (vocab, vocab)."""
    table = scale * np.random.default_rng(seed).normal(size=(vocab_size, vocab_size))
    return lambda tokens, position: table[tokens[-1]]
