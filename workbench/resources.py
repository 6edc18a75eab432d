"""Where the project's own texts are: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import WorkbenchError


def data_folder() -> Path:
    """Return the folder that holds ``prose/``, ``questions/`` and ``prompts.jsonl``."""
    package = Path(__file__).parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / "prompts.jsonl").is_file():
            return folder
    raise WorkbenchError(f"The project's texts are missing beside {package}: install the package again.")
