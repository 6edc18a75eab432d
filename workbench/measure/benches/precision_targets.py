"""Rows of bench ``precision`` between whole widths: static allocations and choices per token, at the same average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.analysis.damage import UnitScores, unit_scores
from workbench.analysis.sampled_text import SampledText, sampled_corpus
from workbench.apply.allocation import allocate, gain_damage, learnt_damage
from workbench.corpus import TextRecord, Window, windows
from workbench.errors import RecipeError
from workbench.formats.compressed import CompressedModel
from workbench.formats.nested import Nested
from workbench.formats.selectors import Selectors, share_above
from workbench.measure.bench import BenchContext
from workbench.measure.benches.precision_oracle import ExactChoices
from workbench.measure.kept_quality import compare_kept
from workbench.measure.quality import QualityResult, compare_candidates
from workbench.models.base import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import Engine, StepTrace
from workbench.runtime.plan import Plan, Policy
from workbench.runtime.precision import (
    WidthReader,
    cuts_of,
    gain_thresholds,
    ladder_plan,
    precision_plan,
    target_range,
)
from workbench.runtime.precision_control import PrecisionController

TARGETS = (3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75)
QUICK_TARGETS = (3.25, 4.0, 4.75)
STATIC = ("static-llm-mq", "static-hawq", "static-learnt", "static-gain")
_SCORED = 32  # windows of 128 tokens that the scores of the static rivals are taken from
_POSITIONS = 0.5  # bits more in the first half of a window, and fewer in the second, of the schedule by position
_MATCHED = 8  # windows that the oracle's bits are matched on
_AT_ONCE = 24  # candidates beside one dense pass: each holds logits of 128 positions


@dataclass
class Candidate:
    """One way to choose widths, at one target, and what it did on a text.

    Attributes:
        method: name of the row.
        target: average bits asked for.
        engine: what runs it; several candidates may share one.
        policy: of the engine while this candidate runs.
        variant: of the row.
        controller: replaces the policy by its own.
        replay: decisions for a window, given its tokens.
        model: what the engine runs.
        read_bits: bits per weight of block linears that a token read: codes, scales and zero points, and decisions.
        realised_bits: average code bits.
    """

    method: str
    target: float
    engine: Engine
    model: CompressedModel
    policy: Policy
    variant: str = ""
    controller: PrecisionController | None = None
    replay: Callable[[Sequence[int]], Sequence[dict[str, Any]]] | None = None
    read_bits: float = math.nan
    realised_bits: float = math.nan

    @property
    def about(self) -> list[Any]:
        """What its choices depend on beside its model and plan; a replay follows from the name and the target."""
        return [self.method, self.variant, self.target, self.policy]

    @property
    def decision_bits(self) -> float:
        """What decisions read, bits per weight of the blocks' linears."""
        weights = sum(unit.n_weights for unit in self.model.architecture.units)
        return 8 * sum(decider.program.bytes for decider in self.engine.plan.deciders) / weights


class Chosen:
    """A candidate as an engine: sets its policy before every chunk, for others share it, and keeps its trace."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate, self._engine = candidate, candidate.engine
        self.name, self.activation_mode = self._engine.name, self._engine.activation_mode
        self.plan, self.vocab_size = self._engine.plan, self._engine.vocab_size
        self.context_length, self.model = self._engine.context_length, self._engine.model
        parts = candidate.model.architecture
        linears = {unit.id: [candidate.model.linears[linear.id] for linear in unit.linears] for unit in parts.units}

        def stored(unit: str, bits: int) -> float:
            """Bits read per weight of a unit."""
            return sum(e.read_bits(bits) for e in linears[unit]) / sum(e.shape[0] * e.shape[1] for e in linears[unit])

        self._widths = WidthReader(parts, self.plan)
        self._stored = WidthReader(parts, self.plan, stored)
        self._read, self._bits = list[float](), list[float]()  # of each token

    def facts(self) -> dict[str, float]:
        """Averages over the tokens of the text, by attribute of ``Candidate``."""
        return {"read_bits": float(np.mean(self._read)), "realised_bits": float(np.mean(self._bits))}

    def log_probabilities(
        self, tokens: Sequence[int], *, prompt_length: int = 1, chunk: int = 128
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See ``Engine.log_probabilities``."""
        one, trace = self._candidate, list[StepTrace]()
        replay = one.replay(tokens) if one.replay is not None else None
        rows = self._engine.log_probabilities(
            tokens, prompt_length=prompt_length, chunk=chunk, replay=replay, trace=trace
        )
        while True:
            self._engine.set_policy(one.controller.policy if one.controller is not None else one.policy)
            trace.clear()
            found = next(rows, None)
            if found is None:
                return
            self._read += (self._stored(trace) + one.decision_bits).tolist()
            self._bits += self._widths(trace).tolist()
            if one.controller is not None:
                one.controller.observe(trace)
            yield found


