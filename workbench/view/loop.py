"""The loop's two long halves as plain functions: look at a model, then try a recipe. No threads, no state, no UI.

Sizes are small on purpose: this is for sitting in front of. Every number comes with how much it rests on, and
``workbench measure`` gives the same numbers with enough windows and pairs for a claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from workbench.analysis.profile import Profile
from workbench.analysis.sensitivity import WIDTHS, DecodingSteps, UnitScores, damage_table, generated
from workbench.apply.compress import compress
from workbench.apply.recipe import Budget, DamageSource, Recipe, Solution
from workbench.apply.rtn import RtnConfig
from workbench.apply.solver import pareto, solve
from workbench.corpus import open_text, prompts, require_disjoint, windows
from workbench.formats.compressed import CompressedModel
from workbench.measure.latency import LatencyResult, compare_latency
from workbench.measure.quality import QualityResult, compare_quality
from workbench.models import LoadedModel
from workbench.operate.jobs import analyze
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.reference import ReferenceEngine
from workbench.store import Store
from workbench.view.texts import Generation, pieces

DAMAGE: Literal["fisher"] = (
    "fisher"  # the damage that budgets are solved for: an estimate of the KL, from one backward pass per window
)


@dataclass(frozen=True)
class Settings:
    """How much is looked at and measured. The defaults keep a whole turn under some two minutes on two cores.

    Attributes:
        prompts: whose replies are looked at and compared; empty for the first English ones of the project.
        n_prompts: how many of the project's prompts, where none are given.
        new_tokens: longest reply, tokens.
        widths: bits to look at and to choose from.
        group_size: input channels per scale.
        output_bits: of embedding and output layer.
        score_windows, score_tokens: calibration windows for the units' scores, and their length.
        quality_windows, quality_tokens: evaluation windows for KL, and their length.
        latency_pairs, latency_tokens: interleaved pairs, and decoding steps per side and pair.
        engine: ``auto`` or a name.
        threads: of the engine while its time is taken; None for one per usable core.
        seed: of everything drawn.
    """

    prompts: tuple[str, ...] = ()
    n_prompts: int = 2
    new_tokens: int = 40
    widths: tuple[int, ...] = WIDTHS
    group_size: int = 64
    output_bits: int = 8
    score_windows: int = 8
    score_tokens: int = 128
    quality_windows: int = 8
    quality_tokens: int = 256
    latency_pairs: int = 10
    latency_tokens: int = 12
    engine: str = "auto"
    threads: int | None = None
    seed: int = 0

    def texts(self) -> tuple[str, ...]:
        """The prompts in use."""
        return self.prompts or tuple(prompt.text for prompt in prompts(language="en")[: self.n_prompts])


@dataclass(frozen=True)
class Look:
    """What was seen of a model.

    Attributes:
        steps: profile of ``DecodingSteps`` over the prompts and the model's own replies.
        scores: profile of ``UnitScores`` on calibration text.
        damage: one row per unit and width: ``unit``, ``block``, ``bits``, ``fisher``, ``gradient``, ``stored_bits``,
            ``n_weights``.
        trade_off: effective bits against predicted damage, see ``trade_off``.
    """

    steps: Profile
    scores: Profile
    damage: pd.DataFrame
    trade_off: pd.DataFrame

    @property
    def score_tokens(self) -> int:
        """Tokens of text behind the units' scores."""
        return int(self.scores.table.drop_duplicates("window")["n_tokens"].sum())


