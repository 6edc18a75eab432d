"""Measuring: latency, memory, energy and quality, every number with its spread.

Nothing here imports torch or pandas until a name needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.measure.latency import compare_latency
    from workbench.measure.measurement import measure
    from workbench.measure.quality import compare_candidates, compare_quality
    from workbench.measure.result import Measurement

_WHERE = {
    "Measurement": "result",
    "compare_candidates": "quality",
    "compare_latency": "latency",
    "compare_quality": "quality",
    "measure": "measurement",
}

__all__ = ["Measurement", "compare_candidates", "compare_latency", "compare_quality", "measure"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
