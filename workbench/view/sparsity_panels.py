"""The texts and tables of a sitting with contextual sparsity, as escaped HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from workbench.measure.benches.sparsity_quality import PREFIX
from workbench.view.panels import panel
from workbench.view.sparsity_controller import SparsityState
from workbench.view.sparsity_picks import METHODS
from workbench.view.sparsity_trial import SparsityTrial, decided
from workbench.view.sparsity_verdicts import verdicts

_ALL = {"all": "heads and neurons, by weights", "heads": "heads", "neurons": "neurons"}


def said_of(state: SparsityState) -> str:
    """What is looked at, in one escaped line: the pick, the truth it is held against, and the text."""
    scored, shown = state.scored, state.outcomes
    if scored is None or shown is None:
        return ""
    pick = state.pick
    facts = [
        f"{pick.line} at {pick.sparsity:.0%}",
        f"true scores by {pick.criterion}",
        f"text {state.text}, {len(shown.positions)} steps from {int(shown.positions[0])} on",
        state.model if state.tables is None else state.tables.dense.name,
    ]
    return " · ".join(escape(fact, quote=False) for fact in facts)


def predicted(state: SparsityState) -> str:
    """What the pick is expected to cost, and how that was found out."""
    if state.look is None:
        return ""
    pick, seen = state.pick, state.look
    if state.predicted is None:
        own = seen.curves[seen.curves["line"] == pick.line]["sparsity"].to_list()
        why = f"was measured up to {max(own):.0%} alone" if own else "was not measured"
        return panel(f'<span class="wb-note">No prediction: {escape(pick.line)} {why} on sampled text.</span>')
    said = (
        f"<b>{escape(pick.line)}</b>, {pick.sparsity:.0%} left out: predicted damage <b>{state.predicted:.3g}</b> nats "
        "a token (KL to dense)"
    )
    truth = ""
    if pick.method == "oracle" and state.tables is not None:
        truth = f" True masks are measured by {escape(state.tables.fitted_for)}, for which the predictor was fitted."
    of = "all weights of the blocks" if not pick.masks else "the weights of all heads and neurons"
    return panel(
        f'{said}<div class="wb-note">Sparsity is the share of {of}. Predicted: interpolated between '
        f"{escape(_curve_points(state))}, measured on {seen.n_tokens} tokens in {seen.n_windows} windows that the "
        f"model sampled; Run measures on evaluation text.{truth}</div>"
    )


def _curve_points(state: SparsityState) -> str:
    assert state.look is not None
    curves = state.look.curves
    return ", ".join(f"{value:.0%}" for value in curves.loc[curves["line"] == state.pick.line, "sparsity"])


def counts(state: SparsityState) -> str:
    """Hits, misses and false skips in numbers, of the pick and of other masks, by the same true masks."""
    table = state.counts
    if table is None:
        note = "Inputs are left out by their size, token by token: nothing is predicted, so there is no true mask."
        return panel(f'<span class="wb-note">{note}</span>') if state.look is not None else ""
    heads = ["", "of", "left out", "hits, of what could be left out", "misses, of the same"]
    heads += ["false skips, of what is left out", "by chance"]
    rows = []
    for row in table.to_dict("records"):
        chance = row["kept"] + row["false skip"]  # a unit that is drawn matters as often as units do
        cells = [
            _ALL[row["kind"]],
            _share(row["left_out"]),
            _share(row["found"]),
            _share(1 - row["found"]),
            _share(row["wrongly"]),
            _share(chance),
        ]
        rows.append(_row(row["line"], cells))
    notes = [
        f"True masks leave out what scored least by {state.pick.criterion}, as much of it, hybrid. Criteria by "
        "gradient know the tokens that follow: they say what turned out to matter, which no choice could know.",
        "Shares are of the blocks that may be masked; the sparsity asked for counts those that stay whole too.",
    ]
    return _table("Masks beside what turned out to matter, in the text below", heads, rows, notes)


def verdict(state: SparsityState) -> str:
    """Whether the input carries information, and whether a static mask is as good."""
    return panel("".join(f"<p>{escape(one)}</p>" for one in verdicts(state)))


def measured(trial: SparsityTrial | None) -> str:
    """What was measured: the weights whole, the rivals at the same sparsity, and the pick."""
    if trial is None:
        return panel('<span class="wb-note">Nothing yet: press Run.</span>')
    heads = ["", "asked", "of all block weights", "KL predicted", "KL to dense (95 % interval)"]
    heads += ["more than the pick (95 % interval)", "perplexity, times dense", "time per token", "95th percentile"]
    rows = []
    for row in trial.table.to_dict("records"):
        more = f"{row['more']:+.4f} ({row['more_low']:+.4f} to {row['more_high']:+.4f})"
        cells = [
            f"{row['sparsity']:.0%}",
            f"{row['left_out']:.1%}",
            "" if math.isnan(row["predicted"]) else f"{row['predicted']:.3g}",
            f"{row['kl']:.4f} ({row['kl_low']:.4f} to {row['kl_high']:.4f})",
            "picked" if row["line"] == trial.pick.line else more,
            f"{row['ratio']:.3f}",
            *("" if math.isnan(row[name]) else f"{row[name]:.2f} ms" for name in ("ms_per_token", "ms_p95")),
        ]
        rows.append(_row(row["line"], cells))
    notes = [
        f"Quality: {trial.n_tokens} tokens in {trial.n_windows} windows of {trial.text}, after the first {PREFIX} of "
        "each, which masks leave whole; a claim takes 40 windows. Masks leave keys and values whole.",
        _speed(trial),
        f"Engine {trial.engine}. Run {trial.run} of the store.",
    ]
    return _table("Measured on the same windows", heads, rows, notes)


def _speed(trial: SparsityTrial) -> str:
    own = trial.table[trial.table["line"] == trial.pick.line].iloc[0]
    if math.isnan(own["ms_per_token"]):
        why = (
            "true masks cannot be chosen while writing"
            if trial.pick.method == "oracle"
            else "the cpu engine is not there"
        )
        return f"Not timed: {why}."
    rounds = "rounds" if trial.pairs > 1 else "round"
    interval = "" if math.isnan(own["speed_low"]) else f" ({own['speed_low']:.2f} to {own['speed_high']:.2f})"
    return (
        f"Speed: {own['speed']:.2f}{interval} times that of the same weights whole, {trial.pairs} {rounds} in turns, "
        f"{trial.threads} threads, masks from the first token of the reply on."
    )


def replies(trial: SparsityTrial | None) -> str:
    """What the replies left out, or why there are none."""
    if trial is None:
        return ""
    if not trial.generations:
        return panel(
            f'<span class="wb-note">No replies: {METHODS["oracle"]}, so nothing can be written by them.</span>'
        )
    share = decided(trial.left_out)
    left = "nothing: they ended too early" if math.isnan(share) else f"{share:.1%} of the blocks' weights on average"
    return panel(f'<span class="wb-note">Replies at {trial.pick.sparsity:.0%}, greedy; they left out {left}.</span>')


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _row(name: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[str], notes: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return panel(
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        + "".join(f'<div class="wb-note">{escape(note)}</div>' for note in notes if note)
    )
