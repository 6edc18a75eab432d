"""Compression Workbench: look into a language model, pick where it may compute less, run it, trust the numbers.

Names are imported when they are first used, so that ``import workbench`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Budget": "workbench.apply.recipe",
    "CompressedModel": "workbench.formats.compressed",
    "DecodingSteps": "workbench.analysis.sensitivity",
    "Job": "workbench.progress",
    "Profile": "workbench.analysis.profile",
    "Recipe": "workbench.apply.recipe",
    "RtnConfig": "workbench.apply.rtn",
    "SensitivityOptions": "workbench.operate.sensitivity",
    "Store": "workbench.store",
    "UnitDamage": "workbench.analysis.damage",
    "UnitScores": "workbench.analysis.damage",
    "WorkbenchError": "workbench.errors",
    "analyze": "workbench.operate.jobs",
    "compress": "workbench.apply.compress",
    "load": "workbench.models",
    "look_at_steps": "workbench.operate.sensitivity",
    "look_at_units": "workbench.operate.sensitivity",
    "open_engine": "workbench.runtime",
    "open_text": "workbench.corpus",
    "recipe_from_profile": "workbench.operate.solving",
    "solve": "workbench.apply.solver",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
