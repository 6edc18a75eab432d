"""Commands that run: ``demo``, ``compress``, ``measure``, ``report`` and ``bench``; text is made in ``generate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import console
from workbench.cli.options import (
    DeviceName,
    EngineName,
    Json,
    ModelName,
    Quiet,
    Threads,
    require_compressed,
    require_text,
)
from workbench.files import check_folder, check_output_file, write_json
from workbench.progress import duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from workbench.formats.compressed import CompressedModel
    from workbench.progress import Job


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("demo")(demo)
    app.command("compress")(compress)
    app.command("measure")(measure)
    app.command("report")(report)
    app.command("bench")(bench)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json, recipe.json, report.html and the model.")],
    model: Annotated[str, typer.Option(help="smollm2-135m, a folder, a GGUF file or a hub id.")] = "smollm2-135m",
    bits: Annotated[float, typer.Option(help="Budget: average effective bits.")] = 4.5,
    text: Annotated[str, typer.Option(help="Evaluation text: prose, pydoc, hf:..., or a file.")] = "prose",
    engine: EngineName = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole loop in one sitting: look, pick, run, measure, report."""
    from workbench.runtime import choose_engine

    folder = check_folder(out)
    choose_engine(engine)
    require_text(text)
    from workbench.store import Store
    from workbench.view.demo import DemoOptions, run_demo

    options = DemoOptions(model=model, bits=bits, text=text, engine=engine, threads=threads)
    with Store() as store, console.running(quiet or as_json) as job:
        result = run_demo(folder, options, store, job)
    if as_json:
        console.show_json(result)
        return
    if engine == "auto":
        console.say(f"Engine: {result['engine']} (chosen by auto)")
    show_sides(result["dense"], result["compressed"], result["latency"], result["notes"])
    console.say(f"Written: {folder}/demo.json, recipe.json, report.html and model/")


