"""Texts as documents with an origin, and the record that keeps what was fitted apart from what is measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from workbench.errors import CorpusError, suggest

Split = Literal["calibration", "tuning", "evaluation"]
SPLITS: tuple[Split, ...] = get_args(Split)


class TextRecord(BaseModel):
    """Which text an analysis or fit has seen. ``documents`` are SHA-256 of each document, to keep splits apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    split: str
    sha256: str
    n_tokens: int
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """One text. ``language`` is an ISO 639-1 code, or ``unknown``; ``domain`` is what figures are grouped by."""

    name: str
    text: str
    domain: str
    language: str

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the text as UTF-8: the document's identity, whatever it is called."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Documents of one split, in a fixed order."""

    name: str
    split: Split
    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) over the documents' hashes in order."""
        return hashlib.sha256("\n".join(d.sha256 for d in self.documents).encode()).hexdigest()

    def record(self, n_tokens: int) -> TextRecord:
        """Return what to remember of this text after ``n_tokens`` of it were used."""
        documents = tuple(document.sha256 for document in self.documents)
        return TextRecord(name=self.name, split=self.split, sha256=self.sha256, n_tokens=n_tokens, documents=documents)


def check_split(split: str) -> Split:
    """Return ``split`` if it is one of ``SPLITS``, else raise ``CorpusError``."""
    for known in SPLITS:
        if split == known:
            return known
    raise CorpusError(f"There is no split '{split}': choose {', '.join(SPLITS)}." + suggest(split, SPLITS))


def require_disjoint(used: TextRecord, corpus: Corpus) -> None:
    """Refuse to measure on a document that was fitted on.

    Args:
        used: the text that a fit or solve has seen.
        corpus: the text about to be measured.

    Raises:
        CorpusError: they share a document (compared by content, not by name).
    """
    seen = set(used.documents)
    shared = [document.name for document in corpus.documents if document.sha256 in seen]
    if shared:
        raise CorpusError(
            f"'{corpus.name}' ({corpus.split}) shares {len(shared)} of its {len(corpus.documents)} documents with the "
            f"text that was fitted on, '{used.name}' ({used.split}), first '{shared[0]}': measure on another text or "
            "split."
        )
