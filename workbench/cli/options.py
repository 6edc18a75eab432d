"""Options that several commands have, and checks of what was given that are made before long work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import InputError, ModelError
from workbench.models.base import EMBEDDED

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m, a folder, a GGUF file or a hub id.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the engines; one per usable core if not given.")]
EngineName = Annotated[str, typer.Option(help="auto, reference or cpu.")]
DeviceName = Annotated[
    str, typer.Option(help="Where the model computes: cpu, cuda or cuda:1; one that is not there is an error.")
]


def require_text(name: str) -> None:
    """Raise now, before a model is loaded, where a text cannot be opened."""
    if name != "self" and not name.startswith("hf:"):
        from workbench.corpus import open_text

        open_text(name, "calibration")


def require_compressed(name: str, purpose: str) -> None:
    """Raise where ``name`` is not a compressed model's folder, saying what it is instead.

    Args:
        name: as given.
        purpose: what needs one, as the beginning of a sentence: ``--width reads``.

    Raises:
        ModelError: nothing is there, as of any model.
        InputError: something else is there: a folder of other files, or a dense model.
    """
    from workbench.formats.folder import is_compressed

    if is_compressed(name):
        return
    path, needed = Path(name), f"{purpose} a folder that `workbench compress` wrote"
    if not path.exists() and name != EMBEDDED:
        raise ModelError(f"There is no model '{name}': {needed}.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name} is not a compressed model, it holds no model at all: {needed}.")
    raise InputError(f"{name} is not a compressed model but a dense one: {needed}, so compress it first.")
