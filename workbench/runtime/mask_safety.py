"""A safety net under predicted masks: how sure the predictor is, whether its input is what it knows, and dense if not.

Both are told from the prompt alone, by what its last token decides and where its taps lie. What is compared is where
scores and inputs lie, not how good the masks are: that is not known while running, so silence is no proof.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.formats.mask_predictor import MaskPart, MaskPredictor
from workbench.formats.mask_statistics import MaskStatistics
from workbench.models.base import Architecture
from workbench.progress import Job
from workbench.runtime.base import GREEDY, Engine, Sampler
from workbench.runtime.feature_log import FeatureLog, FeatureReader
from workbench.runtime.holding import Controller, Held
from workbench.runtime.mask_log import MaskLog
from workbench.runtime.mask_shares import mask_thresholds, predictor_groups
from workbench.runtime.plan import Policy

IMPORTANT, UNSURE, UNLIKE = "important", "low confidence", "unlike the calibration text"
_LOW = 0.02  # share of held-out decisions that count as unsure
_FALSE = 0.01  # of texts like those of calibration, the share that may be called unlike
_UNIT = {"block_input": "qkv", "attention_output": "o", "mlp_input": "gate_up"}


@dataclass(frozen=True)
class Verdict:
    """What is known of a prompt.

    Attributes:
        confidence: see ``MaskWatch.confidence``; None where nobody looked.
        lowest: confidence below which a decision counts as unsure.
        drift: how far the prompt lies from the calibration texts, in standard errors; None where nobody looked, or of a
            prompt too short to tell.
        band: what drift may come to, either way.
        dense_because: why the request runs dense; empty where it does not.
    """

    confidence: float | None = None
    lowest: float | None = None
    drift: float | None = None
    band: float | None = None
    dense_because: str = ""

    @property
    def unsure(self) -> bool:
        return self.confidence is not None and self.lowest is not None and self.confidence < self.lowest

    @property
    def unlike(self) -> bool:
        return self.drift is not None and self.band is not None and abs(self.drift) > self.band


class MaskWatch:
    """Judges prompts by a predictor's statistics.

    Args:
        architecture: of the model.
        predictor: with statistics.
        sparsity: that it runs at.

    Attributes:
        lowest: the confidence that 2 % of the decisions on held-out text stay below.
        band: 99 % of texts like those of calibration lie within it, as Student's t of one text beside them says.

    Raises:
        InputError: a predictor without statistics, or a sparsity that is not possible.
    """

    def __init__(self, architecture: Architecture, predictor: MaskPredictor, sparsity: float) -> None:
        from scipy.special import stdtrit

        self.architecture, self.predictor, self.statistics = architecture, predictor, _statistics(predictor)
        groups = predictor_groups(architecture, predictor)
        sizes = [group.size for group in groups]
        thresholds = mask_thresholds(architecture, predictor, sparsity)
        self._thresholds = np.repeat(thresholds, sizes)
        self._errors = np.repeat(self.statistics.errors.astype(np.float64), sizes)
        weights = [
            float(group.weights) if cut > np.finfo(np.float32).min else 0.0
            for group, cut in zip(groups, thresholds, strict=True)
        ]  # groups that stay whole say nothing
        self._weights = np.repeat(weights, sizes)
        self.sites = tuple(site_of(architecture, part) for part in predictor.parts)
        self.lowest = float(np.quantile(self._confidence([h.astype(np.float32) for h in self.statistics.held]), _LOW))
        self.band = float(stdtrit(int(self.statistics.texts) - 1, 1 - _FALSE / 2))

    def confidence(self, taps: Sequence[np.ndarray]) -> np.ndarray:
        """How sure decisions are, float64 (n,), from 1/2 to 1, of the taps (n, width) of each part.

        The distance of every unit's score to its threshold, in units of the score's held-out error, gives the chance
        that what the score stands for lies on the same side, were errors normal; averaged over units by their weights.
        """
        return self._confidence([part.hidden_of(x) for part, x in zip(self.predictor.parts, taps, strict=True)])

    def drift(self, distances: np.ndarray) -> float | None:
        """Where a text of these distances (n,) of its tokens, the first left out, lies among the calibration texts.

        In standard errors of one more text: the logarithm of the mean distance, less its mean over those texts at as
        many tokens, over their standard deviation. None below the fewest tokens that calibration looked at.
        """
        lengths, drift = self.statistics.lengths, self.statistics.drift.astype(np.float64)
        if not len(lengths) or len(distances) < lengths[0]:
            return None
        at = np.log(len(distances))
        mean, deviation = (float(np.interp(at, np.log(lengths), drift[:, i])) for i in (0, 1))
        texts = int(self.statistics.texts)
        return (float(np.log(distances.mean())) - mean) / (deviation * (1 + 1 / texts) ** 0.5)

    def _confidence(self, hidden: Sequence[np.ndarray]) -> np.ndarray:
        from scipy.special import ndtr

        scores = np.hstack([part.scores_of(h) for part, h in zip(self.predictor.parts, hidden, strict=True)])
        if not self._weights.any():
            return np.ones(len(scores))
        sure = ndtr(np.abs(scores.astype(np.float64) - self._thresholds) / self._errors)
        return sure @ self._weights / self._weights.sum()


class PromptReader:
    """A tap callback (``numpy``) that keeps of a prompt what a watch judges it by, and counts decisions in a log.

    Args:
        watch: whose predictor is read.
        log: what decisions are added to, if anything.
        decides: for positions (n,), whether something is decided there, bool (n,).
    """

    def __init__(
        self,
        watch: MaskWatch,
        log: MaskLog | None = None,
        decides: Callable[[np.ndarray], np.ndarray] = lambda positions: positions >= 0,
    ) -> None:
        self._watch, self._log, self._decides = watch, log, decides
        self._last: dict[str, np.ndarray] = {}
        self._distances: list[np.ndarray] = []

    def __call__(self, site: str, first: int, rows: Any) -> None:
        if site not in self._watch.sites:
            return
        if self._log is not None:
            chosen = self._decides(np.arange(first, first + len(rows)))
            part = self._watch.sites.index(site)
            self._log.see(self._watch.architecture, self._watch.predictor, part, rows[chosen])
        self._last[site] = np.array(rows[-1:], dtype=np.float32)
        if site == self._watch.sites[0] and len(rows) > (first == 0):
            self._distances.append(self._watch.statistics.distance(rows[1:] if first == 0 else rows))

    def judged(self) -> Verdict:
        """What the tokens seen so far say; the last of them is the prompt's."""
        confidence = self._watch.confidence([self._last[site] for site in self._watch.sites])[0]
        distances = np.concatenate(self._distances) if self._distances else np.zeros(0)
        drift = self._watch.drift(distances)
        return Verdict(float(confidence), self._watch.lowest, drift, self._watch.band)


