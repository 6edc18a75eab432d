"""Prompts and questions: complete, checked, and refused line by line when damaged."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from workbench.corpus import prompts, questions
from workbench.corpus.prompts import Question, read_rows
from workbench.errors import CorpusError

GOOD = {"id": "a", "domain": "d", "language": "en", "question": "q?", "choices": ["x", "y"], "answer": 1}


def test_prompts_cover_every_domain_in_both_languages():
    counts = Counter((p.domain, p.language) for p in prompts())
    assert len(counts) == 16
    assert prompts("law", "ja") == [p for p in prompts() if (p.domain, p.language) == ("law", "ja")]


def test_questions_are_many_and_their_answers_are_not_in_one_place():
    found = questions()
    assert len(found) >= 200
    assert len({q.id for q in found}) == len(found)
    places = Counter(q.answer for q in found)
    assert max(places.values()) < 0.35 * len(found)


def test_unknown_domains_are_suggested():
    with pytest.raises(CorpusError, match="Did you mean 'medicine'"):
        prompts("medecine")
    with pytest.raises(CorpusError, match="language 'fr'"):
        prompts(language="fr")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "answer": 2}, "index of one of the choices"),
        ({**GOOD, "choices": ["x", "x"]}, "must differ"),
        ({**GOOD, "extra": 1}, "extra"),
        ({key: value for key, value in GOOD.items() if key != "answer"}, "answer"),
        ("{", "not JSON"),
    ],
)
def test_a_damaged_row_names_file_line_and_field(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    text = row if isinstance(row, str) else json.dumps({**row, "id": "b"})
    path.write_text(json.dumps(GOOD) + "\n\n" + text + "\n")
    with pytest.raises(CorpusError, match=rf"rows\.jsonl, line 3.*{message}"):
        list(read_rows(path, Question))


def test_an_id_used_twice_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 2)
    with pytest.raises(CorpusError, match="used before"):
        list(read_rows(path, Question))