def compress(
    model: ModelName,
    recipe: Annotated[Path, typer.Option(help="A recipe, .json, of `solve` or your own.")],
    out: Annotated[Path, typer.Option(help="Folder for the compressed model.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model that is there.")] = False,
    allow_other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Use a recipe made for another fine-tune, knowingly.")
    ] = False,
    device: DeviceName = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe and write the compressed model.

    With --device cuda whatever is fitted on text is fitted there, on text that is sampled there.
    """
    from workbench.apply.recipe import Recipe

    chosen = Recipe.load(recipe)
    from workbench.formats.folder import check_output_folder

    folder = check_output_folder(out, overwrite=overwrite)
    from workbench.models import load
    from workbench.operate.fits import compress_into
    from workbench.store import Store

    with Store() as store, console.running(quiet or as_json) as job:
        dense = load(model, device=device, job=job)
        chosen.check_model(dense, allow_other_weights=allow_other_weights)
        compressed = compress_into(
            store, dense, chosen, folder, overwrite=overwrite, allow_other_weights=allow_other_weights, job=job
        )
    facts = {
        "out": str(folder),
        "sha256": compressed.sha256,
        "recipe_sha256": chosen.sha256,
        "effective_bits": compressed.effective_bits,
        "output_bits": compressed.output_bits,
        "weight_bytes": compressed.weight_bytes,
        "dense_bytes": dense.dense_bytes,
        "fit_seconds": compressed.fit_seconds,
    }
    if as_json:
        console.show_json(facts)
        return
    asked = f" (asked for: {chosen.solution.budget})" if chosen.solution is not None else ""
    console.say(
        f"Effective bits: {compressed.effective_bits:.4f}{asked}; output layer: {compressed.output_bits:.3f} bits."
    )
    share = compressed.weight_bytes / dense.dense_bytes
    console.say(f"Weights on disk: {compressed.weight_bytes:,} bytes, {share:.1%} of dense ({dense.dense_bytes:,}).")
    if compressed.fit_seconds is not None:
        console.say(f"Time of the fit: {duration(compressed.fit_seconds)}.")
    console.say(f"Written: {folder}")
    console.say(f"Next: workbench measure {shlex.quote(str(out))}")
    # The first tokens of a text stay whole under masks, so it takes a longer reply to see them at work.
    prompt = "Why is the sky blue?" if compressed.mask_predictor is None else "Tell me a long story about the sea."
    console.say(f'      workbench generate {shlex.quote(str(out))} "{prompt}"{_choice(compressed)}')


def _choice(compressed: CompressedModel) -> str:
    """What ``generate`` is told of a model that decides while running: the middle of the widths, a usual sparsity."""
    if compressed.input_cuts is not None:
        return f" --sparsity {min(0.4, compressed.input_cuts.highest):.2g}"
    if compressed.mask_predictor is not None:
        return " --sparsity 0.3"
    if compressed.selectors is None:
        return ""
    from workbench.runtime.precision import target_range

    low, high = target_range(compressed.architecture, compressed.selectors)
    return f" --target {(low + high) / 2:.1f}"


def measure(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A compressed model.")],
    text: Annotated[str, typer.Option(help="Evaluation text: prose, pydoc, hf:..., or a file.")] = "prose",
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows; 40 or more for a claim.")] = 48,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved timing pairs; 20 or more for a claim.")] = 20,
    dense: Annotated[str | None, typer.Option(help="The dense model, where it has moved.")] = None,
    questions: Annotated[bool, typer.Option("--questions", help="Also ask 200 multiple-choice questions.")] = False,
    tasks: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write everything measured, .json.")] = None,
    engine: EngineName = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a compressed model against the dense one: quality, speed, memory, energy."""
    from workbench.runtime import choose_engine

    target = None if out is None else check_output_file(out, suffixes=(".json",))
    require_compressed(folder, "measure reads")
    choose_engine(engine)
    require_text(text)
    from workbench.measure import measure as measure_model
    from workbench.operate.runs import record_measurement
    from workbench.store import Store

    with Store() as store, console.running(quiet or as_json) as job:
        found = measure_model(
            folder,
            dense,
            text=text,
            n_windows=windows,
            window_length=window_length,
            pairs=pairs,
            threads=threads,
            engine=engine,
            ask_questions=questions,
            job=job,
        )
        few_shot = _few_shot(folder, tasks, engine, threads, job) if tasks else None
        number = record_measurement(store, "measure", found, name=Path(folder).name)
    value = {**found.to_json(), "run": number, "tasks": few_shot}
    if target is not None:
        write_json(target, console.plain(value))
    if as_json:
        console.show_json(value)
        return
    show_sides(found.dense_row(), found.row(), found.latency.to_json(), found.notes)
    before, after = found.dense_alone.energy, found.alone.energy
    if before.joules_per_token is not None and after.joules_per_token is not None:
        console.say(
            f"Energy per token: {after.joules_per_token:.3g} J compressed, {before.joules_per_token:.3g} J dense "
            f"({after.source})."
        )
    first = ["group", "n_windows", "kl_mean", "kl_mean_low", "kl_mean_high", "delta_nll"]
    console.show_table("By domain and language", _ahead(found.quality.by_group, first))
    if found.questions is not None:
        right, now, flips = found.questions.dense, found.questions.candidate, found.questions.flips
        console.say(
            f"Questions: dense {right.accuracy_per_byte.value:.1%}, compressed {now.accuracy_per_byte.value:.1%} "
            f"right of {flips.n_questions} (chance {right.chance:.0%}); {flips.changed} answered differently, "
            f"{flips.lost} lost, {flips.gained} gained."
        )
    if few_shot is not None:
        import pandas as pd

        console.show_table("Few-shot tasks", pd.DataFrame(few_shot))
    console.say(f"Run {number} in the store." + (f" Written: {target}" if target else ""))


def _few_shot(folder: str, tasks: list[str], engine: str, threads: int | None, job: Job) -> list[dict[str, Any]]:
    from workbench.measure.harness import run_tasks
    from workbench.runtime import open_engine

    opened = open_engine(folder, engine=engine, threads=threads, job=job)
    try:
        return console.plain(run_tasks(opened, tasks, job=job).to_dict(orient="records"))
    finally:
        opened.close()


def report(
    number: Annotated[int, typer.Argument(metavar="RUN", help="A run of the store; `store runs` lists them.")],
    out: Annotated[Path, typer.Option(help="The page to write, .html.")] = Path("report.html"),
) -> None:
    """Write one run of the store as a self-contained page."""
    target = check_output_file(out, suffixes=(".html",))
    from workbench.store import Store
    from workbench.view.run_report import report_run

    with Store() as store:
        report_run(store, number, target)
    console.say(f"Written: {target}")


