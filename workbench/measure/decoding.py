"""What a measuring process does with an engine: open it, decode from it, and count what a step reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from workbench.errors import InputError
from workbench.runtime import open_engine
from workbench.runtime.base import Engine


@dataclass(frozen=True)
class Target:
    """What to measure: ``source`` is a name or path that ``runtime.open_engine`` opens; ``name`` is for tables."""

    source: str | Path
    name: str = ""
    engine: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"

    def request(self) -> dict[str, str]:
        """The JSON form that a child process reads."""
        return {**asdict(self), "source": str(self.source)}

    def open(self, threads: int) -> Engine:
        """Open the engine in this process."""
        return open_engine(self.source, engine=self.engine, threads=threads, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Run:
    """One greedy reply. ``step_s``: seconds of each decoding step; ``ttft_s``: from nothing to the first token;
    ``read_bytes``: stored bytes of block linears that a step reads, mean over the steps."""

    ttft_s: float
    step_s: list[float]
    read_bytes: float


class Reply:
    """A greedy reply that never stops by itself, so that all sides do equal work."""

    def __init__(self, engine: Engine, prompt: Sequence[int]) -> None:
        self._engine = engine
        self.sequence = engine.start()
        self._token = int(np.argmax(engine.prefill(self.sequence, prompt)))

    def step(self) -> None:
        """Feed the last token and choose the next."""
        self._token = int(np.argmax(self._engine.step([self.sequence], [self._token])[0]))


def decode(engine: Engine, prompt: Sequence[int], new_tokens: int) -> Run:
    """Time a reply of ``new_tokens`` decoding steps after the first token."""
    started = time.perf_counter()
    reply = Reply(engine, prompt)
    ttft = time.perf_counter() - started
    steps = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        reply.step()
        steps.append(time.perf_counter() - started)
    read = [step.read_bytes for step in reply.sequence.trace[-new_tokens:]]
    return Run(ttft, steps, float(np.mean(read)))


class SteadyDecoding:
    """Decoding without an end, for a counter to watch: replies of ``length`` steps, one after the other.

    The first prompt is read before the watching begins; later ones are part of it, a few percent of the work.
    """

    def __init__(self, engine: Engine, prompt: Sequence[int], length: int = 256) -> None:
        self._engine, self._prompt = engine, prompt
        self._length = min(length, engine.context_length - len(prompt))
        self._reply, self._steps = Reply(engine, prompt), 0

    def run(self, steps: int) -> int:
        """Decode ``steps`` tokens; return their number."""
        for _ in range(steps):
            if self._steps == self._length:
                self._reply, self._steps = Reply(self._engine, self._prompt), 0
            self._reply.step()
            self._steps += 1
        return steps


def prefill_seconds(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds from a prompt to the logits after it."""
    sequence = engine.start()
    started = time.perf_counter()
    engine.prefill(sequence, prompt)
    return time.perf_counter() - started


def lengthen(prompt: Sequence[int], length: int) -> list[int]:
    """Repeat a prompt up to ``length`` tokens: the time of a prefill depends on how many tokens, not on which."""
    return (list(prompt) * (length // len(prompt) + 1))[:length]


def default_prompt(engine: Engine) -> list[int]:
    """Token ids of the project's first prompt in the model's chat template."""
    from workbench.corpus import prompts

    return engine.model.encode_chat(prompts()[0].text)


def check_room(engines: Sequence[Engine], prompt_tokens: int, new_tokens: int) -> int:
    """Return the smallest context of the engines, in tokens.

    Raises:
        InputError: the prompt and the new tokens do not fit it.
    """
    context = min(engine.context_length for engine in engines)
    if prompt_tokens + new_tokens > context:
        raise InputError(
            f"A prompt of {prompt_tokens} tokens and {new_tokens} new ones do not fit the context of {context}: "
            "shorten the prompt or ask for fewer tokens."
        )
    return context
