"""A page for one run of the store, from what the store keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.errors import InputError
from workbench.store import Store
from workbench.view.plots import bits_table, damage_by_unit
from workbench.view.report import ReportFigure, write_report


def report_run(store: Store, number: int, path: Path) -> None:
    """Write the page of one measured run.

    Raises:
        InputError: no such run, or one without measurements of a compressed model.
    """
    run = store.run(number)
    summary: Mapping[str, Any] = run["summary"]
    if "compressed" not in summary:
        raise InputError(
            f"Run {number} ({run['kind']}) measured no compressed model: choose a run of kind demo or measure."
        )
    bits = summary.get("bits_by_unit") or {}
    figures = []
    if bits:
        figures.append(ReportFigure(damage_by_unit(None, bits), "Bits of each unit.", bits_table(bits).reset_index()))
    compressed = dict(summary["compressed"])
    for key in ("latency_ratio", "latency_ratio_low", "latency_ratio_high"):
        compressed[key] = summary.get(key)
    tables = {
        caption: pd.DataFrame(summary[key])
        for key, caption in (
            ("by_group", "Quality by domain and language"),
            ("worst_windows", "Windows with the highest KL"),
        )
        if summary.get(key)
    }
    write_report(
        path,
        title=f"Run {number}: {run['name']}",
        summary=" ".join(summary.get("notes") or ()),
        recipe=summary.get("recipe"),
        environment=run["environment"],
        measurements=[{**summary["dense"], "variant": "dense"}, {**compressed, "variant": "compressed"}],
        figures=figures,
        tables=tables,
    )
