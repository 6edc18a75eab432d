"""The texts and tables of the sensitivity workbench as escaped HTML, from a controller's state."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from workbench.progress import JobState
from workbench.view.controller import State
from workbench.view.loop import Trial
from workbench.view.plots import speed_sentence
from workbench.view.sitting import SittingState
from workbench.view.texts import Generation, Span, differences, marked_html

# JupyterLab's own colours, so that light and dark themes both read well; the second value is for other front ends.
STYLE = """<style>
.wb-panel { color: var(--jp-ui-font-color1, #1f2933); line-height: 1.5; }
.wb-panel table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wb-panel caption { text-align: left; color: var(--jp-ui-font-color2, #52606d); padding: 2px 0 4px; }
.wb-panel th, .wb-panel td { padding: 2px 12px 2px 0; text-align: right;
  border-bottom: 1px solid var(--jp-border-color2, #cbd2d9); }
.wb-panel th { font-weight: 600; }
.wb-panel th:first-child, .wb-panel td:first-child { text-align: left; }
.wb-panel th[scope=row] { white-space: nowrap; }
.wb-scroll { max-height: 260px; overflow-y: auto; }
.wb-pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.wb-reply { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--jp-layout-color2, #f5f7fa);
  border: 1px solid var(--jp-border-color2, #cbd2d9); border-radius: 4px; padding: 8px 12px; }
.wb-reply mark { background: #ffe08a; color: #1f2933; text-decoration: underline; }
.wb-prompt { white-space: pre-wrap; border-left: 4px solid #0072B2; padding-left: 10px; margin: 8px 0; }
.wb-error { border-left: 4px solid #D55E00; padding: 4px 10px; }
.wb-note { color: var(--jp-ui-font-color2, #52606d); }
</style>"""


def panel(content: str, role: str = "") -> str:
    """Wrap HTML in the workbench's style; ``role`` status makes screen readers say changes."""
    attributes = f' role="{role}" aria-live="polite"' if role else ""
    return f'<div class="wb-panel"{attributes}>{content}</div>'


def heading(model: str, what: str = "Sensitivity of") -> str:
    """What is shown of the model, by its name or the last part of its path; the whole of it on hover."""
    short = Path(model).name if Path(model).exists() else model
    return panel(f'<h2 title="{escape(model)}">{escape(what)} {escape(short)}</h2>')


def status(state: SittingState) -> str:
    """What happened last, and what went wrong."""
    if state.error:
        return panel(f'<div class="wb-error"><b>Not possible:</b> {escape(state.error)}</div>', "status")
    return panel(escape(state.message), "status")


def progress(progress: JobState | None) -> str:
    """Name of the stage, share done, and the time that remains of it."""
    return "" if progress is None else progress.words


def prediction(state: State) -> str:
    """Asked and achieved bits, the predicted damage, and what is possible."""
    parts = []
    if state.solution is not None:
        found = state.solution
        parts.append(
            f"<b>{found.achieved_bits:.3f}</b> effective bits for the {state.budget:.2f} asked, "
            f"predicted damage <b>{found.predicted_damage:.4g}</b> nats per token"
        )
        if state.pinned:
            parts.append(f"{len(state.pinned)} of {len(found.unit_bits)} units pinned by you")
    if state.budget_range is not None:
        low, high = state.budget_range
        parts.append(f"possible: {low:.3f} to {high:.3f}")
    return panel(" · ".join(parts))


def ranking(table: pd.DataFrame, columns: dict[str, str], caption: str, top: int = 40) -> str:
    """The first rows of a ranked table.

    Args:
        table: most sensitive first.
        columns: which columns to show, and their headings.
        caption: what it is; the number of rows is added.
        top: how many rows.
    """
    shown = table.head(top)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_number(value))}</td>" for value in row) + "</tr>"
        for row in shown[list(columns)].itertuples(index=False, name=None)
    )
    said = f"{caption} ({len(shown)} of {len(table)})"
    return panel(
        f'<div class="wb-scroll" tabindex="0" role="region" aria-label="{escape(said)}"><table>'
        f"<caption>{escape(said)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def measured(trial: Trial | None) -> str:
    """What was measured: speed in plain words, then dense beside compressed."""
    if trial is None:
        return panel('<span class="wb-note">Nothing yet: press Run.</span>')
    found = trial.found
    dense, compressed, quality, kl = (
        found.latency.baseline,
        found.latency.candidate,
        found.quality,
        found.quality.kl_mean,
    )
    rows = [
        ("time per token, median", f"{dense.ms_per_token:.1f} ms", f"{compressed.ms_per_token:.1f} ms"),
        ("time per token, 95th percentile", f"{dense.p95_ms:.1f} ms", f"{compressed.p95_ms:.1f} ms"),
        ("weights on disk", size(found.dense_sizes.weight_bytes), size(found.sizes.weight_bytes)),
        ("effective bits of the units", f"{found.dense_sizes.effective_bits:g}", f"{found.sizes.effective_bits:.3f}"),
        ("perplexity", f"{quality.perplexity_dense:.2f}", f"{quality.perplexity_candidate:.2f}"),
        ("KL to dense, nats per token", "0", f"{kl.value:.4f} (95 % interval {kl.low:.4f} to {kl.high:.4f})"),
        ("same most probable token", "100 %", f"{100 * quality.top1_agreement:.1f} %"),
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(a)}</td><td>{escape(b)}</td></tr>' for name, a, b in rows
    )
    notes = [
        f"Speed: {found.latency.pairs} interleaved pairs of {found.latency.new_tokens} tokens, "
        f"{found.latency.threads} threads, engine {compressed.engine}. {found.latency.note}",
        f"Quality: {quality.n_tokens} tokens in {quality.n_windows} windows of evaluation text. {quality.note}",
        f"Written to {trial.folder}; run {trial.run} of the store.",
    ]
    smaller = found.dense_sizes.weight_bytes / found.sizes.weight_bytes
    return panel(
        f"<p><b>{escape(speed_sentence(found.latency))}.</b> {smaller:.2f}x smaller on disk.</p>"
        '<table><caption>Measured, dense beside compressed</caption><thead><tr><th scope="col"></th>'
        f'<th scope="col">dense</th><th scope="col">compressed</th></tr></thead><tbody>{body}</tbody></table>'
        + "".join(f'<div class="wb-note">{escape(note.strip())}</div>' for note in notes)
    )


def side_by_side(generations: tuple[Generation, ...], other: str = "compressed") -> str:
    """Replies of both, with what differs marked."""
    blocks = []
    for generation in generations:
        left, right = differences(generation.dense, generation.compressed)
        blocks.append(
            f'<div class="wb-prompt">{escape(generation.prompt)}</div><div class="wb-pair">'
            f'<div><div class="wb-note">dense</div><div class="wb-reply">{_reply(left)}</div></div>'
            f'<div><div class="wb-note">{escape(other)}</div>'
            f'<div class="wb-reply">{_reply(right)}</div></div></div>'
        )
    return panel("".join(blocks))


def _reply(spans: Sequence[Span]) -> str:
    """A reply with what differs marked; an empty box would look as if it were still to come."""
    seen = any(span.text.strip() for span in spans)
    return marked_html(spans) if seen else '<span class="wb-note">(nothing that can be seen)</span>'


def size(count: int) -> str:
    """Bytes in the decimal unit that leaves three digits or more."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 100 * factor else f"{count / factor:.0f} {unit}"
    return f"{count} bytes"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
