"""How the workbench's pictures look: one plotly template, colour-blind safe colours, and escaping of foreign text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from workbench.analysis.profile import Provenance

# Okabe and Ito's eight colours, told apart with any common colour vision deficiency; dense is always blue and
# compressed always vermillion, so that a reader learns them once.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#666666"
COLORWAY = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, GREY, YELLOW)
DENSE_COLOR, COMPRESSED_COLOR = BLUE, VERMILLION
UNIT_COLORS = {"qkv": BLUE, "o": SKY, "gate_up": ORANGE, "down": VERMILLION}

# Perceptually uniform, and safe for colour vision deficiencies, which the diverging one is too.
SEQUENTIAL = "Cividis"
DIVERGING = "PuOr"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
TEMPLATE = "workbench"


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": "#e3e6ea",
        "linecolor": "#9aa3ad",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "tickcolor": "#9aa3ad",
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 13}},
        "tickfont": {"size": 11},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": "#1f2933"},
            "title": {
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"l": 12, "t": 16},
                "font": {"size": 17},
                "subtitle": {"font": {"size": 12, "color": "#52606d"}},
            },
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(COLORWAY),
            "margin": {"l": 64, "r": 24, "t": 84, "b": 56},
            "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
            "xaxis": axis,
            "yaxis": axis,
            "colorscale": {"sequential": SEQUENTIAL},
        }
    )


pio.templates[TEMPLATE] = _template()


def escape(text: object) -> str:
    """Return ``text`` so that plotly's pseudo-HTML shows it as it is.

    Model names, prompts and layer names come from files: without this a layer called ``<b>`` would change the
    picture, and ``<a href=...>`` would put a link into it. Quotes stay, because plotly does not decode ``&quot;``.
    """
    return html.escape(str(text), quote=False)


def subtitle(provenance: Provenance, *parts: str) -> str:
    """One escaped line of what was looked at: the given parts, then model, dtype, device and seed."""
    facts = [*parts, provenance.model, provenance.dtype, provenance.device, f"seed {provenance.seed}"]
    return join(facts)


def join(parts: Iterable[object]) -> str:
    """Escape the parts and join them with a middle dot, leaving out empty ones."""
    return " · ".join(escape(part) for part in parts if str(part))


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks of a logarithmic axis from 10^low to 10^high that do not run into each other; plotly's where few fit."""
    mantissas = (1,) if high - low > 2.5 else (1, 2, 5) if high - low > 1 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    marks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in mantissas]
    marks = [mark for mark in marks if low - 1e-9 <= math.log10(mark) <= high + 1e-9]
    return {"tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]} if len(marks) > 2 else {}


def log_ends(values: np.ndarray) -> list[float]:
    """Powers of ten around all positive values, with some room."""
    logs = np.log10(values[np.isfinite(values) & (values > 0)])
    if not len(logs):
        return [-1.0, 1.0]
    margin = 0.05 * max(float(logs.max() - logs.min()), 0.2)
    return [float(logs.min()) - margin, float(logs.max()) + margin]


def interval_bars(low: pd.Series, middle: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Error bars from ``low`` to ``high``; where an end is not known there is none."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - middle).fillna(0),
        "arrayminus": (middle - low).fillna(0),
        "thickness": 1.5,
    }
