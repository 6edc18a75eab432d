"""The command line, ``workbench``. Exit codes: 0 done, 1 other failure, 2 bad input, 3 model, 4 store or disk,
5 engine, 6 damaged data, 130 cancelled."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from workbench.cli import console, keep, look, run
from workbench.errors import Cancelled, WorkbenchError

app = typer.Typer(
    name="workbench",
    help="Look into a language model, pick where it may compute less, run the result, and trust the numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (run, look, keep):
    module.register(app)


@app.callback()
def common(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options of every command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with a status that means something."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # wherever it stands
    try:
        app(args=words, prog_name="workbench")  # exits by itself, with 2 on wrong usage
    except WorkbenchError as error:
        if debug:
            raise
        if isinstance(error, Cancelled):
            console.tell(str(error))
        else:
            console.fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.tell("Stopped. Finished parts are kept: run the same again to resume.")
        sys.exit(130)
