"""Does measured latency follow the bits, and is it faster than what a user could take instead?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from workbench.apply.bnb import BnbNf4Config
from workbench.apply.compress import compress
from workbench.apply.config import MethodConfig
from workbench.apply.gguf import GgufConfig
from workbench.apply.nested import NestedConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext, Rows, bench
from workbench.measure.latency import PAIRS_FOR_A_CLAIM, PREFILL_TOKENS
from workbench.measure.measurement import evaluation_windows
from workbench.measure.quality import QualityResult, compare_many
from workbench.measure.result import Sizes, dense_quality_columns, quality_columns
from workbench.measure.rows import row
from workbench.measure.spawn import run_child
from workbench.measure.statistics import median_bootstrap
from workbench.models import LoadedModel, load
from workbench.models.loading import gguf_file
from workbench.progress import Job
from workbench.runtime import choose_engine
from workbench.runtime.cpu import CpuEngine
from workbench.runtime.plan import Policy, width_plan

WIDTHS = (2, 3, 4, 5, 6, 8)
_QUICK_WIDTHS = (3, 4, 8)
_GROUP_SIZE = 64
_PROMPT = (
    "Before a model is made smaller, somebody has to say where it may lose precision and where it may not, and then "
    "measure what that did."
)
_PROMPT_TOKENS, _NEW_TOKENS = 16, 128
_CHILD, _LEAN = "workbench.measure.engine_child", "workbench.measure.lean_child"
GET_LLAMA = "llama-cpp-python is not installed: pip install 'compression-workbench[bench]' (it compiles llama.cpp)"


@dataclass
class _Row:
    """One contender: what to time, and what is known of it beside its speed."""

    name: str
    method: str
    engine: str
    source: str
    dtype: str = "float32"
    bits: int | None = None  # read width of a nested model
    compressed: CompressedModel | None = None
    variant: str = ""
    activation_mode: str = "int8"
    asked_bits: int | None = None
    note: str = ""
    quality: QualityResult | None = None

    def side(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "source": self.source,
            "dtype": self.dtype,
            "bits": self.bits,
            "widths": list(WIDTHS),
        }


@bench(
    "engine",
    extra_keys=(
        "rival",
        "speed_ratio",
        "speed_low",
        "speed_high",
        "bandwidth",
        "cache_bytes",
        "attention_share",
        "decider_share",
        "trace_share",
        "note",
    ),
)
def engine(context: BenchContext) -> Rows:
    """The cpu engine at every width against transformers, bitsandbytes and llama.cpp, all in turns in one process.

    ``speed_ratio`` (with ``speed_low`` and ``speed_high``) is a row's decoding speed over that of ``rival`` on the same
    rounds: llama.cpp where it is there, else transformers in bf16. ``bandwidth`` is what reading 1 GiB with the
    engine's threads reaches, bytes per second, best of the run. ``trace_share`` is what timing the parts of a step
    takes of it. KL is against the dense model in fp32.
    """
    choose_engine("cpu")
    model = load(context.model, job=context.job)
    prompt = bench_prompt(model)
    with tempfile.TemporaryDirectory() as folder:
        rows = _contenders(model, Path(folder), context)
        dense_quality = _measure_quality(model, rows, context)
        dense_sizes = Sizes.of_dense(model)
        del model  # the timing process loads its own
        timed = [r for r in rows if not r.note]
        answer = time_in_turns([r.side() for r in timed], prompt, context, prefill_repeats=5)
        memory = {
            r.source: run_child(
                _LEAN,
                {"folder": r.source, "threads": context.threads, "prompt": prompt, "new_tokens": _NEW_TOKENS},
                threads=context.threads,
                job=context.job,
            )
            for r in timed
            if r.engine == "cpu" and r.compressed is not None and r.bits in (None, WIDTHS[-1])
        }
    return _rows(rows, timed, answer, memory, dense_sizes, dense_quality)


def time_in_turns(
    sides: Sequence[dict[str, Any]],
    prompt: Sequence[int],
    context: BenchContext,
    *,
    prefill_repeats: int,
    pairs: int | None = None,
    new_tokens: int | None = None,
) -> dict[str, Any]:
    """Time all sides in one child process, a round of each after the other; ``engine_child`` says what comes back."""
    return run_child(
        _CHILD,
        {
            "sides": list(sides),
            "prompt": list(prompt),
            "new_tokens": _NEW_TOKENS if new_tokens is None else new_tokens,
            "pairs": PAIRS_FOR_A_CLAIM if pairs is None else pairs,
            "warmup": 1,
            "threads": context.threads,
            "prefill_tokens": PREFILL_TOKENS,
            "prefill_repeats": prefill_repeats,
        },
        threads=context.threads,
        job=context.job,
    )


def step_columns(side: dict[str, Any], prefill_tokens: int) -> dict[str, Any]:
    """Columns of a side's times."""
    steps = np.concatenate([run["step_s"] for run in side["runs"]])
    median, p95 = (float(v) for v in np.quantile(steps, [0.5, 0.95]))
    return {
        "decode_tokens_per_s": 1 / median,
        "ms_per_token": 1000 * median,
        "ms_p95": 1000 * p95,
        "prefill_tokens_per_s": prefill_tokens / float(np.median(side["prefill_s"])),
    }


