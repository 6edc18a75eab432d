"""Long half of a sitting with contextual sparsity: fit or open a model, score replies, measure every method's curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.analysis.mask_quality import PredictorQuality
from workbench.analysis.mask_steps import ScoredText, score_text
from workbench.analysis.profile import Profile
from workbench.analysis.sampled_text import SampledText, sampled_corpus
from workbench.analysis.sparsity import CRITERIA
from workbench.apply.recipe import Recipe
from workbench.corpus import TextRecord, Window, windows
from workbench.errors import InputError, WorkbenchError
from workbench.formats.compressed import CompressedModel
from workbench.formats.folder import is_compressed
from workbench.formats.mask_predictor import MaskPredictor
from workbench.measure.bench import BenchContext
from workbench.measure.benches.sparsity_methods import Contender
from workbench.measure.benches.sparsity_quality import PREFIX, measure_quality
from workbench.measure.environment import check_threads
from workbench.measure.measurement import evaluation_windows
from workbench.measure.quality import QualityResult, compare_candidates
from workbench.measure.sparse_plans import sparse_plan
from workbench.models import LoadedModel, load
from workbench.operate.fits import fitted
from workbench.operate.jobs import ProfileShelf, analyze
from workbench.operate.sensitivity import chosen_prompts
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.input_sparsity import input_shares
from workbench.store import Store
from workbench.view.sparsity_picks import INPUT_METHODS, METHODS, Method, SparsityPick, SparsitySettings

_BITS = 16  # a name for weights that measure_quality keeps apart by; there is one kind of them here
_ROOM = 9 / 8  # sampled text encoded again can come out shorter than it was sampled


@dataclass(frozen=True, eq=False)
class Tables:
    """A model with what it needs to leave weights out.

    Attributes:
        dense: the dense model.
        whole: its weights as they are stored, without tables.
        masks: the same with a mask predictor, if there is one.
        inputs: the same with input cuts, by method.
    """

    dense: LoadedModel
    whole: CompressedModel
    masks: CompressedModel | None
    inputs: Mapping[Method, CompressedModel]

    @property
    def methods(self) -> tuple[Method, ...]:
        """What can be picked."""
        return tuple(
            name for name in METHODS if (self.masks is not None if name not in _INPUTS else name in self.inputs)
        )

    @property
    def predictor(self) -> MaskPredictor | None:
        return None if self.masks is None else self.masks.mask_predictor

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria that true scores and static masks can go by: those that means were kept of."""
        made = self.predictor
        return () if made is None else tuple(name for name in CRITERIA if name in made.aggregates)

    @property
    def fitted_for(self) -> str:
        """The criterion that the predictor predicts; empty without one."""
        return "" if self.predictor is None else str(self.predictor.facts["criterion"])

    def of(self, pick: SparsityPick) -> CompressedModel:
        """The model that a pick is run with.

        Raises:
            InputError: this model has no such tables, or so much cannot be left out of it.
        """
        made = self.masks if pick.masks else self.inputs.get(pick.method)
        if made is None:
            known = ", ".join(self.methods)
            raise InputError(f"This model cannot do '{pick.method}'; it can do {known}.")
        asked = pick.asked
        # The true masks are made text by text, under the bounds of any other mask.
        sparse_plan(made, {**asked, "kind": "random"} if pick.method == "oracle" else asked)
        return made


