"""What a quantizer costs and gains: methods side by side at the same bits, on texts that took no part in any fit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.apply.calibration import CalibrationText
from workbench.measure.bench import BenchContext, Rows, bench
from workbench.measure.benches.engine import bench_prompt, step_columns, time_in_turns
from workbench.measure.benches.quantization_methods import (
    METHODS,
    SHIFT,
    Contender,
    dense_rows,
    integer_activations,
    shifted,
    weight_only,
)
from workbench.measure.kept_quality import compare_kept
from workbench.measure.measurement import evaluation_windows
from workbench.measure.memory import engines_at_once
from workbench.measure.quality import QualityResult, compare_candidates
from workbench.measure.result import Sizes, quality_columns
from workbench.measure.rows import row
from workbench.measure.statistics import median_bootstrap
from workbench.models import load
from workbench.models.base import LoadedModel
from workbench.runtime import open_engine

TEXTS: tuple[CalibrationText, ...] = ("prose", "pydoc")
_WINDOWS, _QUICK_WINDOWS = (40, 512), (40, 128)  # how many, and their tokens
_SPEED, _QUICK_SPEED = (20, 128), (10, 64)  # prompts read by each, and tokens decoded a round
_AT_ONCE = 16  # engines beside one dense pass, at most: each holds logits of a chunk beside its model

Qualities = dict[Contender, QualityResult]  # on one text


@bench(
    "quantization",
    extra_keys=(
        "ratio",
        "gap_closed",
        "rival",
        "to_rival",
        "to_rival_low",
        "to_rival_high",
        "speed_ratio",
        "speed_low",
        "speed_high",
        "time_to_rtn_ratio",
        "time_to_rtn_low",
        "time_to_rtn_high",
        "prefill_speed_ratio",
        "prefill_speed_low",
        "prefill_speed_high",
        "prefill_to_rival_ratio",
        "prefill_to_rival_low",
        "prefill_to_rival_high",
    ),
    methods=METHODS,
)
def quantization(context: BenchContext) -> Rows:
    """Quantizers of weights at 3 and 4 bits, of activations too at 8 and 4: AWQ, GPTQ, Tender, and their rivals.

    ``ratio`` is perplexity over that of the dense model; ``gap_closed`` the share of the logarithm of
    round-to-nearest's ratio at those bits that a method takes away. ``rival`` names what ``to_rival`` (with its
    interval) is against, nats a token more on the same windows (less: better): bitsandbytes' NF4 at 4 bits, channels
    chosen by activation for those chosen otherwise, for a fit on another domain the same fit on the text's own,
    Tender for whatever else rounds activations, and per-token scales for Tender. ``prefill_to_rival_ratio`` is the
    time of a prompt over the rival's.

    ``speed_ratio`` is decoding speed over that of this engine's bf16 in the same run, ``prefill_speed_ratio`` that of a
    prompt over the faster of this engine's and PyTorch's bf16, ``time_to_rtn_ratio`` the time of a token over that of
    round-to-nearest's at those bits. Rows with ``activation_bits`` of 16 leave activations to the engine, which
    rounds them to 8 bits by token and group (``activation_mode``).

    The output layer stays dense. Fits use text sampled from the model itself, but for those of the shift, whose
    ``calibration`` says another; they are left out where quick, and where another text is given.
    """
    model = load(context.model, job=context.job)
    texts = (context.text,) if context.text else TEXTS
    contenders = dense_rows()
    contenders += [*weight_only(model, context), *integer_activations(model, context)]
    if context.takes(SHIFT, quick=False) and context.text is None:
        contenders += shifted(model, TEXTS)
    for contender in contenders:
        if contender.recipe is not None:
            contender.compressed = context.compress(model, contender.recipe, context.job)
    found = _measure_quality(model, contenders, texts, context)
    speeds = _measure_speed(model, contenders, context)
    return [
        _row(model, contender, here[contender]) | _against(contender, here) | speeds.get(contender, {})
        for here in found
        for contender in contenders
    ]


def _measure_quality(
    model: LoadedModel, contenders: Sequence[Contender], texts: Sequence[str], context: BenchContext
) -> list[Qualities]:
    """Of all contenders on each text; engines are opened once for all texts."""
    n_windows, length = _QUICK_WINDOWS if context.quick else _WINDOWS
    read = [evaluation_windows(text, model, n_windows, length) for text in texts]
    found: list[Qualities] = [{} for _ in texts]
    at_once = engines_at_once(model.n_parameters, _AT_ONCE)
    dense = open_engine(model, threads=context.threads, activation_mode="fp32")
    try:
        for begin in range(0, len(contenders), at_once):
            part = contenders[begin : begin + at_once]
            engines = [contender.engine(model, context.threads) for contender in part]
            try:
                about = [[contender.side, contender.dtype] for contender in part]
                for here, (windows, record) in zip(found, read, strict=True):
                    results = compare_kept(
                        context.shelf, dense, engines, windows, about=about, text=record, job=context.job
                    )
                    here |= zip(part, results, strict=True)
            finally:
                for engine in engines:
                    engine.close()
            for contender, engine in zip(part, engines, strict=True):
                contender.ran_by, contender.activation_mode = engine.name, engine.activation_mode
    finally:
        dense.close()
    return found


def _measure_speed(
    model: LoadedModel, contenders: Sequence[Contender], context: BenchContext
) -> dict[Contender, dict[str, Any]]:
    """Decoding and prefill of everything that is timed, in turns in one process."""
    timed = [contender for contender in contenders if contender.timed]
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for index, contender in enumerate(timed):
            made = contender.compressed
            source = model.source if made is None else str(made.save(Path(folder) / str(index)))
            side = {"engine": contender.side, "source": source, "dtype": contender.dtype, "bits": None}
            sides.append(side | {"decode": contender.timed != "prefill"})
        prefills, new_tokens = _QUICK_SPEED if context.quick else _SPEED
        answer = time_in_turns(sides, bench_prompt(model), context, prefill_repeats=prefills, new_tokens=new_tokens)
    found: dict[Contender, dict[str, Any]] = {}
    steps: dict[Contender, np.ndarray] = {}
    prompts = {contender: np.array(side["prefill_s"]) for contender, side in zip(timed, answer["sides"], strict=True)}
    bandwidth = max(answer["bandwidth"])
    for contender, side in zip(timed, answer["sides"], strict=True):
        found[contender] = {"prefill_tokens_per_s": answer["prefill_tokens"] / float(np.median(prompts[contender]))}
        if not side["runs"]:
            continue
        steps[contender] = np.array([np.median(run["step_s"]) for run in side["runs"]])
        found[contender] |= step_columns(side, answer["prefill_tokens"])
        touched = [run["touched_bytes"] for run in side["runs"]]
        if None not in touched:
            size, seconds = float(np.mean(touched)), found[contender]["ms_per_token"] / 1000
            found[contender] |= {"bytes_per_token": size, "bandwidth_share": size / seconds / bandwidth}
    ours, *others = [contender for contender in timed if contender.method == "bf16"]
    faster = min((ours, *others), key=lambda contender: float(np.median(prompts[contender])))
    for contender, values in found.items():
        values |= _ratio("prefill_speed", prompts[faster], prompts[contender])
        rival = next((c for c in timed if c.label == contender.rival), None)
        if rival is not None:
            values |= _ratio("prefill_to_rival", prompts[contender], prompts[rival])
        if contender not in steps:
            continue
        values |= _ratio("speed", steps[ours], steps[contender])
        rounded = _rounded(contender, timed)
        if rounded is not None:
            values |= _ratio("time_to_rtn", steps[contender], steps[rounded])
    return found


def _ratio(name: str, above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """Columns of the median ratio of paired times, with its interval."""
    ratio = median_bootstrap(above / below)
    return {f"{name}_ratio": ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def _rounded(contender: Contender, among: Iterable[Contender]) -> Contender | None:
    """Round-to-nearest at a contender's bits, where that is another and the contender rounds weights alone."""
    if contender.method == "rtn" or contender.activation_bits != 16:
        return None
    return next((c for c in among if c.method == "rtn" and c.bits == contender.bits), None)


