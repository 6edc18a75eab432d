"""One self-contained HTML file: figures and their tables, measurements, texts, recipe, environment.

Everything that is shown is escaped; a content security policy lets run only the two scripts whose hashes it names and
forbids every connection, so that a model name or a reply can neither run code nor phone home.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from workbench.analysis.profile import Profile
from workbench.errors import InputError
from workbench.files import write_whole
from workbench.view.texts import Generation, differences, marked_html

# More rows make the file slow to open and nobody reads them; the profile beside the report holds all.
MAX_TABLE_ROWS = 500

# What names a candidate, best first.
_NAME_KEYS = ("variant", "method", "name")

HOW: dict[str, str] = {
    "ms_per_token": "Wall time of one decoding step, batch 1. Dense and compressed run in turn (ABBA) in one fresh "
    "process with pinned threads, after a warm-up.",
    "tokens_per_s": "1000 / ms_per_token.",
    "ms_p95": "95th percentile of the single steps' times.",
    "latency_ratio": "Compressed time / dense time, paired; the interval is a 95 % bootstrap over pairs. Above 1 means "
    "that the compressed model is slower on this engine.",
    "weight_bytes": "Bytes of all weights on disk. Dense is bf16: two bytes per parameter.",
    "effective_bits": "Stored bits per weight of the quantized units; scales and zero points are counted.",
    "read_bits": "Stored bits per weight that one decoding step reads, averaged over tokens.",
    "target_bits": "The budget that was asked for; effective_bits is what was reached.",
    "output_bits": "Bits of the output layer (the embedding too where they are tied).",
    "perplexity": "exp of the mean negative log-likelihood per token over windows that took no part in fitting.",
    "kl_mean": "Mean Kullback-Leibler divergence from dense to compressed per token, nats, over the whole vocabulary; "
    "the interval is a 95 % block bootstrap over windows. Dense is computed in fp32.",
    "top1_agreement": "Share of tokens for which both models would pick the same next token.",
    "delta_nll": "Paired difference of negative log-likelihood per token, compressed minus dense, nats; low and high "
    "are the ends of a 95 % block bootstrap over windows.",
    "peak_rss_bytes": "Highest resident memory of the measuring process.",
}


@dataclass(frozen=True)
class ReportFigure:
    """A plotly figure, the sentence that says what it shows, and the table behind it."""

    figure: go.Figure
    caption: str
    table: pd.DataFrame | None = None


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str = "",
    recipe: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    measurements: Sequence[Mapping[str, Any]] = (),
    figures: Sequence[ReportFigure] = (),
    tables: Mapping[str, pd.DataFrame] | None = None,
    generations: Sequence[Generation] = (),
    profiles: Mapping[str, Profile] | None = None,
    how: Mapping[str, str] | None = None,
) -> Path:
    """Write the report to ``path`` in one move: a reader sees the old file or the whole new one.

    Args:
        path: the HTML file; its folder must exist.
        title: plain text.
        summary: one or two sentences under the title.
        recipe: the recipe as a JSON dict.
        environment: what it was measured on, as ``measure.environment.environment()`` gives it.
        measurements: one row per candidate (dense first), keys as in a bench row; shown with one column per candidate.
        figures: pictures with captions and tables.
        tables: caption to table.
        generations: replies side by side.
        profiles: name to profile, for their provenance; their tables are not copied into the report.
        how: additions to, or replacements of, the sentences that say how a number was measured.

    Returns:
        The path written.

    Raises:
        StoreError: the file cannot be written.
        InputError: the folder does not exist.
    """
    target = Path(path)
    html = render(
        title=title,
        summary=summary,
        recipe=recipe,
        environment=environment,
        measurements=measurements,
        figures=figures,
        tables=tables or {},
        generations=generations,
        profiles=profiles or {},
        how={**HOW, **(how or {})},
    )
    if not target.parent.is_dir():
        raise InputError(f"Cannot write {target}: there is no folder {target.parent}. Make it first.")
    write_whole(target, html)
    return target


def render(
    *,
    title: str,
    summary: str,
    recipe: Mapping[str, Any] | None,
    environment: Mapping[str, Any] | None,
    measurements: Sequence[Mapping[str, Any]],
    figures: Sequence[ReportFigure],
    tables: Mapping[str, pd.DataFrame],
    generations: Sequence[Generation],
    profiles: Mapping[str, Profile],
    how: Mapping[str, str],
) -> str:
    """Return the report as one HTML text. Arguments as for ``write_report``."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html.j2"
    )
    bootstrap = (Path(__file__).parent / "templates" / "report.js").read_text(encoding="utf-8")
    plotly = _inside_script(get_plotlyjs())
    measured_keys = list(dict.fromkeys(key for row in measurements for key in row))
    sections = [
        ("measured", "Measured", bool(measurements)),
        ("figures", "Figures", bool(figures)),
        ("tables", "Tables", bool(tables)),
        ("texts", "Generated text", bool(generations)),
        ("how", "How it was measured", bool(measurements)),
        ("recipe", "Recipe", recipe is not None),
        ("provenance", "Data", bool(profiles)),
        ("environment", "Environment", environment is not None),
    ]
    return template.render(
        title=title,
        summary=summary,
        policy=_policy([plotly, bootstrap]),
        contents=[(key, name) for key, name, there in sections if there],
        measurements=_measurement_table(measurements) if measurements else None,
        figures=[_figure(i, figure) for i, figure in enumerate(figures, start=1)],
        tables=[{"name": name, **_table(frame, name)} for name, frame in tables.items()],
        generations=[_generation(generation) for generation in generations],
        how=[(key, how[key]) for key in measured_keys if key in how],
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False) if recipe is not None else "",
        provenance=[(name, profile.provenance.model_dump_json(indent=2)) for name, profile in profiles.items()],
        environment=_environment_table(environment) if environment is not None else None,
        plotly=Markup(plotly),
        bootstrap=Markup(bootstrap),
    )


