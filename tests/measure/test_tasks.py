"""Multiple choice: the likeliest choice, both scores, fair starts at merged tokens, and flips against dense."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from workbench.corpus import Question
from workbench.errors import InputError
from workbench.measure.tasks import multiple_choice, paired


def question(
    number: int, choices: tuple[str, ...] = ("aa", "bb", "cc", "dd"), answer: int = 0, **more: Any
) -> Question:
    fields = {"domain": ("law", "science")[number % 2], "language": "en", "question": f"Which, {number}?", **more}
    return Question(id=f"q{number}", choices=choices, answer=answer, **fields)


def favouring(fake: ModuleType, letter: str, **more: Any) -> Any:
    """An engine that always thinks that one letter comes next, and all others are equal."""
    row = np.zeros(256)
    row[ord(letter)] = 5.0
    return fake.FakeEngine(lambda tokens, position: row, **more)


def test_the_most_probable_choice_is_picked(fake: ModuleType) -> None:
    questions = [question(i, answer=i % 4) for i in range(8)]
    found = multiple_choice(favouring(fake, "b"), questions)
    assert (found.table["picked"] == 1).all()
    assert found.accuracy.value == 0.25
    assert found.accuracy.low < 0.25 < found.accuracy.high
    assert found.chance == 0.25
    assert found.by_group[found.by_group["by"] == "domain"]["n_questions"].sum() == 8


def test_length_matters_only_without_normalisation(fake: ModuleType) -> None:
    uniform = fake.FakeEngine(lambda tokens, position: np.zeros(256))
    found = multiple_choice(uniform, [question(0, choices=("a much longer choice", "b"))])
    # Every byte costs log 256, the separating space too: the short choice wins in sum, the long one per byte.
    assert found.table["picked"][0] == 1
    assert found.table["picked_per_byte"][0] == 0


def test_choices_are_scored_from_the_token_that_all_share(fake: ModuleType) -> None:
    """A tokenizer that merges the end of the question with the start of one choice must not favour that choice."""
    model = fake.byte_model()

    def merging(text: str, *, bos: bool = True) -> list[int]:
        return list(text.encode().replace(b": a", b"\x01"))

    model.encode = merging
    engine = fake.FakeEngine(lambda tokens, position: np.zeros(256), model=model)
    asked: list[int] = []
    score = engine.score
    engine.score = lambda tokens, prompt_length: asked.append(prompt_length) or score(tokens)  # type: ignore[func-returns-value]
    multiple_choice(engine, [question(0, choices=("a", "b"))])
    text = b"Question: Which, 0?\nAnswer"  # without the colon, which the merged token swallows
    assert asked == [len(text)] * 2


def test_japanese_is_asked_in_japanese(fake: ModuleType) -> None:
    seen: list[str] = []
    model = fake.byte_model()
    model.encode = lambda text, bos=True: seen.append(text) or list(text.encode())  # type: ignore[func-returns-value]
    multiple_choice(
        fake.FakeEngine(lambda tokens, position: np.zeros(256), model=model),
        [question(0, language="ja", question="水は？", choices=("液体", "石"))],
    )
    assert seen == ["質問：水は？\n答え：", "質問：水は？\n答え：液体", "質問：水は？\n答え：石"]


def test_flips_count_what_accuracy_hides(fake: ModuleType) -> None:
    questions = [question(i, answer=i % 2) for i in range(10)]
    dense, candidate = (multiple_choice(favouring(fake, letter), questions) for letter in "ab")
    found = paired(dense, candidate)
    assert dense.accuracy == candidate.accuracy
    assert (found.changed, found.gained, found.lost, found.difference.value) == (10, 5, 5, 0)
    assert found.difference.low < 0 < found.difference.high
    assert paired(dense, dense).changed == 0


def test_refusals(fake: ModuleType) -> None:
    engine = favouring(fake, "a", context_length=20)
    with pytest.raises(InputError, match="No questions"):
        multiple_choice(engine, [])
    with pytest.raises(InputError, match=r"'q0' takes .* tokens and the context holds 20"):
        multiple_choice(engine, [question(0)])
    a, b = (multiple_choice(favouring(fake, "a"), [question(i)]) for i in range(2))
    with pytest.raises(InputError, match="different questions"):
        paired(a, b)
