"""What the analysis of decoding steps costs, in dense forward passes and in memory."""

from __future__ import annotations

from workbench.analysis.common import WIDTHS
from workbench.corpus import open_text, windows
from workbench.errors import CorpusError
from workbench.measure.bench import BenchContext, Rows, bench
from workbench.measure.rows import row
from workbench.measure.spawn import run_child
from workbench.models import load

STEPS = 2048
_WINDOW = 512
_GROUP_SIZE = 64
_CHILD = "workbench.measure.analysis_child"


@bench(
    "analysis",
    extra_keys=(
        "steps",
        "widths",
        "forward_passes_per_width",
        "seconds_per_width",
        "dense_pass_seconds",
        "loaded_rss_bytes",
        "loaded_model_bytes",
        "memory_limit_bytes",
    ),
)
def analysis(context: BenchContext) -> Rows:
    """Decoding-step sensitivity over T and 4T teacher-forced steps: dense forward passes per width, and peak memory.

    ``forward_passes_per_width`` is the wall time per width (quantizing and writing the table included) over that of
    one dense pass with log-probabilities over the same tokens, both in one fresh process, in turns window by window.
    ``memory_limit_bytes`` is 1.5 times the loaded model plus 500 MB; ``loaded_model_bytes`` counts its fp32 weights,
    ``loaded_rss_bytes`` the whole process once it was loaded.
    """
    model = load(context.model, job=context.job)
    length = min(_WINDOW, model.architecture.context_length)
    name = context.text or "prose"
    corpus = open_text(name, "evaluation", model=model, n_tokens=4 * STEPS)
    found = windows(corpus, model, length)
    few = STEPS // length
    if len(found) < few:
        raise CorpusError(
            f"The text '{name}' has {len(found)} windows of {length} tokens and {few} are needed for {STEPS} steps: "
            "give a longer text."
        )
    model_bytes = 4 * model.n_parameters
    model_name = model.source
    del model
    rows = []
    for count in sorted({few, min(4 * few, len(found))}):
        chosen = found[:count]
        answer = run_child(
            _CHILD,
            {
                "model": model_name,
                "windows": [list(window.tokens) for window in chosen],
                "widths": list(WIDTHS),
                "group_size": _GROUP_SIZE,
            },
            threads=context.threads,
            job=context.job,
        )
        dense = sum(answer["dense_seconds"])
        per_width = sum(answer["analysis_seconds"]) / len(WIDTHS)
        rows.append(
            row(
                name="workbench",
                method="decoding-steps",
                variant=f"{count * length} steps",
                engine="reference",
                activation_mode="fp32",
                group_size=_GROUP_SIZE,
                text=corpus.name,
                n_tokens=count * length,
                steps=count * length,
                widths=len(WIDTHS),
                forward_passes_per_width=per_width / dense,
                seconds_per_width=per_width,
                dense_pass_seconds=dense,
                peak_rss_bytes=answer["peak_rss_bytes"],
                loaded_rss_bytes=answer["loaded_rss_bytes"],
                loaded_model_bytes=model_bytes,
                memory_limit_bytes=int(1.5 * model_bytes + 500e6),
                repeats=count,
            )
        )
    return rows
