"""The demonstration: the whole loop on a real model, from an empty store to a report, in a few minutes on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.apply.compress import compress
from workbench.apply.recipe import Budget, Recipe
from workbench.files import write_json
from workbench.formats.compressed import CompressedModel
from workbench.measure import Measurement, measure
from workbench.measure.rows import plain
from workbench.models import LoadedModel, load
from workbench.operate.runs import record_measurement
from workbench.operate.sensitivity import Sensitivity, SensitivityOptions, chosen_prompts, look
from workbench.operate.solving import recipe_from_profile
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.store import Store
from workbench.view.figures import looked_figures, measured_figures, picked_figures
from workbench.view.plots import speed_sentence
from workbench.view.report import write_report
from workbench.view.texts import Generation, pieces


@dataclass(frozen=True)
class Measuring:
    """How much is measured against dense.

    Attributes:
        engine: ``auto`` or a name.
        threads: of the engine while it is measured; None for one per usable core.
        n_windows, window_length: evaluation windows and their tokens.
        pairs, timed_tokens: interleaved timing pairs, and decoding steps per side and pair.
    """

    engine: str = "auto"
    threads: int | None = None
    n_windows: int = 48
    window_length: int = 192
    pairs: int = 20
    timed_tokens: int = 8

    @property
    def arguments(self) -> dict[str, Any]:
        """The same as arguments of ``measure``."""
        return {
            "engine": self.engine,
            "threads": self.threads,
            "n_windows": self.n_windows,
            "window_length": self.window_length,
            "pairs": self.pairs,
            "new_tokens": self.timed_tokens,
        }


@dataclass(frozen=True)
class DemoOptions(Measuring):
    """What the demonstration does, and how much of it.

    Attributes:
        model: name or path of the dense model.
        bits: budget in average effective bits.
        text: evaluation text.
        new_tokens: decoding steps per prompt, looked at and shown.
        seed: of everything drawn.
    """

    model: str = "smollm2-135m"
    bits: float = 4.5
    text: str = "prose"
    new_tokens: int = 64
    seed: int = 0


def run_demo(folder: Path, options: DemoOptions, store: Store, job: Job) -> dict[str, Any]:
    """Look, pick, run, measure; write ``demo.json``, ``recipe.json``, ``report.html`` and ``model/`` into ``folder``.

    Args:
        folder: exists and can be written to.
        options: what and how much.
        store: analyses are taken from and kept in it, and the run is recorded.
        job: progress and cancel.

    Returns:
        What ``demo.json`` holds.
    """
    model = load(options.model, job=job)
    looking = SensitivityOptions(new_tokens=options.new_tokens, seed=options.seed)
    seen = look(model, looking, store, job)
    recipe = recipe_from_profile(seen.units, Budget(average_bits=options.bits), seed=options.seed)
    recipe.save(folder / "recipe.json")
    compressed = compress(model, recipe, job=job)
    compressed.save(folder / "model", overwrite=True)
    compressed = CompressedModel.load(folder / "model")
    generations = side_by_side(model, compressed, chosen_prompts(looking), options.new_tokens, job)
    del model, compressed  # measuring opens both by itself
    found = measure(folder / "model", text=options.text, seed=options.seed, job=job, **options.arguments)
    number = record_measurement(store, "demo", found, name=f"demo at {options.bits:g} bits")
    result = plain(demo_record(found, recipe, number))
    write_json(folder / "demo.json", result)
    _write_report(folder / "report.html", seen, recipe, found, generations)
    return result


def side_by_side(
    model: LoadedModel, compressed: CompressedModel, prompts: Sequence[str], new_tokens: int, job: Job
) -> tuple[Generation, ...]:
    """Greedy replies of the dense and the compressed model to the same prompts, chat template applied."""
    job.stage("generate text with both", 2 * len(prompts))
    replies: list[list[tuple[str, ...]]] = []
    for target in (model, compressed):
        engine = open_engine(target)
        try:
            side = []
            for prompt in prompts:
                tokens = engine.generate(
                    engine.start(), model.encode_chat(prompt), new_tokens, stop_tokens=model.stop_tokens, job=job
                )
                side.append(pieces(model.decode, tokens))
                job.advance()
            replies.append(side)
        finally:
            engine.close()
    return tuple(Generation(p, dense, other) for p, dense, other in zip(prompts, *replies, strict=True))


def demo_record(found: Measurement, recipe: Recipe, number: int) -> dict[str, Any]:
    """What ``demo.json`` holds: both sides in one form, and what stands behind the numbers."""
    dense, compressed = found.dense_row(), found.row()
    for side in (dense, compressed):
        side["tokens_per_s"] = side["decode_tokens_per_s"]
    compressed["target_bits"] = recipe.solution.budget.average_bits if recipe.solution is not None else None
    return {
        "model": found.model,
        "engine": compressed["engine"],
        "environment": found.environment,
        "recipe_sha256": recipe.sha256,
        "dense": dense,
        "compressed": compressed,
        "latency": found.latency.to_json(),
        "quality": found.quality.to_json(),
        "energy": {"dense": found.dense_alone.to_json()["energy"], "compressed": found.alone.to_json()["energy"]},
        "notes": list(found.notes),
        "run": number,
    }


def _write_report(
    path: Path,
    seen: Sensitivity,
    recipe: Recipe,
    found: Measurement,
    generations: Sequence[Generation],
) -> None:
    dense, compressed = found.dense_row(), found.row()
    write_report(
        path,
        title=f"{found.model} at {found.sizes.effective_bits:.2f} effective bits",
        summary=summary_sentence(found),
        recipe=recipe.model_dump(mode="json"),
        environment=found.environment,
        measurements=[{"variant": "dense", **dense}, {**compressed, "variant": "compressed"}],
        figures=[*measured_figures(found), *looked_figures(seen), *picked_figures(seen, recipe, found)],
        tables={
            "Quality by domain and language": found.quality.by_group,
            "Windows with the highest KL": found.quality.worst_windows,
        },
        generations=generations,
        profiles={"decoding steps": seen.steps, "units": seen.units},
    )


def summary_sentence(found: Measurement) -> str:
    """Size, quality and speed in two sentences, slower said as plainly as faster."""
    quality = found.quality
    share = found.sizes.weight_bytes / found.dense_sizes.weight_bytes
    return (
        f"The compressed model takes {share:.1%} of the dense model's bytes on disk. Its perplexity is "
        f"{quality.perplexity_candidate / quality.perplexity_dense:.3f} times dense on {quality.n_tokens} tokens, with "
        f"a KL of {quality.kl_mean.value:.4f} nats per token (95 % interval {quality.kl_mean.low:.4f} to "
        f"{quality.kl_mean.high:.4f}). {speed_sentence(found.latency)}."
    )
