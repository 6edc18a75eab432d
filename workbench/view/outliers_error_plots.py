"""Figures of what rounding is predicted to cost, by unit and by number of groups: no state, no files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.view.heatmap import require_columns
from workbench.view.style import GREY, TEMPLATE, UNIT_COLORS, escape, join, log_ends, log_ticks


def unit_errors(table: pd.DataFrame, what: str, unit: str = "") -> go.Figure:
    """Predicted relative error of every unit over the blocks, under what is picked and without it.

    Args:
        table: ``block``, ``unit``, ``error``, ``plain``.
        what: is picked.
        unit: that is marked.
    """
    require_columns(table, ("block", "unit", "error", "plain"))
    shown = table.assign(kind=[str(name).rsplit(".", 1)[-1] for name in table["unit"]])
    figure = go.Figure()
    for kind, rows in shown.groupby("kind", sort=False):
        color = UNIT_COLORS.get(str(kind), GREY)
        for column, dash, name in (("error", "solid", str(kind)), ("plain", "dot", "")):
            figure.add_trace(
                go.Scatter(
                    x=rows["block"],
                    y=rows[column],
                    mode="lines+markers" if column == "error" else "lines",
                    name=escape(name),
                    legendgroup=str(kind),
                    showlegend=bool(name),
                    line={"color": color, "dash": dash, "width": 1.6 if column == "error" else 1.2},
                    marker={"size": 5},
                    customdata=rows["unit"],
                    hovertemplate="%{customdata}<br>"
                    + (escape(what) if column == "error" else "plain rounding")
                    + " %{y:.3g}<extra></extra>",
                )
            )
    own = shown[shown["unit"] == unit]
    if len(own):
        figure.add_trace(
            go.Scatter(
                x=own["block"],
                y=own["error"],
                mode="markers",
                name=escape(unit),
                marker={"size": 13, "symbol": "circle-open", "color": "black", "line": {"width": 2}},
                hoverinfo="skip",
            )
        )
    ends = log_ends(shown[["error", "plain"]].to_numpy(np.float64).ravel())
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "Predicted relative error of every unit",
            "subtitle": {"text": join([f"solid: {what}", "dotted: plain rounding at the same bits", "log scale"])},
        },
        height=360,
        xaxis={"title": "block", "dtick": max(1, int(shown["block"].max()) // 15)},
        yaxis={"title": "relative squared error", "type": "log", "range": ends, **log_ticks(*ends)},
        legend={"y": -0.24},
    )
    return figure


def group_errors(table: pd.DataFrame, unit: str, bits: int, scales: str, said: str) -> go.Figure:
    """Predicted relative error by number of groups: the mean of units of each kind, and one unit with its choice.

    Args:
        table: of ``GroupErrors``.
        unit: id.
        bits, scales: which of its rows.
        said: what was looked at.
    """
    rows = table[(table["bits"] == bits) & (table["scales"] == scales)]
    if rows.empty:
        raise InputError(f"Nothing was predicted for {bits} bits and scales by {scales}.")
    rows = rows.assign(
        error=rows["activation_error"] + rows["weight_error"],
        kind=[str(name).rsplit(".", 1)[-1] for name in rows["unit"]],
    )
    figure = go.Figure()
    for kind, some in rows.groupby("kind", sort=False):
        mean = some.groupby("groups")["error"].mean()
        figure.add_trace(
            go.Scatter(
                x=mean.index,
                y=mean,
                mode="lines",
                name=f"{escape(kind)}, mean of {some['unit'].nunique()}",
                line={"color": UNIT_COLORS.get(str(kind), GREY)},
                hovertemplate=escape(kind) + "<br>%{x} groups: %{y:.3g}<extra></extra>",
            )
        )
    own = rows[rows["unit"] == unit].sort_values("groups")
    figure.add_trace(
        go.Scatter(
            x=own["groups"],
            y=own["error"],
            mode="lines+markers",
            name=escape(unit),
            line={"color": "black", "dash": "dash"},
            marker={"size": [12 if chosen else 4 for chosen in own["chosen"]]},
            hovertemplate="%{x} groups: %{y:.3g}<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=own["groups"],
            y=own["weight_error"],
            mode="lines",
            name="of it, by its weights",
            line={"color": GREY, "dash": "dot"},
            hovertemplate="weights alone: %{y:.3g}<extra></extra>",
        )
    )
    ends = log_ends(np.concatenate([rows["error"], own["weight_error"]]))
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Predicted relative error by number of groups, {bits} bits, scales by {escape(scales)}",
            "subtitle": {"text": join(["large point: what the method takes", said, "log scale"])},
        },
        height=380,
        xaxis={"title": "groups at powers of two", "dtick": 1},
        yaxis={"title": "relative squared error", "type": "log", "range": ends, **log_ticks(*ends)},
        legend={"y": -0.24},
    )
    return figure
