"""The texts and tables of a sitting with outliers, as escaped HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import pandas as pd

from workbench.analysis.outliers import overlap
from workbench.view.outliers_controller import OutlierState
from workbench.view.outliers_trial import ChannelTrial
from workbench.view.panels import panel, ranking
from workbench.view.precision_token_plots import token_names

_MANY_VALUES = 40


def steps_name(first: int, following: int | None) -> str:
    """A range of steps in words.

    Args:
        first: its first step.
        following: first step of the next range, None of the last.
    """
    if following is None:
        return f"steps from {first}"
    return "first token" if following == first + 1 == 1 else f"steps {first} to {following - 1}"


def massive(state: OutlierState, decode: Callable[[Sequence[int]], str]) -> str:
    """The largest values of the residual and of all inputs, with their tokens."""
    if state.look is None:
        return ""
    table = state.look.massive.table
    table = table[table["ratio"].notna()].sort_values("ratio", ascending=False).head(_MANY_VALUES)
    named = table.assign(name=token_names(table["token"], decode))
    heads = {
        "name": "token (id)",
        "text": "text",
        "step": "step",
        "site": "enters",
        "channel": "channel",
        "value": "value",
        "ratio": "over the median of its token",
    }
    return ranking(named, heads, f"Massive activations, {state.look.said()}", _MANY_VALUES)


def overlaps(state: OutlierState, share: float) -> str:
    """How far the most salient channels of the unit are the same on other text and at other steps."""
    if state.look is None:
        return ""
    table = state.look.statistics.table
    table = table[table["unit"] == state.unit]
    starts = state.look.first_steps
    names = {first: steps_name(first, following) for first, following in zip(starts, [*starts[1:], None], strict=True)}
    parts = []
    for over in ("text", "first_step"):
        found = overlap(table, share, over)
        if over == "first_step":
            found = found.assign(a=found["a"].map(names), b=found["b"].map(names))
        parts.append(found)
    found = pd.concat(parts, ignore_index=True)
    if found.empty:
        return panel('<span class="wb-note">One text and one range of steps: nothing to compare.</span>')
    n_top = int(found["n_top"].iloc[0])
    found = found.assign(overlap=[f"{value:.0%}" for value in found["overlap"]], chance=f"{share:.1%}")
    heads = {"a": "most salient on", "b": "and on", "overlap": "are the same", "chance": "would be by chance"}
    return ranking(found, heads, f"Salient channels of {state.unit}, the first {n_top}")


def predicted(state: OutlierState) -> str:
    """What is picked is expected to do: to the unit at once, to all units when the worker has them."""
    if state.look is None:
        return ""
    parts = []
    if state.method == "awq":
        found = state.predicted
        if found is not None:
            exponent = "scales as they are" if found.alpha is None else f"exponent {found.alpha:.2f}"
            kept = f", {len(found.kept)} of {len(found.channels)} channels kept" if len(found.kept) else ""
            parts.append(
                f"{escape(state.unit)}: predicted error <b>{found.error:.3g}</b> of its outputs' square "
                f"({_times(found.error, found.rounded)} of plain rounding; {exponent}{kept})"
            )
    elif state.every_unit is not None:
        own = state.every_unit[state.every_unit["unit"] == state.unit]
        if len(own):
            row = own.iloc[0]
            parts.append(
                f"{escape(state.unit)}: predicted error <b>{row['error']:.3g}</b> of its outputs' square "
                f"({_times(row['error'], row['plain'])} of rows rounded without groups; {row['groups']} groups, "
                f"{row['weight_error']:.2g} of it by the weights)"
            )
    every = state.every_unit
    if every is None:
        parts.append("all units: ...")
    elif len(every) < len(state.look.weights["unit"].unique()):
        parts.append("all units: with so many groups the sums of some could leave 32 bits; take fewer")
    else:
        error, plain = every["error"].sum(), every["plain"].sum()
        parts.append(f"all {len(every)} units, added up: <b>{error:.3g}</b> ({_times(error, plain)} of plain rounding)")
    said = " · ".join(parts)
    source = "channels' mean squares" if state.method == "awq" else "some rows, rounded (scales by chunk: up),"
    return panel(
        f'{said}<div class="wb-note">Expected squared change of the outputs if rounding errors of different channels '
        f"have nothing to do with one another, from {source} at all steps but the first.</div>"
    )


def interventions(state: OutlierState) -> str:
    """What setting values to zero costs."""
    table = state.interventions
    if table is None:
        return panel('<span class="wb-note">Nothing yet: press Zero and measure.</span>')
    shown = table.sort_values("kl", ascending=False).assign(
        step=["all" if step < 0 else str(step) for step in table.sort_values("kl", ascending=False)["step"]]
    )
    heads = {"what": "set to zero", "site": "entering", "channel": "channel", "step": "step", "kl": "KL to dense"}
    return ranking(shown, heads, f"Nats per token, {int(table['n_tokens'].iloc[0])} tokens")


def measured(trial: ChannelTrial | None) -> str:
    """What was measured: dense, the plain rival, and what was picked, beside what was predicted."""
    if trial is None:
        return panel('<span class="wb-note">Nothing yet: press Run.</span>')
    heads = ["", "effective bits", "predicted error, all units", "perplexity", "KL to dense (95 % interval)"]
    heads += ["nats a token more than the rival (95 % interval)", "time per token", "95th percentile"]
    rows = []
    for row in trial.table.to_dict("records"):
        dense = row["method"] == "dense"
        cells = [
            f"{row['effective_bits']:.3f}",
            "" if dense else f"{row['predicted']:.3g}",
            f"{row['perplexity']:.2f}",
            "0" if dense else f"{row['kl']:.4f} ({row['kl_low']:.4f} to {row['kl_high']:.4f})",
            ""
            if math.isnan(row["to_rival"])
            else f"{row['to_rival']:+.4f} ({row['to_rival_low']:+.4f} to {row['to_rival_high']:+.4f})",
            _time(row["ms_per_token"]),
            _time(row["ms_p95"]),
        ]
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(row["method"])}</th>{body}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    rounds = "rounds" if trial.pairs > 1 else "round"
    timed = trial.table["ms_per_token"].notna().any()
    notes = [
        f"Quality: {trial.n_tokens} tokens in {trial.n_windows} windows of evaluation text; a claim takes 40 windows. "
        f"Engine {trial.engine} for all; the rival is the row above, less than it is better.",
        f"Speed: {trial.pairs} {rounds} in turns, {trial.threads} threads, dense in bf16."
        if timed
        else "Not timed: the cpu engine does not run all of these, and the reference engine's time says nothing.",
        f"Run {trial.run} of the store.",
    ]
    return panel(
        f"<table><caption>Measured on the same windows</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        + "".join(f'<div class="wb-note">{escape(note)}</div>' for note in notes)
    )


def _times(error: float, plain: float) -> str:
    return f"{error / plain:.2f} times that" if plain > 0 else "as much as"


def _time(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f} ms"
