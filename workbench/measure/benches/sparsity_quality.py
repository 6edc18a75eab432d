"""Quality of the contenders of bench ``sparsity``: all on the same tokens, each with its plan, policy or masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from workbench.analysis.masking import MaskKind
from workbench.analysis.sparsity import score_units
from workbench.corpus import TextRecord, Window
from workbench.formats.mask_predictor import MaskPredictor
from workbench.measure.bench import BenchContext
from workbench.measure.benches.sparsity_methods import FIXED, Contender
from workbench.measure.kept_quality import compare_kept
from workbench.measure.memory import engines_at_once
from workbench.measure.quality import QualityResult
from workbench.measure.sparse_plans import layout_key, share_controller, sparse_plan, sparse_policy
from workbench.models.base import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import Engine, StepTrace
from workbench.runtime.mask_shares import predictor_groups
from workbench.runtime.masks import constant_mask, oracle_decisions
from workbench.runtime.plan import Policy

PREFIX = 64  # tokens of a window that masks leave whole; nothing that predicts them is counted, for any contender
_AT_ONCE = 24  # contenders beside one dense pass: each holds logits of 128 positions
_HELD = 32  # positions between two looks at a share that is held

Replay = Callable[[Sequence[int]], list[dict[str, Any]]]


def measure_quality(
    model: LoadedModel,
    contenders: Sequence[Contender],
    windows: Sequence[Window],
    record: TextRecord,
    context: BenchContext,
) -> dict[Contender, QualityResult]:
    """Quality on the tokens after the prefix; ``facts`` of a result are ``effective_sparsity`` and ``read_bits`` there.

    Windows are longer than the prefix by two tokens or more. Contenders with a note are left out.
    """
    able = [contender for contender in contenders if not contender.note]
    found: dict[Contender, QualityResult] = {}
    dense = open_engine(model, threads=context.threads, activation_mode="fp32")
    truth = _Truth(model)
    try:
        for part in _batches(able, engines_at_once(model.n_parameters)):
            opened: dict[tuple[Any, ...], Engine] = {}
            try:
                engines: list[Any] = [
                    Sparse(one, engine_of(one, opened, context), masks_of(one, truth)) for one in part
                ]
                about = [engine.about for engine in engines]
                results = compare_kept(
                    context.shelf, dense, engines, windows, about=about, text=record, given=PREFIX + 1, job=context.job
                )
            finally:
                for engine in opened.values():
                    engine.close()
            found |= zip(part, results, strict=True)
    finally:
        dense.close()
    return found


def _batches(able: Sequence[Contender], at_once: int) -> Iterator[Sequence[Contender]]:
    """Oracles together, so that a window's true scores are measured once; the rest by the weights that engines hold."""
    groups = [[c for c in able if c.method == "oracle"]]
    for bits in dict.fromkeys(c.bits for c in able):
        groups.append([c for c in able if c.bits == bits and c.method != "oracle"])
    for group in groups:
        part, keys = list[Contender](), set[Any]()
        for one in group:
            key = engine_key(one)
            if len(part) == _AT_ONCE or (key not in keys and len(keys) == at_once):
                yield part
                part, keys = [], set()
            part.append(one)
            keys.add(key)
        if part:
            yield part


def engine_key(contender: Contender) -> tuple[Any, ...]:
    """Contenders of the same are run by one engine: they differ in policy or recorded masks alone."""
    if contender.method in FIXED:
        return (contender.bits, "fixed")
    if contender.asked is None:
        return (contender.bits,)
    return (contender.bits, id(contender.tables), layout_key(contender.asked))


def engine_of(
    contender: Contender, opened: dict[tuple[Any, ...], Engine], context: BenchContext, prefix: int | None = None
) -> Engine:
    """An engine that runs the contender, shared with those that differ in policy or recorded masks alone.

    Args:
        contender: to run.
        opened: engines with one prefix, to which this one is added; the caller closes them. Weights lie as those whose
            speed is measured, so that ``read_bits`` are theirs.
        context: of the bench.
        prefix: tokens that masks leave whole; None for those of quality.
    """
    asked = contender.asked
    key = engine_key(contender)
    if key not in opened:
        plan = None
        if asked is not None:
            # Fixed masks are replayed, so that one engine serves all of them.
            kind = "oracle" if contender.method in FIXED else asked["kind"]
            whole = PREFIX if prefix is None else prefix
            plan = sparse_plan(contender.tables, {**asked, "kind": kind, "prefix": whole})
        opened[key] = open_engine(contender.whole, threads=context.threads, plan=plan)
    engine = opened[key]
    contender.ran_by, contender.activation_mode = engine.name, engine.activation_mode
    return engine


