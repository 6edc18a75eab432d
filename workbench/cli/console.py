"""The terminal: progress on standard error, results on standard output, one line for every expected error."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from workbench.progress import Job, JobState

if TYPE_CHECKING:
    import pandas as pd

SAY_EVERY_S = 20.0  # where no bar can be drawn: often enough to see that it works, and no flood of a log

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one line of plain text; nothing in it is taken for markup."""
    out.print(escape(text), soft_wrap=True)


def tell(text: str) -> None:
    """Print one line to standard error."""
    err.print(escape(text), soft_wrap=True)


def fail(text: str) -> None:
    """Print one line of error."""
    err.print(f"[bold red]Error:[/] {escape(text)}", soft_wrap=True)


def show_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print JSON for machines; what JSON cannot express becomes null."""
    sys.stdout.write(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: NaN and infinity become None, numpy numbers become numbers."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def show_table(title: str, frame: pd.DataFrame, *, rows: int = 20, more: str = "a wider terminal shows them") -> None:
    """Print the first rows of a table, and how many more there are; of its columns, the first that there is room for.

    ``more`` says where the others are seen.
    """
    cells = [[_cell(value) for value in row] for row in frame.head(rows).itertuples(index=False)]
    names = [str(column) for column in frame.columns]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(names)]
    # A rule and a space on either side of each; long words wrap.
    needed = itertools.accumulate(min(width, _WIDEST) + 3 for width in widths)
    fit = max(sum(total < out.width for total in needed), 1)
    table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for name, (_, column) in list(zip(names, frame.items(), strict=True))[:fit]:
        table.add_column(escape(name), justify="right" if column.dtype.kind in "if" else "left")
    for row in cells:
        table.add_row(*[escape(cell) for cell in row[:fit]])
    out.print(table)
    if len(frame) > rows:
        say(f"... and {len(frame) - rows} more")
    if left := names[fit:]:
        others = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        say(f"No room for {', '.join(left[:_NAMED])}{others}: {more}.")


def show_facts(facts: Mapping[str, str]) -> None:
    """Print one line for each fact, its name before it."""
    width = max((len(name) for name in facts), default=0)
    for name, words in facts.items():
        say(f"{name:<{width}}  {words}")


_WIDEST = 28  # of a column that others lie beside
_NAMED = 6  # columns without room whose names are said


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, int) and abs(value) >= 100_000:
        return f"{value:,}"
    return str(value)


@contextmanager
def running(quiet: bool = False) -> Iterator[Job]:
    """Yield a job whose stages show as progress bars with the remaining time, and which Ctrl-C cancels.

    The first interrupt (or SIGTERM) asks the work to stop at its next safe point; the second stops it at once.
    Where standard error is not a terminal, a line says when a stage begins, and now and then how far it is.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_terminal,
    )
    tasks: dict[str, Any] = {}
    said_at = time.monotonic()

    def listen(state: JobState) -> None:
        nonlocal said_at
        if not state.stage or quiet:
            return
        line = f"{state.words} ..." if time.monotonic() - said_at >= SAY_EVERY_S else ""
        if state.stage not in tasks:
            tasks[state.stage] = progress.add_task(escape(state.stage), total=state.total or None)
            line = f"{state.stage} ..." if not state.done else f"{state.words}, the rest now ..."
        progress.update(tasks[state.stage], completed=state.done, total=state.total or None)
        if line and not err.is_terminal:
            tell(line)
            said_at = time.monotonic()

    job = Job(listen, None if quiet else tell)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if job.cancelled:
            raise KeyboardInterrupt
        job.cancel()
        err.print("Cancelling at the next safe point; interrupt again to stop at once.")

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with progress:
            yield job
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
