"""The heat map over decoding steps: a profile brought into at most so many cells, and drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.analysis.profile import Profile
from workbench.errors import InputError, suggest
from workbench.view.style import DIVERGING, SEQUENTIAL, TEMPLATE, escape, subtitle

# plotly.js redraws a heat map of this many cells in well under a second; beyond it hovering and zooming stall.
MAX_CELLS = 50_000

Aggregate = Literal["max", "mean"]

VALUE_TITLES = {
    "relative_error": "relative output error",
    "error_norm": "output error (L2 norm)",
    "output_norm": "output (L2 norm)",
    "estimate": "estimated error (L2 norm)",
    "error": "exact error (L2 norm)",
    "ratio": "estimated over exact error",
    "width": "width read (bits)",
}


@dataclass(frozen=True)
class StepGrid:
    """A heat map's cells, as drawn.

    Attributes:
        values: float64 (linears, columns); NaN where nothing was measured.
        linears: row names, in the model's order.
        columns: one row per column of ``values``: ``sequence``, ``phase``, ``first`` and ``last`` step.
        steps_per_cell: how many steps one cell covers at most; 1 means that every step is its own cell.
        aggregate: how the steps of one cell were made one number.
        n_steps: steps that went in.
    """

    values: np.ndarray
    linears: tuple[str, ...]
    columns: pd.DataFrame
    steps_per_cell: int
    aggregate: Aggregate
    n_steps: int

    @property
    def table(self) -> pd.DataFrame:
        """The cells as a tidy table: linear, sequence, phase, first and last step, value."""
        n_rows, n_columns = self.values.shape
        repeated = self.columns.loc[np.tile(np.arange(n_columns), n_rows)].reset_index(drop=True)
        repeated.insert(0, "linear", np.repeat(np.array(self.linears, dtype=object), n_columns))
        repeated["value"] = self.values.ravel()
        return repeated


def step_grid(
    profile: Profile,
    bits: int,
    sequence: int | None = None,
    value: str = "relative_error",
    *,
    aggregate: Aggregate = "max",
    max_cells: int = MAX_CELLS,
) -> StepGrid:
    """Bring a decoding-steps profile into at most ``max_cells`` cells.

    Neighbouring steps share a cell only where there are too many, and never across the end of a prompt or of a
    sequence. The maximum keeps single bad steps visible; the mean would hide them.

    Args:
        profile: a profile of ``DecodingSteps``.
        bits: which width to show.
        sequence: one sequence, or None for all of them side by side.
        value: ``relative_error``, ``error_norm`` or ``output_norm``.
        aggregate: ``max`` or ``mean`` over the steps of a cell.
        max_cells: upper bound of rows x columns.

    Raises:
        InputError: a width, sequence or value that the profile does not hold; too many sequences for the cells.
    """
    table = profile.table
    require_columns(table, ("sequence", "step", "phase", "block", "linear", "bits"))
    if value not in VALUE_TITLES or value not in table:
        allowed = [name for name in VALUE_TITLES if name in table]
        raise InputError(f"Unknown value '{value}': choose {', '.join(allowed)}." + suggest(value, allowed))
    widths = sorted(table["bits"].unique())
    if bits not in widths:
        raise InputError(f"This profile holds widths {', '.join(map(str, widths))}, not {bits} bits.")
    chosen = table[table["bits"] == bits].astype({"phase": str, "linear": str})
    if sequence is not None:
        present = sorted(chosen["sequence"].unique())
        if sequence not in present:
            raise InputError(f"This profile holds sequences {present[0]} to {present[-1]}, not {sequence}.")
        chosen = chosen[chosen["sequence"] == sequence]

    linears = chosen.drop_duplicates("linear")["linear"]
    pairs = chosen[["sequence", "step", "phase"]].drop_duplicates().sort_values(["sequence", "step"])
    segments = pairs.groupby(["sequence", "phase"], sort=False).size().to_numpy()
    allowed_columns = max(1, max_cells // len(linears))
    if len(segments) > allowed_columns:
        raise InputError(
            f"{len(segments)} prompts and replies x {len(linears)} linears do not fit into {max_cells} cells: "
            "choose one sequence."
        )
    per_cell = _steps_per_cell(segments, allowed_columns)

    # Number of the cell's column for each (sequence, step): counted within a segment, then offset.
    within = pairs.groupby(["sequence", "phase"], sort=False).cumcount()
    segment = pairs.groupby(["sequence", "phase"], sort=False).ngroup()
    offsets = np.concatenate([[0], np.cumsum(-(-segments // per_cell))])
    pairs = pairs.assign(column=offsets[segment.to_numpy()] + within.to_numpy() // per_cell)
    columns = (
        pairs.groupby("column")
        .agg(sequence=("sequence", "first"), phase=("phase", "first"), first=("step", "min"), last=("step", "max"))
        .reset_index(drop=True)
    )

    located = chosen.merge(pairs[["sequence", "step", "column"]], on=["sequence", "step"])
    grouped = located.groupby(["linear", "column"], sort=False)[value]
    cells = (grouped.max() if aggregate == "max" else grouped.mean()).unstack("column")
    values = cells.reindex(index=list(linears), columns=range(len(columns))).to_numpy(dtype=np.float64)
    return StepGrid(values, tuple(linears), columns, per_cell, aggregate, len(pairs))


def step_heatmap(
    profile: Profile,
    bits: int,
    sequence: int | None = None,
    value: str = "relative_error",
    *,
    aggregate: Aggregate = "max",
) -> go.Figure:
    """Heat map of every linear (y) at every decoding step (x), on a logarithmic colour scale.

    The table behind it is ``step_grid(...).table``. Arguments and errors are those of ``step_grid``.
    """
    grid = step_grid(profile, bits, sequence, value, aggregate=aggregate)
    return grid_figure(grid, profile, bits, value)


def grid_figure(
    grid: StepGrid, profile: Profile, bits: int, value: str, *, text: str | None = None, rows: str = "linear"
) -> go.Figure:
    """Draw a ``StepGrid``; ``text`` is another title, ``rows`` what its rows are."""
    logs, low, high = _log10(grid.values)
    if value == "width":
        logs, low, high = grid.values, float(np.nanmin(grid.values)), float(np.nanmax(grid.values))
    if value == "ratio":  # one is the middle: too high and too low are two colours
        high = max(-low, high)
        low = -high
    columns = [
        f"sequence {sequence}, {phase}, " + (f"step {first}" if first == last else f"steps {first} to {last}")
        for sequence, phase, first, last in _columns(grid.columns)
    ]
    title = VALUE_TITLES[value]
    figure = go.Figure(
        go.Heatmap(
            z=logs.astype(np.float32),
            x=[escape(name) for name in columns],
            y=[escape(name) for name in grid.linears],
            customdata=grid.values.astype(np.float32),
            zmin=low,
            zmax=high,
            colorscale=DIVERGING if value == "ratio" else SEQUENTIAL,
            hoverongaps=False,
            hovertemplate="<b>%{y}</b><br>%{x}<br>" + title + " %{customdata:.3g}<extra></extra>",
            colorbar=_width_colorbar(grid.values, title)
            if value == "width"
            else _log_colorbar(low, high, title + " (log scale)"),
        )
    )
    if grid.steps_per_cell > 1:
        pooled = f"each cell the {'largest' if grid.aggregate == 'max' else 'mean'} of {grid.steps_per_cell} steps"
    else:
        pooled = "one cell per step"
    n_sequences = grid.columns["sequence"].nunique()
    parts = [f"{grid.n_steps} steps of {n_sequences} sequence{'s' if n_sequences > 1 else ''}", pooled]
    group = profile.provenance.parameters.get("group_size")
    if group:
        parts.append(f"groups of {group}")
    n_rows = len(grid.linears)
    many = n_rows > 45
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": text or f"Sensitivity of each linear at each decoding step, {bits} bits",
            "subtitle": {"text": subtitle(profile.provenance, *parts)},
        },
        height=int(np.clip(170 + n_rows * (3.2 if many else 17), 320, 1000)),
        margin={"t": 104},
        xaxis={"title": "decoding step (token position in its sequence)", "showgrid": False, **_step_ticks(grid)},
        yaxis={
            "title": f"{rows}, first block on top",
            "autorange": "reversed",
            "showgrid": False,
            # Names of all rows where they fit, else a selection that grows as the reader zooms in.
            "nticks": 32 if many else n_rows + 1,
        },
    )
    _draw_segments(figure, grid.columns)
    return figure


def _log10(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """log10 with zeros drawn as the smallest positive value; also returns the range for the colours."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size == 0:
        return np.where(np.isfinite(values), 0.0, np.nan), -1.0, 1.0
    floor = positive.min()
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.where(values <= 0, floor, values))
    low, high = float(np.log10(floor)), float(np.log10(positive.max()))
    return logs, low, high if high > low else low + 1.0


