"""Commands that look and pick: ``analyze`` and ``solve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import console
from workbench.cli.options import Json, ModelName, Quiet, require_text
from workbench.errors import InputError
from workbench.files import check_output_file

if TYPE_CHECKING:
    from workbench.analysis.profile import Profile

TABLE_SUFFIXES = (".parquet", ".csv", ".json")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    analyses = typer.Typer(help="Look into a model.", no_args_is_help=True)
    analyses.command("sensitivity")(sensitivity)
    app.add_typer(analyses, name="analyze")
    app.command("solve")(solve)


def numbers(text: str, what: str) -> tuple[int, ...]:
    """Read ``2,3,4`` as numbers, or raise ``InputError``."""
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise InputError(f"{what} '{text}' is not a list of whole numbers such as 2,3,4,8.") from None


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as Parquet (with its provenance), CSV or JSON, in one move."""
    from workbench.files import write_whole

    if path.suffix == ".parquet":
        profile.save(path)
    elif path.suffix == ".csv":
        write_whole(path, profile.table.to_csv(index=False))
    else:
        import json

        rows = profile.table.to_dict(orient="records")
        value = {"provenance": profile.provenance.model_dump(mode="json"), "rows": rows}
        write_whole(path, json.dumps(console.plain(value), ensure_ascii=False) + "\n")


