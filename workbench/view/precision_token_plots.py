"""Figures of how widths chosen per token go on over steps, and which tokens raise them: from tables, no state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.view.style import BLUE, GREY, TEMPLATE, UNIT_COLORS, VERMILLION, escape, join

VALUES_OVER_STEPS = {"estimate": "estimate", "error": "exact error", "bits": "width read"}
_MANY_TOKENS = 20


def autocorrelation_lines(table: pd.DataFrame, unit: str | None = None, column: str = "estimate") -> go.Figure:
    """Autocorrelation by lag: the mean over units of each kind, one unit beside them, and what chance alone gives.

    Args:
        table: of ``analysis.precision.autocorrelation``.
        unit: to draw too.
        column: what the table is of.
    """
    if table.empty:
        raise InputError("Nothing varies over these steps, or the sequences are too short for any lag.")
    shown = table.assign(kind=[str(name).rsplit(".", 1)[-1] for name in table["unit"]])
    figure = go.Figure()
    for kind, rows in shown.groupby("kind", sort=False):
        mean = rows.groupby("lag")["correlation"].mean()
        figure.add_trace(
            go.Scatter(
                x=mean.index,
                y=mean,
                mode="lines+markers",
                name=f"{escape(kind)}, mean of {rows['unit'].nunique()}",
                line={"color": UNIT_COLORS.get(str(kind), GREY)},
                hovertemplate=escape(kind) + "<br>lag %{x}: %{y:.2f}<extra></extra>",
            )
        )
    one = shown[shown["unit"] == unit]
    if len(one):
        figure.add_trace(
            go.Scatter(
                x=one["lag"],
                y=one["correlation"],
                mode="lines",
                name=escape(unit),
                line={"color": "black", "dash": "dash"},
                hovertemplate=escape(unit) + "<br>lag %{x}: %{y:.2f}<extra></extra>",
            )
        )
    pairs = shown.groupby("lag")["n_pairs"].first()
    chance = 1.96 / np.sqrt(pairs.to_numpy(np.float64))
    lags = pairs.index.to_numpy()
    figure.add_trace(
        go.Scatter(
            x=np.concatenate([lags, lags[::-1]]),
            y=np.concatenate([chance, -chance[::-1]]),
            fill="toself",
            fillcolor="rgba(102,102,102,0.15)",
            line={"width": 0},
            hoverinfo="skip",
            name="one unit by chance, 95 %",
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Does one token tell of the next? Autocorrelation of the {VALUES_OVER_STEPS[column]}",
            "subtitle": {
                "text": join(
                    [
                        f"{int(pairs.iloc[0])} pairs of steps at lag 1, {shown['unit'].nunique()} units",
                        "" if column == "bits" else "logarithms",
                        "first tokens left out",
                    ]
                )
            },
        },
        height=340,
        xaxis={"title": "lag (steps)"},
        yaxis={"title": "correlation"},
        legend={"y": -0.28},
    )
    return figure


def token_names(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Texts of tokens as a reader can tell them apart: quoted, for spaces, and with the id, for those that read alike.

    They are not escaped.
    """
    return [f"{decode([int(token)])!r} ({int(token)})" for token in tokens]


def token_bars(table: pd.DataFrame, decode: Callable[[Sequence[int]], str], top: int = _MANY_TOKENS) -> go.Figure:
    """Tokens that raise the width most, and those that lower it most.

    Args:
        table: of ``analysis.precision.token_excess``.
        decode: ids to text.
        top: how many bars.
    """
    if table.empty:
        raise InputError("No token was seen often enough.")
    half = top // 2
    drawn = table if len(table) <= top else pd.concat([table.head(top - half), table.tail(half)])
    drawn = drawn.iloc[::-1]
    names = [escape(name) for name in token_names(drawn["token"], decode)]
    figure = go.Figure(
        go.Bar(
            x=drawn["excess"],
            y=names,
            orientation="h",
            marker={"color": [VERMILLION if value > 0 else BLUE for value in drawn["excess"]]},
            customdata=np.stack([drawn["count"], drawn["bits"]], axis=1),
            hovertemplate="<b>%{y}</b><br>%{x:+.3f} bits, %{customdata[1]:.3f} read"
            "<br>seen %{customdata[0]} times<extra></extra>",
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "Tokens that raise and lower the width",
            "subtitle": {
                "text": join(
                    [
                        f"{len(drawn)} of {len(table)} different tokens",
                        f"{int(table['count'].sum())} seen",
                        "the first token of a text always reads the widest",
                    ]
                )
            },
        },
        height=150 + 19 * len(drawn),
        xaxis={"title": "bits beyond the average"},
        yaxis={"showgrid": False},
        bargap=0.25,
    )
    return figure