def bench_prompt(model: LoadedModel) -> list[int]:
    """What every side continues."""
    return model.encode(_PROMPT)[:_PROMPT_TOKENS]


def _contenders(model: LoadedModel, folder: Path, context: BenchContext) -> list[_Row]:
    """Make every compressed model and name every side."""
    widths = _QUICK_WIDTHS if context.quick else WIDTHS
    found = [_Row("workbench", "bf16", "cpu", model.source, "bfloat16", variant="dense", activation_mode="bf16")]
    if not context.quick:
        found.append(_Row("workbench", "fp32", "cpu", model.source, variant="dense", activation_mode="fp32"))
    path = gguf_file(model.source)
    if path is not None:
        found.append(_stored(model, GgufConfig(), folder / "gguf", "as in the file", context.job))
    if not context.quick:
        for bits in widths:
            found.append(_stored(model, RtnConfig(bits=bits), folder / f"rtn{bits}", "packed", context.job, bits))
    narrow = RtnConfig(bits=4, output_bits=4)
    found.append(_stored(model, narrow, folder / "narrow", "packed, 4-bit output layer", context.job, 4))
    nested = _stored(
        model, NestedConfig(widths=WIDTHS, fit="rounded"), folder / "nested", "planes, rounded", context.job
    )
    for bits in widths:
        found.append(_Row(**{**vars(nested), "bits": bits, "asked_bits": bits}))
    found.append(
        _Row("transformers", "bf16", "reference", model.source, "bfloat16", variant="dense", activation_mode="bf16")
    )
    if not context.quick:
        found.append(_Row("transformers", "fp32", "reference", model.source, variant="dense", activation_mode="fp32"))
        found.append(_bitsandbytes(model, folder / "nf4", context.job))
    if path is not None:
        there = find_spec("llama_cpp") is not None
        found.append(
            _Row("llama.cpp", "gguf", "llama.cpp", str(path), variant="as in the file", note="" if there else GET_LLAMA)
        )
    return found


def _stored(
    model: LoadedModel, config: MethodConfig, folder: Path, variant: str, job: Job, bits: int | None = None
) -> _Row:
    made = compress(model, Recipe.for_model(model, config), job=job)
    made.save(folder)
    return _Row("workbench", config.method, "cpu", str(folder), compressed=made, variant=variant, asked_bits=bits)


def _bitsandbytes(model: LoadedModel, folder: Path, job: Job) -> _Row:
    if find_spec("bitsandbytes") is None:
        note = "bitsandbytes is not installed: pip install 'compression-workbench[bench]'"
        return _Row("bitsandbytes", "nf4", "reference", "", "bfloat16", note=note)
    found = _stored(model, BnbNf4Config(output_bits=16), folder, "output layer dense", job, 4)
    found.name, found.method, found.engine, found.dtype = "bitsandbytes", "nf4", "reference", "bfloat16"
    found.activation_mode = "bf16"
    return found


def _measure_quality(model: LoadedModel, rows: Sequence[_Row], context: BenchContext) -> QualityResult | None:
    """Quality of every side of the cpu engine, against the dense model in fp32 on the same engine."""
    n_windows, length = (8, 128) if context.quick else (40, 256)
    windows, record = evaluation_windows(context.text or "prose", model, n_windows, length)
    dense = CpuEngine(model, threads=context.threads, activation_mode="fp32")
    last: QualityResult | None = None
    for entry in rows:
        if entry.engine != "cpu" or entry.method == "fp32":
            continue
        if entry.compressed is None:
            candidate = CpuEngine(load(entry.source, dtype=entry.dtype), threads=context.threads)
        elif entry.bits is None:
            candidate = CpuEngine(entry.compressed, threads=context.threads)
        else:
            plan = width_plan(entry.compressed.architecture, WIDTHS, entry.bits)
            candidate = CpuEngine(entry.compressed, plan, threads=context.threads)
            candidate.set_policy(Policy({"width": entry.bits}))
        entry.quality = last = compare_many(dense, [candidate], windows, text=record, job=context.job)[0]
        candidate.close()
    dense.close()
    return last


