"""The whole look at a model's sensitivity: over decoding steps, and unit by unit, cached and resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from workbench.analysis.common import WIDTHS
from workbench.analysis.profile import Profile
from workbench.analysis.sensitivity import (
    DecodingSteps,
    StepSequence,
    UnitDamage,
    UnitScores,
    damage_table,
    generated,
    teacher_forced,
)
from workbench.corpus import open_text, prompts, windows
from workbench.models.base import LoadedModel
from workbench.operate.jobs import analyze
from workbench.progress import Job
from workbench.runtime.reference import ReferenceEngine
from workbench.store import Store


@dataclass(frozen=True)
class SensitivityOptions:
    """How much is looked at.

    Attributes:
        text: calibration text: ``prose``, ``pydoc``, ``self``, a hub data set or a file.
        prompts: whose replies are looked at step by step, in the chat template; empty for the project's own.
        n_prompts: how many of the project's prompts where none are given, drawn over the domains.
        new_tokens: longest reply, tokens.
        widths: bits to look at.
        group_size: input channels per scale.
        symmetric: rounding without zero points.
        score_windows, score_tokens: calibration windows for the gradient and Fisher scores, and their length.
        kl: measure the KL of every unit and width too, which takes one partial forward pass for each.
        kl_windows, kl_tokens: calibration windows for it, and their length.
        seed: of everything drawn.
    """

    text: str = "prose"
    prompts: tuple[str, ...] = ()
    n_prompts: int = 3
    new_tokens: int = 64
    widths: tuple[int, ...] = WIDTHS
    group_size: int = 64
    symmetric: bool = False
    score_windows: int = 8
    score_tokens: int = 128
    kl: bool = False
    kl_windows: int = 4
    kl_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Sensitivity:
    """What was seen.

    Attributes:
        steps: profile of ``DecodingSteps``.
        units: profile of kind ``unit-sensitivity``, one row per unit and width: ``block``, ``unit``, ``bits``,
            ``gradient``, ``fisher``, ``stored_bits``, ``n_weights``, and ``kl`` where it was measured.
        cached: whether everything came from the store.
    """

    steps: Profile
    units: Profile
    cached: bool

    @property
    def damage(self) -> str:
        """The column to solve for: the measured KL where there is one, else its estimate."""
        return "kl" if "kl" in self.units.table else "fisher"


def look_at_steps(
    model: LoadedModel,
    options: SensitivityOptions,
    store: Store | None = None,
    job: Job | None = None,
    *,
    refresh: bool = False,
) -> tuple[Profile, bool]:
    """Profile of every decoding step: of the replies to prompts, or of the user's own text.

    Returns:
        The profile, and whether it came from the store.
    """
    job = job or Job()
    record = None
    if options.prompts or options.text in ("prose", "pydoc", "self"):
        sequences = _replies(model, options, job)
    else:
        corpus = open_text(options.text, "calibration", model=model, seed=options.seed, job=job)
        length = min(options.new_tokens, model.architecture.context_length)
        cut = windows(corpus, model, length, limit=options.n_prompts, seed=options.seed)
        sequences = teacher_forced([window.tokens for window in cut])
        record = corpus.record(sum(len(window.tokens) for window in cut))
    found = analyze(store, DecodingSteps(model, sequences, text=record, **_rounding(options)), job, refresh=refresh)
    return found.profile, found.cached


def look_at_units(
    model: LoadedModel,
    options: SensitivityOptions,
    store: Store | None = None,
    job: Job | None = None,
    *,
    refresh: bool = False,
) -> tuple[Profile, bool]:
    """Profile of every unit's damage by width, estimated from gradients and, if asked for, measured as KL.

    Returns:
        The profile, and whether it came from the store.
    """
    job = job or Job()
    corpus = open_text(options.text, "calibration", model=model, seed=options.seed, job=job)

    def cut(count: int, length: int) -> dict[str, Any]:
        length = min(length, model.architecture.context_length)
        found = windows(corpus, model, length, limit=count, seed=options.seed)
        tokens = [window.tokens for window in found]
        return {"windows": tokens, "text": corpus.record(sum(map(len, tokens))), **_rounding(options)}

    scores = analyze(store, UnitScores(model, **cut(options.score_windows, options.score_tokens)), job, refresh=refresh)
    damage = None
    if options.kl:
        damage = analyze(store, UnitDamage(model, **cut(options.kl_windows, options.kl_tokens)), job, refresh=refresh)
    table = damage_table(scores.profile, damage.profile if damage else None)
    provenance = scores.profile.provenance.model_copy(
        update={
            "kind": "unit-sensitivity",
            "parameters": {
                "group_size": options.group_size,
                "symmetric": options.symmetric,
                "scores": scores.profile.provenance.key,
                "damage": damage.profile.provenance.key if damage else None,
                "score_tokens": int(scores.profile.table.groupby("window")["n_tokens"].first().sum()),
                "kl_tokens": options.kl_windows * options.kl_tokens if options.kl else 0,
            },
        }
    )
    return Profile(table, provenance), scores.cached and (damage is None or damage.cached)


def look(
    model: LoadedModel,
    options: SensitivityOptions,
    store: Store | None = None,
    job: Job | None = None,
    *,
    refresh: bool = False,
) -> Sensitivity:
    """Look at every decoding step and every unit. See ``SensitivityOptions`` for how much."""
    steps, steps_cached = look_at_steps(model, options, store, job, refresh=refresh)
    units, units_cached = look_at_units(model, options, store, job, refresh=refresh)
    return Sensitivity(steps, units, steps_cached and units_cached)


class Prompted(Protocol):
    """Options that may name prompts: the user's, and how many of the project's own where there are none."""

    @property
    def prompts(self) -> tuple[str, ...]: ...

    @property
    def n_prompts(self) -> int: ...


def chosen_prompts(options: Prompted) -> tuple[str, ...]:
    """The prompts in use: the user's, or the project's English ones, spread over the domains."""
    if options.prompts:
        return options.prompts
    known = prompts(language="en")
    step = max(1, len(known) // max(1, options.n_prompts))
    return tuple(prompt.text for prompt in known[::step][: options.n_prompts])


def _replies(model: LoadedModel, options: SensitivityOptions, job: Job) -> Sequence[StepSequence]:
    texts = chosen_prompts(options)
    job.stage("generate replies to look at", len(texts))
    engine = ReferenceEngine(model)
    found = []
    try:
        encoded = [model.encode_chat(text) for text in texts]
        for sequence in generated(
            engine, encoded, options.new_tokens, seed=options.seed, stop_tokens=model.stop_tokens, job=job
        ):
            found.append(sequence)
            job.advance()
    finally:
        engine.close()
    return found


def _rounding(options: SensitivityOptions) -> dict[str, Any]:
    return {
        "widths": options.widths,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "seed": options.seed,
    }