def _against(contender: Contender, here: Qualities) -> dict[str, Any]:
    """Columns that compare a contender with others on the same windows."""
    quality = here[contender]
    entry: dict[str, Any] = {}
    rounded = _rounded(contender, here)
    if rounded is not None:
        entry["gap_closed"] = 1 - quality.delta_nll.value / here[rounded].delta_nll.value
    rival = _rival(contender, here)
    if rival is not None:
        found = compare_candidates(quality, here[rival]).delta_nll
        entry |= {"rival": rival.label, "to_rival": found.value, "to_rival_low": found.low, "to_rival_high": found.high}
    return entry


def _rival(contender: Contender, here: Qualities) -> Contender | None:
    """What a contender is judged by: the one that it names, or its like that was fitted on this very domain."""
    if contender.shift is None:
        return next((c for c in here if c.label == contender.rival), None)
    text = here[contender].text
    if text is None or contender.shift == text.name:
        return None
    return next((c for c in here if c.shift == text.name and c.method == contender.method), None)


def _row(model: LoadedModel, contender: Contender, quality: QualityResult) -> dict[str, Any]:
    made = contender.compressed
    sizes = Sizes.of_dense(model) if made is None else Sizes.of_compressed(made)
    return row(
        name=contender.name,
        method=contender.method,
        variant=contender.variant,
        engine=contender.ran_by,
        activation_mode=contender.activation_mode,
        bits=contender.bits,
        activation_bits=contender.activation_bits,
        effective_bits=sizes.effective_bits,
        read_bits=sizes.effective_bits,  # nothing is decided at run time: a step reads all that is stored
        output_bits=sizes.output_bits,
        weight_bytes=sizes.weight_bytes,
        fit_seconds=None if made is None else made.fit_seconds,
        calibration=contender.calibration,
        group_size=contender.group_size,
        ratio=float(np.exp(quality.delta_nll.value)),
        text=quality.text.name if quality.text is not None else None,
        n_tokens=quality.n_tokens,
        repeats=quality.n_windows,
        **quality_columns(quality),
    )
