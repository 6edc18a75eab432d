"""Figures of widths chosen per token, from the profile of ``PrecisionSteps`` and tables: no state, no files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.analysis.precision_thresholds import error_scale
from workbench.analysis.profile import Profile
from workbench.errors import InputError
from workbench.formats.selectors import Selectors, quantile_levels
from workbench.runtime.precision import Rule
from workbench.view.heatmap import StepGrid, grid_figure, require_columns, step_grid
from workbench.view.style import BLUE, GREEN, GREY, ORANGE, TEMPLATE, VERMILLION, escape, join, log_ticks

SHOWN = {"width": "width read", "estimate": "estimated error", "error": "exact error", "ratio": "estimated over exact"}


def choice_grid(profile: Profile, low: int, value: str, sequence: int | None = None) -> StepGrid:
    """Cells of the heat map: ``width``, ``estimate``, ``error`` or ``ratio`` of the step from ``low`` bits, by unit.

    Raises:
        InputError: a value, width or sequence that the profile does not hold.
    """
    table = profile.table
    require_columns(table, ("sequence", "step", "phase", "block", "unit", "low", "estimate", "error", "bits"))
    shown = table.rename(columns={"bits": "width"}).rename(columns={"unit": "linear", "low": "bits"})
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = shown.assign(ratio=(shown["estimate"] / shown["error"]).replace([np.inf, -np.inf], np.nan))
    if value == "width":  # a unit that decides about other widths was looked at too
        shown = shown.drop_duplicates(["sequence", "step", "linear"]).assign(bits=low)
    order = shown.drop_duplicates("linear").sort_values("block", kind="stable")["linear"]
    rank = dict(zip(order, range(len(order)), strict=True))
    shown = shown.assign(rank=shown["linear"].map(rank)).sort_values("rank", kind="stable")
    return step_grid(replace(profile, table=shown), low, sequence, value)


def choice_heatmap(grid: StepGrid, profile: Profile, low: int, value: str) -> go.Figure:
    """Heat map of every unit (y) at every step (x). The table behind it is ``grid.table``."""
    target, rule = profile.provenance.parameters["target"], profile.provenance.parameters["rule"]
    step = "" if value == "width" else f", reading {low} bits instead of the next width"
    text = f"{SHOWN[value].capitalize()} at each step{step}"
    figure = grid_figure(grid, profile, low, value, text=escape(text), rows="unit")
    said = figure.layout.title.subtitle.text
    figure.layout.title.subtitle.text = join([f"read at a target of {target:g} bits, rule {rule}"]) + " · " + said
    return figure


def unit_steps(
    profile: Profile,
    unit: str,
    low: int,
    threshold: float | None,
    sequence: int | None = None,
    now: pd.DataFrame | None = None,
) -> go.Figure:
    """Estimated and exact error of one unit over steps, the threshold, and below them the width that was read.

    Args:
        profile: of ``PrecisionSteps``.
        unit: id.
        low: narrower width of the step that is shown.
        threshold: on the scale of the estimate; None where there is none.
        sequence: one, or None for all, one after the other.
        now: of ``chosen_widths``, what other thresholds than those of the profile would read; drawn where it differs.
    """
    rows = _rows(profile.table, unit, low, sequence)
    x = np.arange(len(rows))
    names = [
        f"sequence {s}, {p}, step {n}" for s, p, n in zip(rows["sequence"], rows["phase"], rows["step"], strict=True)
    ]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.72, 0.28], vertical_spacing=0.05)
    for column, name, color, symbol in (
        ("error", "exact error", BLUE, "circle"),
        ("estimate", "estimate", VERMILLION, "diamond"),
    ):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=rows[column],
                mode="lines+markers",
                name=name,
                line={"color": color, "width": 1.2, "dash": "solid" if column == "error" else "dot"},
                marker={"size": 5, "symbol": symbol},
                customdata=names,
                hovertemplate="%{customdata}<br>" + name + " %{y:.3g}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=rows["bits"],
            mode="lines",
            line={"shape": "hvh", "color": GREEN},
            fill="tozeroy",
            name="width read",
            customdata=names,
            hovertemplate="%{customdata}<br>%{y} bits<extra></extra>",
        ),
        row=2,
        col=1,
    )
    if now is not None:
        chosen = rows[["sequence", "step"]].merge(now[now["unit"] == unit], on=["sequence", "step"], how="left")["bits"]
        if (chosen.to_numpy() != rows["bits"].to_numpy()).any():
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=chosen,
                    mode="lines",
                    line={"shape": "hvh", "color": "black", "dash": "dot", "width": 1.5},
                    name="width by the thresholds now",
                    customdata=names,
                    hovertemplate="%{customdata}<br>now %{y} bits<extra></extra>",
                ),
                row=2,
                col=1,
            )
    for end in np.flatnonzero(np.diff(rows["sequence"].to_numpy())):
        figure.add_vline(end + 0.5, line={"color": GREY, "width": 1})
    shown = np.concatenate([rows["error"], rows["estimate"]]).astype(np.float64)
    if threshold is not None and np.isfinite(threshold) and threshold > 0:
        shown = np.append(shown, threshold)
        figure.add_hline(threshold, line={"color": GREY, "dash": "dash"}, row=1, col=1)
        figure.add_annotation(
            x=1,
            xref="x domain",
            y=np.log10(threshold),
            yref="y",
            text="threshold",
            showarrow=False,
            xanchor="right",
            yanchor="bottom",
            font={"size": 11, "color": GREY},
        )
    decided = rows[rows["step"] > 0]
    correlation = _correlation(decided["estimate"], decided["error"])
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"{escape(unit)}: estimated and exact error, step from {low} bits",
            "subtitle": {
                "text": join(
                    [
                        f"{len(rows)} steps of {rows['sequence'].nunique()} sequences",
                        f"correlation of logarithms {correlation:.2f}",
                    ]
                )
            },
        },
        height=380,
        legend={"y": -0.25},
    )
    ends = _log_range(shown)
    figure.update_yaxes(type="log", title="error (L2 norm)", range=ends, **log_ticks(*ends), row=1, col=1)
    widths = sorted(rows["bits"].unique())
    figure.update_yaxes(title="bits", range=[0, max(widths) + 0.5], dtick=2, row=2, col=1)
    figure.update_xaxes(title="step, sequences one after the other", row=2, col=1)
    return figure


def error_distribution(
    profile: Profile,
    selectors: Selectors,
    index: int,
    unit: str,
    low: int,
    threshold: float | None,
) -> go.Figure:
    """Share of tokens whose estimate exceeds a value: on calibration text, and of what was seen, with the threshold.

    The threshold is the first shape, so that a widget can let it be dragged.

    Args:
        profile: of ``PrecisionSteps``.
        selectors: of the model.
        index: of the unit among the units.
        unit: its id.
        low: narrower width of the step.
        threshold: on the scale of the estimate.
    """
    rule: Rule = profile.provenance.parameters["rule"]
    step = [int(width) for width in selectors.widths].index(low)
    calibrated = calibrated_estimates(selectors, index, step, rule)
    seen = np.sort(_rows(profile.table, unit, low, None).query("step > 0")["estimate"].to_numpy(np.float64))
    figure = go.Figure()
    for values, shares, name, color, dash in (
        (calibrated, 1 - quantile_levels(len(calibrated)), "calibration text", BLUE, "solid"),
        (seen, 1 - (np.arange(len(seen)) + 0.5) / max(len(seen), 1), "these replies", ORANGE, "dot"),
    ):
        figure.add_trace(
            go.Scatter(
                x=values,
                y=shares,
                mode="lines",
                name=name,
                line={"color": color, "dash": dash, "width": 2},
                hovertemplate=name + "<br>%{y:.1%} of tokens above %{x:.3g}<extra></extra>",
            )
        )
    shown = np.concatenate([calibrated, seen])
    if threshold is not None and np.isfinite(threshold) and threshold > 0:
        shown = np.append(shown, threshold)
        figure.add_shape(
            type="line",
            x0=threshold,
            x1=threshold,
            y0=0,
            y1=1,
            yref="paper",
            line={"color": GREY, "dash": "dash", "width": 3},
        )
    ends = _log_range(shown)
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"{escape(unit)}: tokens above a threshold, step from {low} bits",
            "subtitle": {
                "text": join([f"{len(calibrated)} quantiles of calibration text", f"{len(seen)} tokens seen"])
            },
        },
        height=330,
        xaxis={"title": "estimate (log scale)", "type": "log", "range": ends, **log_ticks(*ends)},
        yaxis={"title": "share of tokens above", "tickformat": ".0%", "range": [0, 1.02]},
        legend={"y": -0.3},
    )
    return figure


def calibrated_estimates(selectors: Selectors, unit: int, step: int, rule: Rule) -> np.ndarray:
    """Quantiles of the estimate on calibration text, ascending: of scaled norms, or of errors."""
    if rule == "gain":
        return selectors.norms[unit].astype(np.float64) * error_scale(selectors, unit, step)
    return selectors.errors[unit, step].astype(np.float64)


def _log_range(values: np.ndarray) -> list[float]:
    """Powers of ten that hold all positive values, with room to drag a line beyond them."""
    logs = np.log10(values[values > 0])
    if not len(logs):
        return [-1.0, 1.0]
    margin = 0.08 * max(float(logs.max() - logs.min()), 0.1)
    return [float(logs.min()) - margin, float(logs.max()) + margin]


def _rows(table: pd.DataFrame, unit: str, low: int, sequence: int | None) -> pd.DataFrame:
    rows = table[(table["unit"] == unit) & (table["low"] == low)]
    if sequence is not None:
        rows = rows[rows["sequence"] == sequence]
    if rows.empty:
        raise InputError(f"{unit} decides nothing from {low} bits on at this target.")
    return rows.sort_values(["sequence", "step"])


def _correlation(a: pd.Series, b: pd.Series) -> float:
    """Of logarithms; NaN where one does not vary."""
    x, y = np.log(np.maximum(a.to_numpy(np.float64), 1e-30)), np.log(np.maximum(b.to_numpy(np.float64), 1e-30))
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 0 and y.std() > 0 else float("nan")
