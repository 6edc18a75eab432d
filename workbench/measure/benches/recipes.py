"""Do solved mixes beat uniform widths of the same size? Quality alone: the reference engine computes all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from workbench.analysis.profile import Profile
from workbench.analysis.sensitivity import UnitDamage
from workbench.apply.compress import compress
from workbench.apply.recipe import Budget, DamageSource, Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.solver import solve
from workbench.corpus import TextRecord, Window, open_text, windows
from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext, Rows, bench
from workbench.measure.kept_quality import compare_kept
from workbench.measure.measurement import evaluation_windows
from workbench.measure.memory import engines_at_once
from workbench.measure.quality import QualityResult, compare_candidates
from workbench.measure.result import Sizes, dense_quality_columns, quality_columns, recipe_columns
from workbench.measure.rows import row
from workbench.models import load
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.base import Engine

WIDTHS = (2, 3, 4, 5, 6, 8)
_BUDGETS = (3, 4)  # the byte budgets of these uniform widths
_GROUP_SIZE = 64
_ENGINE = "reference"  # fp32 activations, whatever other engines there are: the claim is about the recipe
_SOLVE_WINDOWS, _SOLVE_TOKENS = 4, 128  # as `workbench analyze sensitivity --kl` takes them: the fit is shared
_OUTPUT_BITS = 16  # the claim is about the blocks' linears


@dataclass(frozen=True)
class _Candidate:
    name: str
    model: CompressedModel
    recipe: Recipe


@bench(
    "recipes",
    extra_keys=("kl_mean_low", "kl_mean_high", "rival", "kl_difference", "kl_low", "kl_high", "kl_verdict"),
)
def recipes(context: BenchContext) -> Rows:
    """Uniform round-to-nearest at 2 to 8 bits, and solved mixes at the byte budgets of uniform 3 and 4.

    ``kl_difference`` (with ``kl_low`` and ``kl_high``) is the mix's KL minus that of ``rival`` on the same windows,
    nats per token; the mix is solved for the measured KL of every unit on calibration text. The output layer stays
    dense.
    """
    job = context.job
    model = load(context.model, job=job)
    profile, used = _damage(model, context)
    n_windows, length = (40, 128) if context.quick else (48, 256)
    evaluation, record = evaluation_windows(context.text or "prose", model, n_windows, length, used=used)
    candidates = _candidates(model, profile, job)
    with_quality = _qualities(model, candidates, evaluation, record, context)
    by_name = {candidate.name: quality for candidate, quality in zip(candidates, with_quality, strict=True)}
    dense = open_engine(model, engine=_ENGINE)
    rows = [_dense_row(model, dense, with_quality[0])]
    dense.close()
    for candidate, quality in zip(candidates, with_quality, strict=True):
        entry = _row(candidate, quality)
        if candidate.recipe.solution is not None:
            rival = candidate.name.replace("solved", "uniform")
            found = compare_candidates(quality, by_name[rival])
            entry |= {
                "rival": rival,
                "kl_difference": found.kl.value,
                "kl_low": found.kl.low,
                "kl_high": found.kl.high,
                "kl_verdict": found.kl_verdict,
            }
        rows.append(entry)
    return rows


def _damage(model: LoadedModel, context: BenchContext) -> tuple[Profile, TextRecord]:
    """Each unit's KL at each width on calibration text: what ``workbench analyze sensitivity --kl`` measures."""
    corpus = open_text("prose", "calibration")
    cut = windows(corpus, model, _SOLVE_TOKENS, limit=_SOLVE_WINDOWS)
    record = corpus.record(sum(len(window.tokens) for window in cut))
    analysis = UnitDamage(model, [window.tokens for window in cut], widths=WIDTHS, group_size=_GROUP_SIZE, text=record)
    return context.analyze(analysis, context.job), record


def _candidates(model: LoadedModel, profile: Profile, job: Job) -> list[_Candidate]:
    table = profile.table.rename(columns={"kl": "damage"})
    source = DamageSource(column="kl", profile=profile.provenance.key, text=profile.provenance.text)
    named = [
        (f"uniform {bits}", Recipe.for_model(model, RtnConfig(bits=bits, output_bits=_OUTPUT_BITS))) for bits in WIDTHS
    ]
    for bits in _BUDGETS:
        solution = solve(table, Budget(bytes=_uniform_bytes(table, bits)), source=source)
        method = RtnConfig(unit_bits=dict(solution.unit_bits), group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS)
        named.append((f"solved {bits}", Recipe.for_model(model, method, solution=solution)))
    return [_Candidate(name, compress(model, recipe, job=job), recipe) for name, recipe in named]


def _uniform_bytes(table: pd.DataFrame, bits: int) -> int:
    """Whole bytes that all units take at one width; rounded down, so that the mix is never the larger one."""
    return int(table.loc[table["bits"] == bits, "stored_bits"].sum()) // 8


def _qualities(
    model: LoadedModel,
    candidates: Sequence[_Candidate],
    evaluation: Sequence[Window],
    record: TextRecord,
    context: BenchContext,
) -> list[QualityResult]:
    """Quality of all candidates, as many at once as half of the free memory holds in fp32: one dense pass for each."""
    at_once = engines_at_once(model.n_parameters)
    found: list[QualityResult] = []
    for start in range(0, len(candidates), at_once):
        part = candidates[start : start + at_once]
        dense = open_engine(model, engine=_ENGINE, threads=context.threads)
        engines: list[Engine] = [open_engine(c.model, engine=_ENGINE, threads=context.threads) for c in part]
        try:
            found += compare_kept(
                context.shelf,
                dense,
                engines,
                evaluation,
                about=[None] * len(part),
                text=record,
                decode=model.decode,
                job=context.job,
            )
        finally:
            for engine in (dense, *engines):
                engine.close()
    return found


def _row(candidate: _Candidate, quality: QualityResult) -> dict[str, Any]:
    sizes = Sizes.of_compressed(candidate.model)
    columns = recipe_columns(candidate.recipe)
    return row(
        name="workbench",
        **{**columns, "variant": candidate.name},
        engine=_ENGINE,
        activation_mode="fp32",
        effective_bits=sizes.effective_bits,
        read_bits=sizes.effective_bits,  # nothing is decided at run time: a step reads all that is stored
        output_bits=sizes.output_bits,
        weight_bytes=sizes.weight_bytes,
        fit_seconds=candidate.model.fit_seconds,
        **_measured(quality, quality_columns(quality)),
    )


def _dense_row(model: LoadedModel, engine: Engine, quality: QualityResult) -> dict[str, Any]:
    sizes = Sizes.of_dense(model)
    return row(
        name="workbench",
        method=engine.activation_mode,
        variant="dense",
        engine=_ENGINE,
        activation_mode=engine.activation_mode,
        bits=sizes.effective_bits,
        activation_bits=sizes.effective_bits,
        effective_bits=sizes.effective_bits,
        read_bits=sizes.effective_bits,
        output_bits=sizes.output_bits,
        weight_bytes=sizes.weight_bytes,
        **{**_measured(quality, dense_quality_columns(quality)), "kl_mean_low": 0.0, "kl_mean_high": 0.0},
    )


def _measured(quality: QualityResult, columns: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": quality.text.name if quality.text is not None else None,
        "n_tokens": quality.n_tokens,
        **columns,
        "kl_mean_low": quality.kl_mean.low,
        "kl_mean_high": quality.kl_mean.high,
        "repeats": quality.n_windows,
    }