_NAMING = ("method", "bits")
# Columns that are shown first, where not alike in all rows: there is room for few.
_BENCH_COLUMNS = (
    *("method", "bits", "activation_bits", "sparsity", "text", "ratio", "kl_mean", "ms_per_token", "speed_ratio"),
    *("name", "effective_bits", "effective_sparsity", "variant"),
)


def bench(
    name: Annotated[str, typer.Argument(help="The bench; `workbench bench list` names them.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="File for environment and rows.")] = None,
    model: Annotated[str, typer.Option(help="smollm2-135m, a folder, a GGUF file or a hub id.")] = "smollm2-135m",
    text: Annotated[str | None, typer.Option(help="Evaluation text: prose, pydoc, hf:..., or a file.")] = None,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="Within some 5 minutes, once fits are stored.")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD,...",
            help="Of 'quantization' and 'sparsity': these methods alone beside dense, also such as --quick leaves out.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure quality anew that an earlier run measured.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run one bench: all rivals of a claim in one run."""
    from workbench.measure.bench import BENCHES, check_bench, run_bench

    if name == "list":
        console.show_facts(BENCHES)
        return
    check_bench(name)
    import pandas as pd

    from workbench.operate.fits import fitted
    from workbench.operate.jobs import ProfileShelf, analyze
    from workbench.store import Store

    with Store() as store, console.running(quiet) as job:
        result = run_bench(
            name,
            json_file,
            model=model,
            text=text,
            threads=threads,
            quick=quick,
            only=[part.strip() for part in (only or "").split(",") if part.strip()],
            analyze=lambda analysis, inner: analyze(store, analysis, inner).profile,
            compress=lambda dense, recipe, inner: fitted(store, dense, recipe, inner),
            shelf=ProfileShelf(store, fresh),
            job=job,
        )
        store.record_run(
            "bench",
            name=name,
            model=str(result["environment"]["model"]),
            method="bench",
            summary={"rows": result["rows"]},
            environment=result["environment"],
        )
    frame = pd.DataFrame(result["rows"]).dropna(axis="columns", how="all")
    alike = [column for column in frame if len(frame) > 1 and column not in _NAMING and frame[column].nunique() == 1]
    frame = _ahead(frame.drop(columns=alike), _BENCH_COLUMNS)
    seen_in = "--json FILE writes them" if json_file is None else f"{json_file} has them"
    console.show_table(f"Bench {name}", frame, rows=100, more=seen_in)
    if json_file is not None:
        console.say(f"Written: {json_file}")


def _ahead(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table with those of ``columns`` that it has before its others."""
    first = [column for column in columns if column in frame]
    return frame[[*first, *(column for column in frame if column not in first)]]


def show_sides(dense: dict[str, Any], compressed: dict[str, Any], latency: dict[str, Any], notes: Any) -> None:
    """Print dense beside compressed, and the speed in plain words."""
    import pandas as pd

    keys = [
        ("ms_per_token", "ms per token"),
        ("decode_tokens_per_s", "tokens per second"),
        ("prefill_tokens_per_s", "prompt tokens per second"),
        ("weight_bytes", "bytes of weights on disk"),
        ("effective_bits", "effective bits"),
        ("output_bits", "bits of the output layer"),
        ("peak_rss_bytes", "peak resident bytes"),
        ("perplexity", "perplexity"),
        ("kl_mean", "KL to dense, nats per token"),
        ("top1_agreement", "same top token"),
        ("delta_nll", "change of NLL per token"),
        ("delta_nll_low", "  95 % interval from"),
        ("delta_nll_high", "  to"),
    ]
    rows = [(label, dense.get(key), compressed.get(key)) for key, label in keys if compressed.get(key) is not None]
    console.show_table("Measured", pd.DataFrame(rows, columns=["", "dense", "compressed"], dtype=object))
    ratio = latency["ratio"]
    words = {"slower": "slower than", "faster": "faster than"}.get(latency["verdict"], "no different in speed from")
    console.say(
        f"Per token the compressed model is {words} dense here: {ratio['value']:.3f}x the time, 95 % interval "
        f"{ratio['low']:.3f} to {ratio['high']:.3f}, {latency['pairs']} interleaved pairs."
    )
    for note in notes:
        console.say(f"Note: {note}")
