"""What a width costs: one nested copy read at every width beside copies made for one width alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.apply.anyprecision import AnyPrecisionConfig
from workbench.apply.config import MethodConfig
from workbench.apply.nested import NestedConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext, Rows, bench
from workbench.measure.measurement import evaluation_windows
from workbench.measure.quality import QualityResult, compare_many
from workbench.measure.result import Sizes, dense_quality_columns, quality_columns
from workbench.measure.rows import row
from workbench.models import load
from workbench.models.base import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import Engine
from workbench.runtime.plan import Policy, width_plan

WIDTHS = (3, 4, 5, 6)
_QUICK_WIDTHS = (3, 4)
_GROUP_SIZE = 64
_NESTED = ("nested", "nested-anyprecision")  # one copy, read at every width
_OUTPUT_BITS = 16  # the claim is about the blocks' linears


@dataclass
class _Candidate:
    """A method at one width."""

    method: str
    bits: int
    model: CompressedModel

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


@bench("precision", extra_keys=("ratio", "gap_closed", "to_separate", "calibration"))
def precision(context: BenchContext) -> Rows:
    """Uniform widths: round-to-nearest, one nested copy read at each, and the same quantizer run for one width alone.

    ``ratio`` is perplexity over that of the dense model; ``gap_closed`` the share of the logarithm of
    round-to-nearest's ratio at that width that a method takes away; ``to_separate`` nested perplexity over that of
    ``separate``, minus one. ``nested-anyprecision`` is Any-Precision LLM's copy, left out where quick. The
    output layer stays dense. Fits use text sampled from the model itself.
    """
    model = load(context.model, job=context.job)
    candidates = _candidates(model, context)
    n_windows, length = (40, 128) if context.quick else (40, 512)
    windows, record = evaluation_windows(context.text or "prose", model, n_windows, length)
    dense = open_engine(model, threads=context.threads, activation_mode="fp32")
    found: list[QualityResult] = []
    modes = []
    for candidate in candidates:
        engine = candidate.engine(context.threads)
        try:
            found += compare_many(dense, [engine], windows, text=record, job=context.job)
            modes.append(engine.activation_mode)
        finally:
            engine.close()
    name = dense.name
    dense.close()
    rows = [_dense_row(model, found[0], name)]
    by_key = {(c.method, c.bits): q for c, q in zip(candidates, found, strict=True)}
    for candidate, quality, mode in zip(candidates, found, modes, strict=True):
        rows.append(_row(candidate, quality, name, mode) | _against(candidate, quality, by_key))
    return rows


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
    sizes = Sizes.of_compressed(candidate.model)
    return row(
        name="workbench",
        method=candidate.method,
        variant=f"{candidate.bits} bits",
        engine=engine,
        activation_mode=mode,
        bits=candidate.bits,
        activation_bits=16,
        effective_bits=sizes.effective_bits,
        read_bits=candidate.read_bits,
        output_bits=sizes.output_bits,
        group_size=None if candidate.method == "nested-anyprecision" else _GROUP_SIZE,
        weight_bytes=sizes.weight_bytes,
        fit_seconds=candidate.model.fit_seconds,
        calibration=None if candidate.method == "rtn" else "self",
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
