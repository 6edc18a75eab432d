"""Multiple-choice questions: a smoke check that needs no hub, paired against dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.measure.statistics import Interval, block_bootstrap, wilson
from workbench.progress import Job

if TYPE_CHECKING:
    from workbench.corpus import Question
    from workbench.models.base import TextModel
    from workbench.runtime.base import Engine

# How a question is put, and what separates the answer from it, by language; others are put as in English.
_TEMPLATES = {"en": ("Question: {}\nAnswer:", " "), "ja": ("質問：{}\n答え：", "")}


@dataclass(frozen=True)
class TaskResult:
    """Answers of one engine.

    Attributes:
        table: one row per question: ``question`` (its id), ``domain``, ``language``, ``n_choices``, ``answer`` and
            ``picked`` (indices; ``picked_per_byte`` with normalised scores), ``correct``, ``correct_per_byte``.
        accuracy: share of questions whose most probable choice is right, with Wilson's interval.
        accuracy_per_byte: the same with log-likelihoods divided by the choice's length in UTF-8 bytes, which does not
            favour short choices.
        chance: expected share of guessing.
        by_group: per domain and per language: ``by``, ``group``, ``n_questions`` and both accuracies with intervals.
        facts: what else the engine told of itself while it answered.
        measured_at: when (UTC, ISO 8601), where it answered in an earlier run; None for now.
    """

    table: pd.DataFrame
    accuracy: Interval
    accuracy_per_byte: Interval
    chance: float
    by_group: pd.DataFrame
    facts: Mapping[str, float] = field(default_factory=dict)
    measured_at: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but the table of questions, as JSON values."""
        return {
            "n_questions": len(self.table),
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "accuracy_per_byte": self.accuracy_per_byte.value,
            "accuracy_per_byte_low": self.accuracy_per_byte.low,
            "accuracy_per_byte_high": self.accuracy_per_byte.high,
            "chance": self.chance,
            "by_group": self.by_group.to_dict(orient="records"),
        }


@dataclass(frozen=True)
class Flips:
    """How a candidate's answers differ from dense on the same questions.

    Equal accuracy can hide many changed answers: ``changed`` counts every question answered differently (by the
    scores per byte), ``lost`` those that were right before, ``gained`` those that are right now. ``difference`` is
    candidate - dense of ``accuracy_per_byte``, with its interval over questions.
    """

    changed: int
    gained: int
    lost: int
    n_questions: int
    difference: Interval


def multiple_choice(engine: Engine, questions: Sequence[Question], *, job: Job | None = None) -> TaskResult:
    """Let an engine answer: the choice with the highest log-likelihood after the question.

    Raises:
        InputError: no questions, or one that does not fit the context (names it).
    """
    if not questions:
        raise InputError("No questions were given.")
    job = job or Job()
    job.stage("multiple choice", len(questions))
    rows = []
    for question in questions:
        scores = _score_choices(engine, question)
        per_byte = scores / np.array([len(choice.encode()) for choice in question.choices])
        picked, picked_per_byte = int(scores.argmax()), int(per_byte.argmax())
        rows.append(
            {
                "question": question.id,
                "domain": question.domain,
                "language": question.language,
                "n_choices": len(question.choices),
                "answer": question.answer,
                "picked": picked,
                "picked_per_byte": picked_per_byte,
                "correct": picked == question.answer,
                "correct_per_byte": picked_per_byte == question.answer,
            }
        )
        job.advance()
    return answered(pd.DataFrame(rows))


def answered(table: pd.DataFrame) -> TaskResult:
    """Return the result that follows from a table of questions; see ``TaskResult``."""
    return TaskResult(
        table=table,
        accuracy=_share(table["correct"]),
        accuracy_per_byte=_share(table["correct_per_byte"]),
        chance=float((1 / table["n_choices"]).mean()),
        by_group=_by_group(table),
    )


def paired(dense: TaskResult, candidate: TaskResult, *, seed: int = 0) -> Flips:
    """Compare answers question by question, by the scores per byte.

    Raises:
        InputError: the results are not of the same questions.
    """
    if list(dense.table["question"]) != list(candidate.table["question"]):
        raise InputError("These two results are on different questions: ask both engines the same ones.")
    before, after = (side.table["correct_per_byte"].to_numpy() for side in (dense, candidate))
    changed = dense.table["picked_per_byte"].to_numpy() != candidate.table["picked_per_byte"].to_numpy()
    return Flips(
        changed=int(changed.sum()),
        gained=int((after & ~before).sum()),
        lost=int((before & ~after).sum()),
        n_questions=len(before),
        difference=block_bootstrap(after.astype(float) - before.astype(float), np.ones(len(before)), seed=seed),
    )


def _score_choices(engine: Engine, question: Question) -> np.ndarray:
    """Natural-log likelihood of each choice after the question, float64 (n_choices,)."""
    texts, start = _encode(engine.model, question)
    longest = max(len(tokens) for tokens in texts)
    if longest > engine.context_length:
        raise InputError(
            f"Question '{question.id}' takes {longest} tokens and the context holds {engine.context_length}: "
            "shorten it."
        )
    scores = [engine.score(tokens, prompt_length=start)[start - 1 :].sum(dtype=np.float64) for tokens in texts]
    return np.array(scores)


def _encode(model: TextModel, question: Question) -> tuple[list[list[int]], int]:
    """Tokens of question and choice together, one list per choice, and how many leading tokens are given.

    A tokenizer may merge the end of the question with the start of a choice. All choices are therefore scored from
    the last token that all of them and the question alone share, so that their scores stay comparable.
    """
    template, separator = _TEMPLATES.get(question.language, _TEMPLATES["en"])
    text = template.format(question.question)
    alone = model.encode(text)
    texts = [model.encode(text + separator + choice) for choice in question.choices]
    shared = min(_common_prefix(alone, tokens) for tokens in texts)
    return texts, max(1, shared)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _share(correct: pd.Series) -> Interval:
    return wilson(int(correct.sum()), len(correct))


def _by_group(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for by in ("domain", "language"):
        for group, part in table.groupby(by, sort=False):
            plain, per_byte = _share(part["correct"]), _share(part["correct_per_byte"])
            rows.append(
                {
                    "by": by,
                    "group": group,
                    "n_questions": len(part),
                    "accuracy": plain.value,
                    "accuracy_low": plain.low,
                    "accuracy_high": plain.high,
                    "accuracy_per_byte": per_byte.value,
                    "accuracy_per_byte_low": per_byte.low,
                    "accuracy_per_byte_high": per_byte.high,
                }
            )
    return pd.DataFrame(rows)
