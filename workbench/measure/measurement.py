"""Measure one compressed model against dense: quality, speed, memory, energy, each in the way its module says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.apply.recipe import Recipe
from workbench.corpus import Window, open_text, questions, require_disjoint, windows
from workbench.corpus.base import TextRecord
from workbench.errors import EngineError, InputError
from workbench.formats.compressed import CompressedModel
from workbench.measure.alone import measure_alone
from workbench.measure.decoding import Target
from workbench.measure.environment import check_threads, environment, memory_bandwidth
from workbench.measure.latency import PAIRS_FOR_A_CLAIM, measure_many
from workbench.measure.quality import compare_quality
from workbench.measure.result import Measurement, Questions, Sizes
from workbench.measure.tasks import multiple_choice, paired
from workbench.models import load
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine

if TYPE_CHECKING:
    from workbench.runtime.base import Engine


def measure(
    compressed: str | Path,
    dense: str | Path | LoadedModel | None = None,
    *,
    text: str | Path = "prose",
    n_windows: int = 48,
    window_length: int = 256,
    pairs: int = PAIRS_FOR_A_CLAIM,
    new_tokens: int = 16,
    threads: int | None = None,
    engine: str = "auto",
    ask_questions: bool = False,
    seed: int = 0,
    job: Job | None = None,
) -> Measurement:
    """Measure a compressed model on disk against the dense model it was made from.

    Args:
        compressed: folder of the compressed model.
        dense: name or path of the dense model, or the model itself, loaded from a name or path in float32; None for
            the one that the compressed model names.
        text: evaluation text; nothing that the recipe was solved on may be in it.
        n_windows: evaluation windows, 40 or more for a claim.
        window_length: tokens of each.
        pairs: interleaved pairs of the timing, 20 or more for a claim.
        new_tokens: decoding steps per side and pair.
        threads: of the engines; None for one per usable core.
        engine: ``auto`` or a name.
        ask_questions: also ask both sides the project's multiple-choice questions.
        seed: of the choice of windows and of the bootstrap.
        job: progress and cancel.

    Raises:
        InputError, CorpusError: what was given cannot be measured, said before any long work.
        ModelError, IntegrityError: a model cannot be loaded.
        EngineError: the engine cannot run one of them, or the measuring process crashed.
        Cancelled: by ``job``.
    """
    job = job or Job()
    threads = check_threads(threads)
    candidate = CompressedModel.load(compressed)
    name = choose_engine(engine, candidate)
    if name not in candidate.engines:
        raise EngineError(
            f"The engine '{name}' cannot run {compressed}: its weights need one of {', '.join(candidate.engines)}."
        )
    recipe = Recipe.model_validate(candidate.recipe)
    model = dense if isinstance(dense, LoadedModel) else load(str(dense or candidate.base.source), job=job)
    _require_base(model, candidate)
    evaluation, record = evaluation_windows(text, model, n_windows, window_length, used=solved_on(recipe), seed=seed)

    with _opened(model, name, threads) as baseline, _opened(candidate, name, threads) as other:
        quality = compare_quality(baseline, other, evaluation, text=record, decode=model.decode, seed=seed, job=job)
        answers = _ask(baseline, other, seed, job) if ask_questions else None

    name_of_model, dense_sizes, sizes = model.name, Sizes.of_dense(model), Sizes.of_compressed(candidate)
    fit_seconds = candidate.fit_seconds
    sparse = candidate.mask_predictor is not None or candidate.input_cuts is not None
    whole = "All weights were used; `workbench bench sparsity` measures what leaving some out costs." if sparse else ""
    # The dense model is bf16 on disk. An engine that streams it so is timed so; the reference for quality is fp32.
    dense_dtype = "bfloat16" if name == "cpu" else "float32"
    sides = [
        Target(model.source, name="dense", engine=name, dtype=dense_dtype),
        Target(candidate.folder or compressed, name="compressed", engine=name),
    ]
    # The timing process loads both itself: a third copy here, which an engine holds too, would only take its memory.
    del model, candidate, baseline, other
    gc.collect()  # a transformers module refers to itself
    latency = measure_many(sides[0], sides[1:], pairs=pairs, new_tokens=new_tokens, threads=threads, job=job)[0]
    alone = [measure_alone(side, new_tokens=new_tokens, threads=threads, job=job) for side in sides]
    bandwidth, no_bandwidth = _bandwidth(threads)
    return Measurement(
        model=name_of_model,
        candidate=str(compressed),
        recipe=recipe,
        dense_sizes=dense_sizes,
        sizes=sizes,
        latency=latency,
        quality=quality,
        dense_alone=alone[0],
        alone=alone[1],
        questions=answers,
        fit_seconds=fit_seconds,
        bandwidth=bandwidth,
        environment=environment(),
        notes=tuple(note for note in (whole, quality.note, latency.note, alone[1].energy.note, no_bandwidth) if note),
    )


def evaluation_windows(
    text: str | Path,
    model: LoadedModel,
    n_windows: int,
    window_length: int,
    *,
    used: TextRecord | None = None,
    seed: int = 0,
) -> tuple[list[Window], TextRecord]:
    """Return windows of an evaluation text and the record of it.

    Raises:
        CorpusError: no such text, too short, or it shares a document with ``used``.
    """
    if n_windows < 1:
        raise InputError(f"{n_windows} windows are not possible: give at least 1, and 40 for a claim.")
    corpus = open_text(text, "evaluation", model=model, n_tokens=n_windows * window_length, seed=seed)
    if used is not None:
        require_disjoint(used, corpus)
    found = windows(corpus, model, window_length, limit=n_windows, seed=seed)
    return found, corpus.record(sum(len(window.tokens) for window in found))


def solved_on(recipe: Recipe) -> TextRecord | None:
    """The text that a recipe's widths were chosen on, None where nothing was fitted."""
    return recipe.solution.damage.text if recipe.solution is not None and recipe.solution.damage is not None else None


def _require_base(model: LoadedModel, candidate: CompressedModel) -> None:
    base = candidate.base
    if (model.fingerprint.architecture, model.fingerprint.weights) != (
        base.fingerprint.architecture,
        base.fingerprint.weights,
    ):
        raise InputError(
            f"{candidate.folder} was made from {base.name} ({base.source}), and {model.name} ({model.source}) has "
            "other weights: give the dense model that it was made from."
        )


@contextmanager
def _opened(model: LoadedModel | CompressedModel, engine: str, threads: int) -> Iterator[Engine]:
    opened = open_engine(model, engine=engine, threads=threads)
    try:
        yield opened
    finally:
        opened.close()


def _ask(dense: Engine, candidate: Engine, seed: int, job: Job) -> Questions:
    asked = questions()
    before, after = (multiple_choice(engine, asked, job=job) for engine in (dense, candidate))
    return Questions(before, after, paired(before, after, seed=seed))


def _bandwidth(threads: int) -> tuple[float | None, str]:
    """Memory bandwidth, or None and why it could not be measured on this machine."""
    try:
        return memory_bandwidth(threads), ""
    except InputError as error:
        return None, f"No bandwidth share: {error}"
