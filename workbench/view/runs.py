"""The runs of a store as a reader of the dashboard sees them: what to choose from, plain words, tables, one picture.

No UI toolkit here. Every sentence follows one rule: better or worse is said only where the 95 % interval excludes
no difference, and the interval stands beside it. What was not measured is said to be so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.view.style import COLORWAY, DENSE_COLOR, GREY, TEMPLATE, escape, interval_bars

if TYPE_CHECKING:
    from workbench.store import Store

NOT_MEASURED = "not measured"
MAX_RUNS = 500  # newest ones; more points than this are neither readable in one picture nor quick to draw
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "triangle-down")


@dataclass(frozen=True)
class Run:
    """One recorded comparison of a compressed model with its dense one."""

    id: int
    created_at: datetime
    kind: str
    name: str
    model: str
    method: str
    recipe_sha256: str | None
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]

    @classmethod
    def load(cls, store: Store, number: int) -> Run:
        """Read a run from the store. Raises ``InputError`` where there is none of that number."""
        found = store.run(number)
        return cls(**{field.name: found[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Card:
    """One figure in plain words. ``tone`` is ``better``, ``worse``, ``same`` or ``unknown``, from the interval."""

    title: str
    headline: str
    tone: str
    interval: str
    facts: tuple[tuple[str, str], ...]


class RunsController:
    """The runs worth showing, those of one model or of all, newest first.

    Runs that compare nothing (no ``compressed`` row in their summary) are left out.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, Run] = {}
        self.model: str | None = None

    def refresh(self) -> bool:
        """Read the store again; return whether there is anything new. Raises ``StoreError``."""
        numbers = [int(number) for number in self._store.runs(limit=MAX_RUNS)["id"]]
        # A recorded run never changes, so that only new ones are read.
        known = {number: self._known.get(number) or Run.load(self._store, number) for number in numbers}
        changed = known.keys() != self._known.keys()
        self._known = known
        if self.model not in self.models:
            self.model = None
        return changed

    @property
    def models(self) -> list[str]:
        """Names of the models that have runs."""
        return sorted({run.model for run in self._comparisons()})

    @property
    def runs(self) -> list[Run]:
        """Runs of the chosen model, or of all where none is chosen; newest first."""
        return [run for run in self._comparisons() if self.model in (None, run.model)]

    def run(self, run_id: int | None) -> Run | None:
        """The run of that number among ``runs``; else the newest; None where there is none."""
        runs = self.runs
        return next((run for run in runs if run.id == run_id), runs[0] if runs else None)

    def _comparisons(self) -> list[Run]:
        return [run for run in self._known.values() if row(run, "compressed")]


def row(run: Run, side: str) -> Mapping[str, Any]:
    """The measured row of ``dense`` or ``compressed``; empty where the run has none."""
    found = run.summary.get(side)
    return found if isinstance(found, Mapping) else {}


def label(run: Run) -> str:
    """How a run is named in a list to choose from."""
    bits = number(row(run, "compressed").get("effective_bits"))
    width = f" · {bits:.2f} bits" if bits is not None else ""
    return f"#{run.id} · {run.name} · {run.method}{width} · {moment(run.created_at)}"


def moment(when: datetime) -> str:
    """Date and time to the minute, with the time zone."""
    return f"{when:%d %b %Y %H:%M %Z}".strip()