class Targets:
    """All candidates of a model with selectors, their engines opened once."""

    def __init__(self, dense: LoadedModel, model: CompressedModel, context: BenchContext) -> None:
        if model.selectors is None:
            raise RecipeError("The bench needs a model with selectors: compress it with 'dynamic-precision'.")
        self.model, self._dense, self._context = model, dense, context
        self.selectors: Selectors = model.selectors
        self.targets = QUICK_TARGETS if context.quick else TARGETS
        self._scores: pd.DataFrame | None = None
        self._engines: list[Engine] = []
        self._gain: Engine | None = None

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _open(self, plan: Plan) -> Engine:
        engine = open_engine(self.model, threads=self._context.threads, plan=plan)
        self._engines.append(engine)
        return engine

    def allocation(self, method: str, target: float) -> dict[str, int]:
        """Widths of a static rival, solved exactly."""
        arch = self.model.architecture
        low, high = target_range(arch, self.selectors)
        target = min(max(target, low), high)
        if method == "static-learnt":
            return allocate(learnt_damage(arch, self.selectors, target), target)
        if method == "static-gain":
            return allocate(gain_damage(arch, self.selectors), target)
        column = {"static-llm-mq": "gradient", "static-hawq": "fisher"}[method]
        return allocate(self._table().rename(columns={column: "damage"}), target)

    def _table(self) -> pd.DataFrame:
        """First- and second-order scores on the same nested weights."""
        if self._scores is None:
            text = self._context.analyze(SampledText(self._dense, "tuning", _SCORED * 144), self._context.job)
            short = [list(w.tokens) for w in windows(sampled_corpus(text), self._dense, 128)][:_SCORED]
            codes = {name: e.codes for name, e in self.model.linears.items() if isinstance(e, Nested)}
            widths = [int(bits) for bits in self.selectors.widths]
            analysis = UnitScores(self._dense, short, widths=widths, codes=codes)
            table = unit_scores(self._context.analyze(analysis, self._context.job))
            highest = dict(zip((u.id for u in self.model.architecture.units), self.selectors.highest, strict=True))
            self._scores = table[table["bits"] <= table["unit"].map(highest).astype(int)]
        return self._scores

    def statics(self, wanted: Sequence[tuple[str, float]]) -> list[Candidate]:
        """Candidates of static allocations, all in one engine."""
        allocations = [self.allocation(method, target) for method, target in wanted]
        engine = self._open(ladder_plan(self.model.architecture, allocations))
        return [
            Candidate(method, target, engine, self.model, Policy({"level": level}))
            for level, (method, target) in enumerate(wanted)
        ]

    def first_widest(self, length: int) -> list[Candidate]:
        """Static allocations, with the first token read at the widest as ``dynamic`` does: what that alone gives."""
        low, high = target_range(self.model.architecture, self.selectors)
        rest = [max((t * length - high) / (length - 1), low) for t in self.targets]
        allocations = [self.allocation("static-gain", high), *(self.allocation("static-gain", t) for t in rest)]
        engine = self._open(ladder_plan(self.model.architecture, allocations))
        found = []
        for level, target in enumerate(self.targets, start=1):

            def replay(tokens: Sequence[int], level: float = level) -> list[dict[str, Any]]:
                return [{"level": level if at else 0.0} for at in range(len(tokens))]

            variant = "first token at the widest"
            found.append(Candidate("static-gain", target, engine, self.model, Policy(), variant, replay=replay))
        return found

    def by_position(self) -> list[Candidate]:
        """The learnt allocation of more bits in the first half of every window, of fewer in the second."""
        low, high = target_range(self.model.architecture, self.selectors)
        allocations, found = list[dict[str, int]](), []
        for target in self.targets:
            more = min(_POSITIONS, high - target, target - low)
            allocations += [self.allocation("static-learnt", target + sign * more) for sign in (1, -1)]
        engine = self._open(ladder_plan(self.model.architecture, allocations))
        for index, target in enumerate(self.targets):
            first, second = {"level": 2.0 * index}, {"level": 2.0 * index + 1}

            def replay(
                tokens: Sequence[int], first: dict[str, float] = first, second: dict[str, float] = second
            ) -> list[dict[str, Any]]:
                return [first if at < len(tokens) / 2 else second for at in range(len(tokens))]

            found.append(
                Candidate("by-position", target, engine, self.model, Policy(), "halves of a window", replay=replay)
            )
        return found

    def dynamic(self) -> list[Candidate]:
        """The rule ``gain``: with the thresholds of calibration, held on the target, and its rates drawn at random."""
        arch = self.model.architecture
        if self._gain is None:
            self._gain = self._open(precision_plan(arch, self.selectors, self.targets[0]))
        found = []
        for target in self.targets:
            thresholds = gain_thresholds(arch, self.selectors, target)
            policy = Policy(thresholds=thresholds)
            controller = PrecisionController(arch, self.selectors, target)
            found.append(Candidate("dynamic", target, self._gain, self.model, policy, "held on target", controller))
            if not self._context.quick:
                found.append(Candidate("dynamic", target, self._gain, self.model, policy, "thresholds of calibration"))
            found.append(
                Candidate(
                    "random", target, self._gain, self.model, policy, "rates of dynamic", replay=self._drawn(thresholds)
                )
            )
        return found

    def _drawn(self, thresholds: Mapping[str, Sequence[float]]) -> Callable[[Sequence[int]], list[dict[str, Any]]]:
        """Levels drawn for each token and unit with the rates that these thresholds have on calibration text."""
        cuts = cuts_of(self.model.architecture, self.selectors, thresholds)
        above = np.stack([share_above(q, c) for q, c in zip(self.selectors.norms, cuts, strict=True)])
        names = [unit.id for unit in self.model.architecture.units]
        random = np.random.default_rng(0)

        def replay(tokens: Sequence[int]) -> list[dict[str, Any]]:
            chosen = (random.random((len(tokens), len(names), 1)) < above).sum(axis=2).astype(float)
            chosen[0] = [len(cut) for cut in thresholds.values()]
            return [dict(zip(names, row.tolist(), strict=True)) for row in chosen]

        return replay

    def published(self) -> list[Candidate]:
        """DP-LLM: a plan of its own for every target, since its estimators belong to pairs of widths."""
        return [
            Candidate("dpllm", target, self._open(plan), self.model, Policy(), _estimators(plan))
            for target in self.targets
            for plan in [precision_plan(self.model.architecture, self.selectors, target, "error")]
        ]

    def oracle(self, published: Sequence[Candidate], windows: Sequence[Window]) -> list[Candidate]:
        """DP-LLM on exact errors, in the engines of the published ones, which have been evaluated.

        Under the thresholds of calibration, and under such as read as many bits of these windows as estimates did.
        """
        weights: dict[tuple[str, int], torch.Tensor] = {}
        some = [window.tokens for window in windows[:: -(-len(windows) // _MATCHED)]]
        found = []
        for one in published:
            for variant in ("exact errors", "exact errors, as many bits as dpllm"):
                exact = ExactChoices(self._dense, self.model, one.engine.plan, one.target, weights)
                if variant != "exact errors":
                    exact.read_as_many(one.realised_bits, some)
                found.append(
                    Candidate("dpllm-oracle", one.target, one.engine, self.model, Policy(), variant, replay=exact)
                )
        return found


def _estimators(plan: Plan) -> str:
    kinds = [type(decider.program).__name__ for decider in plan.deciders]
    return (
        f"{kinds.count('NormLevels')} norms, {kinds.count('ProjectionLevels')} projections, "
        f"{kinds.count('PositionTable')} fixed"
    )


def evaluate(
    dense: Engine, candidates: Sequence[Candidate], text: Sequence[Window], record: TextRecord, context: BenchContext
) -> list[QualityResult]:
    """Quality of all candidates on the same windows; fills what they read."""
    found: list[QualityResult] = []
    for begin in range(0, len(candidates), _AT_ONCE):
        part = candidates[begin : begin + _AT_ONCE]
        engines: list[Any] = [Chosen(candidate) for candidate in part]
        about = [candidate.about for candidate in part]
        found += compare_kept(context.shelf, dense, engines, text, about=about, text=record, job=context.job)
    for candidate, quality in zip(candidates, found, strict=True):
        candidate.read_bits, candidate.realised_bits = (quality.facts[n] for n in ("read_bits", "realised_bits"))
    return found


def against_static(
    targets: Targets,
    dense: Engine,
    rows: Sequence[tuple[Candidate, QualityResult]],
    known: Sequence[tuple[Candidate, QualityResult]],
    text: Sequence[Window],
    record: TextRecord,
    context: BenchContext,
) -> list[dict[str, Any]]:
    """Columns that compare each candidate with the best static allocation that reads as many bits, decisions counted.

    A static allocation pays no decisions, so it may read as many code bits more. Best is the one of lowest negative
    log-likelihood on this very text, among those solved for learnt precisions and for gains: a rival that a user
    could only know afterwards. ``known`` are results at the targets.
    """
    options: tuple[str, ...] = ("static-learnt", "static-gain")
    if context.quick:  # the better one at the targets alone
        at = {(c.method, c.target): q.delta_nll.value for c, q in known if not c.variant}
        totals = {method: sum(at[method, target] for target in targets.targets) for method in options}
        options = (min(totals, key=totals.__getitem__),)
    wanted = [(method, c.realised_bits + c.decision_bits) for c, _ in rows for method in options]
    rivals = targets.statics(wanted)
    found = evaluate(dense, rivals, text, record, context)
    columns = []
    for index, (_, quality) in enumerate(rows):
        pairs = list(zip(rivals, found, strict=True))[len(options) * index : len(options) * (index + 1)]
        rival, best = min(pairs, key=lambda pair: pair[1].delta_nll.value)
        difference = compare_candidates(quality, best)
        columns.append(
            {
                "rival": rival.method,
                "rival_read_bits": rival.read_bits,
                "rival_ratio": float(np.exp(best.delta_nll.value)),
                "to_rival": difference.delta_nll.value,
                "to_rival_low": difference.delta_nll.low,
                "to_rival_high": difference.delta_nll.high,
                "kl_to_rival": difference.kl.value,
                "kl_to_rival_low": difference.kl.low,
                "kl_to_rival_high": difference.kl.high,
            }
        )
    return columns
