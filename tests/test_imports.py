"""Imports point one way, and importing the package costs nothing.

The order is the one of docs/architecture.md. It holds for every import: at the top of a module, inside functions,
under ``TYPE_CHECKING``, and by name through ``importlib``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "workbench"

# Lower may not import higher; parts on one line may import each other.
ORDER = (
    ("models",),
    ("formats",),
    ("runtime",),
    ("capture", "corpus"),
    ("analysis",),
    ("apply",),
    ("measure",),
    ("operate",),
    ("view",),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
EVERYWHERE = {"errors", "files", "progress", "resources", "waiting"}
STORE_FROM = RANK["measure"]
FACADE = {"", "__init__", "__main__"}  # the package itself, whose names are lazy, and `python -m workbench`

HEAVY = ("torch", "transformers", "pandas", "pyarrow", "plotly", "panel", "bokeh", "ipywidgets")
LEAN = ("workbench", "workbench.errors", "workbench.progress", "workbench.store", "workbench.cli")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """``workbench.store.files`` of its path; a package's ``__init__`` is the package."""
    parts = ["workbench", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything of ``workbench`` that a module imports, however it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, base]) if base else ".".join(above)
            if base == "workbench":
                for alias in node.names:
                    yield node.lineno, f"workbench.{alias.name}"
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def part_of(name: str) -> str | None:
    """The top-level part that a dotted name lies in; '' for the package itself, None outside of it."""
    head, _, rest = name.partition(".")
    return rest.split(".")[0] if head == "workbench" else None


def violation(user: str, used: str) -> str | None:
    """Why ``user`` may not import ``used``, or None where it may. Both are top-level parts."""
    if user == used or user in FACADE or used in EVERYWHERE:
        return None
    if user in EVERYWHERE:
        return f"{user} is used everywhere and may itself use only {', '.join(sorted(EVERYWHERE))}"
    if user == "store":
        return f"store may itself use only {', '.join(sorted(EVERYWHERE))}"
    if used == "store":
        return None if RANK[user] >= STORE_FROM else "store is used from measure upwards"
    if used not in RANK:
        return f"'{used}' has no place in the order"
    return None if RANK[used] <= RANK[user] else f"{user} lies below {used}"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_one_way(path: Path) -> None:
    module = dotted(path)
    user = part_of(module)
    assert user is not None
    known = {*RANK, *EVERYWHERE, *FACADE, "store"}
    assert user in known, f"{module}: give '{user}' a place in docs/architecture.md and in ORDER"
    broken = []
    for line, name in imported(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py"):
        used = part_of(name)
        if used is not None and (why := violation(user, used)):
            broken.append(f"{path}:{line}: {module} imports {name}: {why}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "code", "names"),
    [
        ("workbench.models.base", "import workbench.view.plots", ["workbench.view.plots"]),
        ("workbench.models.base", "def f():\n    from workbench import view, cli", ["workbench.view", "workbench.cli"]),
        ("workbench.models.base", "from ..view import plots", ["workbench.view"]),
        ("workbench.models.base", "from .. import view", ["workbench.view"]),
        ("workbench.models.base", "from . import families", ["workbench.models"]),
        ("workbench.models.base", "import importlib\nimportlib.import_module('workbench.cli')", ["workbench.cli"]),
    ],
)
def test_every_form_of_import_is_seen(module: str, code: str, names: list[str]) -> None:
    found = [name for _, name in imported(ast.parse(code), module, is_package=False)]
    assert [name for name in found if name != "importlib"] == names


@pytest.mark.parametrize(
    ("user", "used", "allowed"),
    [
        ("models", "runtime", False),
        ("analysis", "store", False),
        ("apply", "store", False),
        ("measure", "store", True),
        ("store", "models", False),
        ("errors", "models", False),
        ("view", "cli", False),
        ("cli", "models", True),
        ("corpus", "capture", True),
        ("models", "errors", True),
    ],
)
def test_the_order_itself(user: str, used: str, allowed: bool) -> None:
    assert (violation(user, used) is None) == allowed


@pytest.mark.parametrize("module", LEAN)
def test_import_stays_lean(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not part of this version")
    code = f"import json, sys, {module}; sys.stdout.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & set(HEAVY)
