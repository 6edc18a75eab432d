"""Prompts and multiple-choice questions written for the project."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workbench.errors import CorpusError, suggest
from workbench.resources import data_folder

Row = TypeVar("Row", bound=BaseModel)


class Prompt(BaseModel):
    """What a user might ask a chat model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    domain: str
    language: str
    text: str = Field(min_length=1)


class Question(BaseModel):
    """A multiple-choice question; ``answer`` is the index of the right choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    domain: str
    language: str
    question: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Question:
        if self.answer >= len(self.choices) or len(set(self.choices)) != len(self.choices):
            raise ValueError("'answer' must be the index of one of the choices, which must differ")
        return self


def prompts(domain: str | None = None, language: str | None = None) -> list[Prompt]:
    """Return the project's prompts, all or of one domain and language, in the order of the file.

    Raises:
        CorpusError: no such domain or language, or a damaged file.
    """
    found = list(read_rows(data_folder() / "prompts.jsonl", Prompt))
    for name, wanted in (("domain", domain), ("language", language)):
        known = sorted({str(getattr(prompt, name)) for prompt in found})
        if wanted is not None and wanted not in known:
            raise CorpusError(
                f"No prompts of {name} '{wanted}': there are {', '.join(known)}." + suggest(wanted, known)
            )
    return [p for p in found if domain in (None, p.domain) and language in (None, p.language)]


def questions() -> list[Question]:
    """Return the project's questions of all domains.

    Raises:
        CorpusError: missing or damaged files.
    """
    paths = sorted((data_folder() / "questions").glob("*.jsonl"))
    if not paths:
        raise CorpusError(f"No questions in {data_folder() / 'questions'}: install the package again.")
    return [row for path in paths for row in read_rows(path, Question)]


def read_rows(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Yield the rows of a JSON-lines file, each checked; ids must differ.

    Raises:
        CorpusError: naming the file, the line and what is wrong with it.
    """
    seen: set[str] = set()
    for number, line in enumerate(path.read_bytes().decode("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = kind.model_validate(json.loads(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "row"
            raise CorpusError(f"{path}, line {number}: {where}: {first['msg']}.") from error
        except ValueError as error:
            raise CorpusError(f"{path}, line {number} is not JSON: {error}.") from error
        identity = str(getattr(row, "id", number))
        if identity in seen:
            raise CorpusError(f"{path}, line {number}: the id '{identity}' was used before.")
        seen.add(identity)
        yield row
