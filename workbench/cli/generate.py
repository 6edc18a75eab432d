"""Commands that read a model's text: ``generate``, at a width, a target of bits or a sparsity, and ``retune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import console
from workbench.cli.options import DeviceName, EngineName, Json, Threads, require_compressed
from workbench.cli.sparse import Sparse, open_sparse
from workbench.errors import InputError
from workbench.files import check_output_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.formats.compressed import CompressedModel
    from workbench.formats.selectors import Selectors
    from workbench.models.base import Architecture
    from workbench.progress import Job
    from workbench.runtime.base import Engine, StepTrace
    from workbench.runtime.plan import Policy
    from workbench.runtime.precision_control import PrecisionController
    from workbench.runtime.precision_log import PrecisionLog


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("generate")(generate)
    app.command("retune")(retune)


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
    hold: Annotated[
        bool | None,
        typer.Option(
            help="With --target or --sparsity: hold the average on it as text is read; done unless --no-hold.",
            show_default=False,
        ),
    ] = None,
    fail_safe: Annotated[
        bool,
        typer.Option(
            "--fail-safe",
            help="Once text is unlike the calibration text, with --target: read at the widest; with --sparsity, where "
            "it is predicted: run dense.",
        ),
    ] = False,
    important: Annotated[
        bool, typer.Option("--important", help="With --sparsity, where it is predicted: run this request dense.")
    ] = False,
    guard: Annotated[
        bool | None,
        typer.Option(
            help="With --sparsity, where it is predicted: run dense what the predictor is unsure of; done unless "
            "--no-guard.",
            show_default=False,
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="With --target, or --sparsity where it is predicted: add counts of what was chosen, and no text, to "
            "this file."
        ),
    ] = None,
    log_features: Annotated[
        Path | None,
        typer.Option(
            help="With --sparsity, where it is predicted: add what the predictor read at some tokens of a request that "
            "runs dense, for 'retune --features'. Whoever has this file and the model can find out those tokens."
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of the weights not to use: models with input sparsity or predicted sparsity."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="With --sparsity, where it is predicted: choose heads and neurons at every 'token', 'every:8' tokens, "
            "or once per 'reply'; as the predictor was trained if not given."
        ),
    ] = None,
    engine: EngineName = "auto",
    device: DeviceName = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text with a dense or compressed model."""
    from workbench.runtime import choose_engine
    from workbench.runtime.base import Sampler

    sampler = Sampler(temperature, top_k, top_p)
    choose_engine(engine)
    if not prompt.strip():
        raise InputError("The prompt is empty: say what to ask.")
    if target is not None and width is not None:
        raise InputError("--width and --target exclude each other: one width for all tokens, or a choice at each.")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise InputError(f"A sparsity of {sparsity:g} is not possible: give a share from 0 to below 1, such as 0.4.")
    if sparsity is not None and (width is not None or target is not None):
        raise InputError("--sparsity goes with neither --width nor --target: a model decides on widths or on sparsity.")
    if target is None:
        alone = sparsity is None  # these two go with a sparsity as well
        asked = {"--hold" if hold else "--no-hold": hold is not None and alone}
        asked |= {"--fail-safe": fail_safe and alone, "--log": log is not None and alone}
        _require(asked, "--target or --sparsity", "the average bits to read at, or the share of the weights not to use")
    if sparsity is None:
        asked = {"--scope": scope is not None, "--important": important, "--guard": guard is not None}
        asked |= {"--log-features": log_features is not None}
        _require(asked, "--sparsity", "the share of the weights not to use")
    watched: Watched | None = None
    sparse: Sparse | None = None
    with console.running(quiet=True) as job:
        if sparsity is not None:
            switches = (important, guard, fail_safe)
            sparse = open_sparse(
                *(model, sparsity, scope, engine, threads, job, *switches, log),
                device=device,
                features=log_features,
                hold=hold,
            )
            opened = sparse.engine
        elif target is None:
            opened = _at_width(model, width, engine, threads, job, device)
            sequence = opened.start(seed=seed)
        else:
            compressed, selectors = _with_selectors(model, "--target reads")
            counted = None if log is None else _log(log, compressed, selectors)
            opened = _at_target(compressed, selectors, target, engine, threads, job, device)
            sequence = opened.start(seed=seed)
            watched = _watched(opened, sequence, compressed, target, hold is not False, fail_safe, counted)
        loaded = opened.model
        ids = loaded.encode(prompt) if raw else loaded.encode_chat(prompt)
        options: dict[str, Any] = {"sampler": sampler, "stop_tokens": loaded.stop_tokens, "job": job}
        if sparse is not None:
            sequence, reply = sparse.reply(ids, new_tokens, seed=seed, **options)
            if sparse.log is not None and log is not None:
                sparse.log.save(log)
            if sparse.features is not None and log_features is not None:
                sparse.features[0].save(log_features)
        else:
            held = watched.held if watched is not None else None
            between = held.look if held is not None else None
            reply = opened.generate(sequence, ids, new_tokens, on_token=held, between=between, **options)
        if watched is not None:
            watched.held.finish()
            if watched.log is not None and log is not None:
                watched.log.save(log)
    steps = [step.seconds for step in sequence.trace[len(ids) :]]
    per_token = 1000 * sum(steps) / len(steps) if steps else None
    if as_json:
        facts: dict[str, Any] = {
            "model": loaded.name,
            "engine": opened.name,
            "tokens": reply,
            "text": loaded.decode(reply),
            "prompt_tokens": len(ids),
            "ms_per_token": per_token,
            "seed": seed,
        }
        if width is not None:
            facts["width"] = width
        if watched is not None:
            facts["target_bits"] = target
            facts["realised_bits"] = watched.controller.realised
            facts["warning"] = watched.controller.warning
            facts["units_unlike"] = list(watched.controller.watch.outside)
        if sparse is not None:
            facts |= sparse.facts(sequence.trace, len(ids))
        console.show_json(facts)
        return
    console.say(loaded.decode(reply))
    if per_token is not None:
        console.tell(
            f"{len(reply)} tokens, {per_token:.1f} ms each on the {opened.name} engine (one run, no claim: use measure)"
        )
    if watched is not None:
        read, warning = watched.controller.realised, watched.controller.warning
        console.tell(f"Read at {read:.3f} bits on average, prompt included; asked for {target:g}.")
        if warning:
            console.tell(warning)
    if sparse is None and _may_leave_out(model):
        console.tell("Nothing was left out: this model can leave weights out, with --sparsity 0.4 for 40 %.")
    if sparse is not None:
        for line in sparse.said(sequence.trace, len(ids)):
            console.tell(line)


