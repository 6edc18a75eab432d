"""What widths cost: one nested copy read at every width, mixes of widths, and widths that every token chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.apply.anyprecision import AnyPrecisionConfig
from workbench.apply.config import MethodConfig
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.corpus import TextRecord, Window
from workbench.formats.codes import stored_bits
from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext, Rows, bench
from workbench.measure.benches.precision_speed import measure_speed
from workbench.measure.benches.precision_targets import STATIC, Candidate, Targets, against_static, evaluate
from workbench.measure.kept_quality import compare_kept
from workbench.measure.measurement import evaluation_windows
from workbench.measure.quality import QualityResult
from workbench.measure.result import Sizes, dense_quality_columns, quality_columns
from workbench.measure.rows import row
from workbench.models import load
from workbench.models.base import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import Engine
from workbench.runtime.plan import Policy, width_plan

WIDTHS = (3, 4, 5, 6)
_QUICK_WIDTHS = (3, 4)
TEXTS = ("prose", "pydoc")
_GROUP_SIZE = 64
_NESTED = ("nested", "nested-anyprecision")  # one copy, read at every width
_WINDOWS, _QUICK_WINDOWS = (40, 512), (40, 128)  # how many, and their tokens
_AT_ONCE = 6  # engines beside one dense pass: each holds a model
_OUTPUT_BITS = 16  # the claim is about the blocks' linears


@dataclass
class _Candidate:
    """A method at one width."""

    method: str
    bits: int
    model: CompressedModel
    note: str | None = None

    def engine(self, threads: int) -> Engine:
        if self.method not in _NESTED:
            return open_engine(self.model, threads=threads)
        plan = width_plan(self.model.architecture, WIDTHS, self.bits)
        engine = open_engine(self.model, threads=threads, plan=plan)
        engine.set_policy(Policy({"width": self.bits}))
        return engine

    @property
    def read_bits(self) -> float:
        """Bits per weight of the blocks' linears that a step reads, scales and zero points counted."""
        linears = self.model.linears.values()
        read = sum(e.read_bits(self.bits if self.method in _NESTED else None) for e in linears)
        return read / sum(e.shape[0] * e.shape[1] for e in linears)


@bench(
    "precision",
    extra_keys=(
        "ratio",
        "gap_closed",
        "to_separate",
        "realised_bits",
        "rival",
        "rival_read_bits",
        "rival_ratio",
        "to_rival",
        "to_rival_low",
        "to_rival_high",
        "kl_to_rival",
        "kl_to_rival_low",
        "kl_to_rival_high",
        "selector_share",
        "to_line",
        "speed_ratio",
        "speed_low",
        "speed_high",
        "note",
    ),
)
def precision(context: BenchContext) -> Rows:
    """What widths cost: uniform ones, static mixes, and widths chosen per token, all read from nested copies.

    Uniform: round-to-nearest, one nested copy read at each width, and the same quantizer run for one width alone
    (``separate``); beside them the round-to-nearest model that takes as much memory as the copy with all its widths.
    Between them, at targets of average code bits: static allocations, a schedule by position, DP-LLM
    (``dpllm``; ``dpllm-oracle`` on exact errors, left out where quick), the rule ``gain`` (``dynamic``) and its rates
    drawn at random.

    ``ratio`` is perplexity over that of the dense model; ``gap_closed`` the share of the logarithm of
    round-to-nearest's ratio at that width that a method takes away; ``to_separate`` nested perplexity over that of
    ``separate``, minus one. ``nested-anyprecision`` is Any-Precision LLM's copy, left out where quick.
    ``realised_bits`` are average code bits; ``read_bits`` count scales, zero points and what decisions read too.
    ``rival`` is the best static allocation that reads as many bits: ``to_rival`` nats a token more (less: better), with
    its interval. Speed: ``to_line`` is the time of a token over that of a straight line in bytes between the uniform
    widths beside it, minus one; ``selector_share`` what deciding takes of a step; ``speed_ratio`` against llama.cpp.

    The output layer stays dense. Fits use text sampled from the model itself.
    """
    model = load(context.model, job=context.job)
    candidates = _candidates(model, context)
    chosen = _chosen(model, context)
    candidates.append(_same_memory(model, chosen, context))
    targets = Targets(model, chosen, context)
    dense = open_engine(model, threads=context.threads, activation_mode="fp32")
    rows: Rows = []
    try:
        for text in _texts(context):
            n_windows, length = _QUICK_WINDOWS if context.quick else _WINDOWS
            found, record = evaluation_windows(text, model, n_windows, length)
            rows += _width_rows(model, dense, candidates, found, record, context)
            rows += _target_rows(targets, dense, found, record, context)
    finally:
        targets.close()
        dense.close()
    speeds = measure_speed(model, chosen, targets.targets, context)
    for entry in rows:
        entry |= speeds.get((entry["method"], entry["bits"]), {})
    return rows + speeds.get(("llama.cpp", None), {}).get("rows", [])


