"""The cpu engine: a whole decoder step in one call of compiled code.

Each weight is read once per step, in the layout it is stored in; deciders and consumers of the plan act inside the
step. It computes the same as the reference engine: to rounding with ``fp32`` activations, to the noise of int8
activations without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import EngineError
from workbench.progress import Job
from workbench.runtime.base import GREEDY, ActivationMode, Guarded, Sampler, StepTrace, TapCallback, prompt_pieces
from workbench.runtime.cpu_build import build, kernels
from workbench.runtime.cpu_source import CompressedSource, FolderSource, LoadedSource, Source
from workbench.runtime.decisions import distinct_masks, slot_value
from workbench.runtime.plan import Plan, Policy

if TYPE_CHECKING:
    from workbench.formats.compressed import CompressedModel
    from workbench.models.base import LoadedModel

PARTS = ("linears", "attention", "output", "deciders", "other")
_CHUNK = 128  # rows of one pass through the weights
_NO_DECISIONS: dict[str, Any] = {}


class CpuSequence:
    """One running text of the cpu engine."""

    def __init__(self, engine: CpuEngine, seed: int) -> None:
        self._engine = engine
        self._core = kernels().Sequence(engine._core)
        self._rng = np.random.default_rng(seed)
        self._trace: list[StepTrace] = []

    @property
    def tokens(self) -> list[int]:
        """Tokens fed so far."""
        return list(self._core.tokens)

    @property
    def position(self) -> int:
        """Number of tokens fed so far."""
        return int(self._core.position)

    @property
    def prompt_length(self) -> int:
        return int(self._core.prompt_length)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key and value cache."""
        return int(self._core.cache_bytes)

    @property
    def trace(self) -> list[StepTrace]:
        """One entry per token fed."""
        for i in range(len(self._trace), self._core.trace_length()):
            self._trace.append(self._engine._step_trace(self._core.trace_row(i)))
        return self._trace


