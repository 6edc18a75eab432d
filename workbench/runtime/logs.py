"""Reading the logs that ``generate --log`` writes: what is checked of every kind alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.errors import InputError


def read_log(path: Path | str, what: str, model: str, known: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the values of a log of this very model.

    Args:
        path: of the file.
        what: it counts, for messages.
        model: identity (SHA-256) of the compressed model.
        known: whether values are such a log, of this version.

    Raises:
        InputError: a file that cannot be read, is no such log, or is one of another model.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"Cannot read the log {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not a log of {what}, nor any JSON: name a file of 'generate --log'.") from None
    if not isinstance(values, dict) or not known(values):
        raise InputError(f"{path} is not a log of {what} of this version: name a file of 'generate --log'.")
    if values.get("model") != model:
        raise InputError(
            f"{path} counts what another model chose, and a log belongs to the model that wrote it: name another "
            "file, or that model."
        )
    return values