_INPUTS = tuple(INPUT_METHODS.values())


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen of a model.

    Attributes:
        texts: replies (or texts) with all their true scores; empty where no heads and neurons are masked.
        quality: profile of ``PredictorQuality`` on evaluation text; None likewise.
        curves: what every method costs on sampled text: ``line``, ``sparsity``, ``kl``, ``kl_low``, ``kl_high``,
            ``left_out`` (of the blocks' weights); ``line`` is ``whole`` for the weights without sparsity.
        to_static: nats per token that predicted masks cost more than the best static one, paired on the same windows:
            ``sparsity``, ``rival``, ``value``, ``low``, ``high``.
        n_windows, n_tokens: behind the curves.
    """

    texts: tuple[ScoredText, ...]
    quality: Profile | None
    curves: pd.DataFrame
    to_static: pd.DataFrame
    n_windows: int
    n_tokens: int


def opened(source: str, settings: SparsitySettings, store: Store, job: Job) -> Tables:
    """A compressed folder as it is, else a model that is fitted and kept.

    Raises:
        InputError: a compressed model that cannot leave weights out.
        ModelError: the model, or the one that the folder was made from, cannot be loaded.
    """
    if is_compressed(Path(source)):
        found = CompressedModel.load(Path(source))
        if found.mask_predictor is None and found.input_cuts is None:
            raise InputError(
                f"{source} cannot leave weights out: compress with the method 'input-sparsity' or "
                "'predicted-sparsity' after the others, or give the dense model."
            )
        inputs = {} if found.input_cuts is None else {INPUT_METHODS[found.input_cuts.criterion]: found}
        masks = None if found.mask_predictor is None else found
        return Tables(load(found.base.source, job=job), found, masks, inputs)
    dense = load(source, job=job)

    def made(*methods: object) -> CompressedModel:
        return fitted(store, dense, Recipe.for_model(dense, *methods, seed=settings.seed), job)  # type: ignore[arg-type]

    whole = made(settings.weights)
    masks = made(settings.weights, settings.masks)
    inputs = {INPUT_METHODS[one.criterion]: made(settings.weights, one) for one in settings.input_configs}
    return Tables(dense, whole, masks, inputs)


def look(tables: Tables, settings: SparsitySettings, store: Store, job: Job) -> Look:
    """Score replies, hold the predictor against true scores, and measure every method on sampled text."""
    texts: tuple[ScoredText, ...] = ()
    quality = None
    if tables.predictor is not None:
        texts = _scored_texts(tables, tables.predictor, settings, job)
        quality = _predictor_quality(tables.dense, tables.predictor, settings, store, job)
    sampled, record = _sampled_windows(tables.dense, settings, store, job)
    picks = [pick.at(sparsity) for pick in lines(tables) for sparsity in settings.curve]
    whole, found = measured(tables, picks, sampled, record, settings, store, job)
    return Look(texts, quality, _curves(whole, found), _to_static(found), whole.n_windows, whole.n_tokens)


def lines(tables: Tables) -> Iterator[SparsityPick]:
    """Every way to choose that the model has, at no sparsity yet."""
    for method in tables.methods:
        if method == "static":
            yield from (SparsityPick("static", 0.0, criterion) for criterion in tables.criteria)
        elif method == "predicted":
            yield from (SparsityPick("predicted", 0.0, scope=scope) for scope in ("token", "every", "reply"))  # type: ignore[arg-type]
        else:
            yield SparsityPick(method, 0.0)


def measured(
    tables: Tables,
    picks: Sequence[SparsityPick],
    text: Sequence[Window],
    record: TextRecord,
    settings: SparsitySettings,
    store: Store,
    job: Job,
) -> tuple[QualityResult, dict[SparsityPick, QualityResult]]:
    """Quality of the stored weights whole, and of each pick that the model can do, on the same windows.

    Only what is predicted after a window's first ``PREFIX`` tokens counts, which masks leave whole. What an earlier
    run measured on these windows is read from the store.
    """
    context = BenchContext(
        tables.dense.source, record.name, check_threads(settings.threads), True, shelf=ProfileShelf(store), job=job
    )
    found: dict[SparsityPick, QualityResult] = {}
    whole = Contender("dense", _BITS, 0.0, tables.whole, tables.whole)
    able = {pick: contender for pick in dict.fromkeys(picks) if (contender := _contender(tables, pick)) is not None}
    # Every engine of a turn holds the weights: a few turns hold fewer at a time.
    for turn in (
        [pick for pick in able if pick.masks and pick.scope == "token"],
        [pick for pick in able if pick.masks and pick.scope != "token"],
        [pick for pick in able if not pick.masks],
    ):
        if turn:
            results = measure_quality(tables.dense, [whole, *(able[pick] for pick in turn)], text, record, context)
            found |= {pick: results[able[pick]] for pick in turn}
            of_whole = results[whole]
    if not found:
        raise InputError("None of these sparsities is possible with this model: give smaller ones.")
    return of_whole, found


def _contender(tables: Tables, pick: SparsityPick) -> Contender | None:
    try:
        made = tables.of(pick)
    except WorkbenchError:
        return None
    return Contender(
        pick.method, _BITS, pick.sparsity, tables.whole, made, pick.asked, pick.line, pick.criterion, pick.scope
    )


def predicted_kl(curves: pd.DataFrame, pick: SparsityPick) -> float | None:
    """KL to dense that a pick is expected to cost, nats per token: between what was measured on sampled text.

    Straight in the logarithm between two measured sparsities, straight from the whole weights to the lowest; None
    where the line was not measured, or beyond its highest sparsity.
    """
    own = curves[curves["line"] == pick.line].sort_values("sparsity")
    at, kl = own["sparsity"].to_numpy(np.float64), own["kl"].to_numpy(np.float64)
    whole = float(curves.loc[curves["line"] == "whole", "kl"].iloc[0])
    if not len(at) or pick.sparsity > at[-1] + 1e-9:
        return None
    if pick.sparsity <= at[0]:
        return whole + (kl[0] - whole) * pick.sparsity / at[0]
    return float(np.exp(np.interp(pick.sparsity, at, np.log(np.maximum(kl, 1e-12)))))


def unit_shares(tables: Tables, pick: SparsityPick) -> pd.DataFrame:
    """Share of its inputs that each unit leaves out, on average over calibration text: ``block``, ``unit``, ``kind``,
    ``share``."""
    cuts = tables.of(pick).input_cuts
    assert cuts is not None  # it was opened so
    units = tables.whole.architecture.units
    shares = input_shares(cuts, pick.sparsity)
    rows = [(*_place(unit.id), unit.id, float(share)) for unit, share in zip(units, shares, strict=True)]
    return pd.DataFrame(rows, columns=["block", "kind", "unit", "share"])


def _place(unit: str) -> tuple[int, str]:
    _, block, kind = unit.split(".")
    return int(block), kind


def _scored_texts(
    tables: Tables, predictor: MaskPredictor, settings: SparsitySettings, job: Job
) -> tuple[ScoredText, ...]:
    """Texts, or the dense model's replies, long enough that something is decided in them."""
    dense, found = tables.dense, []
    prefix = int(predictor.facts["prefix"])
    sequences = _sequences(dense, settings, job)
    job.stage("score heads and neurons", len(sequences))
    for tokens, prompt in sequences:
        if len(tokens) > prefix + 1:
            found.append(score_text(dense, predictor, tokens, prompt, tables.criteria, job))
        job.advance()
    if not found:
        raise InputError(
            f"All {len(sequences)} texts end within {prefix + 1} tokens, of which the first {prefix} stay whole: give "
            "longer texts or prompts, or raise new_tokens."
        )
    return tuple(found)


def _sequences(dense: LoadedModel, settings: SparsitySettings, job: Job) -> list[tuple[list[int], int]]:
    """Tokens, and how many of them were given."""
    if settings.texts:
        longest = dense.architecture.context_length
        return [(dense.encode(text)[:longest], 1) for text in settings.texts]
    prompts = chosen_prompts(settings)
    job.stage("generate replies to look at", len(prompts))
    found = []
    engine = open_engine(dense, engine=settings.engine, threads=check_threads(settings.threads), activation_mode="fp32")
    try:
        for prompt in prompts:
            ids = dense.encode_chat(prompt)
            reply = engine.generate(engine.start(), ids, settings.new_tokens, stop_tokens=dense.stop_tokens, job=job)
            found.append(([*ids, *reply], len(ids)))
            job.advance()
    finally:
        engine.close()
    return found


def _predictor_quality(
    dense: LoadedModel, predictor: MaskPredictor, settings: SparsitySettings, store: Store, job: Job
) -> Profile:
    text, record = evaluation_windows(
        settings.text, dense, settings.quality_windows, settings.quality_length, seed=settings.seed
    )
    analysis = PredictorQuality(dense, predictor, [window.tokens for window in text], text=record, seed=settings.seed)
    return analyze(store, analysis, job).profile


def _sampled_windows(
    dense: LoadedModel, settings: SparsitySettings, store: Store, job: Job
) -> tuple[list[Window], TextRecord]:
    """Windows of text that the model samples, and that nothing was fitted on."""
    length = max(settings.curve_length, PREFIX + 8)
    sampling = SampledText(
        dense,
        "evaluation",
        settings.curve_windows * length,
        seed=settings.seed,
        length=int(length * _ROOM),
    )
    corpus = sampled_corpus(analyze(store, sampling, job).profile)
    found = windows(corpus, dense, length, limit=settings.curve_windows, seed=settings.seed)
    return found, corpus.record(sum(len(window.tokens) for window in found))


def _curves(whole: QualityResult, found: Mapping[SparsityPick, QualityResult]) -> pd.DataFrame:
    named = [("whole", 0.0, whole), *((pick.line, pick.sparsity, result) for pick, result in found.items())]
    return pd.DataFrame(
        [
            {
                "line": line,
                "sparsity": sparsity,
                "kl": result.kl_mean.value,
                "kl_low": result.kl_mean.low,
                "kl_high": result.kl_mean.high,
                "left_out": result.facts["effective_sparsity"],
            }
            for line, sparsity, result in named
        ]
    )


def _to_static(found: Mapping[SparsityPick, QualityResult]) -> pd.DataFrame:
    """Predicted masks against the static one that costs least, at each sparsity."""
    rows = []
    for pick, result in found.items():
        if pick.method == "predicted" and pick.scope == "token":
            rivals = [one for one in found if one.method == "static" and one.sparsity == pick.sparsity]
            if rivals:
                best = min(rivals, key=lambda one: found[one].kl_mean.value)
                more = compare_candidates(result, found[best]).kl
                rows.append((pick.sparsity, best.criterion, more.value, more.low, more.high))
    return pd.DataFrame(rows, columns=["sparsity", "rival", "value", "low", "high"])
