"""Text in, token windows out.

Texts without a download: ``prose`` (written for the project), ``pydoc`` (CPython's help topics) and ``self`` (sampled
from a model). A file or a hub data set can be given instead. Every named text has disjoint splits for calibration,
tuning and evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.corpus.base import SPLITS, Corpus, Document, Split, TextRecord, check_split, require_disjoint
from workbench.corpus.prompts import Prompt, Question, prompts, questions
from workbench.corpus.texts import hub_dataset, prose, pydoc, read_file
from workbench.corpus.windows import Window, windows
from workbench.errors import CorpusError, suggest
from workbench.progress import Job

if TYPE_CHECKING:
    from workbench.models import LoadedModel

NAMES = ("prose", "pydoc", "self")

__all__ = [
    "NAMES",
    "SPLITS",
    "Corpus",
    "Document",
    "Prompt",
    "Question",
    "Split",
    "TextRecord",
    "Window",
    "open_text",
    "prompts",
    "questions",
    "require_disjoint",
    "windows",
]


def open_text(
    name_or_path: str | Path,
    split: str,
    *,
    model: LoadedModel | None = None,
    n_tokens: int | None = None,
    seed: int = 0,
    length: int | None = None,
    job: Job | None = None,
) -> Corpus:
    """Open a text for one purpose.

    Args:
        name_or_path: ``prose``, ``pydoc``, ``self``, ``hf:<dataset>[:<config>[:<split>[:<column>]]]``, or a file.
        split: ``calibration``, ``tuning`` or ``evaluation``. A file is used whole for the purpose it is given for.
        model: needed by ``self``, which is sampled from it; counts the tokens of a hub data set.
        n_tokens: how much to sample or download; ``prose``, ``pydoc`` and files are always whole.
        seed: of the sampling.
        length: tokens per sampled document.
        job: progress and cancel of the sampling.

    Raises:
        CorpusError: no such text or split, or a text that cannot be read.
    """
    purpose = check_split(split)
    name = str(name_or_path)
    if name == "prose":
        return prose(purpose)
    if name == "pydoc":
        return pydoc(purpose)
    if name == "self":
        if model is None:
            raise CorpusError("The text 'self' is sampled from a model: give the model.")
        from workbench.corpus.sampled import sample_corpus

        return sample_corpus(model, purpose, n_tokens, seed, length, job)
    if name.startswith("hf:"):
        return hub_dataset(name, purpose, model, n_tokens)
    path = Path(name).expanduser()
    if not path.exists() and (hint := suggest(name.lower(), NAMES)):
        raise CorpusError(f"There is no text '{name}': give {', '.join(NAMES)}, hf:<dataset>, or a file.{hint}")
    return read_file(path, purpose)
