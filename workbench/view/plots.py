"""Figures drawn from Profiles and tables: plain functions to ``plotly`` figures, without state or files.

Every figure has a table that says the same (``*_table``, or the table it was given), for readers who cannot see the
picture and for those who want the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.models.base import UNIT_KINDS
from workbench.view.heatmap import require_columns, step_grid, step_heatmap
from workbench.view.style import (
    BLUE,
    COMPRESSED_COLOR,
    DENSE_COLOR,
    GREEN,
    GREY,
    SEQUENTIAL,
    TEMPLATE,
    UNIT_COLORS,
    VERMILLION,
    escape,
    interval_bars,
    join,
)

if TYPE_CHECKING:
    from workbench.measure.latency import LatencyResult

__all__ = [
    "bits_table",
    "damage_by_unit",
    "latency_comparison",
    "latency_table",
    "pareto",
    "ranked_bars",
    "speed_sentence",
    "step_grid",
    "step_heatmap",
]


# Measures of a unit's damage, the most trustworthy first.
DAMAGES = ("kl", "fisher", "gradient")


def ranked_bars(ranking: pd.DataFrame, top: int = 30, *, value: str | None = None, note: str = "") -> go.Figure:
    """Horizontal bars, the most sensitive unit or linear on top.

    Args:
        ranking: most sensitive first, as ``rank_linears`` and ``rank_units`` give it: a name column (``linear`` or
            ``unit``) and a value column.
        top: how many rows to draw; the subtitle says how many there are.
        value: the value column; by default the first of kl, fisher, gradient and mean that is there.
        note: what was looked at, for the subtitle.
    """
    name = "linear" if "linear" in ranking else "unit"
    value = value or next((v for v in (*DAMAGES, "mean") if v in ranking), None)
    if value is None or value not in ranking or name not in ranking:
        raise InputError(f"A ranking needs a name and a value column, this one has: {', '.join(ranking.columns)}.")
    drawn = ranking.head(top).iloc[::-1]
    kinds = [str(row).rsplit(".", 1)[-1] for row in drawn["unit"]] if "unit" in drawn else []
    figure = go.Figure(
        go.Bar(
            x=drawn[value],
            y=[escape(row) for row in drawn[name]],
            orientation="h",
            marker={"color": [UNIT_COLORS.get(kind, GREY) for kind in kinds] if kinds else BLUE},
            hovertemplate="<b>%{y}</b><br>" + escape(value) + " %{x:.3g}<extra></extra>",
        )
    )
    scope = f"{len(drawn)} of {len(ranking)} {name}s"
    figure.update_layout(
        template=TEMPLATE,
        title={"text": "Most sensitive first", "subtitle": {"text": join([scope, note])}},
        height=150 + 19 * len(drawn),
        xaxis_title=escape(_axis_name(value)),
        yaxis={"title": name, "showgrid": False},
        bargap=0.25,
    )
    return figure


def bits_table(bits_by_unit: Mapping[str, float]) -> pd.DataFrame:
    """Bits of each unit as a grid: one row per kind of unit, one column per block."""
    rows = []
    for unit, bits in bits_by_unit.items():
        parts = unit.split(".")
        if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdigit():
            raise InputError(f"'{unit}' is no unit: units are named blocks.<i>.<{'|'.join(UNIT_KINDS)}>.")
        rows.append((parts[2], int(parts[1]), bits))
    grid = pd.DataFrame(rows, columns=["unit", "block", "bits"]).pivot(index="unit", columns="block", values="bits")
    known = [kind for kind in UNIT_KINDS if kind in grid.index]
    return grid.reindex([*known, *(kind for kind in grid.index if kind not in known)])


def damage_by_unit(
    damage: pd.DataFrame | None, bits_by_unit: Mapping[str, float], *, pinned: Sequence[str] = ()
) -> go.Figure:
    """Grid of the chosen bits: kind of unit (y) by block (x), with each unit's predicted damage on hover.

    The number is written into each cell, so that nothing is told by colour alone; pinned units are marked ``•``.

    Args:
        damage: a damage table (``unit``, ``bits`` and ``kl``, ``fisher`` or ``gradient``), or None.
        bits_by_unit: unit id to bits; 16 is dense.
        pinned: units whose bits the user fixed.
    """
    grid = bits_table(bits_by_unit)
    metric = next((name for name in DAMAGES if damage is not None and name in damage), "")
    known: dict[tuple[str, float], float] = {}
    if damage is not None and metric:
        known = dict(zip(zip(damage["unit"], damage["bits"], strict=True), damage[metric], strict=True))
    text, hover = [], []
    for kind in grid.index:
        row_text, row_hover = [], []
        for block in grid.columns:
            unit, bits = f"blocks.{block}.{kind}", grid.loc[kind, block]
            if pd.isna(bits):
                row_text.append("")
                row_hover.append("")
                continue
            row_text.append(f"{bits:g}" + ("•" if unit in pinned else ""))
            lines = [f"<b>{escape(unit)}</b>", f"{bits:g} bits" + (", pinned by you" if unit in pinned else "")]
            if (unit, bits) in known:
                lines.append(f"predicted damage ({metric}) {known[unit, bits]:.3g}")
            row_hover.append("<br>".join(lines))
        text.append(row_text)
        hover.append(row_hover)
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(dtype=np.float64),
            x=list(grid.columns),
            y=[escape(kind) for kind in grid.index],
            text=text,
            texttemplate="%{text}",
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            colorscale=SEQUENTIAL,
            zmin=2,
            zmax=8,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "bits", "side": "right"}, "thickness": 14, "dtick": 1, "outlinewidth": 0},
        )
    )
    counts = pd.Series(list(bits_by_unit.values())).value_counts().sort_index()
    facts = [f"{bits:g} bits: {count} unit{'s' if count > 1 else ''}" for bits, count in counts.items()]
    if pinned:
        facts.append(f"• pinned: {len(pinned)}")
    figure.update_layout(
        template=TEMPLATE,
        title={"text": "Bits of each unit", "subtitle": {"text": join(facts)}},
        height=170 + 34 * len(grid),
        xaxis={"title": "block", "showgrid": False, "dtick": 1 if len(grid.columns) <= 40 else 5},
        yaxis={"title": "unit", "autorange": "reversed", "showgrid": False},
    )
    return figure


# ------------------------------------------------------------------------------------------------------ pareto


def pareto(
    points: pd.DataFrame,
    chosen: Mapping[str, float] | None = None,
    measured: pd.DataFrame | None = None,
    *,
    note: str = "",
) -> go.Figure:
    """Effective bits against damage: what the solver predicts, uniform widths, and what was measured.

    Args:
        points: predicted; columns ``effective_bits``, ``damage`` and ``kind`` (``solved`` is joined by a line,
            ``uniform`` is drawn as squares).
        chosen: ``effective_bits`` and ``damage`` of the current choice.
        measured: columns ``effective_bits``, ``kl_mean``, and where known ``kl_low``, ``kl_high`` and ``name``.
        note: what was looked at, for the subtitle.
    """
    require_columns(points, ("effective_bits", "damage", "kind"))
    figure = go.Figure()
    hover = "<b>%{text}</b><br>%{x:.3f} effective bits<br>%{y:.4g} nats per token<extra></extra>"
    solved = points[points["kind"] == "solved"].sort_values("effective_bits")
    uniform = points[points["kind"] == "uniform"].sort_values("effective_bits")
    if len(solved):
        figure.add_scatter(
            x=solved["effective_bits"],
            y=solved["damage"],
            mode="lines+markers",
            name="predicted, solved mix",
            text=["predicted, solved mix"] * len(solved),
            line={"color": BLUE, "width": 2},
            marker={"size": 6},
            hovertemplate=hover,
        )
    if len(uniform):
        figure.add_scatter(
            x=uniform["effective_bits"],
            y=uniform["damage"],
            mode="markers",
            name="predicted, same width everywhere",
            text=["predicted, same width everywhere"] * len(uniform),
            marker={"color": GREY, "symbol": "square-open", "size": 10, "line": {"width": 2}},
            hovertemplate=hover,
        )
    if chosen is not None:
        figure.add_scatter(
            x=[chosen["effective_bits"]],
            y=[chosen["damage"]],
            mode="markers",
            name="your choice",
            text=["your choice"],
            marker={"color": VERMILLION, "symbol": "star", "size": 20, "line": {"color": "white", "width": 1}},
            hovertemplate=hover,
        )
    # Last, so that a measurement lies on top of the choice that it measures.
    if measured is not None and len(measured):
        figure.add_scatter(**_measured_trace(measured, hover))
    intervals = "bars: 95 % interval" if measured is not None and "kl_low" in measured else ""
    figure.update_layout(
        template=TEMPLATE,
        title={"text": "Bits against damage", "subtitle": {"text": join([note, intervals])}},
        height=460,
        xaxis_title="effective bits per weight (scales and zero points counted)",
        yaxis={"title": "KL to dense (nats per token, log)", "type": "log", "exponentformat": "power"},
    )
    return figure


def _measured_trace(measured: pd.DataFrame, hover: str) -> dict[str, object]:
    require_columns(measured, ("effective_bits", "kl_mean"))
    names = measured["name"] if "name" in measured else pd.Series(["measured"] * len(measured))
    trace: dict[str, object] = {
        "x": measured["effective_bits"],
        "y": measured["kl_mean"],
        "mode": "markers",
        "name": "measured",
        "text": [escape(name) for name in names],
        "marker": {"color": GREEN, "symbol": "diamond", "size": 10, "line": {"color": "white", "width": 1}},
        "hovertemplate": hover,
    }
    if "kl_low" in measured and "kl_high" in measured:
        trace["error_y"] = interval_bars(measured["kl_low"], measured["kl_mean"], measured["kl_high"])
    return trace


# ----------------------------------------------------------------------------------------------------- latency


def latency_table(result: LatencyResult) -> pd.DataFrame:
    """Percentiles of the time per token of both sides, milliseconds, and how many decoding steps they come from."""
    rows = [
        (name, side.engine, side.steps, side.p50_ms, side.p95_ms, side.p99_ms, side.tokens_per_s)
        for name, side in zip(_SIDES, (result.baseline, result.candidate), strict=True)
    ]
    return pd.DataFrame(rows, columns=["name", "engine", "n", "p50_ms", "p95_ms", "p99_ms", "tokens_per_s"])


def latency_comparison(result: LatencyResult, *, note: str = "") -> go.Figure:
    """Time per token of dense and compressed: bar to the median, line to p95; the title says plainly which is faster.

    Args:
        result: of ``compare_latency``.
        note: what was measured, for the subtitle.
    """
    table = latency_table(result)
    labels = [f"{row.name} p50 {row.p50_ms:.3g} ms, p95 {row.p95_ms:.3g} ms" for row in table.itertuples(index=False)]
    figure = go.Figure(
        go.Bar(
            x=table["p50_ms"],
            y=table["name"],
            orientation="h",
            width=0.5,
            marker={"color": [DENSE_COLOR, COMPRESSED_COLOR]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": table["p95_ms"] - table["p50_ms"],
                "arrayminus": [0.0, 0.0],
                "thickness": 2,
                "width": 8,
            },
            text=[label.split(" ", 1)[1] for label in labels],
            textposition="inside",
            insidetextanchor="start",
            textfont={"color": "white"},
            hovertext=labels,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    facts = [
        f"{result.pairs} pairs of {result.new_tokens} tokens",
        f"engine {result.baseline.engine}" if result.baseline.engine == result.candidate.engine else "",
        f"{result.threads} threads",
        "line to p95",
        note,
        result.note,
    ]
    figure.update_layout(
        template=TEMPLATE,
        title={"text": speed_sentence(result), "subtitle": {"text": join(facts)}},
        height=280,
        xaxis={"title": "time per token (ms)", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "showgrid": False},
    )
    return figure


_SIDES = ("dense", "compressed")


def speed_sentence(result: LatencyResult) -> str:
    """Say the ratio of times in words: "faster" and "slower" only where the interval excludes 1."""
    ratio = result.ratio
    if result.verdict == "unknown":
        return f"{ratio.value:.2f}x the time per token of dense; one pair gives no interval"
    said = {
        "faster": "Faster than dense",
        "slower": "Slower than dense",
        "no difference": "No difference to dense shown",
    }
    interval = f"{ratio.value:.2f}x the time per token, 95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    return f"{said[result.verdict]}: {interval}"


# ----------------------------------------------------------------------------------------------------- helpers


def _axis_name(value: str) -> str:
    return {
        "kl": "KL to dense with this unit alone changed (nats per token)",
        "fisher": "Fisher score, an estimate of the KL (nats per token)",
        "gradient": "gradient score: first-order change of the loss (nats per token)",
        "mean": "relative output error, mean over decoding steps",
    }.get(value, value)
