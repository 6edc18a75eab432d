"""Figures of masks beside the true ones: hits, misses and false skips by block, unit and step. No state, no files.

Hits, misses and false skips are never told apart by colour alone: where a cell is one unit it carries a sign, and
where a cell is a share each of the three has a panel of its own.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.analysis.mask_steps import FALSE_SKIP, HIT, KEPT, MISS, MaskOutcomes
from workbench.errors import InputError
from workbench.view.heatmap import require_columns
from workbench.view.style import BLUE, SEQUENTIAL, TEMPLATE, VERMILLION, YELLOW, escape, join

# Sign, colour and words of each outcome, in the order of ``analysis.mask_steps.OUTCOMES``. The colours differ in
# lightness as well as in hue.
LOOKS = {
    KEPT: ("", "#e6e9ed", "kept, rightly"),
    HIT: ("✓", BLUE, "hit: left out, and could be"),
    MISS: ("○", YELLOW, "miss: kept, and could be left out"),
    FALSE_SKIP: ("✕", VERMILLION, "false skip: left out, and matters"),
}
_SHARES = (HIT, MISS, FALSE_SKIP)
_CELLS = 64  # neurons of a block are pooled into so many cells
_MANY_SIGNS = 2500  # beyond so many cells signs run into each other


def outcome_map(outcomes: MaskOutcomes, kind: str, said: str, position: int | None = None) -> go.Figure:
    """Every block (up) by its units (across): outcomes of heads at one step, or shares of steps and units.

    Heads stand in their own order, neurons of a block in the order of their true scores in this text.

    Args:
        outcomes: masks beside the true ones.
        kind: ``heads`` or ``neurons``.
        said: what was looked at.
        position: one step; None for all.

    Raises:
        InputError: a step at which the mask is not in force.
    """
    rows = _rows_at(outcomes, position)
    when = f"{len(outcomes.positions)} steps" if position is None else f"step {position}"
    if kind == "heads" and position is not None:
        codes = np.stack([outcomes.of(block, kind)[rows][0] for block in outcomes.blocks])
        blocks = [f"block {block}" for block in outcomes.blocks]
        figure = go.Figure(_signs(codes, [str(i) for i in range(codes.shape[1])], blocks, "head"))
        _titled(figure, f"Heads at step {position}: masks beside what turned out to matter", said, len(blocks))
        figure.update_xaxes(title="head", dtick=1, showgrid=False)
        figure.update_yaxes(autorange="reversed", showgrid=False, title="first masked block on top")
        return figure
    titles = [LOOKS[code][2] for code in _SHARES]
    figure = make_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.025, subplot_titles=titles)
    for column, code in enumerate(_SHARES, start=1):
        cells = np.stack([_pooled(_shares(outcomes, block, kind, rows, code)) for block in outcomes.blocks])
        per_cell = -(-_size(outcomes, kind) // cells.shape[1])
        figure.add_trace(
            go.Heatmap(
                z=cells.astype(np.float32),
                x=list(range(0, per_cell * cells.shape[1], per_cell)),
                y=[f"block {block}" for block in outcomes.blocks],
                coloraxis="coloraxis",
                hovertemplate="%{y}<br>"
                + ("head %{x}" if kind == "heads" else "neurons from rank %{x}")
                + "<br>%{z:.0%}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    across = "head" if kind == "heads" else "neurons by true score, highest left"
    pooling = f"each cell {per_cell} neurons" if kind == "neurons" and per_cell > 1 else ""
    _titled(
        figure,
        f"{kind.capitalize()} over {when}: share of units and steps",
        " · ".join(part for part in (said, pooling) if part),
        len(outcomes.blocks),
    )
    figure.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"tickformat": ".0%", "thickness": 14, "outlinewidth": 0},
        }
    )
    ticks = {"dtick": max(1, _size(outcomes, kind) // 12)} if kind == "heads" else {}
    figure.update_xaxes(title=across, showgrid=False, **ticks)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def outcome_steps(outcomes: MaskOutcomes, block: int, kind: str, said: str, tokens: list[str]) -> go.Figure:
    """One block's heads or neurons (up) at every step (across).

    Args:
        outcomes: masks beside the true ones.
        block: that is shown.
        kind: ``heads`` or ``neurons``, the latter by true score, pooled.
        said: what was looked at.
        tokens: text of each step, not escaped yet.

    Raises:
        InputError: a block that is not masked.
    """
    codes = outcomes.of(block, kind)
    labels = [f"{position}: {escape(name)}" for position, name in zip(outcomes.positions, tokens, strict=True)]
    if kind == "heads":
        heads = [f"head {i}" for i in range(codes.shape[1])]
        figure = go.Figure(_signs(codes.T, labels, heads, "step"))
        figure.update_yaxes(autorange="reversed", showgrid=False, dtick=1)
        n_rows, part = len(heads), ""
    else:
        order = np.argsort(-outcomes.importance_of(block, kind), kind="stable")
        titles = [LOOKS[code][2] for code in _SHARES]
        figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.08, subplot_titles=titles)
        for row, code in enumerate(_SHARES, start=1):
            cells = np.stack([_pooled(step) for step in (codes == code)[:, order].astype(np.float64)])
            per_cell = -(-codes.shape[1] // cells.shape[1])
            figure.add_trace(
                go.Heatmap(
                    z=cells.T.astype(np.float32),
                    x=labels,
                    y=list(range(0, per_cell * cells.shape[1], per_cell)),
                    coloraxis="coloraxis",
                    hovertemplate="step %{x}<br>neurons from rank %{y}<br>%{z:.0%}<extra></extra>",
                ),
                row=row,
                col=1,
            )
        figure.update_layout(
            coloraxis={
                "colorscale": SEQUENTIAL,
                "cmin": 0,
                "cmax": 1,
                "colorbar": {"tickformat": ".0%", "thickness": 14, "outlinewidth": 0},
            }
        )
        figure.update_yaxes(autorange="reversed", showgrid=False, title="rank")
        n_rows, part = 22, f"neurons by true score in this text, highest on top, each cell {per_cell}"
    _titled(
        figure,
        f"{kind.capitalize()} of block {block} at every step",
        " · ".join(one for one in (said, part) if one),
        n_rows,
    )
    bottom = {"row": 3, "col": 1} if kind == "neurons" else {}
    figure.update_xaxes(showgrid=False, nticks=min(len(labels), 40), tickangle=-60, tickfont={"size": 9})
    figure.update_xaxes(title="step: token", **bottom)
    return figure


def share_map(table: pd.DataFrame, what: str, sparsity: float) -> go.Figure:
    """Share of its inputs that each unit leaves out: every block (up) by the kinds of unit (across).

    Args:
        table: of ``sparsity_loop.unit_shares``.
        what: the method.
        sparsity: that was asked for.
    """
    require_columns(table, ("block", "kind", "share"))
    cells = table.pivot_table(index="block", columns="kind", values="share", sort=False)
    figure = go.Figure(
        go.Heatmap(
            z=cells.to_numpy(np.float32),
            x=[escape(kind) for kind in cells.columns],
            y=[f"block {block}" for block in cells.index],
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": "share left out", "side": "right"}, "tickformat": ".0%", "thickness": 14},
            hovertemplate="%{y}, %{x}<br>%{z:.1%}<extra></extra>",
        )
    )
    parts = join([what, f"{sparsity:.0%} of all weights asked for", "expected from calibration text"])
    _titled(figure, "Share of its inputs that each unit leaves out", parts, len(cells))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title="unit that reads the inputs", showgrid=False)
    return figure


def _rows_at(outcomes: MaskOutcomes, position: int | None) -> slice | np.ndarray:
    if position is None:
        return slice(None)
    found = np.flatnonzero(outcomes.positions == position)
    if not len(found):
        raise InputError(
            f"Nothing is decided at step {position}: choose one of {outcomes.positions[0]} to {outcomes.positions[-1]}."
        )
    return found


def _shares(outcomes: MaskOutcomes, block: int, kind: str, rows: slice | np.ndarray, code: int) -> np.ndarray:
    """Share of the steps at which each unit has an outcome, (units,), neurons by their true scores."""
    found = (outcomes.of(block, kind)[rows] == code).mean(axis=0)
    return found if kind == "heads" else found[np.argsort(-outcomes.importance_of(block, kind), kind="stable")]


def _size(outcomes: MaskOutcomes, kind: str) -> int:
    return int(outcomes.of(outcomes.blocks[0], kind).shape[1])


def _pooled(values: np.ndarray) -> np.ndarray:
    """The mean of neighbours, at most ``_CELLS`` of them."""
    width = -(-len(values) // _CELLS)
    return np.add.reduceat(values, np.arange(0, len(values), width)) / np.diff(
        [*range(0, len(values), width), len(values)]
    )


def _signs(codes: np.ndarray, x: list[str], y: list[str], across: str) -> go.Heatmap:
    """Cells of one unit each, with a colour and a sign by outcome."""
    steps = [(code + end) / len(LOOKS) for code in LOOKS for end in (0, 1)]
    colors = [LOOKS[code][1] for code in LOOKS for _ in (0, 1)]
    names = np.array([look[2] for look in LOOKS.values()])
    signs = np.array([look[0] for look in LOOKS.values()])
    return go.Heatmap(
        z=codes,
        x=x,
        y=y,
        zmin=-0.5,
        zmax=len(LOOKS) - 0.5,
        colorscale=list(zip(steps, colors, strict=True)),
        text=signs[codes] if codes.size <= _MANY_SIGNS else None,
        texttemplate="%{text}" if codes.size <= _MANY_SIGNS else None,
        textfont={"size": 11},
        customdata=names[codes],
        hovertemplate="%{y}, " + across + " %{x}<br>%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar={
            "tickvals": list(LOOKS),
            "ticktext": [f"{sign} {name}".strip() for sign, _, name in LOOKS.values()],
            "thickness": 14,
            "outlinewidth": 0,
            "len": 0.9,
        },
    )


def _titled(figure: go.Figure, text: str, said: str, n_rows: int) -> None:
    figure.update_layout(
        template=TEMPLATE,
        title={"text": text, "subtitle": {"text": said}},
        height=int(np.clip(210 + 15 * n_rows, 320, 760)),
        margin={"t": 116},
    )
    figure.update_annotations(font={"size": 12})