def _policy(scripts: Sequence[str]) -> str:
    """Content security policy that runs exactly these inline scripts and connects to nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )


def _inside_script(source: str) -> str:
    """Make JavaScript safe to stand inside a script element: ``</script`` within a string must not end it.

    Carriage returns are normalised as an HTML parser does it, because the policy's hash is taken after parsing.
    """
    return source.replace("</script", "<\\/script").replace("\r\n", "\n").replace("\r", "\n")


def _figure(index: int, figure: ReportFigure) -> dict[str, Any]:
    # Inside a script element only "<" can do harm; its JSON escape means the same to JSON.parse.
    encoded = json.dumps(json.loads(figure.figure.to_json()), separators=(",", ":")).replace("<", "\\u003c")
    return {
        "id": f"figure-{index}",
        "caption": figure.caption,
        "json": Markup(encoded),
        "height": int(figure.figure.layout.height or 450),
        "table": _table(figure.table, figure.caption) if figure.table is not None else None,
    }


def _generation(generation: Generation) -> dict[str, Any]:
    dense, compressed = differences(generation.dense, generation.compressed)
    same = generation.same_until
    if generation.dense == generation.compressed:
        note = f"Identical, {same} tokens."
    else:
        note = f"The first {same} tokens are identical."
    return {
        "prompt": generation.prompt,
        "dense": Markup(marked_html(dense)),
        "compressed": Markup(marked_html(compressed)),
        "note": note,
    }


def _table(frame: pd.DataFrame, caption: str) -> dict[str, Any]:
    shown = frame.head(MAX_TABLE_ROWS)
    numeric = [bool(pd.api.types.is_numeric_dtype(frame[name])) for name in frame.columns]
    rows = [[_cell(value) for value in row] for row in shown.itertuples(index=False, name=None)]
    return {
        "caption": caption,
        "columns": [(str(name), is_number) for name, is_number in zip(frame.columns, numeric, strict=True)],
        "rows": rows,
        "left_out": len(frame) - len(shown),
    }


def _measurement_table(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn rows into one column per candidate: few candidates with many numbers each read better that way."""
    names = [next((str(row[k]) for k in _NAME_KEYS if row.get(k)), str(i)) for i, row in enumerate(measurements)]
    keys = [key for key in dict.fromkeys(key for row in measurements for key in row) if key not in _NAME_KEYS]
    rows = [[key, *(_cell(row.get(key)) for row in measurements)] for key in keys]
    columns = [("number", False), *((name, True) for name in names)]
    return {"caption": "Candidates beside dense", "columns": columns, "rows": rows, "left_out": 0}


def _environment_table(environment: Mapping[str, Any]) -> dict[str, Any]:
    rows: list[list[str]] = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            rows += [[f"{key}: {inner}", _cell(item)] for inner, item in value.items()]
        else:
            rows.append([key, _cell(value)])
    return {
        "caption": "Where this was measured",
        "columns": [("what", False), ("value", False)],
        "rows": rows,
        "left_out": 0,
    }


def _cell(value: object) -> str:
    """A number with the digits that mean something; text as it is; nothing as a dash."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}".replace(",", "\u202f") if abs(int(value)) >= 10_000 else str(int(value))
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
