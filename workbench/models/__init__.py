"""Load models safely and name their parts. Nothing here imports torch until a name needs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.models.base import Architecture, Fingerprint, Linear, LoadedModel, Unit
    from workbench.models.families import architecture
    from workbench.models.loading import load
    from workbench.models.settle import wrap

_WHERE = {
    "Architecture": "base",
    "Fingerprint": "base",
    "Linear": "base",
    "LoadedModel": "base",
    "Unit": "base",
    "architecture": "families",
    "load": "loading",
    "wrap": "settle",
}

__all__ = ["Architecture", "Fingerprint", "Linear", "LoadedModel", "Unit", "architecture", "load", "wrap"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
