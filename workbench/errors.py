"""Errors that reach a person: one line of what was given, what is allowed and what to do.

Every error the library raises on purpose is a ``WorkbenchError``; its ``exit_code`` is what the command line
returns. Anything else that escapes is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    """Base of all expected errors. ``exit_code`` is the status the command line ends with."""

    exit_code = 1


class InputError(WorkbenchError):
    """An argument, option or file given by the user cannot be used."""

    exit_code = 2


class ModelError(WorkbenchError):
    """A model cannot be found, is in a refused format, or is damaged."""

    exit_code = 3


class CorpusError(InputError):
    """A text is empty, too short, unreadable, or already used for something it must not share."""


class RecipeError(InputError):
    """A recipe names what does not exist, is out of range, or cannot meet its budget."""


class StoreError(WorkbenchError):
    """The store or the disk refuses: full, read-only, locked."""

    exit_code = 4


class EngineError(WorkbenchError):
    """A named engine or method cannot run on this machine or on this model."""

    exit_code = 5


class IntegrityError(WorkbenchError):
    """Stored bytes do not match their checksum or fingerprint."""

    exit_code = 6


class Cancelled(WorkbenchError):
    """The user cancelled; finished parts are kept and the same call resumes."""

    exit_code = 130


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string.

    Args:
        given: what the user wrote.
        allowed: the valid names.
    """
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
