"""What the store keeps of a measurement: the numbers that tables, dashboards and reports show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.formats.compressed import CompressedModel
from workbench.measure.result import Measurement
from workbench.store import RunKind, Store


def summary(found: Measurement) -> dict[str, Any]:
    """The flat numbers of both sides, the speed ratio with its interval, the bits picked and the recipe."""
    compressed = CompressedModel.load(found.candidate, verify=False)
    return {
        "dense": found.dense_row(),
        "compressed": found.row(),
        "latency_ratio": found.latency.ratio.value,
        "latency_ratio_low": found.latency.ratio.low,
        "latency_ratio_high": found.latency.ratio.high,
        "latency": found.latency.to_json(),
        "by_group": found.quality.to_json()["by_group"],
        "worst_windows": found.quality.to_json()["worst_windows"],
        "bits_by_unit": compressed.bits_by_unit,
        "recipe": found.recipe.model_dump(mode="json"),
        "notes": list(found.notes),
    }


def record_measurement(
    store: Store,
    kind: RunKind,
    found: Measurement,
    *,
    name: str,
    artifacts: Mapping[str, Path | str] | None = None,
    **more: Any,
) -> int:
    """Record a measurement as a run; ``more`` is added to its summary. Returns the run's number."""
    return store.record_run(
        kind,
        name=name,
        model=found.model,
        method=found.recipe.label,
        recipe_sha256=found.recipe_sha256,
        summary={**summary(found), **more},
        environment=found.environment,
        artifacts=artifacts,
        measured=found.candidate,
    )
