"""Commands that run: ``demo``, ``compress``, ``generate``, ``measure``, ``report`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import console
from workbench.cli.look import Json, ModelName, Quiet, require_text
from workbench.errors import InputError
from workbench.files import check_folder, check_output_file, write_json

if TYPE_CHECKING:
    from workbench.formats.compressed import CompressedModel
    from workbench.formats.selectors import Selectors
    from workbench.progress import Job
    from workbench.runtime.base import Engine
    from workbench.runtime.precision_control import PrecisionController
    from workbench.runtime.precision_log import PrecisionLog

Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the engines; one per usable core if not given.")]
EngineName = Annotated[str, typer.Option(help="auto, reference or cpu.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("demo")(demo)
    app.command("compress")(compress)
    app.command("generate")(generate)
    app.command("retune")(retune)
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe and write the compressed model."""
    from workbench.apply.recipe import Recipe

    chosen = Recipe.load(recipe)
    from workbench.formats.folder import check_output_folder

    folder = check_output_folder(out, overwrite=overwrite)
    from workbench.apply.compress import compress as carry_out
    from workbench.models import load

    with console.running(quiet or as_json) as job:
        dense = load(model, job=job)
        chosen.check_model(dense, allow_other_weights=allow_other_weights)
        compressed = carry_out(dense, chosen, job=job, allow_other_weights=allow_other_weights)
        compressed.save(folder, overwrite=overwrite)
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
    target = chosen.solution.budget if chosen.solution is not None else "none"
    console.say(
        f"Effective bits: {compressed.effective_bits:.4f} (budget: {target}); output layer: "
        f"{compressed.output_bits:.3f} bits."
    )
    share = compressed.weight_bytes / dense.dense_bytes
    console.say(f"Weights on disk: {compressed.weight_bytes:,} bytes, {share:.1%} of dense ({dense.dense_bytes:,}).")
    console.say(f"Written: {folder}")


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL|DIR", help="A model, or a compressed model's folder.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; the model's chat template is applied.")],
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Feed the text as it is, without the chat template.")] = False,
    width: Annotated[int | None, typer.Option(help="Bits to read a nested model at; its widest if not given.")] = None,
    target: Annotated[
        float | None, typer.Option(help="Average bits to read at, chosen per token: models with dynamic precision.")
    ] = None,
    hold: Annotated[bool, typer.Option(help="Hold the average on the target as text is read.")] = True,
    fail_safe: Annotated[
        bool, typer.Option("--fail-safe", help="Read at the widest once the text is unlike the calibration text.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="With --target: add counts of what was chosen, and no text, to this file.")
    ] = None,
    engine: EngineName = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text with a dense or compressed model."""
    from workbench.runtime import choose_engine
    from workbench.runtime.base import Sampler
    from workbench.runtime.precision_control import Held

    sampler = Sampler(temperature, top_k, top_p)
    choose_engine(engine)
    if not prompt.strip():
        raise InputError("The prompt is empty: say what to ask.")
    with console.running(quiet=True) as job:
        if target is not None and width is not None:
            raise InputError("--width and --target exclude each other: one width for all tokens, or a choice at each.")
        watched: Held | None = None
        if log is not None and target is None:
            raise InputError("--log counts the widths that are chosen per token: give a --target too.")
        if target is None:
            opened = _at_width(model, width, engine, threads, job)
            sequence = opened.start(seed=seed)
        else:
            compressed, selectors = _with_selectors(model)
            counted = _log(log, compressed, selectors)
            opened, controller = _at_target(compressed, selectors, target, hold, fail_safe, engine, threads, job)
            sequence = opened.start(seed=seed)
            watched = Held(opened, sequence, controller, counted)
        loaded = opened.model
        ids = loaded.encode(prompt) if raw else loaded.encode_chat(prompt)
        reply = opened.generate(
            sequence,
            ids,
            new_tokens,
            sampler=sampler,
            stop_tokens=loaded.stop_tokens,
            job=job,
            on_token=watched,
        )
        if watched is not None:
            watched.finish()
            if watched.log is not None and log is not None:
                watched.log.save(log)
    steps = [step.seconds for step in sequence.trace[len(ids) :]]
    per_token = 1000 * sum(steps) / len(steps) if steps else None
    if as_json:
        console.show_json(
            {
                "model": loaded.name,
                "engine": opened.name,
                "tokens": reply,
                "text": loaded.decode(reply),
                "prompt_tokens": len(ids),
                "ms_per_token": per_token,
                "seed": seed,
            }
            | (
                {
                    "target_bits": target,
                    "realised_bits": watched.controller.realised,
                    "warning": watched.controller.warning,
                }
                if watched is not None
                else {}
            )
        )
        return
    console.say(loaded.decode(reply))
    if per_token is not None:
        console.err.print(
            f"{len(reply)} tokens, {per_token:.1f} ms each on the {opened.name} engine (one run, no claim: use measure)"
        )
    if watched is not None:
        read, warning = watched.controller.realised, watched.controller.warning
        console.err.print(f"Read at {read:.3f} bits on average, prompt included; asked for {target:g}.")
        if warning:
            console.err.print(warning)


def _log(path: Path | None, compressed: CompressedModel, selectors: Selectors) -> PrecisionLog | None:
    """The log at a path, or an empty one where there is none yet."""
    if path is None:
        return None
    from workbench.runtime.precision_log import PrecisionLog

    check_output_file(path)
    if path.exists():
        return PrecisionLog.load(path, compressed.sha256, selectors)
    return PrecisionLog.empty(compressed.sha256, selectors)


def _with_selectors(model: str) -> tuple[CompressedModel, Selectors]:
    from workbench.formats.compressed import CompressedModel
    from workbench.formats.folder import is_compressed

    if not is_compressed(model):
        raise InputError(f"--target reads a compressed model's widths, and {model} is none: compress it first.")
    compressed = CompressedModel.load(model)
    if compressed.selectors is None:
        raise InputError(
            f"{model} cannot choose its widths per token: compress with the methods 'nested' and 'dynamic-precision'."
        )
    return compressed, compressed.selectors


def retune(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A compressed model with dynamic precision.")],
    log: Annotated[Path, typer.Option(help="What 'generate --log' counted.")],
    out: Annotated[Path, typer.Option(help="Folder for the retuned model; the other one is left as it is.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model that is there.")] = False,
) -> None:
    """Fit the thresholds of dynamic precision to text as it is, from logged counts; weights stay the same."""
    from dataclasses import replace

    from workbench.runtime.precision_log import PrecisionLog, retuned

    compressed, selectors = _with_selectors(model)
    counted = PrecisionLog.load(log, compressed.sha256, selectors)
    made = replace(compressed, selectors=retuned(selectors, counted), folder=None, recorded_sha256=None)
    folder = check_folder(out)
    made.save(folder, overwrite=overwrite)
    console.say(f"Retuned on {counted.tokens:,} tokens: {folder}. Measure it before it replaces the other.")


def _at_target(
    compressed: CompressedModel,
    selectors: Selectors,
    target: float,
    hold: bool,
    fail_safe: bool,
    engine: str,
    threads: int | None,
    job: Job,
) -> tuple[Engine, PrecisionController]:
    """Open an engine on a model with selectors, and what holds it on a target."""
    from workbench.runtime import open_engine
    from workbench.runtime.precision import precision_plan
    from workbench.runtime.precision_control import PrecisionController

    parts = compressed.architecture
    plan = precision_plan(parts, selectors, target)
    controller = PrecisionController(parts, selectors, target, hold=hold, fail_safe=fail_safe)
    return open_engine(compressed, engine=engine, plan=plan, threads=threads, job=job), controller


def _at_width(model: str, width: int | None, engine: str, threads: int | None, job: Job) -> Engine:
    """Open an engine; with a width, on a nested model that is read at it."""
    from workbench.formats.folder import is_compressed
    from workbench.runtime import open_engine

    if width is None:
        return open_engine(model, engine=engine, threads=threads, job=job)
    from workbench.formats.compressed import CompressedModel
    from workbench.runtime.plan import width_plan

    if not is_compressed(model):
        raise InputError(f"--width reads a compressed model at fewer bits, and {model} is none: compress it first.")
    compressed = CompressedModel.load(model)
    if width not in compressed.widths:
        offered = ", ".join(map(str, compressed.widths)) or "none: compress with the method 'nested'"
        raise InputError(f"--width {width} is not possible: this model offers {offered}.")
    plan = width_plan(compressed.architecture, compressed.widths, width)
    return open_engine(compressed, engine=engine, plan=plan, threads=threads, job=job)


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
    from workbench.formats.folder import is_compressed
    from workbench.runtime import choose_engine

    target = None if out is None else check_output_file(out, suffixes=(".json",))
    if not is_compressed(folder):
        raise InputError(f"{folder} is not a compressed model: give a folder that `workbench compress` wrote.")
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
    console.show_table("By domain and language", found.quality.by_group)
    if found.questions is not None:
        before, after, flips = found.questions.dense, found.questions.candidate, found.questions.flips
        console.say(
            f"Questions: dense {before.accuracy_per_byte.value:.1%}, compressed {after.accuracy_per_byte.value:.1%} "
            f"right of {flips.n_questions} (chance {before.chance:.0%}); {flips.changed} answered differently, "
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


def bench(
    name: Annotated[str, typer.Argument(help="The bench; `workbench bench list` names them.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="File for environment and rows.")] = None,
    model: Annotated[str, typer.Option(help="smollm2-135m, a folder, a GGUF file or a hub id.")] = "smollm2-135m",
    text: Annotated[str | None, typer.Option(help="Evaluation text: prose, pydoc, hf:..., or a file.")] = None,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="Within some 5 minutes, once fits are stored.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run one bench: all rivals of a claim in one run."""
    import pandas as pd

    from workbench.measure.bench import benches, run_bench
    from workbench.operate.fits import fitted
    from workbench.operate.jobs import analyze
    from workbench.store import Store

    if name == "list":
        console.show_table(
            "Benches", pd.DataFrame([(b.name, b.description) for b in benches().values()], columns=["name", "what"])
        )
        return
    with Store() as store, console.running(quiet) as job:
        result = run_bench(
            name,
            json_file,
            model=model,
            text=text,
            threads=threads,
            quick=quick,
            analyze=lambda analysis, inner: analyze(store, analysis, inner).profile,
            compress=lambda dense, recipe, inner: fitted(store, dense, recipe, inner),
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
    console.show_table(f"Bench {name}", frame, rows=100)
    if json_file is not None:
        console.say(f"Written: {json_file}")


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
