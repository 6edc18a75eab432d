"""Where texts come from without sampling: the project's prose, CPython's topics, a file, a hub data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.corpus.base import Corpus, Document, Split
from workbench.errors import CorpusError
from workbench.resources import data_folder

if TYPE_CHECKING:
    from workbench.models import LoadedModel

PROSE_SPLITS: dict[Split, tuple[str, ...]] = {
    "calibration": ("en-01", "en-02"),
    "tuning": ("en-03", "ja-01"),
    "evaluation": ("en-04", "en-05", "en-06", "ja-02"),
}

# Shares of CPython's topics: below the first bound calibration, below the second tuning, else evaluation.
_TOPIC_BOUNDS = (0.4, 0.6)

# Tokenizing 64 MiB takes about a minute and gives some 15 million tokens, more than any measurement here reads.
MAX_FILE_BYTES = 64 << 20

_HUB_SPLITS: dict[Split, str] = {"calibration": "train", "tuning": "validation", "evaluation": "test"}
_HUB_TOKENS = 65_536
_BYTES_PER_TOKEN = 8  # generous: English takes 4 to 5 bytes a token


def prose(split: Split) -> Corpus:
    """Return the texts written for the project: eight domains, English and (not for calibration) Japanese."""
    documents = []
    for folder in sorted(path for path in (data_folder() / "prose").iterdir() if path.is_dir()):
        for name in PROSE_SPLITS[split]:
            path = folder / f"{name}.txt"
            if not path.is_file():
                raise CorpusError(f"The project's text {path} is missing: install the package again.")
            text = path.read_bytes().decode("utf-8")
            documents.append(Document(f"prose/{folder.name}/{name}", text, folder.name, name.split("-")[0]))
    return Corpus("prose", split, tuple(documents))


def pydoc(split: Split) -> Corpus:
    """Return CPython's help topics: technical English, a document per topic; varies with the Python version.

    A topic's split follows from its name alone, so that a new topic in a later Python moves no other.
    """
    from pydoc_data.topics import topics

    documents: dict[str, Document] = {}
    for name, text in sorted(topics.items()):
        # Some topics are the same text under two names; it belongs to the first, or it would be in two splits.
        documents.setdefault(text, Document(f"pydoc/{name}", text, "python", "en"))
    return Corpus("pydoc", split, tuple(d for d in documents.values() if _topic_split(d.name) == split))


def _topic_split(name: str) -> Split:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if share < _TOPIC_BOUNDS[0]:
        return "calibration"
    return "tuning" if share < _TOPIC_BOUNDS[1] else "evaluation"


def read_file(path: Path, split: Split) -> Corpus:
    """Return a user's UTF-8 text file as one document, whole, for the one purpose it is given for.

    Raises:
        CorpusError: missing, a folder, empty, too large, or not text.
    """
    if path.is_dir():
        raise CorpusError(f"{path} is a folder: give one UTF-8 text file.")
    if not path.is_file():
        raise CorpusError(
            f"There is no text '{path}': give prose, pydoc, self, hf:<dataset>, or the path of a UTF-8 text file."
        )
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CorpusError(
            f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read, more than any measurement here uses. "
            "Cut a sample from it."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start:,}): convert it to UTF-8.") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise CorpusError(f"{path} holds zero bytes: it is binary, or UTF-16. Give a UTF-8 text file.")
    if not text.strip():
        raise CorpusError(f"{path} is empty: give a text of at least a few hundred words.")
    return Corpus(path.name, split, (Document(path.name, text, path.stem, "unknown"),))


def hub_dataset(name: str, split: Split, model: LoadedModel | None, n_tokens: int | None) -> Corpus:
    """Return the beginning of a data set of the Hugging Face hub, its rows joined by blank lines into one document.

    Args:
        name: ``hf:<dataset>[:<config>[:<split>[:<column>]]]``; parts may be left empty. The split defaults to train,
            validation or test by purpose, the column to ``text`` or the only column of strings.
        model: counts tokens; without it eight bytes are read per token asked for.
        n_tokens: how many tokens to read at least, 65,536 by default.

    Raises:
        CorpusError: the ``datasets`` package is missing, no connection, or no such data set, split or column.
    """
    dataset, config, part, column = _hub_parts(name)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CorpusError(f"'{name}' needs the package 'datasets': run \"pip install 'datasets>=3.0'\".") from error
    part = part or _HUB_SPLITS[split]
    wanted = n_tokens or _HUB_TOKENS
    rows: list[str] = []
    tokens = 0
    try:
        for row in load_dataset(dataset, config or None, split=part, streaming=True):
            text = _row_text(row, column, name)
            if text.strip():
                rows.append(text)
                tokens += len(model.encode(text, bos=False)) if model else len(text.encode()) // _BYTES_PER_TOKEN
            if tokens >= wanted:
                break
    except CorpusError:
        raise
    except Exception as error:  # datasets raises its own, the hub's, its HTTP library's and pyarrow's errors
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"'{name}' (split '{part}') could not be read from the hub: {reason or type(error).__name__}. Check the "
            "name and the connection, or give a text file."
        ) from error
    if not rows:
        raise CorpusError(f"'{name}' (split '{part}') holds no text: choose another split or column.")
    label = ":".join(x for x in ("hf", dataset, config, part, column) if x)
    return Corpus(label, split, (Document(label, "\n\n".join(rows), dataset.split("/")[-1], "unknown"),))


def _hub_parts(name: str) -> tuple[str, str, str, str]:
    parts = name.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise CorpusError(f"'{name}' is not a data set: write hf:<dataset>[:<config>[:<split>[:<column>]]].")
    dataset, config, part, column = (*parts, "", "", "", "")[:4]
    return dataset, config, part, column


def _row_text(row: dict[str, Any], column: str, name: str) -> str:
    strings = [key for key, value in row.items() if isinstance(value, str)]
    column = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else "")
    if column not in strings:
        raise CorpusError(f"'{name}' has these columns of text: {', '.join(strings) or 'none'}. Name one of them.")
    return str(row[column])