@dataclass(frozen=True)
class Trial:
    """One recipe, applied and measured against dense.

    Attributes:
        folder: the compressed model.
        generations: replies side by side, greedy, in the model's chat template.
    """

    recipe: Recipe
    folder: Path
    effective_bits: float
    output_bits: float
    weight_bytes: int
    dense_bytes: int
    generations: tuple[Generation, ...]
    latency: LatencyResult
    quality: QualityResult
    environment: Mapping[str, Any] = field(repr=False)

    @property
    def point(self) -> pd.DataFrame:
        """Where the measurement lies in the trade-off: ``effective_bits``, ``kl_mean``, ``kl_low``, ``kl_high``."""
        kl = self.quality.kl_mean
        return pd.DataFrame(
            {"effective_bits": [self.effective_bits], "kl_mean": kl.value, "kl_low": kl.low, "kl_high": kl.high}
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Dense and compressed with the keys of a bench row."""
        dense, compressed, quality = self.latency.baseline, self.latency.candidate, self.quality
        return [
            {
                "variant": "dense",
                "engine": dense.engine,
                "ms_per_token": dense.ms_per_token,
                "ms_p95": dense.p95_ms,
                "weight_bytes": self.dense_bytes,
                "perplexity": quality.perplexity_dense,
            },
            {
                "variant": "compressed",
                "engine": compressed.engine,
                "ms_per_token": compressed.ms_per_token,
                "ms_p95": compressed.p95_ms,
                "latency_ratio": self.latency.ratio.value,
                "latency_ratio_low": self.latency.ratio.low,
                "latency_ratio_high": self.latency.ratio.high,
                "weight_bytes": self.weight_bytes,
                "effective_bits": self.effective_bits,
                "output_bits": self.output_bits,
                "perplexity": quality.perplexity_candidate,
                "kl_mean": quality.kl_mean.value,
                "kl_mean_low": quality.kl_mean.low,
                "kl_mean_high": quality.kl_mean.high,
                "top1_agreement": quality.top1_agreement,
                "delta_nll": quality.delta_nll.value,
                "delta_nll_low": quality.delta_nll.low,
                "delta_nll_high": quality.delta_nll.high,
                "n_tokens": quality.n_tokens,
            },
        ]


def look(model: LoadedModel, settings: Settings, store: Store | None, job: Job) -> Look:
    """Look at every decoding step of the prompts' replies, and score every unit on calibration text.

    Args:
        model: dense.
        settings: how much.
        store: results are taken from and kept in it; None computes in memory.
        job: progress and cancel.
    """
    texts = settings.texts()
    job.stage("generate replies to look at", len(texts))
    sequences = []
    with _engine(model) as engine:
        encoded = [model.encode_chat(text) for text in texts]
        for sequence in generated(
            engine, encoded, settings.new_tokens, seed=settings.seed, stop_tokens=model.stop_tokens, job=job
        ):
            sequences.append(sequence)
            job.advance()
    options: dict[str, Any] = {"widths": settings.widths, "group_size": settings.group_size, "seed": settings.seed}
    steps = analyze(store, DecodingSteps(model, sequences, **options), job).profile
    corpus = open_text("prose", "calibration")
    cut = windows(corpus, model, settings.score_tokens, limit=settings.score_windows, seed=settings.seed)
    record = corpus.record(sum(len(window.tokens) for window in cut))
    scores = analyze(store, UnitScores(model, [window.tokens for window in cut], text=record, **options), job).profile
    damage = damage_table(scores)
    job.stage("solve for several budgets", 1)
    curve = trade_off(damage)
    job.advance()
    return Look(steps, scores, damage, curve)


def solve_look(seen: Look, bits: float, pinned: Mapping[str, int]) -> Solution:
    """Widths of all units for so many effective bits. ``RecipeError`` where no choice meets them."""
    source = DamageSource(column=DAMAGE, profile=seen.scores.provenance.key, text=seen.scores.provenance.text)
    return solve(solver_table(seen.damage), Budget(average_bits=bits), pinned, source=source)


def trade_off(damage: pd.DataFrame, points: int = 12) -> pd.DataFrame:
    """Effective bits against predicted damage: the solved mix at ``points`` budgets, and each width everywhere.

    Returns columns ``effective_bits``, ``damage``, ``kind`` (``solved`` | ``uniform``).
    """
    table = solver_table(damage)
    solved = pareto(table, points).rename(columns={"achieved_bits": "effective_bits"})
    same = table.groupby("bits")[["damage", "stored_bits", "n_weights"]].sum()
    uniform = pd.DataFrame({"effective_bits": same["stored_bits"] / same["n_weights"], "damage": same["damage"]})
    return pd.concat(
        [solved[["effective_bits", "damage"]].assign(kind="solved"), uniform.assign(kind="uniform")],
        ignore_index=True,
    )


def solver_table(damage: pd.DataFrame) -> pd.DataFrame:
    """A damage table in the columns that the solver takes, by the measure named in ``DAMAGE``."""
    table = damage.rename(columns={DAMAGE: "damage"})
    return table[["unit", "bits", "damage", "stored_bits", "n_weights"]]


def possible_bits(damage: pd.DataFrame, pinned: Mapping[str, int]) -> tuple[float, float]:
    """Smallest and largest effective bits that the table's widths allow with these pins."""
    fixed = damage["unit"].map(pinned)
    rows = damage[fixed.isna() | (fixed == damage["bits"])]
    by_unit = rows.groupby("unit", observed=True)["stored_bits"]
    weights = float(damage.drop_duplicates("unit")["n_weights"].sum())
    return float(by_unit.min().sum()) / weights, float(by_unit.max().sum()) / weights


def recipe_of(model: LoadedModel, solution: Solution, settings: Settings) -> Recipe:
    """The recipe that rounds every unit to its solved width."""
    method = RtnConfig(
        unit_bits=dict(solution.unit_bits), group_size=settings.group_size, output_bits=settings.output_bits
    )
    return Recipe.for_model(model, method, seed=settings.seed, solution=solution)


def apply_recipe(model: LoadedModel, recipe: Recipe, folder: Path, job: Job) -> CompressedModel:
    """Compress into ``folder`` and read it back, so that what is measured is what is on disk."""
    compress(model, recipe, job=job).save(folder, overwrite=True)
    return CompressedModel.load(folder)


def compare_outputs(
    model: LoadedModel, compressed: CompressedModel, recipe: Recipe, settings: Settings, job: Job
) -> tuple[tuple[Generation, ...], QualityResult]:
    """Greedy replies of both to the same prompts in the chat template, and KL on evaluation windows of the prose."""
    texts = settings.texts()
    corpus = open_text("prose", "evaluation")
    if recipe.solution is not None and recipe.solution.damage is not None and recipe.solution.damage.text is not None:
        require_disjoint(recipe.solution.damage.text, corpus)
    cut = windows(corpus, model, settings.quality_tokens, limit=settings.quality_windows, seed=settings.seed)
    record = corpus.record(sum(len(window.tokens) for window in cut))
    with _engine(model) as dense, _engine(compressed) as candidate:
        job.stage("generate text with both", 2 * len(texts))
        replies = [[_reply(engine, model, text, settings, job) for text in texts] for engine in (dense, candidate)]
        quality = compare_quality(dense, candidate, cut, text=record, decode=model.decode, seed=settings.seed, job=job)
    generations = tuple(Generation(text, a, b) for text, a, b in zip(texts, *replies, strict=True))
    return generations, quality


def _reply(engine: ReferenceEngine, model: LoadedModel, text: str, settings: Settings, job: Job) -> tuple[str, ...]:
    tokens = engine.generate(
        engine.start(seed=settings.seed),
        model.encode_chat(text),
        settings.new_tokens,
        stop_tokens=model.stop_tokens,
        job=job,
    )
    job.advance()
    return pieces(model.decode, tokens)


def measure_latency(source: str, folder: Path, settings: Settings, job: Job) -> LatencyResult:
    """Interleaved time per token of the dense model and of the compressed one on disk."""
    return compare_latency(
        source,
        folder,
        new_tokens=settings.latency_tokens,
        pairs=settings.latency_pairs,
        threads=settings.threads,
        engine=settings.engine,
        job=job,
    )


@contextmanager
def _engine(target: LoadedModel | CompressedModel) -> Iterator[ReferenceEngine]:
    engine = open_engine(target)
    try:
        yield engine
    finally:
        engine.close()
