"""Progress and cancellation of long work, passed down as one object.

A ``Job`` is made by whoever started the work (command line, notebook, dashboard) and given to every long function
as ``job=``. The function announces a stage and advances it; ``advance`` is also the safe point at which a cancel
takes effect.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from workbench.errors import Cancelled


@dataclass(frozen=True)
class JobState:
    """One moment of a job. ``done`` and ``total`` are in the stage's own units; times in seconds."""

    stage: str
    done: float
    total: float
    elapsed_s: float
    remaining_s: float | None

    @property
    def words(self) -> str:
        """The stage, the share that is done, and the time that remains of it."""
        share = f"{100 * self.done / self.total:.0f} %" if self.total else ""
        left = "" if self.remaining_s is None else f", about {duration(self.remaining_s)} left in this step"
        return f"{self.stage}: {share}{left}"


def duration(seconds: float) -> str:
    """Seconds in words, no finer than anybody can plan with."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Job:
    """Progress of one piece of work, and the flag that stops it between two steps.

    Args:
        listener: called with a ``JobState`` after every change, in the thread that does the work.
        on_note: called with every ``note``, likewise.
    """

    def __init__(
        self,
        listener: Callable[[JobState], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self._listener = listener
        self._on_note = on_note
        self._cancel = threading.Event()
        self._stage, self._done, self._total = "", 0.0, 0.0
        self._share = 0.0
        self._before = 0.0
        self._started = time.monotonic()

    def stage(self, name: str, total: float, done: float = 0.0) -> None:
        """Begin a stage of ``total`` units of work (of any kind, as long as they are even), some of it done before."""
        self._stage, self._done, self._total = name, done, float(total)
        self._before = done
        self._share = 0.0
        self._started = time.monotonic()
        self._tell()
        self.check()

    def advance(self, amount: float = 1.0) -> None:
        """Count work as done. Raises ``Cancelled`` if the job was cancelled meanwhile."""
        self._done += amount
        self._share = 0.0
        self._tell()
        self.check()

    def within(self, share: float) -> None:
        """Show progress inside the present unit of work, 0 to 1, until the next ``advance``; checks for a cancel."""
        self._share = share
        self._tell()
        self.check()

    def note(self, text: str) -> None:
        """Say in one sentence what whoever waits cannot see from the stages, such as what need not be done again."""
        if self._on_note is not None:
            self._on_note(text)

    def cancel(self) -> None:
        """Ask the work to stop at its next safe point. May be called from any thread."""
        self._cancel.set()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def check(self) -> None:
        """Raise ``Cancelled`` if a cancel was asked for."""
        if self._cancel.is_set():
            where = f" during {self._stage}" if self._stage else ""
            raise Cancelled(f"Cancelled{where}. Finished parts are kept: run the same again to resume.")

    @property
    def state(self) -> JobState:
        elapsed = time.monotonic() - self._started
        done = min(self._done + self._share, self._total)
        fresh = done - self._before  # what an earlier, interrupted run had done says nothing about this run's speed
        left = elapsed * (self._total - done) / fresh if fresh > 0 else None
        return JobState(self._stage, done, self._total, elapsed, left)

    def _tell(self) -> None:
        if self._listener is not None:
            self._listener(self.state)
