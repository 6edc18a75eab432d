"""The reference engine: PyTorch and transformers, slow, the truth that other engines are compared with.

The plan acts through hooks on the model's own modules, so every family that transformers can run is covered and
nothing is rewritten. All consumers live at a linear's input or output: a head mask zeroes head outputs before ``o``, a
neuron mask zeroes activations before ``down``, a path zeroes what attention or MLP adds to the residual stream.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from workbench.errors import EngineError
from workbench.models.base import Linear, LoadedModel
from workbench.progress import Job
from workbench.runtime.base import GREEDY, ActivationMode, Guarded, Sampler, StepTrace, TapCallback, prompt_pieces
from workbench.runtime.decisions import Decisions, programs_of
from workbench.runtime.integer_layers import IntegerLayers
from workbench.runtime.plan import (
    PATH_SKIP_ATTENTION,
    PATH_SKIP_BLOCK,
    PATH_SKIP_MLP,
    Consumer,
    Decider,
    InputTransform,
    Plan,
    Policy,
)
from workbench.runtime.reads import ReadCounter
from workbench.runtime.sampling import sample
from workbench.runtime.weights import DenseWeights, WeightSource

_ROWS = 16  # of logits that are copied at once


# The tap that sees what a unit reads.
_TAP_OF_UNIT = {"qkv": "block_input", "o": "attention_output", "gate_up": "mlp_input", "down": "mlp_inner"}


class ReferenceSequence:
    """One running text of the reference engine."""

    def __init__(self, decisions: Decisions, cache: DynamicCache, seed: int) -> None:
        self.tokens: list[int] = []
        self.prompt_length = 0
        self.trace: list[StepTrace] = []
        self._decisions = decisions
        self._cache = cache
        self._rng = np.random.default_rng(seed)

    @property
    def position(self) -> int:
        """Number of tokens fed so far."""
        return len(self.tokens)


class ReferenceEngine(Guarded):
    """Runs a loaded model, dense or rebuilt from a compressed one, under a plan.

    Args:
        model: the model; its module is hooked, not changed, and may be shared.
        plan: deciders, consumers and transforms; empty by default.
        weights: where widths and stored sizes come from.

    Raises:
        EngineError: the plan contradicts itself or names what the model does not have.
    """

    name = "reference"

    def __init__(self, model: LoadedModel, plan: Plan | None = None, weights: WeightSource | None = None) -> None:
        self.model = model
        self.plan = plan or Plan()
        self.plan.check(model.architecture)
        self.activation_mode: ActivationMode = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        self.vocab_size = model.architecture.vocab_size
        self.context_length = model.architecture.context_length
        self._weights = weights or DenseWeights(model)
        # transformers 5.2x renamed the argument, and says so on every call that uses the old name.
        known = inspect.signature(model.module.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"
        self._policy = Policy()
        self._programs = programs_of(self.plan, self._policy)
        self._tap: TapCallback | None = None
        self._reads = ReadCounter(model.architecture, self.plan, self._weights.stored_bytes)
        self._hooks: list[Any] = []
        self._running: Decisions | None = None
        self._start = 0
        self._widths: dict[tuple[str, int], torch.Tensor] = {}
        self._integers = IntegerLayers(model)
        self._integers.check(self.plan)
        self._load_widths()
        self._install()

    # Interface -----------------------------------------------------------------------------------------------------

    def start(self, *, seed: int = 0, replay: Sequence[dict[str, Any]] | None = None) -> ReferenceSequence:
        """Return an empty sequence; see ``Engine.start``."""
        self._check_open()
        decisions = Decisions(self.plan, self._policy, replay, self._programs)
        return ReferenceSequence(decisions, DynamicCache(config=self.model.module.config), seed)

    def prefill(
        self, sequence: ReferenceSequence, tokens: Sequence[int], *, between: Callable[[], None] | None = None
    ) -> np.ndarray:
        """Feed a prompt; return the logits after its last token, float32 (vocab,). See ``Engine.prefill``."""
        if sequence.position:
            raise EngineError("This sequence has its prompt already: feed further tokens with step().")
        self._check_tokens(tokens, 0)
        sequence.prompt_length = len(tokens)
        for begin, end in prompt_pieces(len(tokens), between):
            hidden = self._feed(sequence, tokens[begin:end])
        return self._logits(hidden[-1:])[0].numpy()

    def step(self, sequences: Sequence[ReferenceSequence], tokens: Sequence[int]) -> np.ndarray:
        """Feed one token to each sequence; return logits float32 (n, vocab)."""
        if len(sequences) != len(tokens):
            raise EngineError(f"step() got {len(sequences)} sequences and {len(tokens)} tokens: one token for each.")
        rows = [self._logits(self._feed(s, [t]))[0] for s, t in zip(sequences, tokens, strict=True)]
        return torch.stack(rows).numpy()

    def generate(
        self,
        sequence: ReferenceSequence,
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
        logits = self.prefill(sequence, prompt, between=between)
        new: list[int] = []
        while len(new) < min(max_new_tokens, room):
            job.check()
            token = sample(logits, sampler, sequence._rng)
            if token in stop_tokens:
                break
            new.append(token)
            if on_token is not None:
                on_token(token)
            if len(new) < min(max_new_tokens, room):
                logits = self.step([sequence], [token])[0]
        return new

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
        targets = torch.tensor(list(tokens[1:]), dtype=torch.long)
        found = []
        chunks = self._chunks(tokens, prompt_length, 128, replay, trace)
        for first, logits in chunks:
            rows = logits[: len(tokens) - 1 - first]
            target = targets[first : first + len(rows)].unsqueeze(1)
            total = torch.cat([part.logsumexp(dim=1) for part in rows.split(_ROWS)])  # it copies what it is given
            found.append(rows.gather(1, target).squeeze(1) - total)
            del rows, logits  # the largest tensors of all: gone before the next are made
        return torch.cat(found).numpy()

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
        for first, logits in self._chunks(tokens, prompt_length, chunk, replay, trace):
            rows = logits.log_softmax(dim=1).numpy()
            del logits  # not held while the rows are used
            yield first, rows
            del rows

    def hidden_states(self, tokens: Sequence[int], *, prompt_length: int = 1) -> torch.Tensor:
        """Teacher-forced final hidden states (n, hidden) without the output layer: what capture needs of a text."""
        self._check_tokens(tokens, 0)
        with self._run(Decisions(self.plan, self._policy, programs=self._programs), 0, len(tokens), prompt_length):
            return self._body(tokens, None)

    def set_policy(self, policy: Policy) -> None:
        """Fix slots of sequences that start from now on, and change thresholds for all; see ``Policy``."""
        self._check_open()
        policy.check(self.plan)
        self._policy = policy
        self._programs.update(programs_of(self.plan, policy))

    def weight(self, linear_id: str, bits: int) -> torch.Tensor:
        """The weight (out, in) that a width consumer of this plan reads at a width."""
        return self._widths[linear_id, bits]

    def set_tap(self, callback: TapCallback | None, *, numpy: bool = False) -> None:
        """Call ``callback(site, first position, rows)`` for each linear's input and each block's residual."""
        self._tap = callback
        if callback is not None and numpy:
            self._tap = lambda site, first, rows: callback(site, first, rows.float().cpu().numpy())
        self._install()

    def close(self) -> None:
        """Unhook the model and drop what the engine holds."""
        self._remove_hooks()
        self._widths.clear()
        self._closed = True

    # Forward passes ------------------------------------------------------------------------------------------------

    def _feed(self, sequence: ReferenceSequence, tokens: Sequence[int]) -> torch.Tensor:
        """Run tokens through the blocks with the sequence's cache; return final hidden states (n, hidden)."""
        self._check_tokens(tokens, sequence.position)
        started = time.perf_counter()
        with self._run(sequence._decisions, sequence.position, len(tokens), sequence.prompt_length):
            hidden = self._body(tokens, sequence._cache)
            seconds = (time.perf_counter() - started) / len(tokens)
            sequence.trace += self._trace_of(sequence._decisions, sequence.position, tokens, seconds)
        sequence.tokens += tokens
        return hidden

    def _chunks(
        self,
        tokens: Sequence[int],
        prompt_length: int,
        chunk: int,
        replay: Sequence[dict[str, Any]] | None,
        trace: list[StepTrace] | None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Teacher-forced logits, ``chunk`` positions at a time; the text is split only where a reply begins."""
        self._check_tokens(tokens, 0)
        decisions = Decisions(self.plan, self._policy, replay, self._programs)
        by_reply = any(d.scope.kind == "reply" for d in self.plan.deciders)
        cuts = [0, prompt_length] if by_reply and 0 < prompt_length < len(tokens) else [0]
        cache = DynamicCache(config=self.model.module.config) if len(cuts) > 1 else None
        for begin, end in zip(cuts, [*cuts[1:], len(tokens)], strict=True):
            piece = tokens[begin:end]
            started = time.perf_counter()
            with self._run(decisions, begin, len(piece), prompt_length):
                hidden = self._body(piece, cache)
                if trace is not None:
                    seconds = (time.perf_counter() - started) / len(piece)
                    trace += self._trace_of(decisions, begin, piece, seconds)
            for first in range(0, len(piece), chunk):
                yield begin + first, self._logits(hidden[first : first + chunk])

    @torch.inference_mode()
    def _body(self, tokens: Sequence[int], cache: DynamicCache | None) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self.model.device)
        held = {} if cache is None else {self._cache_argument: cache}
        out = self.model.module.base_model(input_ids=ids, use_cache=cache is not None, **held)
        return out.last_hidden_state[0]

    @torch.inference_mode()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output layer on hidden states (n, hidden): float32 (n, vocab) on the CPU."""
        logits = self.model.module.get_output_embeddings()(hidden).float()
        cap = getattr(self.model.module.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits.cpu()

    def _trace_of(self, decisions: Decisions, start: int, tokens: Sequence[int], seconds: float) -> list[StepTrace]:
        reads, kept = self._reads.per_token(decisions, len(tokens))
        clamped, beyond = self._integers.counts(len(tokens))
        return [
            StepTrace(
                start + i,
                int(token),
                seconds,
                int(reads[i]),
                decisions.record(i) if self.plan.deciders else {},
                clamped=int(clamped[i]),
                beyond=int(beyond[i]),
                kept_weights=float(kept[i]),
            )
            for i, token in enumerate(tokens)
        ]

    # Plan ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _run(self, decisions: Decisions, start: int, count: int, prompt_length: int) -> Iterator[None]:
        decisions.begin(start, count, prompt_length)
        self._running, self._start = decisions, start
        self._integers.begin(start)
        self._reads.begin()
        try:
            yield
        finally:
            self._running = None
            self._integers.begin(0)  # whoever runs the module itself starts there

    def _load_widths(self) -> None:
        """Dequantize every width that a consumer may choose."""
        for consumer in self.plan.consumers:
            if consumer.kind != "width":
                continue
            for linear in self.model.architecture.unit(consumer.target).linears:
                for bits in consumer.widths:
                    weight = self._weights.weight(linear.id, bits)
                    self._widths[linear.id, bits] = weight.to(self.model.device, self.model.dtype)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _install(self) -> None:
        """Hook exactly the modules that the plan or the tap concerns; a dense engine has no hooks at all."""
        self._remove_hooks()
        arch = self.model.architecture
        if self._tap is None and not (self.plan.deciders or self.plan.transforms):
            return
        for block in range(arch.n_blocks):
            residual = [d for d in self.plan.deciders if d.tap.kind == "residual" and d.tap.block == block]
            if residual or self._tap is not None:
                self._hooks.append(
                    self.model.block(block).register_forward_pre_hook(
                        self._block_hook(block, residual), with_kwargs=True
                    )
                )
        for linear in arch.linears:
            before, after = self._linear_hooks(linear)
            module = self.model.linear_module(linear.id)
            if before is not None:
                self._hooks.append(module.register_forward_pre_hook(before))
            if after is not None:
                self._hooks.append(module.register_forward_hook(after))

    def _block_hook(self, block: int, deciders: list[Decider]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._running is None:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            self._decide(deciders, hidden)
            if self._tap is not None:
                self._tap(f"blocks.{block}", self._start, _rows(hidden))

        return hook

    def _linear_hooks(self, linear: Linear) -> tuple[Callable | None, Callable | None]:
        arch = self.model.architecture
        unit = arch.unit(linear.unit)
        first = unit.linears[0].id == linear.id
        tap = _TAP_OF_UNIT[unit.kind] if first else None
        deciders = [d for d in self.plan.deciders if d.tap.kind == tap and d.tap.block == linear.block]
        here = [c for c in self.plan.consumers if c.target in (unit.id, f"blocks.{linear.block}")]
        transforms = [self._transform(t) for t in self.plan.transforms.get(linear.id, ())]
        masks = [c for c in here if (c.kind, unit.kind) in (("heads", "o"), ("neurons", "down"))]
        thresholds = [(c, self._factors(c)) for c in here if c.kind == "input_threshold"]
        widths = [c for c in here if c.kind == "width"]
        skipped_by = {"o": PATH_SKIP_ATTENTION, "down": PATH_SKIP_MLP}.get(unit.kind)
        paths = [c for c in here if c.kind == "path" and skipped_by is not None]

        def before(module: nn.Module, args: tuple) -> tuple | None:
            if self._running is None:
                return None
            x = args[0]
            self._decide(deciders, x)
            if self._tap is not None:
                self._tap(linear.id, self._start, _rows(x))
            for transform in transforms:
                x = transform(x)
            for consumer in masks:
                # Chosen and not multiplied: what is masked is zero even where it is infinite.
                mask = self._mask(consumer, arch.n_heads if unit.kind == "o" else arch.n_neurons, x.device)
                kept = mask.repeat_interleave(x.shape[-1] // mask.shape[-1], dim=-1).view(x.shape)
                x = torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=x.device))
            for consumer, factors in thresholds:
                size = x.float().abs() if factors is None else x.float().abs() * factors
                kept = size > self._value(consumer, size).view(*x.shape[:-1], 1)
                self._reads.note_inputs(linear.id, kept)
                x = x * kept
            return (x, *args[1:])

        def after(module: nn.Linear, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if self._running is None:
                return output
            for consumer in widths:
                output = self._at_widths(consumer, linear, module, args[0], output)
            for consumer in paths:
                value = self._value(consumer, output).view(*output.shape[:-1], 1)
                output = output * ~((value == skipped_by) | (value == PATH_SKIP_BLOCK))
            return output

        needs_before = self._tap is not None or deciders or transforms or masks or thresholds
        return (before if needs_before else None), (after if widths or paths else None)

    def _at_widths(
        self, consumer: Consumer, linear: Linear, module: nn.Linear, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Recompute each token's row with the weights of the width in force for it."""
        rows, out = _rows(x), _rows(output).clone()
        chosen = torch.from_numpy(consumer.bits(self._in_force(consumer)))
        for bits in chosen.unique().tolist():
            if bits not in consumer.widths:
                raise EngineError(
                    f"Slot '{consumer.slot}' asks for {bits} bits of {consumer.target}, which offers "
                    f"{list(consumer.widths)}."
                )
            where = chosen == bits
            out[where] = F.linear(rows[where], self._widths[linear.id, bits], module.bias)
        return out.view(output.shape)

    def _transform(self, transform: InputTransform) -> Callable[[torch.Tensor], torch.Tensor]:
        array = torch.from_numpy(np.ascontiguousarray(transform.array)).to(self.model.device)
        if transform.kind == "scale":
            return lambda x: x * array.to(x.dtype)
        if transform.kind == "order":
            return lambda x: x[..., array]
        return lambda x: (x.to(array.dtype) @ array).to(x.dtype)

    def _decide(self, deciders: list[Decider], hidden: torch.Tensor) -> None:
        if deciders and self._running is not None:
            taps = _rows(hidden).float().cpu().numpy()
            for decider in deciders:
                self._running.decide(decider, taps)

    def _value(self, consumer: Consumer, like: torch.Tensor) -> torch.Tensor:
        """The slot's values for the running chunk, on the device and in the dtype of ``like``."""
        return torch.from_numpy(self._in_force(consumer)).to(like.device, like.dtype)

    def _mask(self, consumer: Consumer, size: int, device: torch.device) -> torch.Tensor:
        """The part of a mask that a consumer reads, bool (tokens, size)."""
        if self._running is None:
            raise EngineError("A slot was read outside a run.")
        part = self._running.mask(consumer.slot, consumer.offset, consumer.offset + size)
        return torch.from_numpy(part != 0).to(device)

    def _factors(self, consumer: Consumer) -> torch.Tensor | None:
        if consumer.factors is None:
            return None
        return torch.from_numpy(np.array(consumer.factors, dtype=np.float32)).to(self.model.device)

    def _in_force(self, consumer: Consumer) -> np.ndarray:
        if self._running is None:
            raise EngineError("A slot was read outside a run.")
        return self._running.in_force(consumer.slot)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