def retune(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model with dynamic precision or predicted sparsity.")],
    out: Annotated[Path, typer.Option(help="Folder for the retuned model; the other one is left as it is.")],
    log: Annotated[Path | None, typer.Option(help="What 'generate --log' counted: moves thresholds alone.")] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="What 'generate --log-features' kept: trains the predictor of masks on, and its thresholds."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Fit the thresholds of dynamic precision or predicted sparsity to text as it is, from logged counts.

    Weights stay the same, and so do predictors, unless features of requests that ran dense are given.
    """
    from dataclasses import replace

    from workbench.formats.compressed import CompressedModel
    from workbench.formats.folder import check_output_folder
    from workbench.runtime import mask_log, precision_log

    require_compressed(model, "retune reads")
    if (log is None) == (features is None):
        raise InputError("Give one of --log, which moves thresholds, and --features, which trains the predictor on.")
    given = log or features
    assert given is not None  # one of them is
    _keep_apart(Path(model), given, out)
    folder = check_output_folder(out, overwrite=overwrite)
    compressed, figures = CompressedModel.load(model), dict[str, float]()
    if features is not None:
        made, tokens, figures = _trained_on(compressed, model, features)
        counted_as = "tokens of requests that ran dense"
    elif (predictor := compressed.mask_predictor) is not None:
        masks = mask_log.MaskLog.load(given, compressed.sha256, predictor)
        tokens, counted_as = masks.decisions, "decisions"
        made = replace(compressed, mask_predictor=mask_log.retuned(predictor, masks))
    elif compressed.input_cuts is not None:
        raise InputError(
            f"{model} looks at the inputs of every token by thresholds of its calibration text, which nothing logs: "
            "'retune' is for 'dynamic-precision' and 'predicted-sparsity'."
        )
    else:
        compressed, selectors = _with_selectors(model, "retune reads")
        counted_as = "tokens"
        counted = precision_log.PrecisionLog.load(given, compressed.sha256, selectors)
        tokens = counted.tokens
        made = replace(compressed, selectors=precision_log.retuned(selectors, counted))
    made = replace(made, folder=None, recorded_sha256=None)
    made.save(folder, overwrite=overwrite)
    if as_json:
        console.show_json(
            {"out": str(folder), "sha256": made.sha256, "retuned_from": compressed.sha256, "tokens": tokens, **figures}
        )
        return
    if figures:
        console.say(
            f"Squared error of predicted scores on requests held out: {figures['error_before']:.3f} of their variance "
            f"before, {figures['error_after']:.3f} now."
        )
    console.say(f"Retuned on {tokens:,} {counted_as}: {folder}. Measure it before it replaces the other.")


def _trained_on(
    compressed: CompressedModel, model: str, features: Path
) -> tuple[CompressedModel, int, dict[str, float]]:
    """The model with its predictor of masks trained on, on how many tokens, and held-out errors.

    Raises:
        InputError: nothing to train, or an outcome that is no better than what there was.
    """
    from dataclasses import replace

    from workbench.apply.mask_retrain import retrained
    from workbench.runtime.feature_log import FeatureLog

    predictor = compressed.mask_predictor
    if predictor is None:
        raise InputError(f"{model} predicts no masks: --features is for models with 'predicted-sparsity'.")
    log = FeatureLog.load(features, compressed.sha256, predictor)
    found = retrained(compressed.architecture, predictor, log)
    if found.after >= found.before:
        raise InputError(
            f"On requests held out the trained predictor is no better (squared error {found.after:.3f} of the scores' "
            f"variance, {found.before:.3f} before), so nothing was written: log more requests."
        )
    figures = {"error_before": found.before, "error_after": found.after}
    return replace(compressed, mask_predictor=found.predictor), len(log.scores), figures


def _require(given: dict[str, bool], option: str, what: str) -> None:
    """Refuse options that change nothing without another."""
    named = [name for name, value in given.items() if value]
    if named:
        verb = "means" if len(named) == 1 else "mean"
        raise InputError(f"{' and '.join(named)} {verb} something only with {option}: give {what}.")


def _keep_apart(model: Path, log: Path, out: Path) -> None:
    """Refuse an output folder whose replacement would destroy the model, or the log that belongs to it alone."""
    folder = out.expanduser().resolve()
    if folder in (source := model.resolve(), *source.parents):
        raise InputError(
            f"--out {out} would replace the model that is retuned, and its log belongs to that very model: choose "
            "another folder."
        )
    if folder in log.resolve().parents:
        raise InputError(f"--out {out} would replace the folder that the log {log} lies in: choose another folder.")


def _log(path: Path, compressed: CompressedModel, selectors: Selectors) -> PrecisionLog:
    """The log at a path, or an empty one where there is none yet."""
    from workbench.runtime.precision_log import PrecisionLog

    check_output_file(path)
    if path.exists():
        return PrecisionLog.load(path, compressed.sha256, selectors)
    return PrecisionLog.empty(compressed.sha256, selectors)


def _with_selectors(model: str, purpose: str) -> tuple[CompressedModel, Selectors]:
    from workbench.formats.compressed import CompressedModel

    require_compressed(model, purpose)
    compressed = CompressedModel.load(model)
    if compressed.selectors is None:
        raise InputError(
            f"{model} cannot choose its widths per token: compress with the methods 'nested' and 'dynamic-precision'."
        )
    return compressed, compressed.selectors


def _at_target(
    compressed: CompressedModel,
    selectors: Selectors,
    target: float,
    engine: str,
    threads: int | None,
    job: Job,
    device: str,
) -> Engine:
    """Open an engine that chooses widths per token, with the thresholds of calibration."""
    from workbench.runtime import open_engine
    from workbench.runtime.precision import precision_plan

    plan = precision_plan(compressed.architecture, selectors, target)
    return open_engine(compressed, engine=engine, plan=plan, threads=threads, device=device, job=job)


class Watched:
    """A sequence that is held on its target, and counted.

    Attributes:
        controller: that watches.
        held: what the engine calls.
        log: what was counted, where it is.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: Any,
        architecture: Architecture,
        controller: PrecisionController,
        log: PrecisionLog | None,
    ) -> None:
        from workbench.runtime.holding import Held

        self.controller, self.log = controller, log
        self._architecture = architecture
        self.held = Held(engine, sequence, controller, self._count)

    def _count(self, steps: Sequence[StepTrace], policy: Policy) -> None:
        if self.log is not None:
            self.log = self.log.added(self._architecture, steps, policy.thresholds)