def _texts(context: BenchContext) -> tuple[str, ...]:
    if context.text:
        return (context.text,)
    return TEXTS[:1] if context.quick else TEXTS


def _chosen(model: LoadedModel, context: BenchContext) -> CompressedModel:
    """The nested copy with what chooses its widths."""
    nested = NestedConfig(widths=WIDTHS, group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS)
    return context.compress(model, Recipe.for_model(model, nested, PrecisionConfig()), context.job)


def _same_memory(model: LoadedModel, chosen: CompressedModel, context: BenchContext) -> _Candidate:
    """Round-to-nearest at the widest width that takes no more memory than the copy with all its widths."""
    linears = model.architecture.linears
    weights = sum(linear.n_weights for linear in linears)

    def effective(bits: int) -> float:
        return sum(stored_bits(x.out_features, x.in_features, bits, _GROUP_SIZE, False) for x in linears) / weights

    bits = next((b for b in range(8, 3, -1) if effective(b) <= chosen.effective_bits), 3)
    config = RtnConfig(bits=bits, group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS)
    made = context.compress(model, Recipe.for_model(model, config), context.job)
    return _Candidate("rtn", bits, made, note="as much memory as the nested copy")


def _width_rows(
    model: LoadedModel,
    dense: Engine,
    candidates: list[_Candidate],
    windows: list[Window],
    record: TextRecord,
    context: BenchContext,
) -> Rows:
    found: list[QualityResult] = []
    modes = []
    for begin in range(0, len(candidates), _AT_ONCE):
        engines = [candidate.engine(context.threads) for candidate in candidates[begin : begin + _AT_ONCE]]
        try:
            about = [candidate.bits for candidate in candidates[begin : begin + _AT_ONCE]]
            found += compare_kept(context.shelf, dense, engines, windows, about=about, text=record, job=context.job)
            modes += [engine.activation_mode for engine in engines]
        finally:
            for engine in engines:
                engine.close()
    rows = [_dense_row(model, found[0], dense.name)]
    by_key = {(c.method, c.bits): q for c, q in zip(candidates, found, strict=True)}
    for candidate, quality, mode in zip(candidates, found, modes, strict=True):
        rows.append(_row(candidate, quality, dense.name, mode) | _against(candidate, quality, by_key))
    return rows


def _target_rows(
    targets: Targets, dense: Engine, windows: list[Window], record: TextRecord, context: BenchContext
) -> Rows:
    wanted = [(method, target) for method in STATIC for target in targets.targets]
    length = len(windows[0].tokens)
    candidates = [*targets.statics(wanted), *targets.by_position()]
    if not context.quick:
        candidates += targets.first_widest(length)
    published = targets.published()
    candidates += [*targets.dynamic(), *published]
    found = evaluate(dense, candidates, windows, record, context)
    if not context.quick:
        exact = targets.oracle(published, windows)
        found += evaluate(dense, exact, windows, record, context)
        candidates += exact
    known = list(zip(candidates, found, strict=True))
    moving = [pair for pair in known if pair[0].method in ("dynamic", "dpllm")]
    compared = against_static(targets, dense, moving, known, windows, record, context)
    rivals = {id(candidate): columns for (candidate, _), columns in zip(moving, compared, strict=True)}
    return [
        _target_row(targets.model, candidate, quality) | rivals.get(id(candidate), {})
        for candidate, quality in zip(candidates, found, strict=True)
    ]


