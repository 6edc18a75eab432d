"""What is left of contextual sparsity where several sequences are decoded at once, each with its own choice.

A step reads what any of its sequences uses: at half of the weights left out by each, eight sequences that chose
independently would leave out less than half a percent together. How much less they do, and what that is worth in time,
is measured on different texts in one step of the cpu engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.measure.bench import BenchContext
from workbench.measure.benches.engine import time_in_turns
from workbench.measure.measurement import evaluation_windows
from workbench.measure.statistics import median_bootstrap
from workbench.models.base import LoadedModel

SIZES = (1, 2, 4, 8, 16)
PROMPT_TOKENS = 32  # of each text; masks are in force after them


def batch_texts(model: LoadedModel, text: str, count: int, new_tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Windows of a text, of ``new_tokens`` after their prompt: ``count`` of them, or as many as it has."""
    windows, _ = evaluation_windows(text, model, count, PROMPT_TOKENS + new_tokens, seed=seed)
    return [list(window.tokens) for window in windows]


def time_batches(
    sides: Sequence[tuple[str, Mapping[str, Any] | None]],
    texts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    context: BenchContext,
    *,
    pairs: int | None = None,
) -> list[dict[str, Any]]:
    """Time steps of several sequences, in turns in one process.

    Args:
        sides: folder of a compressed model, and what of it is left out (``measure.sparse_plans``). The first is the
            weights whole (None).
        texts: of one length; the first ``size`` of them in a batch.
        sizes: texts at once, no more than there are.
        context: of the bench.
        pairs: rounds; None for as many as a claim takes.

    Returns:
        By side and size: ``side`` (its index), ``batch``, ``left_out`` (share of the blocks' weights that a sequence's
        token did not use), ``left_out_by_all`` (that none of the step's did), ``ms_per_step``, ``bytes_per_step``, and
        ``speed``, ``speed_low``, ``speed_high`` over the weights whole with as many sequences (paired).
    """
    keys = [(index, size) for index in range(len(sides)) for size in sizes]
    asked: list[dict[str, Any]] = []
    for index, size in keys:
        source, sparse = sides[index]
        one = {"engine": "cpu", "source": source, "dtype": "float32", "bits": None, "texts": list(texts[:size])}
        asked.append(one | {"sparse": None if sparse is None else {**sparse, "prefix": PROMPT_TOKENS}})
    prompt = texts[0][:PROMPT_TOKENS]
    answer = time_in_turns(
        asked, prompt, context, prefill_repeats=1, pairs=pairs, new_tokens=len(texts[0]) - PROMPT_TOKENS
    )
    runs = {key: side["runs"] for key, side in zip(keys, answer["sides"], strict=True)}
    medians = {key: np.array([np.median(run["step_s"]) for run in found]) for key, found in runs.items()}
    rows = []
    for (index, size), found in runs.items():
        speed = median_bootstrap(medians[0, size] / medians[index, size])
        rows.append(
            {
                "side": index,
                "batch": size,
                "left_out": float(np.mean([run["left_out"] for run in found])),
                "left_out_by_all": float(np.mean([run["left_out_by_all"] for run in found])),
                "ms_per_step": 1000 * float(np.median(np.concatenate([run["step_s"] for run in found]))),
                "bytes_per_step": float(np.mean([run["touched_bytes"] for run in found])),
                "speed": speed.value,
                "speed_low": speed.low,
                "speed_high": speed.high,
            }
        )
    return rows
