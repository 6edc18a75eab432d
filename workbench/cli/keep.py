"""Commands about the machine and what is kept: ``doctor``, ``store`` and ``dashboard``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli import console
from workbench.cli.options import Json
from workbench.errors import StoreError


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("doctor")(doctor)
    app.command("dashboard")(dashboard)
    kept = typer.Typer(help="What is kept: analyses, compressed runs, measurements.", no_args_is_help=True)
    for name, command in (("info", info), ("runs", runs), ("verify", verify), ("gc", gc), ("rm", remove)):
        kept.command(name)(command)
    app.add_typer(kept, name="store")


def doctor(as_json: Json = False) -> None:
    """What this machine can do, what is missing and how to get it, and what the store holds."""
    from workbench.operate.doctor import examine

    found = examine()
    if as_json:
        console.show_json(found.to_json())
        return
    console.show_facts(_facts(found.machine))
    console.say("")
    for check in found.checks:
        console.say(f"[{'ok' if check.ok else 'missing'}] {check.name}: {check.detail}")
    if found.store_error:
        raise StoreError(found.store_error)
    console.say("")
    console.show_facts(_facts(found.store, "store "))


def _facts(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Facts named as people would; what a fact of several parts is made of stands on one line."""
    return {prefix + name.replace("_", " "): _in_words(name, value) for name, value in values.items()}


def _in_words(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{part} {_in_words(part, one)}" for part, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_in_words("", one) for one in value) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes") and isinstance(value, int):
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value:,}"
    return str(value)


def info(as_json: Json = False) -> None:
    """Where the store is and what it holds."""
    from workbench.store import Store

    with Store() as store:
        found = store.info()
    if as_json:
        console.show_json(found)
        return
    console.show_facts(_facts(found))


def runs(
    kind: Annotated[str | None, typer.Option(help="demo, measure, bench or analysis.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
    as_json: Json = False,
) -> None:
    """List recorded runs, newest first."""
    from workbench.errors import InputError, suggest
    from workbench.store import RUN_KINDS, Store

    if kind is not None and kind not in RUN_KINDS:
        raise InputError(f"There are no runs of kind '{kind}', only {', '.join(RUN_KINDS)}." + suggest(kind, RUN_KINDS))
    with Store() as store:
        found = store.runs(kind=kind, model=model, limit=limit)
    if as_json:
        console.show_json(found.to_dict(orient="records"))
        return
    if found.empty:
        console.say("No runs yet: `workbench demo`, `measure` and `bench` record what they measure.")
        return
    found["created_at"] = [str(at)[:16] for at in found["created_at"]]  # to the minute, UTC
    wanted = ["id", "created_at", "kind", "name", "compressed.kl_mean", "compressed.ms_per_token", "dense.ms_per_token"]
    wanted += ["model", "compressed.effective_bits", "compressed.weight_bytes"]
    shown = found[[column for column in wanted if column in found]]
    short = {str(column): str(column).removeprefix("compressed.") for column in shown}
    console.show_table("Runs", shown.rename(columns=short), rows=limit)


def verify() -> None:
    """Check every stored file against its checksum; damaged ones are set aside."""
    from workbench.errors import IntegrityError
    from workbench.store import Store

    with Store() as store:
        problems = store.verify()
    if problems:
        for problem in problems:
            console.say(problem)
        raise IntegrityError(
            f"{len(problems)} problem(s) found; what was damaged will be computed again when asked for."
        )
    console.say("Everything that is stored matches its checksum.")


def gc(
    max_mb: Annotated[float | None, typer.Option(help="Bound all that is kept, in MB.")] = None,
    older_than_days: Annotated[float | None, typer.Option(help="Remove what was not used for so long.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what is left over and least recently used; what a run refers to stays, or goes last."""
    from workbench.store import Store

    limit = None if max_mb is None else int(max_mb * 1e6)
    with Store() as store:
        removed = store.gc(max_bytes=limit, older_than_days=older_than_days, dry_run=dry_run)
    if as_json:
        console.show_json([asdict(removal) for removal in removed])
        return
    for removal in removed:
        of_runs = f" (measured by run {', '.join(map(str, removal.runs))}, which stays)" if removal.runs else ""
        console.say(f"{removal.what} {removal.name}: {removal.bytes:,} bytes{of_runs}")
    verb = "would be removed" if dry_run else "removed"
    console.say(f"{len(removed)} item(s), {sum(r.bytes for r in removed):,} bytes {verb}.")


def remove(number: Annotated[int, typer.Argument(metavar="RUN", help="The run's number.")]) -> None:
    """Delete one run's record; its files go with the next `store gc`."""
    from workbench.store import Store

    with Store() as store:
        store.delete_run(number)
    console.say(f"Run {number} deleted.")


def dashboard(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5006,
    address: Annotated[str, typer.Option(help="Address to listen on; anybody who reaches it can read.")] = "127.0.0.1",
    prefix: Annotated[str, typer.Option(help="Path under which a reverse proxy shows the page.")] = "",
    home: Annotated[Path | None, typer.Option(help="Another store.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Open a browser.")] = False,
) -> None:
    """Serve the managers' page: runs, what they cost and what was picked."""
    from workbench.errors import EngineError
    from workbench.store import Store

    try:
        from workbench.view.dashboard import serve
    except ModuleNotFoundError as error:
        raise EngineError(
            f"The dashboard needs {error.name}: pip install 'compression-workbench[dashboard]'."
        ) from error
    with Store(home) as store:
        serve(store, port=port, address=address, prefix=prefix, show=show, on_ready=_ready)


def _ready(url: str) -> None:
    console.say(f"Serving {url} (Ctrl-C stops)")