def _width_colorbar(values: np.ndarray, title: str) -> dict[str, object]:
    widths = [float(bits) for bits in np.unique(values[np.isfinite(values)])]
    return {
        "title": {"text": title, "side": "right"},
        "tickvals": widths,
        "ticktext": [f"{bits:g}" for bits in widths],
        "thickness": 14,
        "outlinewidth": 0,
    }


def _log_colorbar(low: float, high: float, title: str) -> dict[str, object]:
    """Ticks at 1, 2 and 5 times powers of ten, or at powers of ten alone where the range is wide."""
    mantissas = (1, 2, 5) if high - low < 2.5 else (1,)
    marks = [m * 10.0**e for e in range(int(np.floor(low)), int(np.ceil(high)) + 1) for m in mantissas]
    marks = [m for m in marks if low - 1e-9 <= np.log10(m) <= high + 1e-9]
    return {
        "title": {"text": title, "side": "right"},
        "tickvals": [float(np.log10(m)) for m in marks],
        "ticktext": [f"{m:g}" for m in marks],
        "thickness": 14,
        "outlinewidth": 0,
    }


def _step_ticks(grid: StepGrid) -> dict[str, object]:
    """About sixteen labels over the whole axis, at round steps of each sequence."""
    columns = _columns(grid.columns)
    wanted = grid.n_steps / 16
    stride = next(s for s in (m * 10**e for e in range(7) for m in (1, 2, 5)) if s >= wanted)
    apart = max(1, len(columns) // 32)
    positions: list[int] = []
    for position, (_, _, first, last) in enumerate(columns):
        round_step = -(-first // stride) * stride
        if round_step <= last and (not positions or position - positions[-1] >= apart):
            positions.append(position)
    return {
        "tickvals": positions,
        "ticktext": [str(-(-columns[p][2] // stride) * stride) for p in positions],
        "range": [-0.5, len(columns) - 0.5],
    }


def _draw_segments(figure: go.Figure, columns: pd.DataFrame) -> None:
    """Lines where a prompt ends (dashed) and where a sequence ends (solid), and a name above each segment."""
    keys = [(sequence, phase) for sequence, phase, _, _ in _columns(columns)]
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]] + [len(keys)]
    several = columns["sequence"].nunique() > 1
    for start, end in itertools.pairwise(starts):
        sequence, phase = keys[start]
        if start > 0:
            inside = keys[start - 1][0] == sequence
            # White over black stays visible on both ends of the colour scale.
            figure.add_vline(start - 0.5, line={"color": "white", "width": 3})
            figure.add_vline(start - 0.5, line={"color": "black", "width": 1, "dash": "dash" if inside else "solid"})
        figure.add_annotation(
            x=(start + end - 1) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            text=escape(f"{phase} {sequence}" if several else phase),
            font={"size": 11},
        )


def _steps_per_cell(segments: np.ndarray, allowed_columns: int) -> int:
    """Smallest number of steps per cell with which segments of these lengths fit into ``allowed_columns``."""
    low, high = 1, int(segments.max())
    while low < high:
        middle = (low + high) // 2
        if int((-(-segments // middle)).sum()) <= allowed_columns:
            high = middle
        else:
            low = middle + 1
    return low


def _columns(columns: pd.DataFrame) -> list[tuple[int, str, int, int]]:
    """Sequence, phase, first and last step of each column, as plain Python values."""
    rows = zip(columns["sequence"], columns["phase"], columns["first"], columns["last"], strict=True)
    return [(int(sequence), str(phase), int(first), int(last)) for sequence, phase, first, last in rows]


def require_columns(table: pd.DataFrame, names: Sequence[str]) -> None:
    """Raise ``InputError`` naming the columns that a table lacks."""
    missing = [name for name in names if name not in table]
    if missing:
        raise InputError(f"This table lacks the column {', '.join(missing)}; it has {', '.join(table.columns)}.")