def masks_of(contender: Contender, truth: _Truth | None = None) -> Replay | np.ndarray | None:
    """The recorded masks of a contender that predicts none: of every window, or one for all tokens.

    ``truth`` is for the oracle's.
    """
    if contender.method not in FIXED or contender.asked is None:
        return None
    asked, predictor = contender.asked, contender.tables.mask_predictor
    assert predictor is not None  # it was compressed so
    if contender.method == "oracle":
        assert truth is not None
        return truth.masks(predictor, contender.sparsity, asked["allocation"])
    mask = constant_mask(
        contender.tables.architecture,
        predictor,
        contender.sparsity,
        kind=asked["kind"],
        allocation=asked["allocation"],
        criterion=asked.get("criterion"),
    )
    return mask.astype(np.uint8)


class Sparse:
    """A contender as an engine: sets its policy before every chunk, for others share it, and adds up its trace.

    A share that is held is held over all windows: each chunk of one follows from those before.
    """

    def __init__(self, contender: Contender, engine: Engine, masks: Replay | np.ndarray | None) -> None:
        self._engine, self._masks = engine, masks
        self.name, self.activation_mode = engine.name, engine.activation_mode
        self.plan, self.vocab_size = engine.plan, engine.vocab_size
        self.context_length, self.model = engine.context_length, engine.model
        self.isa = str(getattr(engine, "isa", ""))
        self._policy, self._controller = Policy(), None
        if contender.asked is not None and masks is None:
            self._policy = sparse_policy(contender.tables, contender.asked)
            self._controller = share_controller(contender.tables, contender.asked, first=PREFIX)
        self._weights = sum(linear.n_weights for linear in contender.whole.architecture.linears)
        self._left = list[float]()  # of each counted token
        self._read = list[int]()
        given = masks if isinstance(masks, np.ndarray) else None
        self.about = [contender.method, contender.sparsity, contender.criterion, contender.asked, self._policy, given]

    def facts(self) -> dict[str, float]:
        """Averages over the counted tokens."""
        read = 8 * float(np.mean(self._read)) / self._weights
        return {"effective_sparsity": float(np.mean(self._left)), "read_bits": read}

    def _replay(self, tokens: Sequence[int]) -> list[dict[str, Any]] | None:
        if self._masks is None:
            return None
        if not isinstance(self._masks, np.ndarray):
            return self._masks(tokens)
        slot, whole = self.plan.deciders[0].slot, np.ones_like(self._masks)
        return [{slot: self._masks if at >= PREFIX else whole} for at in range(len(tokens))]

    def log_probabilities(
        self, tokens: Sequence[int], *, prompt_length: int = 1, chunk: int = 128
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See ``Engine.log_probabilities``; the prefix is the prompt."""
        trace, held = list[StepTrace](), self._controller
        chunk = chunk if held is None else min(chunk, _HELD)
        rows = self._engine.log_probabilities(
            tokens, prompt_length=PREFIX, chunk=chunk, replay=self._replay(tokens), trace=trace
        )
        while True:
            self._engine.set_policy(self._policy if held is None else held.policy)
            trace.clear()
            found = next(rows, None)
            if found is None:
                return
            if held is not None:
                held.observe(trace)
            for step in trace:
                if PREFIX <= step.position < len(tokens) - 1:
                    self._left.append(1 - step.kept_weights)
                    self._read.append(step.read_bytes)
            yield found


class _Truth:
    """Masks of what a window's heads and neurons really score, by gradients of its own text."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._scores: tuple[Any, np.ndarray] | None = None  # of the latest window
        self._masks: dict[Any, list[dict[str, Any]]] = {}  # of the latest window too

    def masks(self, predictor: MaskPredictor, sparsity: float, allocation: Any) -> Replay:
        architecture = self._model.architecture

        def replay(tokens: Sequence[int]) -> list[dict[str, Any]]:
            scores = self._true(tuple(tokens), predictor)
            key = (sparsity, allocation)
            if key not in self._masks:
                self._masks[key] = oracle_decisions(
                    architecture, predictor, scores, sparsity, prefix=PREFIX, allocation=allocation
                )
            return self._masks[key]

        return replay

    def _true(self, tokens: tuple[int, ...], predictor: MaskPredictor) -> np.ndarray:
        """Scores float32 (tokens, units of the predictor's groups)."""
        criterion = str(predictor.facts["criterion"])
        if self._scores is None or self._scores[0] != (tokens, criterion):
            by_group: dict[tuple[int, MaskKind], np.ndarray] = {}

            def sink(block: int, kind: MaskKind, found: Any) -> None:
                by_group[block, kind] = found[criterion][0].cpu().numpy()

            score_units(self._model, torch.tensor([tokens]), [criterion], sink)
            groups = predictor_groups(self._model.architecture, predictor)
            self._masks.clear()
            self._scores = (
                (tokens, criterion),
                np.concatenate([by_group[group.block, group.kind] for group in groups], axis=1),
            )
        return self._scores[1]
