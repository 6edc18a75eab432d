"""Long halves of a sitting with widths chosen per token: get such a model, look at its choices, try a target."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.precision import PrecisionSteps, require_selectors
from workbench.analysis.profile import Profile
from workbench.analysis.sensitivity import StepSequence
from workbench.apply.allocation import allocate, gain_damage
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.formats.compressed import CompressedModel
from workbench.formats.folder import is_compressed
from workbench.measure.bench import BenchContext
from workbench.measure.benches.engine import bench_prompt, step_columns, time_in_turns
from workbench.measure.benches.precision_targets import Candidate, evaluate
from workbench.measure.environment import check_threads, environment
from workbench.measure.measurement import evaluation_windows
from workbench.models import LoadedModel, load
from workbench.operate.fits import fitted
from workbench.operate.jobs import analyze
from workbench.operate.sensitivity import chosen_prompts
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine
from workbench.runtime.base import Engine
from workbench.runtime.plan import Policy
from workbench.runtime.precision import Rule, ladder_plan, precision_plan
from workbench.runtime.precision_control import PrecisionController
from workbench.store import Store
from workbench.view.demo import Measuring
from workbench.view.texts import Generation, pieces

Thresholds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class PrecisionSettings(Measuring):
    """How the model is made, and how much is looked at and measured in one sitting.

    Attributes:
        nested: codes of several widths, where the model is not compressed yet.
        dynamic: what chooses among them.
        prompts: whose replies are looked at, in the chat template; empty for some of the project's own.
        n_prompts: how many of those.
        new_tokens: longest reply, tokens.
        text: evaluation text.
        seed: of everything drawn.
    """

    nested: NestedConfig = field(default_factory=NestedConfig)
    dynamic: PrecisionConfig = field(default_factory=PrecisionConfig)
    prompts: tuple[str, ...] = ()
    n_prompts: int = 2
    new_tokens: int = 48
    text: str = "prose"
    seed: int = 0
    n_windows: int = 8
    window_length: int = 128
    pairs: int = 10

    @classmethod
    def quick(cls) -> PrecisionSettings:
        """A model in a minute: codes rounded without looking at activations, and nothing learnt for the rule ``error``.

        At 3 bits it is far worse than the default; which units and tokens ask for more shows all the same.
        """
        dynamic = PrecisionConfig(targets=(), calibration_tokens=1024)
        return cls(nested=NestedConfig(fit="rounded"), dynamic=dynamic)


@dataclass(frozen=True)
class TargetTrial:
    """What one target did.

    Attributes:
        target: average bits.
        rule: that chose the widths.
        own: thresholds were moved by hand.
        generations: replies beside the dense model's, greedy.
        table: one row per way to read: ``method``, ``bits`` (asked for), ``realised_bits`` (average code bits),
            ``read_bits`` (scales, zero points and decisions counted), ``perplexity``, ``ratio`` (to dense), ``kl``,
            ``kl_low``, ``kl_high``, ``ms_per_token``, ``ms_p95``.
        n_windows, n_tokens: behind the quality.
        pairs: rounds behind the speed.
        threads: of the engine.
        warning: what the watch said, or an empty string.
        run: its number in the store.
    """

    target: float
    rule: Rule
    own: bool
    generations: tuple[Generation, ...]
    table: pd.DataFrame
    n_windows: int
    n_tokens: int
    pairs: int
    threads: int
    warning: str
    run: int


def opened(source: str, settings: PrecisionSettings, store: Store, job: Job) -> tuple[LoadedModel, CompressedModel]:
    """The dense model and one that chooses widths per token: a compressed folder as it is, else made and kept.

    Raises:
        InputError: a compressed model without selectors.
        ModelError: the model, or the one that the folder was made from, cannot be loaded.
    """
    if is_compressed(Path(source)):
        compressed = CompressedModel.load(Path(source))
        require_selectors(compressed)
        return load(compressed.base.source, job=job), compressed
    dense = load(source, job=job)
    made = fitted(store, dense, Recipe.for_model(dense, settings.nested, settings.dynamic), job)
    return dense, made


def look_at_choices(
    compressed: CompressedModel, target: float, rule: Rule, settings: PrecisionSettings, store: Store, job: Job
) -> Profile:
    """Replies of the model at the target, and what was estimated, true and chosen at each of their steps."""
    plan = precision_plan(compressed.architecture, require_selectors(compressed), target, rule)
    engine = open_engine(compressed, engine=settings.engine, plan=plan, threads=settings.threads)
    sequences = []
    job.stage("generate replies to look at", len(chosen_prompts(settings)))
    try:
        for prompt in chosen_prompts(settings):
            ids = engine.model.encode_chat(prompt)
            reply = engine.generate(
                engine.start(seed=settings.seed),
                ids,
                settings.new_tokens,
                stop_tokens=engine.model.stop_tokens,
                job=job,
            )
            sequences.append(StepSequence((*ids, *reply), len(ids)))
            job.advance()
    finally:
        engine.close()
    analysis = PrecisionSteps(compressed, sequences, target, rule=rule, seed=settings.seed)
    return analyze(store, analysis, job).profile


def try_target(
    dense: LoadedModel,
    compressed: CompressedModel,
    target: float,
    rule: Rule,
    thresholds: Thresholds | None,
    settings: PrecisionSettings,
    store: Store,
    job: Job,
) -> TargetTrial:
    """Generate and measure at a target, beside dense, the uniform widths around it and the best static mix.

    Args:
        dense: the dense model.
        compressed: with selectors.
        target: average bits.
        rule: that chooses.
        thresholds: moved by hand, on the norm, by unit; None for those of the target, which are then held on it too.
        settings: how much.
        store: where the run is recorded.
        job: progress and cancel.
    """
    selectors, arch = require_selectors(compressed), compressed.architecture
    threads = check_threads(settings.threads)
    plan = precision_plan(arch, selectors, target, rule)
    policy = Policy(thresholds={name: tuple(cuts) for name, cuts in thresholds.items()}) if thresholds else Policy()
    widths = [int(bits) for bits in selectors.widths]
    around = [max(b for b in widths if b <= target + 1e-9), min(b for b in widths if b >= target - 1e-9)]
    uniform = [{unit.id: bits for unit in arch.units} for bits in dict.fromkeys(around)]
    mixed = allocate(gain_damage(arch, selectors), target)

    engines = _Engines(compressed, settings.engine, threads)
    dense_engine = open_engine(dense, engine=settings.engine, threads=threads, activation_mode="fp32")
    try:
        moving, ladder = engines.open(plan), engines.open(ladder_plan(arch, [*uniform, mixed]))
        controller = PrecisionController(arch, selectors, target)
        candidates = [
            *(
                Candidate(
                    f"{next(iter(bits.values()))} bits",
                    float(next(iter(bits.values()))),
                    ladder,
                    compressed,
                    Policy({"level": level}),
                )
                for level, bits in enumerate(uniform)
            ),
            Candidate("static mix", target, ladder, compressed, Policy({"level": len(uniform)})),
            Candidate("per token", target, moving, compressed, policy, "your thresholds" if thresholds else ""),
        ]
        if rule == "gain" and not thresholds:
            candidates.append(Candidate("per token, held", target, moving, compressed, policy, "", controller))
        replies = _replies(dense, dense_engine, moving, policy, settings, job)
        text, record = evaluation_windows(
            settings.text, dense, settings.n_windows, settings.window_length, seed=settings.seed
        )
        context = BenchContext(dense.source, settings.text, threads, quick=True, job=job)
        found = evaluate(dense_engine, candidates, text, record, context)
    finally:
        dense_engine.close()
        engines.close()
    first = found[0]
    rows: list[dict[str, Any]] = [
        {"method": "dense", "bits": 16.0, "realised_bits": 16.0, "read_bits": 16.0, "ratio": 1.0, "kl": 0.0}
        | {"kl_low": 0.0, "kl_high": 0.0, "perplexity": first.perplexity_dense}
    ]
    for candidate, quality in zip(candidates, found, strict=True):
        kl = quality.kl_mean
        rows.append(
            {
                "method": candidate.method,
                "bits": candidate.target,
                "realised_bits": candidate.realised_bits,
                "read_bits": candidate.read_bits,
                "perplexity": quality.perplexity_candidate,
                "ratio": math.exp(quality.delta_nll.value),
                "kl": kl.value,
                "kl_low": kl.low,
                "kl_high": kl.high,
            }
        )
    speeds = _speeds(dense, compressed, target, rule, policy, dict.fromkeys(around), settings, context)
    table = pd.DataFrame(rows)
    for name in ("ms_per_token", "ms_p95"):
        table[name] = [speeds.get(method, {}).get(name, np.nan) for method in table["method"]]
    number = store.record_run(
        "measure",
        name=f"notebook, {target:g} bits per token",
        model=dense.name,
        method=f"dynamic-precision, {rule}",
        recipe_sha256=None,
        summary={row["method"]: {k: v for k, v in row.items() if k != "method"} for row in table.to_dict("records")},
        environment=environment(),
    )
    return TargetTrial(
        target,
        rule,
        bool(thresholds),
        replies,
        table,
        first.n_windows,
        first.n_tokens,
        settings.pairs,
        threads,
        controller.warning,
        number,
    )


class _Engines:
    """Engines of one model under several plans."""

    def __init__(self, model: CompressedModel, name: str, threads: int) -> None:
        self._model, self._name, self._threads = model, name, threads
        self._open: list[Engine] = []

    def open(self, plan: Any) -> Engine:
        self._open.append(open_engine(self._model, engine=self._name, plan=plan, threads=self._threads))
        return self._open[-1]

    def close(self) -> None:
        for engine in self._open:
            engine.close()


def _replies(
    model: LoadedModel, dense: Engine, moving: Engine, policy: Policy, settings: PrecisionSettings, job: Job
) -> tuple[Generation, ...]:
    prompts = chosen_prompts(settings)
    job.stage("generate text with both", 2 * len(prompts))
    moving.set_policy(policy)
    sides = []
    for engine in (dense, moving):
        side = []
        for prompt in prompts:
            ids = model.encode_chat(prompt)
            tokens = engine.generate(engine.start(), ids, settings.new_tokens, stop_tokens=model.stop_tokens, job=job)
            side.append(pieces(model.decode, tokens))
            job.advance()
        sides.append(side)
    return tuple(Generation(p, a, b) for p, a, b in zip(prompts, *sides, strict=True))


def _speeds(
    dense: LoadedModel,
    compressed: CompressedModel,
    target: float,
    rule: Rule,
    policy: Policy,
    uniform: Iterable[int],
    settings: PrecisionSettings,
    context: BenchContext,
) -> dict[str, dict[str, float]]:
    """Time per token of dense (bf16), the uniform widths and the choice per token, in turns in one process.

    Empty where the cpu engine cannot run the model: other engines read all widths, and their time says nothing.
    """
    if choose_engine(settings.engine, compressed) != "cpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source = str(compressed.folder or compressed.save(Path(folder) / "model"))
        widths = [int(bits) for bits in compressed.widths]
        common = {"engine": "cpu", "source": source, "dtype": "float32", "widths": widths}
        sides: dict[str, dict[str, Any]] = {
            "dense": {"engine": "cpu", "source": dense.source, "dtype": "bfloat16", "bits": None}
        }
        sides |= {f"{bits} bits": common | {"bits": bits} for bits in uniform}
        moving: dict[str, Any] = common | {"bits": None, "target": target, "rule": rule}
        if policy.thresholds:
            moving["thresholds"] = {name: list(cuts) for name, cuts in policy.thresholds.items()}
        sides["per token"] = moving
        answer = time_in_turns(
            list(sides.values()), bench_prompt(dense), context, prefill_repeats=1, pairs=settings.pairs
        )
    return {
        name: step_columns(side, answer["prefill_tokens"]) for name, side in zip(sides, answer["sides"], strict=True)
    }
