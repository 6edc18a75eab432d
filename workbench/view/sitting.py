"""One sitting with a model without any UI toolkit: a state that listeners hear of, and long work in one worker.

A skin (ipywidgets, Panel) subscribes to a ``Sitting``, shows its state and calls its actions. Long work runs in one
worker thread, one piece at a time, so that a skin never blocks; listeners are called in the thread that made the
change, and whoever shows the state in a toolkit must be ready for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from workbench.errors import Cancelled, InputError, WorkbenchError
from workbench.models import LoadedModel, load
from workbench.progress import Job, JobState
from workbench.store import Store

T = TypeVar("T")

log = logging.getLogger(__name__)

# A listener hears of progress at most this often; changes of anything else always reach it.
PROGRESS_INTERVAL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class SittingState:
    """One moment. Parts that did not change are the same objects as before, so a skin redraws what differs.

    Attributes:
        model: name or path of the dense model.
        busy: what the worker is doing (``Analysing``, ``Running``), or an empty string.
        cancelling: a cancel was asked for and takes effect at the next safe point.
        progress: of the present stage, None when idle.
        message: one line of what happened last.
        error: one line of what went wrong last, or an empty string.
    """

    model: str
    busy: str = ""
    cancelling: bool = False
    progress: JobState | None = None
    message: str = ""
    error: str = ""


S = TypeVar("S", bound=SittingState)


class Sitting(Generic[S]):
    """State, listeners, and one worker.

    Args:
        state: to begin with.
        store: where analyses and fits are kept; None opens the default store.
    """

    def __init__(self, state: S, store: Store | None) -> None:
        self._store = store or Store()
        self._dense: LoadedModel | None = None
        self._job = Job()
        self._work: Future[Any] | None = None
        self._told = 0.0
        self._telling = False
        self._lock = threading.RLock()
        self._listeners: list[Callable[[S], None]] = []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="workbench")
        self._state = state

    @property
    def state(self) -> S:
        return self._state

    def subscribe(self, listener: Callable[[S], None]) -> Callable[[], None]:
        """Call ``listener`` with every new state; returns a function that stops it."""
        with self._lock:
            self._listeners.append(listener)

        def stop() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return stop

    def _change(self, **changes: Any) -> None:
        """Replace parts of the state and tell the listeners, in order.

        A listener may act itself (a slider that is clamped asks for another budget): that state follows once all
        listeners have heard of this one, so that none is left showing an older state than another.
        """
        with self._lock:
            self._state = replace(self._state, **changes)
            if self._telling:
                return
            self._telling = True
            try:
                told: S | None = None
                while told is not self._state:
                    told = self._state
                    for listener in list(self._listeners):
                        listener(told)
            finally:
                self._telling = False

    def cancel(self) -> None:
        """Stop the work under way at its next safe point; nothing happens where there is none."""
        with self._lock:  # said before it is done: work that ends at once must have the last word
            if self._state.busy:
                self._change(cancelling=True, message=f"{self._state.busy}: cancelling.")
                self._job.cancel()

    def wait(self) -> S:
        """Block until nothing is under way, and return the state. What the work raised, if anything, is raised here."""
        if self._work is not None:
            self._work.result()
        return self._state

    def close(self) -> None:
        """Cancel what runs, and free the model and the worker."""
        self._job.cancel()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._dense = None
        with self._lock:
            self._listeners.clear()

    def _start(self, name: str, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            if self._state.busy:
                raise InputError(f"{self._state.busy} is still under way: wait for it, or cancel it first.")
            self._job = Job(self._tell)
            self._change(busy=name, cancelling=False, progress=None, error="", message=f"{name} ...")
            future = self._worker.submit(self._guarded, name, work)
            self._work = future
        return future

    def _guarded(self, name: str, work: Callable[[], T]) -> T:
        """Run ``work``; what it raises becomes one line of the state, and stays in its future."""
        began = time.monotonic()
        try:
            result = work()
        except Cancelled as error:
            self._finish(message=str(error))
            raise
        except WorkbenchError as error:
            self._finish(message=f"{name} failed.", error=str(error))
            raise
        except Exception as error:
            log.exception("%s failed", name)
            self._finish(message=f"{name} failed.", error=f"Unexpected {type(error).__name__}: {error}")
            raise
        self._finish(message=f"{name} took {time.monotonic() - began:.0f} s.")
        return result

    def _finish(self, **changes: Any) -> None:
        self._change(busy="", cancelling=False, progress=None, **changes)

    def _tell(self, progress: JobState) -> None:
        """Pass progress on, but not more often than a screen can use."""
        now = time.monotonic()
        begins = self._state.progress is None or self._state.progress.stage != progress.stage
        if begins or progress.done >= progress.total or now - self._told >= PROGRESS_INTERVAL_S:
            self._told = now
            self._change(progress=progress)

    def _model(self) -> LoadedModel:
        if self._dense is None:
            self._dense = load(self._state.model, job=self._job)
        return self._dense