def guarded_reply(
    engine: Engine,
    watch: MaskWatch | None,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    important: bool = False,
    guard: bool = True,
    fail_safe: bool = False,
    seed: int = 0,
    sampler: Sampler = GREEDY,
    stop_tokens: Sequence[int] = (),
    job: Job | None = None,
    log: MaskLog | None = None,
    features: tuple[FeatureLog, FeatureReader] | None = None,
    controller: Controller | None = None,
) -> tuple[Any, list[int], Verdict]:
    """Reply under an engine's mask plan, or dense where that is called for.

    A request that turns out to want it is begun anew, so that nothing of its prompt was left out either: its prompt is
    read twice. That is one sequence's policy; other sequences of the engine go on as they are. The policy of the engine
    is its plan's own afterwards.

    Args:
        engine: opened under a mask plan.
        watch: judges the prompt; None judges nothing.
        prompt: tokens.
        new_tokens: at most.
        important: run dense, whatever the prompt.
        guard: run dense where the predictor is unsure at the prompt's last token; otherwise only say so.
        fail_safe: run dense where the prompt is unlike the calibration text, too.
        seed: of the sequence.
        sampler: see ``Engine.generate``.
        stop_tokens: see there.
        job: see there.
        log: what the request is added to, with every decision that was looked at (none of a sequence that runs dense);
            taps are then read all along, which takes time. With a watch alone.
        features: where a sample of its tokens goes if it runs dense, and what takes it.
        controller: moves the engine's thresholds, those of all its sequences, while the request runs; not where it
            runs dense.

    Returns:
        The sequence, its new tokens, and what is known of the prompt.
    """
    options: dict[str, Any] = {"sampler": sampler, "stop_tokens": stop_tokens, "job": job}
    verdict = Verdict(dense_because=IMPORTANT)
    if not important:
        sequence = engine.start(seed=seed)
        held = None if controller is None else Held(engine, sequence, controller)
        between = None if held is None else held.look
        if watch is None:
            try:
                reply = engine.generate(sequence, prompt, new_tokens, on_token=held, between=between, **options)
            finally:
                _ended(engine, held)
            return sequence, reply, Verdict()
        reader = PromptReader(watch, log, functools.partial(_decided, engine, len(prompt)))
        found: list[Verdict] = []

        def look() -> None:
            if found:
                return
            if log is None:
                engine.set_tap(None)
            judged = reader.judged()
            because = UNSURE if guard and judged.unsure else UNLIKE if fail_safe and judged.unlike else ""
            found.append(Verdict(judged.confidence, judged.lowest, judged.drift, judged.band, because))
            if because:
                raise _Dense

        def on_token(token: int) -> None:
            look()
            if held is not None:
                held(token)

        engine.set_tap(reader, numpy=True)
        try:
            reply = engine.generate(sequence, prompt, new_tokens, on_token=on_token, between=between, **options)
            look()
            _counted(log, sequence, len(prompt), found[0])
            return sequence, reply, found[0]
        except _Dense:
            verdict = found[0]
        finally:
            engine.set_tap(None)
            _ended(engine, held)
    engine.set_policy(Policy(values=dict.fromkeys(engine.plan.slots, 1.0)))
    sequence = engine.start(seed=seed)
    engine.set_policy(Policy())
    if features is not None:
        engine.set_tap(features[1], numpy=True)
    try:
        reply = engine.generate(sequence, prompt, new_tokens, **options)
    finally:
        engine.set_tap(None)
    if features is not None:
        features[0].finish()
    _counted(log, sequence, len(prompt), verdict)
    return sequence, reply, verdict