def _rows(
    rows: Sequence[_Row],
    timed: Sequence[_Row],
    answer: dict[str, Any],
    memory: dict[str, dict[str, Any]],
    dense: Sizes,
    dense_quality: QualityResult | None,
) -> Rows:
    bandwidth = max(answer["bandwidth"])
    medians = {
        id(r): np.array([np.median(run["step_s"]) for run in side["runs"]])
        for r, side in zip(timed, answer["sides"], strict=True)
    }
    sides = {id(r): side for r, side in zip(timed, answer["sides"], strict=True)}
    rivals = [r for r in timed if r.name == "llama.cpp"] or [
        r for r in timed if r.name == "transformers" and r.method == "bf16"
    ]
    found = []
    for entry in rows:
        if id(entry) not in medians:
            found.append(row(name=entry.name, method=entry.method, engine=entry.engine, note=entry.note))
            continue
        values = _speed(entry, sides[id(entry)], answer["prefill_tokens"], bandwidth)
        rival = rivals[0]
        if entry is not rival:
            ratio = median_bootstrap(medians[id(rival)] / medians[id(entry)])
            values |= {
                "rival": f"{rival.name} {rival.method}",
                "speed_ratio": ratio.value,
                "speed_low": ratio.low,
                "speed_high": ratio.high,
            }
        lean = memory.get(entry.source)
        if lean is not None:
            values |= {"peak_rss_bytes": lean["peak_rss_bytes"], "cache_bytes": lean["cache_bytes"]}
        found.append(row(**_about(entry, dense, dense_quality), **values))
    return found


def _about(entry: _Row, dense: Sizes, dense_quality: QualityResult | None) -> dict[str, Any]:
    """Columns of what a side is: sizes and quality."""
    columns: dict[str, Any] = {
        "name": entry.name,
        "method": entry.method,
        "variant": entry.variant,
        "engine": entry.engine,
        "activation_mode": entry.activation_mode,
        "activation_bits": 16,
        "bits": entry.asked_bits if entry.compressed is not None else dense.effective_bits,
    }
    if entry.compressed is not None:
        sizes = Sizes.of_compressed(entry.compressed)
        columns |= {
            "effective_bits": sizes.effective_bits,
            "output_bits": sizes.output_bits,
            "weight_bytes": sizes.weight_bytes,
            "fit_seconds": entry.compressed.fit_seconds,
            "group_size": 32 if entry.method == "gguf" else _GROUP_SIZE,
        }
    elif entry.method in ("bf16", "fp32"):
        columns |= {
            "effective_bits": dense.effective_bits,
            "output_bits": dense.output_bits,
            "weight_bytes": dense.weight_bytes,
        }
    quality = entry.quality
    if quality is not None:
        columns |= quality_columns(quality)
    elif entry.method == "fp32" and dense_quality is not None:
        quality = dense_quality
        columns |= dense_quality_columns(dense_quality)
    if quality is not None:
        columns |= {"text": quality.text.name if quality.text else None, "n_tokens": quality.n_tokens}
    return columns


def _speed(entry: _Row, side: dict[str, Any], prefill_tokens: int, bandwidth: float) -> dict[str, Any]:
    values = step_columns(side, prefill_tokens)
    median = values["ms_per_token"] / 1000
    touched = [run["touched_bytes"] for run in side["runs"] if run["touched_bytes"] is not None]
    values |= {"repeats": len(side["runs"]), "bandwidth": bandwidth}
    if touched:
        size = float(np.mean(touched))
        parts = side["runs"][0]["parts"]
        total = sum(parts.values())
        values |= {
            "bytes_per_token": size,
            "bandwidth_share": size / median / bandwidth,
            "attention_share": parts["attention"] / total,
            "decider_share": parts["deciders"] / total,
            "trace_share": float(np.median([run["trace_s"] for run in side["runs"]])) / median,
        }
    if entry.compressed is not None:
        linears = entry.compressed.linears.values()
        bits = entry.bits if entry.method == "nested" else None
        weights = sum(encoding.shape[0] * encoding.shape[1] for encoding in linears)
        values["read_bits"] = sum(encoding.read_bits(bits) for encoding in linears) / weights
    return values
