"""Notebooks are thin and clean: no stored outputs but those that are compared, and nothing defined in them.

That they run is checked by nbval, which ``make test`` gives the same folder.
"""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compared = "NBVAL_CHECK_OUTPUT" in cell.source
            assert bool(cell.outputs) == compared, cell.source
            assert (cell.execution_count is not None) == compared, cell.source  # nbval needs one where it compares
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defines_nothing(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        made = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While)
        assert not any(isinstance(node, made) for node in ast.walk(ast.parse(cell.source))), cell.source
    assert sum(len(cell.source.splitlines()) for cell in cells) < 40


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
