"""Latency of candidates against a baseline: interleaved in one spawned process, with intervals over pairs.

Two timings taken minutes apart on a shared machine can differ by half. So all sides are loaded in one child process
with pinned threads and decode in turns (AB BA BA AB ...); the claim is the ratio within a pair of neighbours, and its
interval comes from the spread of those ratios. Timings are never cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workbench.errors import InputError
from workbench.measure.decoding import Target
from workbench.measure.environment import check_threads
from workbench.measure.spawn import run_child
from workbench.measure.statistics import Interval, median_bootstrap
from workbench.progress import Job
from workbench.runtime import choose_engine

PAIRS_FOR_A_CLAIM = 20
PREFILL_TOKENS = 512
_PREFILL_REPEATS = 4
_CHILD = "workbench.measure.latency_child"

LatencyVerdict = Literal["faster", "slower", "no difference", "unknown"]


@dataclass(frozen=True)
class SideLatency:
    """One side's times. Milliseconds, of wall time inside the engine plus the choice of the token.

    Attributes:
        name: of the target.
        engine: that ran it.
        activation_mode: of the engine.
        ms_per_token: median over all decoding steps; ``p95_ms`` and ``p99_ms`` their tails.
        tokens_per_s: ``1000 / ms_per_token``.
        ttft_ms: median time from an empty sequence to the first token of the reply.
        prefill_tokens_per_s: of a prompt of ``prefill_tokens``, median.
        read_bytes_per_token: bytes of block linears that a step reads, as the engine counts them.
        steps: decoding steps timed.
    """

    name: str
    engine: str
    activation_mode: str
    ms_per_token: float
    p95_ms: float
    p99_ms: float
    tokens_per_s: float
    ttft_ms: float
    prefill_tokens_per_s: float
    prefill_tokens: int
    read_bytes_per_token: float
    steps: int

    @property
    def p50_ms(self) -> float:
        return self.ms_per_token


@dataclass(frozen=True)
class LatencyResult:
    """A candidate's decoding time against a baseline's.

    Attributes:
        baseline, candidate: each side's own times.
        ratio: candidate / baseline of the time per token (median over pairs of the ratio of a pair's medians), with
            its 95 % interval over pairs; below 1 is faster.
        pairs: number of pairs.
        threads: of each engine.
        prompt_tokens, new_tokens: of each run.
        steal_share: of the machine's processor time during the runs, that a hypervisor gave to others.
        environment: of the child.
        note: what to beware of, or an empty string.
    """

    baseline: SideLatency
    candidate: SideLatency
    ratio: Interval
    pairs: int
    threads: int
    prompt_tokens: int
    new_tokens: int
    steal_share: float | None
    environment: dict[str, Any]
    note: str

    @property
    def verdict(self) -> LatencyVerdict:
        """The interval against 1: beyond it the candidate is faster or slower, within it nothing was shown."""
        if not np.isfinite([self.ratio.low, self.ratio.high]).all():
            return "unknown"
        if self.ratio.high < 1:
            return "faster"
        return "slower" if self.ratio.low > 1 else "no difference"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def compare_latency(
    baseline: str | Path,
    candidate: str | Path,
    *,
    prompt: Sequence[int] | None = None,
    new_tokens: int = 16,
    pairs: int = PAIRS_FOR_A_CLAIM,
    warmup: int = 2,
    threads: int | None = None,
    engine: str = "auto",
    dtype: str = "float32",
    job: Job | None = None,
) -> LatencyResult:
    """Time a candidate against a baseline; both are names or paths. See ``measure_many``."""
    sides = [Target(source, engine=engine, dtype=dtype) for source in (baseline, candidate)]
    return measure_many(
        sides[0], sides[1:], prompt=prompt, new_tokens=new_tokens, pairs=pairs, warmup=warmup, threads=threads, job=job
    )[0]


def measure_many(
    baseline: Target,
    candidates: Sequence[Target],
    *,
    prompt: Sequence[int] | None = None,
    new_tokens: int = 16,
    pairs: int = PAIRS_FOR_A_CLAIM,
    warmup: int = 2,
    threads: int | None = None,
    job: Job | None = None,
) -> list[LatencyResult]:
    """Time several candidates against one baseline in one process, all taking turns in every round.

    Args:
        baseline: what all ratios are against.
        candidates: at least one; all models are held in memory at once.
        prompt: token ids to decode after; None for a prompt of the project in the model's chat template.
        new_tokens: decoding steps per side and round, at least 1. Replies do not stop early.
        pairs: rounds that count, at least 1; 20 for a claim.
        warmup: rounds before them that do not.
        threads: of each engine; None for one per usable core.
        job: progress; a cancel ends the child at once.

    Returns:
        One result per candidate, in order.

    Raises:
        InputError: impossible numbers, or a prompt that does not fit the context.
        EngineError: an engine cannot run, or the child crashed.
        Cancelled: the job was cancelled.
    """
    if not candidates or new_tokens < 1 or pairs < 1 or warmup < 0 or (prompt is not None and not prompt):
        raise InputError(
            f"Timing needs a candidate, a prompt, new_tokens and pairs of at least 1 and warmup of at least 0, got "
            f"{len(candidates)} candidates, {new_tokens=}, {pairs=}, {warmup=}."
        )
    targets = [baseline, *candidates]
    for target in targets:
        choose_engine(target.engine)
    threads = check_threads(threads)
    answer = run_child(
        _CHILD,
        {
            "targets": [target.request() for target in targets],
            "prompt": None if prompt is None else [int(token) for token in prompt],
            "new_tokens": new_tokens,
            "pairs": pairs,
            "warmup": warmup,
            "prefill_tokens": PREFILL_TOKENS,
            "prefill_repeats": _PREFILL_REPEATS,
        },
        threads=threads,
        job=job,
    )
    sides = [
        _side(target.name or str(target.source), side, answer["prefill_tokens"])
        for target, side in zip(targets, answer["sides"], strict=True)
    ]
    note = "" if pairs >= PAIRS_FOR_A_CLAIM else f"{pairs} pairs: too few for a claim (at least {PAIRS_FOR_A_CLAIM})."
    base = _medians(answer["sides"][0])
    return [
        LatencyResult(
            baseline=sides[0],
            candidate=side,
            ratio=median_bootstrap(_medians(raw) / base),
            pairs=pairs,
            threads=threads,
            prompt_tokens=answer["prompt_tokens"],
            new_tokens=new_tokens,
            steal_share=answer["steal_share"],
            environment=answer["environment"],
            note=note,
        )
        for side, raw in zip(sides[1:], answer["sides"][1:], strict=True)
    ]


def _medians(side: dict[str, Any]) -> np.ndarray:
    """Median step of each run, seconds (pairs,): a single interrupted step then does not move its pair."""
    return np.array([np.median(run["step_s"]) for run in side["runs"]])


def _side(name: str, side: dict[str, Any], prefill_tokens: int) -> SideLatency:
    steps = 1000 * np.concatenate([run["step_s"] for run in side["runs"]])
    median, p95, p99 = (float(value) for value in np.quantile(steps, [0.5, 0.95, 0.99]))
    return SideLatency(
        name=name,
        engine=side["engine"],
        activation_mode=side["activation_mode"],
        ms_per_token=median,
        p95_ms=p95,
        p99_ms=p99,
        tokens_per_s=1000 / median,
        ttft_ms=1000 * float(np.median([run["ttft_s"] for run in side["runs"]])),
        prefill_tokens_per_s=prefill_tokens / float(np.median(side["prefill_s"])),
        prefill_tokens=prefill_tokens,
        read_bytes_per_token=float(np.mean([run["read_bytes"] for run in side["runs"]])),
        steps=len(steps),
    )
