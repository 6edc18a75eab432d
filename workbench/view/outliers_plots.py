"""Figures of outliers and of what protects from them, from tables of ``view.outliers_loop``: no state, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.analysis.outliers import power_of_two_groups
from workbench.errors import InputError
from workbench.view.heatmap import require_columns
from workbench.view.precision_token_plots import token_names
from workbench.view.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SEQUENTIAL,
    TEMPLATE,
    VERMILLION,
    escape,
    join,
    log_ends,
    log_ticks,
)

_MANY_COLUMNS = 256  # cells of a surface across: more than a screen tells apart are pooled
_MANY_POINTS = 4000  # of a scatter: what is not marked is thinned out beyond
_DECADES = 4.0  # below the largest magnitude, a surface's colours end


def channel_profile(channels: pd.DataFrame, unit: str, said: str, n_groups: int, *, ranked: bool = True) -> go.Figure:
    """Largest magnitude, 99 % quantile and mean magnitude of every input channel, over groups at powers of two.

    Args:
        channels: of ``Look.channels``.
        unit: id.
        said: what was looked at.
        n_groups: groups whose boundaries are drawn; channels are counted by their largest magnitude.
        ranked: channels by falling largest magnitude, instead of by their number.
    """
    require_columns(channels, ("channel", "n_tokens", "absmax", "q99", "mean_abs"))
    order = ["absmax", "channel"] if ranked else ["channel"]
    rows = channels.sort_values(order, ascending=not ranked)
    x = np.arange(len(rows))
    figure = go.Figure()
    for column, name, color, width in (
        ("absmax", "largest", VERMILLION, 2.0),
        ("q99", "99 % quantile", ORANGE, 1.2),
        ("mean_abs", "mean", BLUE, 1.2),
    ):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=rows[column].where(rows[column] > 0),
                mode="lines",
                name=f"{name} magnitude",
                line={"color": color, "width": width},
                customdata=rows["channel"],
                hovertemplate="channel %{customdata}<br>" + name + " %{y:.4g}<extra></extra>",
            )
        )
    largest = float(rows["absmax"].max())
    groups = power_of_two_groups(rows["absmax"].to_numpy(np.float64), n_groups)
    counts = np.bincount(groups, minlength=n_groups)
    for group in range(n_groups if largest > 0 else 0):
        top = largest * 2.0**-group
        if group:
            figure.add_hline(top, line={"color": GREY, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="left",
            xshift=4,
            y=np.log10(top),
            yanchor="top",
            text=f"group {group + 1}: {counts[group]}",
            showarrow=False,
            font={"size": 10, "color": GREY},
        )
    shown = rows[["absmax", "mean_abs"]].to_numpy(np.float64)
    ends = log_ends(np.append(shown[shown > 0], largest * 2.0**-n_groups if largest > 0 else 1.0))
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Input channels of {escape(unit)}",
            "subtitle": {"text": join([f"{len(rows)} channels", f"{_seen(rows)} tokens seen, of {said}", "log scale"])},
        },
        height=380,
        margin={"r": 96},
        xaxis={"title": "channels, largest first" if ranked else "channel", "showgrid": False},
        yaxis={"title": "magnitude", "type": "log", "range": ends, **log_ticks(*ends)},
        legend={"y": -0.22},
    )
    return figure


def salience_scatter(channels: pd.DataFrame, unit: str, said: str, share: float) -> go.Figure:
    """Every input channel by its activations (across) and its weights (up), with what either would choose.

    Args:
        channels: of ``Look.channels``.
        unit: id.
        said: what was looked at.
        share: of the channels that are marked, at least one.
    """
    require_columns(channels, ("channel", "n_tokens", "mean_abs", "norm"))
    n_top = max(1, round(share * len(channels)))
    strong, heavy = (set(channels.nlargest(n_top, by)["channel"]) for by in ("mean_abs", "norm"))
    is_strong, is_heavy = (channels["channel"].isin(list(chosen)) for chosen in (strong, heavy))
    rest = channels[~is_strong & ~is_heavy]
    thinned = rest.iloc[:: max(1, -(-len(rest) // _MANY_POINTS))]
    figure = go.Figure()
    for rows, name, color, symbol, size in (
        (thinned, "other channels", "#b5bcc4", "circle", 5),
        (channels[is_heavy & ~is_strong], "chosen by weight", BLUE, "square-open", 9),
        (channels[is_strong & ~is_heavy], "chosen by activation", VERMILLION, "diamond", 9),
        (channels[is_strong & is_heavy], "chosen by both", GREEN, "star", 11),
    ):
        if len(rows) or name != "chosen by both":
            figure.add_trace(
                go.Scatter(
                    x=rows["mean_abs"],
                    y=rows["norm"],
                    mode="markers",
                    name=f"{name} ({len(rows)})",
                    marker={"color": color, "symbol": symbol, "size": size},
                    customdata=rows["channel"],
                    hovertemplate="channel %{customdata}<br>mean magnitude %{x:.4g}<br>weights %{y:.4g}<extra></extra>",
                )
            )
    x_ends = log_ends(channels["mean_abs"].to_numpy(np.float64))
    y_ends = log_ends(channels["norm"].to_numpy(np.float64))
    fewer = "" if len(thinned) == len(rest) else f"other channels thinned to {len(thinned)}"
    both = f"both choose {len(strong & heavy)} of {n_top}"
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Which channels of {escape(unit)} matter: by activation and by weight",
            "subtitle": {"text": join([both, f"{_seen(channels)} tokens seen, of {said}", fewer])},
        },
        height=420,
        xaxis={"title": "mean magnitude of the input", "type": "log", "range": x_ends, **log_ticks(*x_ends)},
        yaxis={"title": "norm of the weights", "type": "log", "range": y_ends, **log_ticks(*y_ends)},
        legend={"y": -0.2},
    )
    return figure


def surface_maps(
    surface: pd.DataFrame,
    unit: str,
    scales: np.ndarray,
    after: str,
    decode: Callable[[Sequence[int]], str],
) -> go.Figure:
    """A unit's input, tokens x channels, as it is and divided by a scale per channel, in the same colours.

    Args:
        surface: table of ``InputSurface``.
        unit: id.
        scales: float (in,), by channel.
        after: what the second map is of.
        decode: ids to text, which is escaped.

    Raises:
        InputError: not as many scales as channels.
    """
    require_columns(surface, ("step", "token", "channel", "value"))
    steps = int(surface["step"].max()) + 1
    ordered = surface.sort_values(["step", "channel"], kind="stable")
    values = ordered["value"].abs().to_numpy(np.float64).reshape(steps, -1)
    n_channels = values.shape[1]
    if scales.shape != (n_channels,):
        raise InputError(f"{unit} has {n_channels} input channels, and {len(scales)} scales were given.")
    width = -(-n_channels // _MANY_COLUMNS)
    maps = [_pooled(values, width), _pooled(values / scales, width)]
    top = max(float(drawn.max()) for drawn in maps) or 1.0
    tokens = ordered["token"].to_numpy().reshape(steps, -1)[:, 0]
    names = [escape(name) for name in token_names(tokens, decode)]
    labels = [f"{step}: {name}" for step, name in enumerate(names)]
    firsts = np.arange(maps[0].shape[1]) * width
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=["as it is", escape(after)]
    )
    for column, drawn in enumerate(maps, start=1):
        figure.add_trace(
            go.Heatmap(
                z=np.log10(np.maximum(drawn, top * 10.0**-_DECADES)).astype(np.float32),
                x=firsts,
                y=labels,
                customdata=drawn.astype(np.float32),
                coloraxis="coloraxis",
                hovertemplate="token %{y}<br>channel %{x}"
                + (" and on" if width > 1 else "")
                + "<br>magnitude %{customdata:.4g}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title="channel", showgrid=False, row=1, col=column)
    high = float(np.log10(top))
    marks = np.arange(np.ceil(high - _DECADES), np.floor(high) + 1)
    pooling = f"each cell the largest of {width} channels" if width > 1 else "one cell per channel"
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"What enters {escape(unit)}, token by token",
            "subtitle": {
                "text": join([f"{steps} tokens of one text", f"{n_channels} channels, {pooling}", "log scale"])
            },
        },
        height=int(np.clip(210 + 11 * steps, 360, 720)),
        margin={"t": 112},
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": high - _DECADES,
            "cmax": high,
            "colorbar": {
                "title": {"text": "magnitude", "side": "right"},
                "tickvals": marks.tolist(),
                "ticktext": [f"{10.0**mark:g}" for mark in marks],
                "thickness": 14,
                "outlinewidth": 0,
            },
        },
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"size": 9}, nticks=min(steps, 48))
    return figure


def _pooled(values: np.ndarray, width: int) -> np.ndarray:
    """The largest of every ``width`` neighbouring columns."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % width)))
    return padded.reshape(len(values), -1, width).max(axis=2)


def _seen(channels: pd.DataFrame) -> int:
    """Tokens behind a table of channels."""
    return int(channels["n_tokens"].max())
