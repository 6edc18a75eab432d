"""Figures of what leaving out costs, over sparsity, blocks, domains and languages. No state, no files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from workbench.analysis.profile import Profile
from workbench.view.heatmap import require_columns
from workbench.view.sparsity_picks import MOST, SparsityPick
from workbench.view.sparsity_trial import SparsityTrial
from workbench.view.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SEQUENTIAL,
    SKY,
    TEMPLATE,
    VERMILLION,
    escape,
    interval_bars,
    join,
    log_ends,
    log_ticks,
    subtitle,
)

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star", "cross", "pentagon")
# By the beginning of a line's name: colour, symbol, dash.
_LINES = {
    "predicted": (VERMILLION, "circle", "solid"),
    "static": (BLUE, "square", "dash"),
    "random": (GREY, "x", "dot"),
    "true": (GREEN, "star", "dot"),
    "inputs by size (TEAL)": (ORANGE, "diamond", "solid"),
    "inputs": (PURPLE, "triangle-up", "solid"),
}


def curve_lines(
    curves: pd.DataFrame, pick: SparsityPick, predicted: float | None, said: str, trial: SparsityTrial | None = None
) -> go.Figure:
    """KL to dense by sparsity, one line per way to choose, with what is predicted of the pick and what a run measured.

    Static lines by other criteria, and predicted ones of other scopes, begin hidden; a click in the legend shows them.

    Args:
        curves: of ``Look``.
        pick: that is marked.
        predicted: its KL, None where it is not known.
        said: what the lines were measured on.
        trial: the last run, whose pick is marked too.
    """
    require_columns(curves, ("line", "sparsity", "kl", "kl_low", "kl_high"))
    figure = go.Figure()
    shown = {pick.line, SparsityPick("static", 0.0, pick.criterion).line, SparsityPick().line}
    for line, rows in curves[curves["line"] != "whole"].groupby("line", sort=False):
        rows = rows.sort_values("sparsity")
        color, symbol, dash = next(look for start, look in _LINES.items() if str(line).startswith(start))
        variant = str(line).startswith(("static", "predicted"))
        figure.add_trace(
            go.Scatter(
                x=rows["sparsity"],
                y=rows["kl"],
                error_y=interval_bars(rows["kl_low"], rows["kl"], rows["kl_high"]),
                mode="lines+markers",
                name=escape(line),
                line={"color": color, "dash": dash, "width": 3 if line == pick.line else 1.6},
                marker={"symbol": symbol, "size": 8},
                visible=True if not variant or line in shown else "legendonly",
                hovertemplate=escape(line) + "<br>%{x:.0%} left out: %{y:.3g} nats a token<extra></extra>",
            )
        )
    marks = []
    if predicted is not None and predicted > 0:
        marks.append((pick.sparsity, predicted, f"predicted: {pick.line}", "diamond-open"))
    if trial is not None:
        row = trial.table[trial.table["line"] == trial.pick.line].iloc[0]
        marks.append(
            (trial.pick.sparsity, float(row["kl"]), f"measured: {trial.pick.line}, {trial.text}", "circle-x-open")
        )
    for x, y, name, symbol in marks:
        figure.add_trace(
            go.Scatter(
                x=[x],
                y=[y],
                mode="markers",
                name=escape(name),
                marker={"symbol": symbol, "size": 15, "color": "black", "line": {"width": 2}},
                hovertemplate=escape(name) + "<br>%{x:.0%} left out: %{y:.3g} nats a token<extra></extra>",
            )
        )
    ends = log_ends(curves.loc[curves["line"] != "whole", ["kl"]].to_numpy(np.float64).ravel())
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "What leaving out costs, by how it is chosen",
            "subtitle": {"text": " · ".join([said, "between points: straight in the logarithm"])},
        },
        height=460,
        xaxis={
            "title": "sparsity: of heads' and neurons' weights, or of all weights for inputs",
            "tickformat": ".0%",
            "range": [0, MOST + 0.03],
        },
        yaxis={"title": "KL to dense, nats a token", "type": "log", "range": ends, **log_ticks(*ends)},
        legend={"y": -0.22},
    )
    return figure


def quality_lines(profile: Profile) -> go.Figure:
    """How well the predictor tells what matters, over blocks: rank correlation, and recall beside a static mask.

    Args:
        profile: of ``analysis.mask_quality.PredictorQuality``.
    """
    table = profile.table
    require_columns(table, ("block", "kind", "spearman", "spearman_demeaned", "recall", "static_recall", "chance"))
    asked = float(profile.provenance.parameters["sparsity"])
    figure = make_subplots(
        rows=2,
        cols=2,
        shared_xaxes=True,
        shared_yaxes="rows",
        vertical_spacing=0.12,
        horizontal_spacing=0.05,
        subplot_titles=[
            "heads: rank correlation",
            "neurons: rank correlation",
            f"heads: recall of the {1 - asked:.0%} that matter most",
            f"neurons: recall of the {1 - asked:.0%} that matter most",
        ],
    )
    for column, kind in enumerate(("heads", "neurons"), start=1):
        means = (
            table[table["kind"] == kind]
            .groupby("block")[["spearman", "spearman_demeaned", "recall", "static_recall", "chance"]]
            .mean()
        )
        for row, name, words, color, symbol, dash in (
            (1, "spearman", "of scores", SKY, "circle", "solid"),
            (1, "spearman_demeaned", "each unit's mean taken off", VERMILLION, "diamond", "solid"),
            (2, "recall", "predicted mask", VERMILLION, "diamond", "solid"),
            (2, "static_recall", "static mask", BLUE, "square", "dash"),
            (2, "chance", "chance", GREY, "line-ew", "dot"),
        ):
            figure.add_trace(
                go.Scatter(
                    x=means.index,
                    y=means[name],
                    mode="lines" if name == "chance" else "lines+markers",
                    name=("correlation " if row == 1 else "recall, ") + words,
                    legendgroup=name,
                    showlegend=column == 1,
                    line={"color": color, "dash": dash, "width": 2},
                    marker={"symbol": symbol, "size": 6},
                    hovertemplate="block %{x}: %{y:.2f}<extra>" + words + "</extra>",
                ),
                row=row,
                col=column,
            )
        figure.update_xaxes(title="block", row=2, col=column)
    decisions = len(table[["sequence", "step"]].drop_duplicates())
    figure.update_yaxes(rangemode="tozero", tickformat=".2f")
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "How well the predictor tells what matters",
            "subtitle": {
                "text": subtitle(
                    profile.provenance,
                    f"{decisions} decisions in {table['sequence'].nunique()} windows"
                    + (f" of {profile.provenance.text.name}" if profile.provenance.text is not None else ""),
                )
            },
        },
        height=520,
        margin={"t": 116},
        legend={"y": -0.16},
    )
    figure.update_annotations(font={"size": 12})
    return figure


def group_dots(trial: SparsityTrial) -> go.Figure:
    """KL to dense of every domain and language at each sparsity, with intervals where there are windows enough."""
    table = trial.groups
    require_columns(table, ("sparsity", "by", "group", "kl_mean", "kl_mean_low", "kl_mean_high", "ratio", "n_windows"))
    sparsities = sorted(table["sparsity"].unique())
    colors = sample_colorscale(SEQUENTIAL, list(np.linspace(0.0, 0.9, len(sparsities))))
    highest = table[table["sparsity"] == sparsities[-1]].sort_values(["by", "kl_mean"], ascending=[False, False])
    names = [f"{by}: {group}" for by, group in zip(highest["by"], highest["group"], strict=True)]
    figure = go.Figure()
    for index, sparsity in enumerate(sparsities):
        rows = table[table["sparsity"] == sparsity]
        own = sparsity == trial.pick.sparsity
        figure.add_trace(
            go.Scatter(
                x=rows["kl_mean"],
                y=[escape(f"{by}: {group}") for by, group in zip(rows["by"], rows["group"], strict=True)],
                error_x=interval_bars(rows["kl_mean_low"], rows["kl_mean"], rows["kl_mean_high"]),
                mode="markers",
                name=f"{sparsity:.0%} left out" + (", picked" if own else ""),
                marker={
                    "color": colors[index],
                    "symbol": _SYMBOLS[index % len(_SYMBOLS)],
                    "size": 11 if own else 9,
                    "line": {"width": 1.5 if own else 0.5, "color": "black"},
                },
                customdata=np.stack([rows["ratio"], rows["n_windows"], rows["n_tokens"]], axis=1),
                hovertemplate="%{y}<br>%{x:.3g} nats a token, perplexity times %{customdata[0]:.3f}<br>"
                "%{customdata[2]} tokens in %{customdata[1]} windows<extra></extra>",
            )
        )
    values = table[["kl_mean", "kl_mean_low", "kl_mean_high"]].to_numpy(np.float64).ravel()
    ends = log_ends(values)
    fewest = int(table["n_windows"].min())
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "How much each field and language bears",
            "subtitle": {
                "text": join(
                    [
                        trial.pick.line,
                        f"{trial.n_tokens} tokens in {trial.n_windows} windows of {trial.text}",
                        f"as few as {fewest} window{'s' if fewest > 1 else ''} a group"
                        + (", no interval from one" if fewest < 2 else ""),
                    ]
                )
            },
        },
        height=int(np.clip(220 + 26 * len(names), 360, 900)),
        xaxis={"title": "KL to dense, nats a token (log scale)", "type": "log", "range": ends, **log_ticks(*ends)},
        yaxis={"categoryorder": "array", "categoryarray": [escape(name) for name in names[::-1]]},
        legend={"y": -0.2},
    )
    return figure


def batch_lines(trial: SparsityTrial) -> go.Figure:
    """What several requests leave out alone and together, and what is gained over the weights whole."""
    table = trial.batches[trial.batches["line"] == trial.pick.line]
    require_columns(table, ("batch", "left_out", "left_out_by_all", "speed", "speed_low", "speed_high"))
    sizes = [str(size) for size in table["batch"]]
    figure = make_subplots(cols=2, rows=1, subplot_titles=("left out", "speed over the weights whole"))
    for column, name, color, symbol, dash in (
        ("left_out", "by each request", SKY, "circle", "dot"),
        ("left_out_by_all", "by all of them: need not be read", VERMILLION, "diamond", "solid"),
    ):
        figure.add_trace(
            go.Scatter(
                x=sizes,
                y=table[column],
                name=name,
                mode="lines+markers",
                line={"color": color, "dash": dash},
                marker={"symbol": symbol, "size": 9},
                hovertemplate="%{x} at once: %{y:.1%} " + name + "<extra></extra>",
            ),
            row=1,
            col=1,
        )
    figure.add_trace(
        go.Scatter(
            x=sizes,
            y=table["speed"],
            error_y=interval_bars(table["speed_low"], table["speed"], table["speed_high"]),
            name="speed",
            mode="lines+markers",
            line={"color": BLUE},
            marker={"symbol": "square", "size": 9},
            customdata=table["ms_per_step"],
            hovertemplate="%{x} at once: %{y:.3f} times as fast, %{customdata:.2f} ms a step<extra></extra>",
        ),
        row=1,
        col=2,
    )
    figure.add_hline(y=1.0, line={"color": GREY, "dash": "dot", "width": 1}, row=1, col=2)
    for at in (1, 2):
        figure.update_xaxes(title="requests at once", type="category", row=1, col=at)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=1)
    rounds = f"{trial.pairs} round{'s' if trial.pairs != 1 else ''} in turns, {trial.threads} threads"
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "What is left of it with several requests at once",
            "subtitle": {"text": join([f"{trial.pick.line} at {trial.pick.sparsity:.0%}", trial.text, rounds])},
        },
        height=380,
        legend={"y": -0.3},
    )
    figure.update_annotations(font={"size": 12})
    return figure
