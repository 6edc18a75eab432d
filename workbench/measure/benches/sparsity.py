"""What leaving weights out costs and gains: heads and neurons by masks, and small inputs, token by token."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.measure.bench import BenchContext, Rows, bench
from workbench.measure.benches import sparsity_methods, sparsity_quality
from workbench.measure.benches.engine import bench_prompt, step_columns, time_in_turns
from workbench.measure.benches.sparsity_batches import PROMPT_TOKENS, SIZES, batch_texts, time_batches
from workbench.measure.benches.sparsity_methods import (
    METHODS,
    Contender,
    contenders,
    group_size,
    standard,
)
from workbench.measure.benches.sparsity_quality import engine_key, measure_quality
from workbench.measure.benches.sparsity_questions import KEYS, measure_answers
from workbench.measure.measurement import evaluation_windows
from workbench.measure.memory import engines_at_once
from workbench.measure.quality import QualityResult, compare_candidates
from workbench.measure.result import Sizes, quality_columns
from workbench.measure.rows import row
from workbench.measure.statistics import Interval, median_bootstrap
from workbench.models import load
from workbench.models.base import LoadedModel

TEXTS = ("prose", "pydoc")
_WINDOWS, _QUICK_WINDOWS = (40, 256), (40, 96)  # how many, and their tokens, those of the prefix included
_SPEED, _QUICK_SPEED = (3, 128), (1, 32)  # prompts read by each, and tokens decoded a round
_RIVALS = ("random", "static", "per-layer", "per-layer-published")  # of "unified"

_BATCH_TOKENS = 16  # steps a round
_BATCHED = ("static", "unified", "teal", "wina")  # what is timed with several sequences at once

Qualities = Mapping[Contender, QualityResult]  # on one text


@bench(
    "sparsity",
    extra_keys=(
        "weight_bits",
        "criterion",
        "scope",
        "prefix",
        "batch",
        "batch_sparsity",
        "ratio",
        "ratio_to_whole",
        "ratio_to_whole_low",
        "ratio_to_whole_high",
        "rival",
        "to_rival",
        "to_rival_low",
        "to_rival_high",
        *(f"to_{name.replace('-', '_')}{end}" for name in _RIVALS for end in ("", "_low", "_high")),
        "speed_ratio",
        "speed_low",
        "speed_high",
        "decider_share",
        *KEYS,
        "note",
    ),
    methods=METHODS,
)
def sparsity(context: BenchContext) -> Rows:
    """What leaving weights out costs and gains: heads and neurons by masks, and small inputs, token by token.

    On weights of 16 bits and of 4 (round-to-nearest): whole (``dense``); heads and neurons masked at ``random``, by
    mean scores over calibration text (``static``, ``magnitude``), by true scores (``oracle``, which no causal choice
    can know), by a predictor in every block (``per-layer``) or one for all (``unified``, ShadowLLM), both tuned through
    the model; inputs left out by size (``teal``) and by size times norm of the column (``wina``). ``criterion`` is what
    they go by, ``scope`` how often is decided. Where not quick, also a predictor in every block trained on scores
    alone, as DejaVu's are (``per-layer-published``), static masks by all criteria, and rarer decisions, at one
    sparsity; quick, 4-bit weights are masked at one sparsity alone. Inputs by thresholds that are ``learnt`` for one
    share of 4-bit weights, from these weights whole and from the dense model, only where ``--only`` names them: the fit
    takes hours on a CPU.

    ``sparsity`` is asked for: of the weights of heads and neurons (keys and values apart) by masks, of all weights by
    inputs. ``effective_sparsity`` is the share of all weights of the blocks' linears that steps did not use;
    ``read_bits`` count what decisions read, and on the cpu engine whole tiles and rows (``StepTrace``): of a tiny
    model, whose predictor is large beside its blocks, more than of whole weights. The first 64 tokens of a window are
    whole for masks (the first one for inputs), and only what is predicted after them counts, for every method alike.

    ``ratio`` is perplexity over that of the dense model, ``ratio_to_whole`` over that of the same weights whole
    (paired). ``to_random`` and the like are KL per token more than that mask's at the same weights and sparsity
    (negative: better), ``to_rival`` more than the best of theirs, ``rival``. ``speed_ratio`` is decoding speed over
    that of the same weights whole, with masks in force from the first token of the reply on; ``decider_share`` what
    deciding takes of a step. ``note`` says why a row has no figures. Fits use text sampled from the model itself.

    Where not quick, rows with a ``batch`` above 1 are of so many sequences decoded at once, of different texts:
    ``effective_sparsity`` is what each left out, ``batch_sparsity`` what none of them used, which is all that a step
    need not read; ``speed_ratio`` is over the weights whole with as many sequences.

    ``flips`` is how many of ``questions`` are answered unlike the dense model, ``flips_to_whole`` unlike the same
    weights whole; ``accuracy`` is the share of right answers and ``accuracy_change`` that less the dense model's, both
    by log-likelihood per byte. Questions are shorter than 64 tokens, so masks leave only what stands before a
    question's last token whole, and are decided at each token from there on (``sparsity_questions``);
    ``answers_sparsity`` is the share of all weights that those steps did not use. Everybody answers that could choose
    so while writing, the oracle and the variants apart; quick, only at the one sparsity, and every eighth question
    alone.
    """
    model = load(context.model, job=context.job)
    listed = contenders(model, context)
    rows: list[tuple[Contender, dict[str, Any]]] = []
    for text in _texts(context):
        windows, record = evaluation_windows(text, model, *(_QUICK_WINDOWS if context.quick else _WINDOWS))
        found = measure_quality(model, listed, windows, record, context)
        rows += [(one, _row(one, found.get(one)) | _against(one, found)) for one in listed]
    answers = measure_answers(model, listed, context)
    speeds = _measure_speed(model, listed, context)
    every = [entry | answers.get(one, {}) | speeds.get(one, {}) for one, entry in rows]
    return every if context.quick else [*every, *_batch_rows(model, listed, context)]


def _texts(context: BenchContext) -> tuple[str, ...]:
    if context.text:
        return (context.text,)
    return TEXTS[:1] if context.quick else TEXTS


def _row(contender: Contender, quality: QualityResult | None) -> dict[str, Any]:
    sizes = Sizes.of_compressed(contender.stored)
    entry = row(
        name="workbench",
        method=contender.method,
        variant=contender.variant,
        bits=contender.bits,
        activation_bits=16,
        effective_bits=sizes.effective_bits,
        output_bits=sizes.output_bits,
        group_size=group_size(contender.bits),
        sparsity=contender.sparsity,
        calibration=None if contender.method in ("dense", "random", "oracle") else "self",
        weight_bytes=sizes.weight_bytes,
        fit_seconds=contender.stored.fit_seconds,
        weight_bits=contender.bits,
        criterion=contender.criterion,
        scope=contender.scope,
        prefix=None
        if contender.asked is None
        else 1
        if contender.asked["kind"] == "inputs"
        else sparsity_quality.PREFIX,
        batch=1,
    )
    if quality is None:
        return entry | {"note": contender.note}
    return entry | {
        "engine": contender.ran_by,
        "activation_mode": contender.activation_mode,
        "effective_sparsity": quality.facts["effective_sparsity"],
        "read_bits": quality.facts["read_bits"],
        "ratio": math.exp(quality.delta_nll.value),
        "text": quality.text.name if quality.text is not None else None,
        "n_tokens": quality.n_tokens,
        "repeats": quality.n_windows,
        **quality_columns(quality),
    }


def _against(contender: Contender, here: Qualities) -> dict[str, Any]:
    """Columns that compare a contender with others on the same windows."""
    if contender not in here or contender.method == "dense":
        return {}
    listed, quality = list(here), here[contender]
    whole = next(one for one in listed if one.method == "dense" and one.bits == contender.bits)
    nats = compare_candidates(quality, here[whole]).delta_nll
    ratio = Interval(*(math.exp(value) for value in (nats.value, nats.low, nats.high)))
    entry: dict[str, Any] = _interval("ratio_to_whole", ratio)
    if contender.method != "unified":
        return entry
    rivals = {name: standard(listed, contender, name) for name in _RIVALS}
    to = {name: compare_candidates(quality, here[one]).kl for name, one in rivals.items() if one is not None}
    for name, difference in to.items():
        entry |= _interval(f"to_{name.replace('-', '_')}", difference)
    if to:
        best = max(to, key=lambda name: to[name].value)  # the less is gained over it, the better it is
        entry |= {"rival": best} | _interval("to_rival", to[best])
    return entry


def _interval(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _measure_speed(
    model: LoadedModel, listed: Sequence[Contender], context: BenchContext
) -> dict[Contender, dict[str, Any]]:
    """Decoding of everything that is timed, in turns in one process, or in as few as memory allows."""
    found: dict[Contender, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[int, str] = {}  # by the model's identity in this process
        for part in _together([one for one in listed if one.timed], engines_at_once(model.n_parameters)):
            for made in (one.whole if one.asked is None else one.tables for one in part):
                if id(made) not in sources:
                    sources[id(made)] = str(made.folder or made.save(Path(folder) / str(len(sources))))
            found |= {
                one: columns for one, columns in _timed(model, part, sources, context).items() if one not in found
            }
    return found


def _together(timed: Sequence[Contender], at_once: int) -> Iterator[Sequence[Contender]]:
    """What is timed in one process: all, or parts with the weights whole in each."""
    if len({engine_key(one) for one in timed}) <= at_once:
        yield timed
        return
    for bits in dict.fromkeys(one.bits for one in timed):
        whole, *others = [one for one in timed if one.bits == bits]
        size = max(1, at_once - 1)
        for begin in range(0, max(1, len(others)), size):
            yield [whole, *others[begin : begin + size]]


def _batch_rows(model: LoadedModel, listed: Sequence[Contender], context: BenchContext) -> list[dict[str, Any]]:
    """Rows of several sequences decoded at once, of weights whole and with the one sparsity left out."""
    texts = batch_texts(model, _texts(context)[0], max(SIZES), _BATCH_TOKENS)
    sizes = [size for size in SIZES if size <= len(texts)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in dict.fromkeys(one.bits for one in listed):
            here = [one for one in listed if one.bits == bits and one.timed]
            whole = next(one for one in here if one.method == "dense")
            able = [one for one in here if one.method in _BATCHED and one.sparsity == sparsity_methods.ONE_SPARSITY]
            chosen = [whole, *able][: max(2, engines_at_once(model.n_parameters))]
            sides: list[tuple[str, Mapping[str, Any] | None]] = []
            for index, one in enumerate(chosen):
                made = one.whole if one.asked is None else one.tables
                sides.append((str(made.folder or made.save(Path(folder) / f"{bits}-{index}")), one.asked))
            for found in time_batches(sides, texts, sizes, context):
                one = chosen[found["side"]]
                step = found["ms_per_step"]
                rows.append(
                    _row(one, None)
                    | {
                        "variant": f"{found['batch']} sequences at once: {one.variant}",
                        "engine": "cpu",
                        "text": None,
                        "prefix": None if one.asked is None else PROMPT_TOKENS,
                        "batch": found["batch"],
                        "effective_sparsity": found["left_out"],
                        "batch_sparsity": found["left_out_by_all"],
                        "ms_per_token": step / found["batch"],
                        "decode_tokens_per_s": 1000 * found["batch"] / step,
                        "bytes_per_token": found["bytes_per_step"] / found["batch"],
                        "speed_ratio": found["speed"],
                        "speed_low": found["speed_low"],
                        "speed_high": found["speed_high"],
                    }
                )
    return rows


def _timed(
    model: LoadedModel, timed: Sequence[Contender], sources: Mapping[int, str], context: BenchContext
) -> dict[Contender, dict[str, Any]]:
    """Columns of contenders that are timed in one process."""
    prompt = bench_prompt(model)
    sides: list[dict[str, Any]] = []
    for contender in timed:
        made = contender.whole if contender.asked is None else contender.tables
        side = {"engine": "cpu", "source": sources[id(made)], "dtype": "float32", "bits": None}
        # Masks from the first token of the reply on: the prompt is shorter than the prefix of quality.
        sparse = None if contender.asked is None else {**contender.asked, "prefix": len(prompt)}
        sides.append(side | {"sparse": sparse})
    prefills, new_tokens = _QUICK_SPEED if context.quick else _SPEED
    answer = time_in_turns(sides, prompt, context, prefill_repeats=prefills, new_tokens=new_tokens)
    side_of = dict(zip(timed, answer["sides"], strict=True))
    steps = {one: np.array([np.median(run["step_s"]) for run in side["runs"]]) for one, side in side_of.items()}
    bandwidth = max(answer["bandwidth"])
    found: dict[Contender, dict[str, Any]] = {}
    for one, side in side_of.items():
        whole = next(other for other in timed if other.method == "dense" and other.bits == one.bits)
        columns = step_columns(side, answer["prefill_tokens"])
        touched = float(np.mean([run["touched_bytes"] for run in side["runs"]]))
        parts = [run["parts"] for run in side["runs"]]
        ratio = median_bootstrap(steps[whole] / steps[one])
        found[one] = columns | {
            "bytes_per_token": touched,
            "bandwidth_share": touched / (columns["ms_per_token"] / 1000) / bandwidth,
            "speed_ratio": ratio.value,
            "speed_low": ratio.low,
            "speed_high": ratio.high,
            "decider_share": float(np.median([part["deciders"] / sum(part.values()) for part in parts])),
        }
    return found
