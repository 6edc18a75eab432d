"""The interface that every engine has: immutable weights and a plan, and sequences that run through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from workbench.errors import EngineError, InputError
from workbench.progress import Job
from workbench.runtime.plan import Plan, Policy

if TYPE_CHECKING:
    from workbench.models.base import TextModel

ActivationMode = Literal["fp32", "bf16", "int8"]

# callback(site, position of the first row, rows float32 (n, width)); sites: linear ids (their inputs) and
# "blocks.<i>" (the residual entering the block).
TapCallback = Callable[[str, int, Any], None]


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"Sampler({self.temperature=}, {self.top_k=}, {self.top_p=}): temperature and top_k must be at least "
                "0 and top_p in (0, 1]."
            )


GREEDY = Sampler()
_FEWEST_ROWS, _MOST_ROWS = 8, 128


@dataclass(frozen=True)
class StepTrace:
    """What one decoding step did.

    ``seconds`` is wall time inside the engine; ``read_bytes`` are stored bytes of block linears that a step of this
    plan has to read (codes, scales and tables of the widths, heads and neurons in use), and what its decisions read.
    The cpu engine counts what its layouts read: whole tiles of 16 neurons, dense rows all where more than 45 % are
    wanted, padding. So in a small model, where few tiles are masked as a whole and a predictor is large beside the
    blocks, a mask may read more than none. Of a predictor all codes count, though those of hidden units that are zero
    are not read. The reference engine counts shares of weights. ``kept_weights`` is the share
    of the block linears' weights that the step used (one less it is the effective sparsity), ``pass_weights`` the
    share that any token of the same pass used: what a step of several sequences must read, each with its own mask (None
    where the engine does not say; the reference engine does not). ``decisions`` maps each
    slot to the value in force: a number, or a mask uint8 (size,), which is not to be written to. Where inputs are
    rounded to integers with calibrated scales, ``clamped`` counts the codes that were clamped and ``beyond`` the inputs
    beyond the calibrated range, each unit's inputs once. (Sums cannot overflow: encodings whose sums could are
    refused.)
    """

    position: int
    token: int
    seconds: float
    read_bytes: int
    decisions: dict[str, Any] = field(default_factory=dict)
    touched_bytes: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    clamped: int = 0
    beyond: int = 0
    kept_weights: float = 1.0
    pass_weights: float | None = None


class EngineSequence(Protocol):
    """One running text: its cache, position and trace. Made by ``Engine.start``."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def prompt_length(self) -> int: ...

    @property
    def trace(self) -> list[StepTrace]: ...

    @property
    def position(self) -> int: ...


class Engine(Protocol):
    """Runs one dense or compressed model. All logits are float32 numpy arrays.

    ``score`` and ``log_probabilities`` decide per token exactly as ``step`` does. ``model`` gives tokenizer,
    architecture, fingerprint and stop tokens.
    """

    name: str
    activation_mode: ActivationMode
    plan: Plan
    vocab_size: int
    context_length: int

    @property
    def model(self) -> TextModel: ...

    def start(self, *, seed: int = 0, replay: Sequence[dict[str, Any]] | None = None) -> Any:
        """Return an empty sequence. ``replay`` gives recorded decisions per position to use instead of deciding."""
        ...

    def prefill(self, sequence: Any, tokens: Sequence[int], *, between: Callable[[], None] | None = None) -> np.ndarray:
        """Feed a prompt; return the logits after its last token, (vocab,).

        With ``between`` the prompt is read in pieces (``prompt_pieces``), and it is called between two of them: what it
        changes by ``set_policy`` holds for the tokens of the pieces to come.
        """
        ...

    def step(self, sequences: Sequence[Any], tokens: Sequence[int]) -> np.ndarray:
        """Feed one token to each sequence; return logits (n, vocab)."""
        ...

    def generate(
        self,
        sequence: Any,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampler: Sampler = GREEDY,
        stop_tokens: Sequence[int] = (),
        job: Job | None = None,
        on_token: Callable[[int], None] | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[int]:
        """Prefill ``prompt`` and sample up to ``max_new_tokens``; return the new tokens. Cancels between steps.

        ``on_token`` is called with each new token, ``between`` as by ``prefill``.
        """
        ...

    def score(self, tokens: Sequence[int], *, prompt_length: int = 1) -> np.ndarray:
        """Natural-log probability of ``tokens[1:]`` given what precedes each, float32 (len - 1,)."""
        ...

    def log_probabilities(
        self,
        tokens: Sequence[int],
        *,
        prompt_length: int = 1,
        chunk: int = 128,
        replay: Sequence[dict[str, Any]] | None = None,
        trace: list[StepTrace] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first position, log-probabilities (n, vocab)) for positions 0 .. len - 1, ``chunk`` at a time.

        ``replay`` gives recorded decisions per position to use instead of deciding; ``trace`` is filled with one entry
        per position, at the latest when its log-probabilities are yielded.
        """
        ...

    def set_policy(self, policy: Policy) -> None:
        """Change thresholds, widths or masks without touching the weights."""
        ...

    def set_tap(self, callback: TapCallback | None, *, numpy: bool = False) -> None:
        """Call ``callback`` with every linear's input and every block's residual, or stop doing so.

        Rows are torch tensors, with ``numpy`` numpy arrays, for which no engine imports torch.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. A closed engine cannot be used again."""
        ...


def prompt_pieces(n: int, between: Callable[[], None] | None) -> Iterator[tuple[int, int]]:
    """Cut a prompt of n tokens into the pieces [begin, end) it is read in: one, or with ``between`` called in between.

    A piece is at most a quarter of what was read before it, so that a policy that follows what was read is never far
    behind, within bounds: eight tokens are the fewest that are worth a pass through all weights, and a pass of the cpu
    engine takes 128 rows.
    """
    begin = 0
    while begin < n:
        size = n if between is None else min(max(_FEWEST_ROWS, begin // 4), _MOST_ROWS)
        end = min(begin + size, n)
        yield begin, end
        begin = end
        if between is not None and begin < n:
            between()


class Guarded:
    """What every engine refuses alike: work after ``close``, and tokens that the context does not hold."""

    context_length: int
    _closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("This engine is closed: open another.")

    def _check_tokens(self, tokens: Sequence[int], position: int) -> None:
        self._check_open()
        if len(tokens) == 0:
            raise InputError("No tokens were given: the text or prompt is empty.")
        if position + len(tokens) > self.context_length:
            raise InputError(
                f"{position + len(tokens)} tokens do not fit the model's context of {self.context_length}: shorten "
                "the text or use windows."
            )

    def _room_after(self, prompt: Sequence[int]) -> int:
        """Tokens that still fit after a prompt, at least 1."""
        room = self.context_length - len(prompt)
        if room < 1:
            raise InputError(f"The prompt has {len(prompt)} tokens and the context only {self.context_length}.")
        return room