def _target_row(model: CompressedModel, candidate: Candidate, quality: QualityResult) -> dict[str, Any]:
    return _columns(model, quality) | {
        "method": candidate.method,
        "variant": candidate.variant,
        "engine": candidate.engine.name,
        "activation_mode": candidate.engine.activation_mode,
        "bits": candidate.target,
        "read_bits": candidate.read_bits,
        "realised_bits": candidate.realised_bits,
        "calibration": "self",
        "ratio": _ratio(quality),
    }


def _candidates(model: LoadedModel, context: BenchContext) -> list[_Candidate]:
    widths = _QUICK_WIDTHS if context.quick else WIDTHS

    def made(config: MethodConfig) -> CompressedModel:
        return context.compress(model, Recipe.for_model(model, config), context.job)

    def nested(*at: int) -> CompressedModel:
        return made(NestedConfig(widths=at, group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS))

    found = [
        _Candidate("rtn", b, made(RtnConfig(bits=b, group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS))) for b in widths
    ]
    one = nested(*WIDTHS)
    found += [_Candidate("nested", bits, one) for bits in widths]
    if not context.quick:
        tables = made(AnyPrecisionConfig(widths=WIDTHS, output_bits=_OUTPUT_BITS))
        found += [_Candidate("nested-anyprecision", bits, tables) for bits in widths]
        found += [_Candidate("separate", bits, nested(bits)) for bits in widths]
    return found


def _ratio(quality: QualityResult) -> float:
    return float(np.exp(quality.delta_nll.value))


def _against(
    candidate: _Candidate, quality: QualityResult, by_key: dict[tuple[str, int], QualityResult]
) -> dict[str, Any]:
    ratio = _ratio(quality)
    entry: dict[str, Any] = {"ratio": ratio}
    rounded = by_key.get(("rtn", candidate.bits))
    if rounded is not None and rounded is not quality:
        entry["gap_closed"] = 1 - quality.delta_nll.value / rounded.delta_nll.value
    separate = by_key.get(("separate", candidate.bits))
    if separate is not None and candidate.method == "nested":
        entry["to_separate"] = ratio / _ratio(separate) - 1
    return entry


def _row(candidate: _Candidate, quality: QualityResult, engine: str, mode: str) -> dict[str, Any]:
    entry = _columns(candidate.model, quality) | {
        "method": candidate.method,
        "variant": f"{candidate.bits} bits",
        "engine": engine,
        "activation_mode": mode,
        "bits": candidate.bits,
        "read_bits": candidate.read_bits,
        "realised_bits": float(candidate.bits),
        "calibration": None if candidate.method == "rtn" else "self",
    }
    if candidate.note:
        entry["note"] = candidate.note
    return entry | ({"group_size": None} if candidate.method == "nested-anyprecision" else {})


def _columns(model: CompressedModel, quality: QualityResult) -> dict[str, Any]:
    """What rows of one compressed model share."""
    sizes = Sizes.of_compressed(model)
    return row(
        name="workbench",
        activation_bits=16,
        effective_bits=sizes.effective_bits,
        output_bits=sizes.output_bits,
        group_size=_GROUP_SIZE,
        weight_bytes=sizes.weight_bytes,
        fit_seconds=model.fit_seconds,
        text=quality.text.name if quality.text is not None else None,
        n_tokens=quality.n_tokens,
        repeats=quality.n_windows,
        **quality_columns(quality),
    )


def _dense_row(model: LoadedModel, quality: QualityResult, engine: str) -> dict[str, Any]:
    sizes = Sizes.of_dense(model)
    return row(
        name="workbench",
        method="fp32",
        variant="dense",
        engine=engine,
        activation_mode="fp32",
        bits=sizes.effective_bits,
        activation_bits=sizes.effective_bits,
        effective_bits=sizes.effective_bits,
        read_bits=sizes.effective_bits,
        output_bits=sizes.output_bits,
        weight_bytes=sizes.weight_bytes,
        text=quality.text.name if quality.text is not None else None,
        n_tokens=quality.n_tokens,
        repeats=quality.n_windows,
        **dense_quality_columns(quality),
    ) | {"ratio": 1.0}
