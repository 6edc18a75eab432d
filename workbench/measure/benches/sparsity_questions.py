"""Answers of the contenders of bench ``sparsity`` to multiple-choice questions, with masks in force where it counts.

A question is shorter than the tokens that masks leave whole of a window, and under that prefix an answer would say
nothing about them. So the question is the prefix here: its last token, which the first token of an answer is predicted
from, and the tokens of the answer run under a mask, decided at each of them from what precedes it. What stands before
that last token is whole, as a short prompt is while serving. Inputs are left out from the second token on, as always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.corpus import questions
from workbench.measure.bench import BenchContext
from workbench.measure.benches import sparsity_methods
from workbench.measure.benches.sparsity_methods import Contender, standard
from workbench.measure.benches.sparsity_quality import engine_key, engine_of, masks_of
from workbench.measure.kept_quality import answer_kept
from workbench.measure.sparse_plans import share_controller, sparse_policy
from workbench.measure.tasks import TaskResult, paired
from workbench.models.base import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import Engine, StepTrace
from workbench.runtime.masks import whole_policy
from workbench.runtime.plan import Policy

KEYS = (
    "questions",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "accuracy_change",
    "accuracy_change_low",
    "accuracy_change_high",
    "flips",
    "flips_to_whole",
    "answers_sparsity",
    "answers_measured_at",
)
_QUICK_EACH = 8  # of so many questions where quick, evenly over domains: what fits into its five minutes


def measure_answers(
    model: LoadedModel, listed: Sequence[Contender], context: BenchContext
) -> dict[Contender, dict[str, Any]]:
    """Columns of those contenders that answer.

    Those are all that could choose so while writing, as they are by default: no oracle, whose masks know the scores.
    Where quick, at one sparsity and by every eighth question.
    """
    able = [one for one in listed if not one.note and one.method != "oracle"]
    able = [one for one in able if one is standard(listed, one, one.method)]
    asked = questions()
    if context.quick:
        able = [one for one in able if one.sparsity in (0.0, sparsity_methods.ONE_SPARSITY)]
        asked = asked[::_QUICK_EACH]
    dense = open_engine(model, threads=context.threads, activation_mode="fp32")
    try:
        side: Any = Answering(dense)
        truth = answer_kept(context.shelf, side, asked, about="dense", job=context.job)
    finally:
        dense.close()
    answers: dict[Contender, TaskResult] = {}
    for key in dict.fromkeys(engine_key(one) for one in able):
        opened: dict[tuple[Any, ...], Engine] = {}
        try:
            for one in (one for one in able if engine_key(one) == key):
                side = Answering(engine_of(one, opened, context, prefix=0), one)
                answers[one] = answer_kept(context.shelf, side, asked, about=side.about, job=context.job)
        finally:
            for running in opened.values():
                running.close()
    return {one: _columns(one, answers, truth) for one in answers}


class Answering:
    """An engine that answers under a contender's masks; ``measure.tasks`` asks for what is here and no more."""

    def __init__(self, engine: Engine, contender: Contender | None = None) -> None:
        self._engine: Any = engine
        self.name, self.activation_mode, self.plan = engine.name, engine.activation_mode, engine.plan
        self.context_length, self.model = engine.context_length, engine.model
        self.isa = str(getattr(engine, "isa", ""))
        self._policy, self._mask, self._predicted, self._controller = Policy(), None, False, None
        self._left = list[float]()  # of each step that part of an answer is predicted from
        self.about: list[Any] = []
        if contender is None or contender.asked is None:
            return
        found = masks_of(contender)
        if found is not None:
            assert isinstance(found, np.ndarray)  # one mask for all tokens
            self._mask = found
        else:
            self._policy = sparse_policy(contender.tables, contender.asked)
            self._controller = share_controller(contender.tables, contender.asked, first=0)
            self._predicted = contender.asked["kind"] == "predicted"
        self.about = [contender.method, contender.sparsity, contender.criterion, contender.asked]
        self.about += [self._policy, self._mask]

    def facts(self) -> dict[str, float]:
        """Averages over all answers."""
        return {"sparsity": float(np.mean(self._left))}

    def score(self, tokens: Sequence[int], *, prompt_length: int = 1) -> np.ndarray:
        """Natural-log probability of ``tokens[1:]``, float32 (len - 1,): 0 of those that belong to the question."""
        begin = prompt_length - 1
        policy = self._policy if self._controller is None else self._controller.policy
        trace, found = (self._stepped if self._predicted else self._in_one_pass)(tokens, begin, policy)
        counted = trace[begin : len(tokens) - 1]
        self._left += [1 - step.kept_weights for step in counted]
        if self._controller is not None:
            self._controller.observe(counted)
        found[:begin] = 0
        return found

    def _in_one_pass(self, tokens: Sequence[int], begin: int, policy: Policy) -> tuple[list[StepTrace], np.ndarray]:
        trace = list[StepTrace]()
        self._engine.set_policy(policy)
        # All of it as the prompt, so that no pass is cut where a reply would begin: nothing here decides for one.
        recorded = self._recorded(len(tokens), begin)
        found = self._engine.score(tokens, prompt_length=len(tokens), replay=recorded, trace=trace)
        return trace, found.copy()

    def _stepped(self, tokens: Sequence[int], begin: int, policy: Policy) -> tuple[list[StepTrace], np.ndarray]:
        """Thresholds move where the question's last token begins, so what follows is fed token by token."""
        engine, found = self._engine, np.zeros(len(tokens) - 1, dtype=np.float32)
        sequence = engine.start()
        if begin:
            engine.set_policy(whole_policy(engine.plan))
            engine.prefill(sequence, tokens[:begin])
        engine.set_policy(policy)
        for at in range(begin, len(tokens) - 1):
            (logits,) = engine.step([sequence], [tokens[at]]).astype(np.float64)
            highest = logits.max()
            found[at] = logits[tokens[at + 1]] - highest - np.log(np.exp(logits - highest).sum())
        return sequence.trace, found

    def _recorded(self, length: int, begin: int) -> list[dict[str, Any]] | None:
        if self._mask is None:
            return None
        slot, whole = self.plan.deciders[0].slot, np.ones_like(self._mask)
        return [{slot: self._mask if at >= begin else whole} for at in range(length)]


def _columns(contender: Contender, answers: Mapping[Contender, TaskResult], truth: TaskResult) -> dict[str, Any]:
    result = answers[contender]
    flips, right = paired(truth, result), result.accuracy_per_byte
    whole = next(one for one in answers if one.method == "dense" and one.bits == contender.bits)
    return {
        "questions": flips.n_questions,
        "accuracy": right.value,
        "accuracy_low": right.low,
        "accuracy_high": right.high,
        "accuracy_change": flips.difference.value,
        "accuracy_change_low": flips.difference.low,
        "accuracy_change_high": flips.difference.high,
        "flips": flips.changed,
        "flips_to_whole": None if contender is whole else paired(answers[whole], result).changed,
        "answers_sparsity": result.facts["sparsity"],
        "answers_measured_at": result.measured_at,
    }