def _ended(engine: Engine, held: Held | None) -> None:
    """Let the controller see the last tokens; thresholds are the plan's own again."""
    if held is not None:
        held.finish()
        engine.set_policy(Policy())


def _decided(engine: Engine, prompt: int, positions: np.ndarray) -> np.ndarray:
    """Whether the plan decides at positions (n,), bool (n,): all its deciders do so together."""
    decider = engine.plan.deciders[0]
    if decider.scope.kind == "reply":
        return positions == prompt - 1
    return (positions >= getattr(decider.program, "first", 0)) & (positions % decider.scope.n == 0)


def _counted(log: MaskLog | None, sequence: Any, prompt: int, verdict: Verdict) -> None:
    if log is not None:
        dense = bool(verdict.dense_because)
        log.finish(sequence.trace[prompt:], verdict.confidence, verdict.drift, dense=dense)


class _Dense(Exception):
    """The request is to run dense: leaves the generation that found it out."""


def site_of(architecture: Architecture, part: MaskPart) -> str:
    """Where an engine's tap shows what a part reads."""
    if part.tap == "residual":
        return f"blocks.{part.block}"
    return architecture.unit(f"blocks.{part.block}.{_UNIT[part.tap]}").linears[0].id


def _statistics(predictor: MaskPredictor) -> MaskStatistics:
    if predictor.statistics is None:
        raise InputError("This model keeps no statistics of its mask predictor: compress it again to have it watched.")
    return predictor.statistics
