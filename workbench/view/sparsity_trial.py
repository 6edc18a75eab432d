"""Run what was picked of contextual sparsity, and measure it beside its rivals, dense text, and every domain."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.measure.bench import BenchContext
from workbench.measure.benches.engine import bench_prompt, step_columns, time_in_turns
from workbench.measure.benches.sparsity_batches import batch_texts, time_batches
from workbench.measure.benches.sparsity_quality import PREFIX
from workbench.measure.environment import check_threads, environment
from workbench.measure.measurement import evaluation_windows
from workbench.measure.quality import QualityResult, compare_candidates
from workbench.measure.sparse_plans import share_controller, sparse_plan
from workbench.measure.statistics import median_bootstrap
from workbench.operate.sensitivity import chosen_prompts
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine
from workbench.runtime.base import Engine
from workbench.runtime.holding import Held
from workbench.runtime.share_control import ShareController
from workbench.store import Store
from workbench.view.sparsity_loop import Tables, measured, predicted_kl
from workbench.view.sparsity_picks import SparsityPick, SparsitySettings
from workbench.view.texts import Generation, pieces

WHOLE = "whole"
_BATCHES, _BATCH_TOKENS = (1, 2, 4, 8), 8  # requests at once, and the tokens that each is given in a round
_BATCH_COLUMNS = ("left_out", "left_out_by_all", "ms_per_step", "speed", "speed_low", "speed_high")
_TIMED_TOKENS = 24  # of a round: a step takes milliseconds, and its median is what counts


@dataclass(frozen=True, eq=False)
class SparsityTrial:
    """One pick, measured.

    Attributes:
        pick: that was run.
        table: one row for the weights whole, each rival at the same sparsity, and the pick: ``line``, ``sparsity``,
            ``left_out`` (of the blocks' weights), ``predicted`` (KL), ``kl``, ``kl_low``, ``kl_high``, ``ratio`` (of
            perplexity to dense), ``more``, ``more_low``, ``more_high`` (KL more than the pick's, paired),
            ``ms_per_token``, ``ms_p95``, ``speed``, ``speed_low``, ``speed_high`` (over the weights whole, in turns).
        groups: quality of the pick's line by domain and language: ``sparsity``, ``by``, ``group``, ``n_windows``,
            ``n_tokens``, ``ratio``, ``kl_mean``, ``kl_mean_low``, ``kl_mean_high``.
        batches: several requests at once, whole (``line`` is ``whole``) and as picked: ``line``, ``batch``,
            ``left_out``, ``left_out_by_all`` (of the blocks' weights, by each and by all of them), ``ms_per_step``,
            ``speed``, ``speed_low``, ``speed_high`` (over the weights whole, as many at once); empty where it is not
            timed.
        generations: greedy replies, dense beside the pick's; empty for masks that must know the text.
        left_out: share of the blocks' weights that the replies did not use, a reply; NaN of one that took no step.
        engine: that ran it.
        text: name of the evaluation text.
        n_windows, n_tokens: behind the quality.
        pairs, threads: behind the speed.
        run: its number in the store.
    """

    pick: SparsityPick
    table: pd.DataFrame
    groups: pd.DataFrame
    batches: pd.DataFrame
    generations: tuple[Generation, ...]
    left_out: tuple[float, ...]
    engine: str
    text: str
    n_windows: int
    n_tokens: int
    pairs: int
    threads: int
    run: int


def try_pick(
    tables: Tables, curves: pd.DataFrame, pick: SparsityPick, settings: SparsitySettings, store: Store, job: Job
) -> SparsityTrial:
    """Generate and measure.

    Args:
        tables: the model.
        curves: of ``Look``, what is predicted.
        pick: what to leave out.
        settings: how much.
        store: where quality is kept and the run is recorded.
        job: progress and cancel.

    Raises:
        InputError: a pick that the model cannot do.
    """
    tables.of(pick)
    threads = check_threads(settings.threads)
    replies, left_out, engine = _replies(tables, pick, settings, job)
    text, record = evaluation_windows(
        settings.text,
        tables.dense,
        settings.n_windows,
        max(settings.window_length, PREFIX + 8),
        seed=settings.seed,
    )
    rivals = _rivals(tables, pick)
    curve = [pick.at(sparsity) for sparsity in settings.by_domain]
    whole, found = measured(tables, [*rivals, pick, *curve], text, record, settings, store, job)
    context = BenchContext(tables.dense.source, record.name, threads, True, job=job)
    speeds, batches = _speeds(tables, pick, settings, context)
    table = _table(whole, {one: found[one] for one in (*rivals, pick) if one in found}, pick, curves, speeds, settings)
    number = store.record_run(
        "measure",
        name=f"notebook, {100 * pick.sparsity:g} % left out",
        model=tables.dense.name,
        method=pick.line,
        recipe_sha256=None,
        summary={row["line"]: {k: v for k, v in row.items() if k != "line"} for row in table.to_dict("records")},
        environment=environment(),
    )
    groups = _groups({one: found[one] for one in sorted({*curve, pick}, key=lambda one: one.sparsity) if one in found})
    return SparsityTrial(
        pick,
        table,
        groups,
        batches,
        replies,
        left_out,
        engine,
        record.name,
        whole.n_windows,
        whole.n_tokens,
        settings.pairs,
        threads,
        number,
    )


def _rivals(tables: Tables, pick: SparsityPick) -> list[SparsityPick]:
    """The other methods at the same sparsity, static masks by the picked criterion."""
    lines = [SparsityPick(method, pick.sparsity, pick.criterion) for method in tables.methods]  # type: ignore[arg-type]
    return [one for one in lines if one.line != pick.line]


def _replies(
    tables: Tables, pick: SparsityPick, settings: SparsitySettings, job: Job
) -> tuple[tuple[Generation, ...], tuple[float, ...], str]:
    """Greedy replies of both, what each left out, and the engine that ran them."""
    made, threads = tables.of(pick), check_threads(settings.threads)
    if pick.method == "oracle":
        return (), (), choose_engine(settings.engine, made)
    prompts = chosen_prompts(settings)
    job.stage("generate text with both", 2 * len(prompts))
    sides: list[list[tuple[str, ...]]] = []
    shares: list[float] = []
    dense = open_engine(tables.dense, engine=settings.engine, threads=threads, activation_mode="fp32")
    try:
        sides.append([_reply(dense, prompt, settings, job)[0] for prompt in prompts])
    finally:
        dense.close()
    plan = sparse_plan(made, pick.asked)
    sparse = open_engine(made, engine=settings.engine, plan=plan, threads=threads)
    try:
        found = [_reply(sparse, prompt, settings, job, share_controller(made, pick.asked)) for prompt in prompts]
    finally:
        sparse.close()
    sides.append([text for text, _ in found])
    shares = [share for _, share in found]
    generations = tuple(Generation(p, a, b) for p, a, b in zip(prompts, *sides, strict=True))
    return generations, tuple(shares), sparse.name


def _reply(
    engine: Engine, prompt: str, settings: SparsitySettings, job: Job, controller: ShareController | None = None
) -> tuple[tuple[str, ...], float]:
    """A reply with its share held, as ``generate`` does it."""
    if controller is not None:
        engine.set_policy(controller.policy)
    model = engine.model
    ids, sequence = model.encode_chat(prompt), engine.start(seed=settings.seed)
    held = None if controller is None else Held(engine, sequence, controller)
    tokens = engine.generate(
        sequence,
        ids,
        settings.new_tokens,
        stop_tokens=model.stop_tokens,
        job=job,
        on_token=held,
        between=None if held is None else held.look,
    )
    steps = sequence.trace[len(ids) :]
    job.advance()
    kept = [step.kept_weights for step in steps]
    return pieces(model.decode, tokens), 1 - float(np.mean(kept)) if kept else math.nan


def _table(
    whole: QualityResult,
    found: Mapping[SparsityPick, QualityResult],
    pick: SparsityPick,
    curves: pd.DataFrame,
    speeds: Mapping[str, Mapping[str, float]],
    settings: SparsitySettings,
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for one, quality in [(None, whole), *found.items()]:
        kl, line = quality.kl_mean, WHOLE if one is None else one.line
        row: dict[str, Any] = {
            "line": line,
            "sparsity": 0.0 if one is None else one.sparsity,
            "left_out": quality.facts["effective_sparsity"],
            "predicted": None if one is None else predicted_kl(curves, one),
            "kl": kl.value,
            "kl_low": kl.low,
            "kl_high": kl.high,
            "ratio": math.exp(quality.delta_nll.value),
        }
        more = compare_candidates(quality, found[pick], seed=settings.seed).kl
        names = ("more", "more_low", "more_high")
        values = (math.nan,) * 3 if one == pick else (more.value, more.low, more.high)
        rows.append(row | dict(zip(names, values, strict=True)) | dict(speeds.get(line, {})))
    table = pd.DataFrame(rows).astype({"predicted": float})
    wanted = ("ms_per_token", "ms_p95", "speed", "speed_low", "speed_high")
    return table.reindex(columns=[*(c for c in table.columns if c not in wanted), *wanted])


def _groups(found: Mapping[SparsityPick, QualityResult]) -> pd.DataFrame:
    parts = []
    for pick, quality in found.items():
        table = quality.by_group.assign(sparsity=pick.sparsity, ratio=np.exp(quality.by_group["delta_nll"]))
        parts.append(table)
    columns = ["sparsity", "by", "group", "n_windows", "n_tokens", "ratio", "kl_mean", "kl_mean_low", "kl_mean_high"]
    return pd.concat(parts, ignore_index=True)[columns]


def _speeds(
    tables: Tables, pick: SparsityPick, settings: SparsitySettings, context: BenchContext
) -> tuple[dict[str, dict[str, float]], pd.DataFrame]:
    """Decoding of the weights whole and of the pick, in turns in one process, and with several requests at once.

    Empty where the cpu engine cannot: the reference engine reads all weights whatever is left out, and true masks
    cannot be chosen while decoding.
    """
    made, columns_of = tables.of(pick), ["line", "batch", *_BATCH_COLUMNS]
    if pick.method == "oracle" or choose_engine(settings.engine, made) != "cpu":
        return {}, pd.DataFrame(columns=columns_of)
    prompt, names = bench_prompt(tables.dense), (WHOLE, pick.line)
    texts = batch_texts(tables.dense, settings.text, max(_BATCHES), _BATCH_TOKENS, seed=settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        source = str(made.folder or made.save(Path(folder) / "model"))
        common: dict[str, Any] = {"engine": "cpu", "source": source, "dtype": "float32", "bits": None}
        # Masks are in force from the first token of the reply on: the prompt is what stays whole.
        sides = [common | {"sparse": None}, common | {"sparse": {**pick.asked, "prefix": len(prompt)}}]
        answer = time_in_turns(
            sides, prompt, context, prefill_repeats=1, pairs=settings.pairs, new_tokens=_TIMED_TOKENS
        )
        together = time_batches(
            [(source, None), (source, pick.asked)],
            texts,
            [size for size in _BATCHES if size <= len(texts)],
            context,
            pairs=settings.pairs,
        )
    found: dict[str, dict[str, float]] = {}
    steps: list[np.ndarray] = []
    for name, side in zip(names, answer["sides"], strict=True):
        columns = step_columns(side, answer["prefill_tokens"])
        found[name] = {key: float(columns[key]) for key in ("ms_per_token", "ms_p95")}
        steps.append(np.array([np.median(run["step_s"]) for run in side["runs"]]))
    ratio = median_bootstrap(steps[0] / steps[1], seed=settings.seed)
    found[pick.line] |= {"speed": ratio.value, "speed_low": ratio.low, "speed_high": ratio.high}
    batches = pd.DataFrame([row | {"line": names[row["side"]]} for row in together])
    return found, batches[columns_of]


def decided(replies: Sequence[float]) -> float:
    """Mean share left out by the replies that took a step; NaN where none did."""
    taken = [share for share in replies if not math.isnan(share)]
    return float(np.mean(taken)) if taken else math.nan