def number(value: object) -> float | None:
    """``value`` as a finite float, or None: what a run recorded is not trusted to be a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def cards(run: Run) -> list[Card]:
    """Latency, size and quality of a run against dense."""
    return [_latency_card(run), _size_card(run), _quality_card(run)]


def _latency_card(run: Run) -> Card:
    ratio, low, high = (number(run.summary.get(f"latency_ratio{end}")) for end in ("", "_low", "_high"))
    dense, compressed = row(run, "dense"), row(run, "compressed")
    headline, tone, interval = _verdict(
        ratio, low, high, better="less time per token", worse="more time per token", quantity="Time per token"
    )
    facts = [
        ("Time per token", _pair(dense, compressed, "ms_per_token", "{:.2f} ms")),
        ("95th percentile", _pair(dense, compressed, "ms_p95", "{:.2f} ms")),
        ("Decoding", _pair(dense, compressed, "decode_tokens_per_s", "{:.1f} tokens/s")),
        ("Prefill", _pair(dense, compressed, "prefill_tokens_per_s", "{:.0f} tokens/s")),
        ("Engine", str(compressed.get("engine") or NOT_MEASURED)),
    ]
    return Card("Latency", headline, tone, interval, tuple(facts))


def _size_card(run: Run) -> Card:
    dense, compressed = row(run, "dense"), row(run, "compressed")
    before, after = number(dense.get("weight_bytes")), number(compressed.get("weight_bytes"))
    ratio = after / before if before and after is not None else None
    # A size is counted and not sampled: its interval is the number itself.
    headline, tone, _ = _verdict(ratio, ratio, ratio, better="smaller", worse="larger", quantity="Weights")
    interval = f"Weights on disk {ratio:.3f}x dense (counted, no spread)" if ratio is not None else ""
    facts = [
        ("Weights on disk", _pair(dense, compressed, "weight_bytes", "{} MB", scale=1e-6)),
        ("Effective bits", _one(compressed, "effective_bits", "{:.2f} per weight")),
        ("Output layer", _one(compressed, "output_bits", "{:.2f} bits per weight")),
        ("Peak memory", _pair(dense, compressed, "peak_rss_bytes", "{} MB", scale=1e-6)),
    ]
    return Card("Size", headline, tone, interval, tuple(facts))


def _quality_card(run: Run) -> Card:
    dense, compressed = row(run, "dense"), row(run, "compressed")
    # The difference is paired token by token; its exponential is the ratio of the two perplexities.
    ratio, low, high = (
        None if (delta := number(compressed.get(f"delta_nll{end}"))) is None or abs(delta) > 50 else math.exp(delta)
        for end in ("", "_low", "_high")
    )
    headline, tone, interval = _verdict(
        ratio, low, high, better="lower perplexity", worse="higher perplexity", quantity="Perplexity"
    )
    tokens = number(compressed.get("n_tokens"))
    text = str(compressed.get("text") or NOT_MEASURED) + (f", {tokens:,.0f} tokens" if tokens is not None else "")
    facts = [
        ("Perplexity", _pair(dense, compressed, "perplexity", "{:.2f}")),
        ("Mean KL to dense", _one(compressed, "kl_mean", "{:.4f} nats per token")),
        ("Same first choice", _one(compressed, "top1_agreement", "{:.1f} % of tokens", scale=100)),
        ("Text", text),
    ]
    return Card("Quality", headline, tone, interval, tuple(facts))


def _verdict(
    ratio: float | None, low: float | None, high: float | None, *, better: str, worse: str, quantity: str
) -> tuple[str, str, str]:
    """Headline, tone and interval of a ratio to dense, below 1 better."""
    if ratio is None:
        return NOT_MEASURED.capitalize(), "unknown", ""
    change = f"{_percent(abs(ratio - 1))} {better if ratio < 1 else worse} than dense"
    if low is None or high is None:
        return change, "unknown", f"{quantity} {ratio:.3f}x dense; no interval was recorded"
    interval = f"{quantity} {ratio:.3f}x dense, 95 % interval {low:.3f} to {high:.3f}"
    if low <= 1 <= high:
        return "No difference from dense beyond the noise", "same", interval
    return change, "better" if ratio < 1 else "worse", interval


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _format(value: float | None, form: str, scale: float) -> str:
    if value is None:
        return NOT_MEASURED
    return form.format(f"{value * scale:,.0f}" if form.startswith("{} ") else value * scale)


def _one(measured: Mapping[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    return _format(number(measured.get(key)), form, scale)


def _pair(dense: Mapping[str, Any], compressed: Mapping[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    """``value (dense: value)``."""
    if number(dense.get(key)) is None and number(compressed.get(key)) is None:
        return NOT_MEASURED
    return f"{_one(compressed, key, form, scale)} (dense: {_one(dense, key, form, scale)})"


def table(runs: Iterable[Run]) -> pd.DataFrame:
    """One line per run: the numbers that the picture of all runs is drawn from, and those beside them.

    ``perplexity_ratio`` and ``latency_ratio`` are to the dense model of the same run; ``bytes_ratio`` is of the
    weights on disk. Missing numbers are NaN.
    """
    lines = []
    for run in runs:
        dense, compressed = row(run, "dense"), row(run, "compressed")
        deltas = [number(compressed.get(f"delta_nll{end}")) for end in ("", "_low", "_high")]
        ratios = [math.nan if delta is None or abs(delta) > 50 else math.exp(delta) for delta in deltas]
        sizes = [number(side.get("weight_bytes")) for side in (dense, compressed)]
        numbers = {
            "effective_bits": number(compressed.get("effective_bits")),
            "weight_bytes": sizes[1],
            "bytes_ratio": sizes[1] / sizes[0] if sizes[0] and sizes[1] else None,
            "latency_ratio": number(run.summary.get("latency_ratio")),
            "kl_mean": number(compressed.get("kl_mean")),
        }
        lines.append(
            {"run": run.id, "created_at": run.created_at, "model": run.model, "method": run.method, "name": run.name}
            | {key: math.nan if value is None else value for key, value in numbers.items()}
            | dict(zip(("perplexity_ratio", "perplexity_low", "perplexity_high"), ratios, strict=True))
        )
    columns = ["run", "created_at", "model", "method", "name", "effective_bits", "weight_bytes", "bytes_ratio"]
    columns += ["latency_ratio", "kl_mean", "perplexity_ratio", "perplexity_low", "perplexity_high"]
    return pd.DataFrame(lines, columns=columns)


def frontier(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Positions of the points that no other point beats in both numbers (smaller is better), by rising ``x``."""
    best = math.inf
    kept = []
    for position in sorted(range(len(x)), key=lambda i: (x[i], y[i])):
        if y[position] < best:
            kept.append(position)
            best = y[position]
    return kept


