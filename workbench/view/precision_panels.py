"""The texts and tables of a sitting with widths chosen per token, as escaped HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import pandas as pd

from workbench.view.panels import panel, ranking
from workbench.view.precision_controller import PrecisionState
from workbench.view.precision_loop import TargetTrial
from workbench.view.precision_token_plots import token_names

_MANY_TOKENS = 40


def expected(state: PrecisionState) -> str:
    """What the thresholds give on calibration text and on the replies that were looked at, and what is possible."""
    parts = []
    if state.expected is not None and state.cuts is not None:
        parts.append(
            f"<b>{state.expected:.3f}</b> bits expected on calibration text for the {state.target:.2f} asked, by "
            f"{len(state.cuts)} thresholds"
        )
        if state.seen is not None:
            parts.append(f"<b>{state.seen:.3f}</b> on the replies below, their inputs as they were seen")
        if state.moved:
            parts.append(f"{len(state.moved)} moved by you")
        if state.rule == "error":
            parts.append("quantiles of exact errors; estimates and other text realise another average")
    if state.possible is not None:
        parts.append(f"possible: {state.possible[0]:g} to {state.possible[1]:.4g}")
    said = " · ".join(parts)
    if state.look is not None and state.look.provenance.parameters["target"] != state.target:
        at = state.look.provenance.parameters["target"]
        said += f'<div class="wb-note">The map shows what was read at {at:g} bits; Analyse looks again.</div>'
    return panel(said)


def share(state: PrecisionState, unit: str, low: int, row: Any, decided: bool) -> str:
    """The share of tokens that read wider, expected and seen."""
    if row is None or not decided or state.look is None or not math.isfinite(row["threshold"]):
        return panel(f'<span class="wb-note">{escape(unit)} decides nothing from {low} bits on at this target.</span>')
    mark = ", moved by you" if (unit, low) in state.moved else ""
    said = (
        f"Threshold <b>{row['threshold']:.4g}</b>{mark}: <b>{100 * row['share']:.1f} %</b> of calibration "
        f"tokens read more than {low} bits"
    )
    if state.choices is not None:
        own = state.choices[(state.choices["unit"] == unit) & (state.choices["step"] > 0)]
        wider = 100 * float((own["bits"] > low).mean())
        said += f"; of the {len(own)} tokens of these replies, first ones aside, <b>{wider:.1f} %</b>"
    return panel(said)


def tokens(table: pd.DataFrame, decode: Callable[[Sequence[int]], str]) -> str:
    """The tokens that raise the width most, as a table.

    Args:
        table: of ``analysis.precision.token_excess``.
        decode: ids to text.
    """
    named = table.assign(text=token_names(table["token"], decode))
    heads = {
        "text": "token (id)",
        "count": "seen",
        "bits": "bits read",
        "excess": "beyond average",
        "error": "error over the units' mean",
    }
    return ranking(named, heads, "Tokens that raise the width most", _MANY_TOKENS)


def measured(trial: TargetTrial | None) -> str:
    """What was measured: dense, uniform widths, the best static mix, and widths per token."""
    if trial is None:
        return panel('<span class="wb-note">Nothing yet: press Run.</span>')
    heads = ["", "bits asked", "bits read", "with scales and decisions", "perplexity", "KL to dense (95 % interval)"]
    heads += ["time per token", "95th percentile", "tokens/s"]
    rows = []
    for row in trial.table.to_dict("records"):
        per_second = "" if math.isnan(row["ms_per_token"]) else f"{1000 / row['ms_per_token']:.1f}"
        kl = f"{row['kl']:.4f} ({row['kl_low']:.4f} to {row['kl_high']:.4f})" if row["method"] != "dense" else "0"
        cells = [
            f"{row['bits']:g}",
            f"{row['realised_bits']:.3f}",
            f"{row['read_bits']:.3f}",
            f"{row['perplexity']:.2f}",
            kl,
        ]
        cells += [_time(row["ms_per_token"]), _time(row["ms_p95"]), per_second]
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(row["method"])}</th>{body}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    rounds = "rounds" if trial.pairs > 1 else "round"
    own = ", with thresholds moved by you" if trial.own else ""
    notes = [
        f"Target {trial.target:g} bits, rule {trial.rule}{own}. 'held' moves thresholds with what was read so far.",
        f"Quality: {trial.n_tokens} tokens in {trial.n_windows} windows of evaluation text; a claim takes 40 windows.",
        f"Speed: {trial.pairs} {rounds} in turns, {trial.threads} threads, dense in bf16, tokens/s from the median; a "
        "static mix and a held target read about the same bytes and are not timed. "
        + (
            ""
            if trial.table["ms_per_token"].notna().any()
            else "The cpu engine does not run this model: nothing was timed."
        ),
        trial.warning,
        f"Run {trial.run} of the store.",
    ]
    return panel(
        f"<table><caption>Measured on the same windows</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        + "".join(f'<div class="wb-note">{escape(note.strip())}</div>' for note in notes if note)
    )


def _time(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f} ms"