class CpuEngine(Guarded):
    """Runs a dense or compressed model in compiled code, under a plan. See ``Engine`` for the interface.

    Args:
        target: a loaded model, a compressed one, or the folder of one (read without torch).
        plan: deciders, consumers and transforms; empty by default.
        threads: of each step, the caller's included; None for one per usable core.
        activation_mode: ``int8`` (bf16 where weights are bf16) or ``fp32``; None chooses the first. Weights in tables
            (``nested-tables``) are multiplied with fp32 activations in both: ``int8`` is then the output layer, and
            an fp16 cache. Integer encodings round their inputs as they say in both.
        cores: processor of each thread, or none.
        isa: instruction set, ``auto`` for the best that the processor has.
        planes: keep group codes as bit-planes and not packed.
        columns: lay weights of units with input thresholds out input by input, where they are 4-bit group codes or
            bf16, so that inputs left out are not read: None where a thread's runs are long enough for it to pay, True
            wherever it can be, False nowhere.
        job: progress and cancel of preparing the weights.

    Raises:
        EngineError: not built, or something of this model or plan that it does not run.
    """

    name = "cpu"

    def __init__(
        self,
        target: LoadedModel | CompressedModel | Path,
        plan: Plan | None = None,
        *,
        threads: int | None = None,
        activation_mode: ActivationMode | None = None,
        cores: Sequence[int] = (),
        isa: str = "auto",
        planes: bool = False,
        columns: bool | None = None,
        job: Job | None = None,
    ) -> None:
        self.plan = plan or Plan()
        source = open_source(target)
        try:
            self.plan.check(source.architecture)
            self.model = source.model
            architecture = source.architecture
            self.activation_mode: ActivationMode = activation_mode or _fast_mode(source)
            self._core = build(
                source,
                self.plan,
                exact=self.activation_mode == "fp32",
                threads=threads or len(os.sched_getaffinity(0)),
                cores=cores,
                isa=isa,
                planes=planes,
                columns=columns,
                job=job,
            )
        finally:
            source.close()
        self.vocab_size = architecture.vocab_size
        self.context_length = architecture.context_length
        self._slots = [(d.slot, d.program.size) for d in self.plan.deciders]
        self._policy = Policy()
        self._tap: TapCallback | None = None
        self._numpy = False
        self._fused = {"q": "qkv", "k": None, "v": None, "gate": "gate_up", "up": None}
        self._linear_ids = {linear.id for linear in architecture.linears}

    # Interface -----------------------------------------------------------------------------------------------------

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return str(self._core.isa)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held and streamed."""
        return int(self._core.weight_bytes)

    @property
    def output_bytes(self) -> int:
        """Bytes that a step reads of the output layer."""
        return int(self._core.output_bytes)

    @property
    def trace_seconds(self) -> float:
        """Seconds that the last pass spent on timing its parts: clock readings counted, one reading measured here."""
        return float(self._core.laps * kernels().lap_seconds())

    def start(self, *, seed: int = 0, replay: Sequence[dict[str, Any]] | None = None) -> CpuSequence:
        """Return an empty sequence; see ``Engine.start``."""
        self._check_open()
        sequence = CpuSequence(self, seed)
        for slot, (name, size) in enumerate(self._slots):
            if name not in self._policy.values:
                continue
            value = slot_value(self._policy.values[name], size)
            if size == 1:
                sequence._core.fix(self._core, slot, float(value))
            else:
                sequence._core.fix_mask(self._core, slot, np.ascontiguousarray(value))
        if replay is not None and self._slots:
            values = [[float(r[name]) for name, size in self._slots if size == 1] for r in replay]
            masks = [
                (slot, *distinct_masks([r[name] for r in replay], size))
                for slot, (name, size) in enumerate(self._slots)
                if size > 1
            ]
            sequence._core.replay(self._core, np.array(values, dtype=np.float32).reshape(len(replay), -1), masks)
        return sequence

    def prefill(
        self, sequence: CpuSequence, tokens: Sequence[int], *, between: Callable[[], None] | None = None
    ) -> np.ndarray:
        """Feed a prompt; return the logits after its last token, float32 (vocab,). See ``Engine.prefill``."""
        if sequence.position:
            raise EngineError("This sequence has its prompt already: feed further tokens with step().")
        self._check_tokens(tokens, 0)
        sequence._core.prompt_length = len(tokens)
        ids = _ids(tokens)
        for begin, end in prompt_pieces(len(ids), between):
            logits = self._call(self._core.prefill, sequence._core, ids[begin:end])
        return logits

    def step(self, sequences: Sequence[CpuSequence], tokens: Sequence[int]) -> np.ndarray:
        """Feed one token to each sequence, all in one pass through the weights; return logits float32 (n, vocab)."""
        if len(sequences) != len(tokens):
            raise EngineError(f"step() got {len(sequences)} sequences and {len(tokens)} tokens: one token for each.")
        for sequence in sequences:
            self._check_tokens([0], sequence.position)
        return self._call(self._core.step, [s._core for s in sequences], _ids(tokens))

    def generate(
        self,
        sequence: CpuSequence,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampler: Sampler = GREEDY,
        stop_tokens: Sequence[int] = (),
        job: Job | None = None,
        on_token: Callable[[int], None] | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[int]:
        """Prefill and sample; see ``Engine.generate``. A stop token ends the reply and is not part of it."""
        job = job or Job()
        room = self._room_after(prompt)
        count = min(max_new_tokens, room)
        logits = self.prefill(sequence, prompt, between=between)
        if count < 1:
            return []
        settings = (float(sampler.temperature), sampler.top_k, float(sampler.top_p))
        draw = sequence._rng.random if sampler.temperature else float
        token = _chosen(kernels().sample(logits, *settings, draw()))
        new: list[int] = []
        while True:
            job.check()
            if token in stop_tokens:
                return new
            new.append(token)
            if on_token is not None:
                on_token(token)
            if len(new) == count:
                return new
            token = _chosen(self._call(self._core.step_sample, sequence._core, token, *settings, draw()))

    def score(
        self,
        tokens: Sequence[int],
        *,
        prompt_length: int = 1,
        replay: Sequence[dict[str, Any]] | None = None,
        trace: list[StepTrace] | None = None,
    ) -> np.ndarray:
        """Natural-log probability of ``tokens[1:]`` given what precedes each, float32 (len - 1,).

        Args:
            tokens: the whole text.
            prompt_length: where the reply starts, for deciders of scope ``reply``.
            replay: recorded decisions per position to use instead of deciding.
            trace: filled with one entry per position.
        """
        self._check_tokens(tokens, 0)
        sequence = self.start(replay=replay)
        sequence._core.prompt_length = prompt_length
        ids = _ids(tokens)
        targets = np.append(ids[1:], np.int32(-1)).astype(np.int32)
        found = []
        for begin, end in self._chunks(len(tokens), prompt_length, _CHUNK):
            found.append(self._call(self._core.score, sequence._core, ids[begin:end], targets[begin:end]))
        if trace is not None:
            trace += sequence.trace
        return np.concatenate(found)[:-1]

    def log_probabilities(
        self,
        tokens: Sequence[int],
        *,
        prompt_length: int = 1,
        chunk: int = 128,
        replay: Sequence[dict[str, Any]] | None = None,
        trace: list[StepTrace] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first position, log-probabilities float32 (n, vocab)); see ``Engine.log_probabilities``."""
        self._check_tokens(tokens, 0)
        sequence = self.start(replay=replay)
        sequence._core.prompt_length = prompt_length
        ids = _ids(tokens)
        for begin, end in self._chunks(len(tokens), prompt_length, chunk):
            logits = self._call(self._core.all_logits, sequence._core, ids[begin:end])
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits, dtype=np.float32).sum(axis=1, dtype=np.float64, keepdims=True)).astype(
                np.float32
            )
            if trace is not None:
                trace += sequence.trace[begin:end]
            yield begin, logits

    def set_policy(self, policy: Policy) -> None:
        """Fix slots of sequences that start from now on, and change thresholds for all; see ``Policy``."""
        self._check_open()
        policy.check(self.plan)
        self._policy = policy
        for slot, decider in enumerate(self.plan.deciders):
            planned = getattr(decider.program, "thresholds", ())
            if planned:
                self._core.set_thresholds(slot, list(policy.thresholds.get(decider.slot, planned)))

    def set_tap(self, callback: TapCallback | None, *, numpy: bool = False) -> None:
        """Call ``callback(site, first position, rows)`` for each linear's input and each block's residual."""
        self._tap, self._numpy = callback, numpy
        self._core.set_tap(callback is not None)

    def close(self) -> None:
        """Free the weights once the last sequence is gone. A closed engine cannot be used again."""
        self._closed = True
        self._core = None

    # Inside --------------------------------------------------------------------------------------------------------

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call into the kernels, and hand over what the tap has seen."""
        self._check_open()
        try:
            result = function(*arguments)
        except (ValueError, IndexError, RuntimeError) as error:
            raise EngineError(f"The cpu engine stopped: {error}") from error
        if self._tap is not None:
            self._hand_over(self._tap)
        return result

    def _hand_over(self, tap: TapCallback) -> None:
        for site, position, rows in self._core.take_taps():
            if site not in self._linear_ids and site.count(".") == 2:  # the parts of a fused linear see one input
                owner, _, role = site.rpartition(".")
                fused = self._fused.get(role)
                if fused is None:
                    continue
                site = f"{owner}.{fused}"
            if self._numpy:
                tap(site, position, rows)
                continue
            import torch

            tap(site, position, torch.from_numpy(rows))

    def _chunks(self, n: int, prompt_length: int, size: int) -> Iterator[tuple[int, int]]:
        """Cut n tokens into passes; a pass never spans the end of the prompt, where replies are decided."""
        begin = 0
        while begin < n:
            end = min(begin + size, n)
            if begin < prompt_length < end:
                end = prompt_length
            yield begin, end
            begin = end

    def _step_trace(self, row: tuple) -> StepTrace:
        position, token, seconds, read, touched, parts, values, masks, clamped, beyond, kept, kept_any = row
        numbers, arrays = iter(values), iter(masks)
        decisions = {name: next(numbers) if size == 1 else next(arrays) for name, size in self._slots}
        return StepTrace(
            position,
            token,
            seconds,
            round(read),
            decisions,
            round(touched),
            dict(zip(PARTS, parts, strict=True)),
            clamped,
            beyond,
            kept,
            kept_any,
        )


def open_source(target: LoadedModel | CompressedModel | Path) -> Source:
    """Return the numbers of a model or of a compressed model's folder."""
    if isinstance(target, Path):
        return FolderSource(target)
    from workbench.models.base import LoadedModel

    return LoadedSource(target) if isinstance(target, LoadedModel) else CompressedSource(target)


def _fast_mode(source: Source) -> ActivationMode:
    """What the engine computes in where the caller leaves it open: what the first linear's weights are made for."""
    kind = source.kind(source.architecture.linears[0].id)
    return {"f32": "fp32", "dense": "bf16"}.get(kind, "int8")  # type: ignore[return-value]


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(tokens, dtype=np.int32)


def _chosen(token: int) -> int:
    if token < 0:
        raise EngineError("The model's logits are NaN: the weights are damaged or overflow in this dtype.")
    return token