def pareto_of_runs(runs: pd.DataFrame, chosen: int | None = None) -> go.Figure:
    """Weights on disk against perplexity, both relative to dense, so that runs of several models can be compared.

    Args:
        runs: what ``table`` gives.
        chosen: number of the run to ring.
    """
    drawn = runs.dropna(subset=["bytes_ratio", "perplexity_ratio"])
    figure = go.Figure()
    figure.add_scatter(
        x=[1],
        y=[1],
        mode="markers",
        name="dense",
        marker={"size": 13, "color": DENSE_COLOR, "symbol": "x"},
        hovertemplate="<b>dense</b><extra></extra>",
    )
    best = drawn.iloc[frontier(drawn["bytes_ratio"].tolist(), drawn["perplexity_ratio"].tolist())]
    if len(best) > 1:
        figure.add_scatter(
            x=best["bytes_ratio"],
            y=best["perplexity_ratio"],
            mode="lines",
            name="not beaten in both",
            line={"color": GREY, "width": 1.5, "dash": "dash", "shape": "hv"},
            hoverinfo="skip",
        )
    colors = [color for color in COLORWAY if color != DENSE_COLOR]
    for position, (method, group) in enumerate(drawn.groupby("method", sort=True)):
        figure.add_scatter(
            x=group["bytes_ratio"],
            y=group["perplexity_ratio"],
            error_y=interval_bars(group["perplexity_low"], group["perplexity_ratio"], group["perplexity_high"]),
            mode="markers",
            name=escape(_short(str(method))),
            marker={
                "size": 11,
                "color": colors[position % len(colors)],
                "symbol": _SYMBOLS[position % len(_SYMBOLS)],
            },
            customdata=group["run"].tolist(),
            text=[f"#{line.run} {escape(line.name)}<br>{escape(line.model)}" for line in group.itertuples(index=False)],
            hovertemplate="<b>%{text}</b><br>%{x:.3f}x the bytes<br>%{y:.3f}x the perplexity<extra></extra>",
        )
    ring = drawn[drawn["run"] == chosen]
    if len(ring):
        figure.add_scatter(
            x=ring["bytes_ratio"],
            y=ring["perplexity_ratio"],
            mode="markers",
            name="chosen run",
            marker={"size": 22, "color": "#1f2933", "symbol": "circle-open", "line": {"width": 2}},
            hoverinfo="skip",
        )
    spread = drawn["perplexity_ratio"].to_numpy(dtype=np.float64)
    figure.update_layout(
        template=TEMPLATE,
        height=430,
        margin={"t": 16},
        xaxis_title="weights on disk, relative to dense",
        yaxis={
            "title": "perplexity, relative to dense" + (" (log scale)" if _wide(spread) else ""),
            "type": "log" if _wide(spread) else "linear",
        },
        hovermode="closest",
    )
    return figure


def _short(name: str, limit: int = 40) -> str:
    """A name that leaves room for the picture beside it."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _wide(ratios: np.ndarray) -> bool:
    """Whether a linear axis would squeeze the good runs together: the worst is more than three times the best."""
    return bool(ratios.size and ratios.max() > 3 * ratios.min())


def bits_by_unit(run: Run) -> dict[str, float]:
    """Bits that were picked for each unit; empty where the run recorded none."""
    found = run.summary.get("bits_by_unit")
    if not isinstance(found, Mapping):
        return {}
    return {str(unit): bits for unit, value in found.items() if (bits := number(value)) is not None}


def recipe_json(run: Run) -> str | None:
    """The run's recipe as JSON text, or None where it recorded none."""
    recipe = run.summary.get("recipe")
    return json.dumps(recipe, indent=2, ensure_ascii=False) + "\n" if isinstance(recipe, Mapping) else None


def notes(run: Run) -> list[str]:
    """What the measurement itself says about its limits."""
    found = run.summary.get("notes")
    return [str(note) for note in found] if isinstance(found, list | tuple) else []


def environment_facts(run: Run) -> list[tuple[str, str]]:
    """What the run was measured on, for people: names and values, nested ones joined."""
    facts = sorted(run.environment.items())
    return [(key.removesuffix("_bytes").replace("_", " "), _shown(key, value)) for key, value in facts]


def _shown(key: str, value: object) -> str:
    if value is None:
        return "unknown"
    if key.endswith("_bytes") and (size := number(value)) is not None:
        return f"{size / 1e9:,.1f} GB"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown('', inner)}" for name, inner in value.items() if inner is not None) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_shown("", inner) for inner in value) or "none"
    return str(value)
