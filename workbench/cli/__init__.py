"""The command line, ``workbench``. Exit codes: 0 done, 1 other failure, 2 bad input, 3 model, 4 store or disk,
5 engine, 6 damaged data, 130 cancelled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from workbench.cli import console, generate, keep, look, run, train
from workbench.errors import Cancelled, WorkbenchError
from workbench.waiting import let_threads_sleep

_UsageError: Any = typer.BadParameter.__base__  # click's own, which typer does not name
_INTERRUPTED = 130
# typer speaks of values as pydantic does.
_PLAINER = {
    "Input should be a valid integer, unable to parse string as an integer": "a whole number is needed",
    "Input should be a valid number, unable to parse string as a number": "a number is needed",
    "Input should be": "it must be",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}

app = typer.Typer(
    name="workbench",
    help="Look into a language model, pick where it may compute less, run the result, and trust the numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (run, generate, look, train, keep):
    module.register(app)


@app.callback()
def common(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options of every command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with a status that means something."""
    let_threads_sleep()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # wherever it stands
    try:
        code = app(args=words, prog_name="workbench", standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        _tell_usage(error)
        sys.exit(error.exit_code)
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
        sys.exit(_INTERRUPTED)


def _tell_usage(error: _UsageError) -> None:
    """Say what is wrong with the words that were given, in one line, and in another where help is."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        error.show()
        return
    message = " ".join(error.format_message().split())
    for words, plain in _PLAINER.items():
        message = message.replace(words, plain)
    console.fail(message)
    if context is not None:
        console.tell(f"See '{context.command_path} --help'.")