def sensitivity(
    model: ModelName,
    text: Annotated[str, typer.Option(help="Calibration text: prose, pydoc, self, hf:..., or a file.")] = "prose",
    out: Annotated[Path | None, typer.Option(help="Write the units' damage: .parquet, .csv or .json.")] = None,
    steps_out: Annotated[Path | None, typer.Option(help="Write every decoding step's errors, likewise.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts (or windows of a file) to look at step by step.")] = 3,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of your own; may be repeated.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decoding steps per prompt.")] = 64,
    widths: Annotated[str, typer.Option(help="Bits to look at, 2 to 8.")] = "2,3,4,5,6,8",
    group_size: Annotated[int, typer.Option(min=1, help="Input channels per scale.")] = 64,
    kl: Annotated[bool, typer.Option("--kl", help="Also measure the KL of every unit and width (slower).")] = False,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows of 128 tokens for the scores.")] = 8,
    bits: Annotated[int, typer.Option(help="Width that the printed rankings are for.")] = 4,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    refresh: Annotated[bool, typer.Option("--refresh", help="Compute again even if the store has it.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which linears and units suffer in fewer bits: over decoding steps, and by damage to the output."""
    targets = {path: check_output_file(path, suffixes=TABLE_SUFFIXES) for path in (out, steps_out) if path is not None}
    from workbench.analysis.common import check_widths
    from workbench.analysis.sensitivity import proxy_correlation, rank_linears, rank_units
    from workbench.models import load
    from workbench.operate.sensitivity import SensitivityOptions, look
    from workbench.store import Store

    chosen = check_widths(numbers(widths, "--widths"))
    if bits not in chosen:
        raise InputError(f"--bits {bits} is not among the widths looked at, {list(chosen)}.")
    options = SensitivityOptions(
        text=text,
        prompts=tuple(prompt or ()),
        n_prompts=prompts,
        new_tokens=new_tokens,
        widths=chosen,
        group_size=group_size,
        score_windows=windows,
        kl=kl,
    )
    require_text(text)
    with Store() as store, console.running(quiet or as_json) as job:
        loaded = load(model, dtype=dtype, device=device, job=job)
        seen = look(loaded, options, store, job, refresh=refresh)
    if out is not None:
        write_profile(seen.units, targets[out])
    if steps_out is not None:
        write_profile(seen.steps, targets[steps_out])
    units = rank_units(seen.units.table, bits, seen.damage)
    linears = rank_linears(seen.steps, bits)
    correlation = proxy_correlation(seen.units.table) if kl else None
    if as_json:
        console.show_json(
            {
                "model": loaded.name,
                "cached": seen.cached,
                "bits": bits,
                "damage": seen.damage,
                "units": units.to_dict(orient="records"),
                "linears": linears.to_dict(orient="records"),
                "proxy_correlation": None if correlation is None else correlation.to_dict(orient="records"),
                "provenance": seen.units.provenance.model_dump(mode="json", exclude={"parameters"}),
            }
        )
        return
    steps = len(seen.steps.table.groupby(["sequence", "step"]))
    console.show_table(
        f"{loaded.name}: relative output error of linears at {bits} bits over {steps} steps, worst first",
        linears[["rank", "linear", "mean", "p95", "max", "worst_step", "variation"]],
    )
    console.show_table(
        f"Damage of units at {bits} bits ({seen.damage}, nats per token), worst first",
        units[["rank", "unit", seen.damage, "share"]],
    )
    if correlation is not None:
        console.show_table("Rank correlation (Spearman) of the proxies with the measured KL", correlation)
    if seen.cached:
        console.say("From the store; --refresh computes again.")
    for path in targets.values():
        console.say(f"Written: {path}")


def solve(
    source: Annotated[
        str, typer.Argument(metavar="PROFILE|MODEL", help="A .parquet of `analyze sensitivity`, or a model.")
    ],
    out: Annotated[Path, typer.Option(help="The recipe to write, .json.")] = Path("recipe.json"),
    bits: Annotated[float | None, typer.Option(help="Budget: average effective bits.")] = None,
    size: Annotated[int | None, typer.Option("--bytes", help="Budget: bytes of the blocks' linears.")] = None,
    damage: Annotated[str | None, typer.Option(help="kl, fisher or gradient; the best there is if not given.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="Fix a unit, as blocks.0.down=8; may be repeated.")] = None,
    output_bits: Annotated[int, typer.Option(help="Embedding and output layer; 16 leaves them.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose bits for every unit under a budget, exactly, and write the recipe."""
    target = check_output_file(out, suffixes=(".json",))
    from workbench.apply.recipe import Budget

    if (bits is None) == (size is None):
        raise InputError("Give one budget: --bits (average effective bits) or --bytes.")
    budget = Budget(average_bits=bits, bytes=size)
    pinned = dict(_pin(item) for item in pin or ())
    from workbench.operate.solving import recipe_from_profile

    profile = _profile(source, quiet or as_json)
    recipe = recipe_from_profile(profile, budget, pinned=pinned, damage=damage, output_bits=output_bits, seed=seed)
    recipe.save(target)
    solution = recipe.solution
    if solution is None:
        raise InputError("The recipe has no solution.")
    if as_json:
        console.show_json({**solution.model_dump(mode="json"), "recipe": str(target), "recipe_sha256": recipe.sha256})
        return
    import collections

    counts = collections.Counter(solution.unit_bits.values())
    console.say(f"Budget: {budget}. Achieved: {solution.achieved_bits:.4f} effective bits.")
    console.say(f"Size of the blocks' linears: {solution.achieved_bytes:,} bytes; 16 bits would be dense.")
    console.say(
        f"Predicted damage ({solution.damage.column if solution.damage else 'given'}): "
        f"{solution.predicted_damage:.5g} nats per token, if damages add up; optimality gap {solution.gap:.1g}."
    )
    console.say("Units by bits: " + ", ".join(f"{counts[b]} at {b}" for b in sorted(counts)))
    console.say(f"Written: {target}")


def _pin(item: str) -> tuple[str, int]:
    unit, _, bits = item.partition("=")
    if not bits.isdigit():
        raise InputError(f"--pin '{item}' is not UNIT=BITS, such as blocks.0.down=8.")
    return unit, int(bits)


def _profile(source: str, quiet: bool) -> Any:
    """A saved profile, or a model looked at now (or found in the store)."""
    from workbench.analysis.profile import Profile

    if source.endswith(".parquet"):
        return Profile.load(Path(source))
    from workbench.models import load
    from workbench.operate.sensitivity import SensitivityOptions, look_at_units
    from workbench.store import Store

    with Store() as store, console.running(quiet) as job:
        return look_at_units(load(source, job=job), SensitivityOptions(), store, job)[0]