def _watched(
    engine: Engine,
    sequence: Any,
    compressed: CompressedModel,
    target: float,
    hold: bool,
    fail_safe: bool,
    log: PrecisionLog | None,
) -> Watched:
    """What watches a sequence and holds it on its target."""
    from workbench.runtime.precision_control import PrecisionController

    if compressed.selectors is None:
        raise InputError("The model has no selectors.")
    parts = compressed.architecture
    controller = PrecisionController(parts, compressed.selectors, target, hold=hold, fail_safe=fail_safe)
    return Watched(engine, sequence, parts, controller, log)


def _may_leave_out(model: str) -> bool:
    """Whether this is a compressed model that can leave weights out."""
    from workbench.formats.folder import MANIFEST, is_compressed
    from workbench.formats.manifest import read

    if not is_compressed(model):
        return False
    methods = read(Path(model) / MANIFEST).recipe["methods"]
    return bool(methods) and methods[-1]["method"] in ("input-sparsity", "predicted-sparsity")


def _at_width(model: str, width: int | None, engine: str, threads: int | None, job: Job, device: str) -> Engine:
    """Open an engine; with a width, on a nested model that is read at it."""
    from workbench.runtime import open_engine

    if width is None:
        return open_engine(model, engine=engine, threads=threads, device=device, job=job)
    from workbench.formats.compressed import CompressedModel
    from workbench.runtime.plan import width_plan

    require_compressed(model, "--width reads")
    compressed = CompressedModel.load(model)
    if width not in compressed.widths:
        offered = ", ".join(map(str, compressed.widths)) or "none: compress with the method 'nested'"
        raise InputError(f"--width {width} is not possible: this model offers {offered}.")
    plan = width_plan(compressed.architecture, compressed.widths, width)
    return open_engine(compressed, engine=engine, plan=plan, threads=threads, device=device, job=job)
