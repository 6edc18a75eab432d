"""What the user is doing, without any UI toolkit: the model, the bits picked, the work under way, and its results.

A skin (ipywidgets, Panel) subscribes to a ``Controller``, shows its ``State`` and calls its actions. Long work runs in
one worker thread, one piece at a time, so that a skin never blocks; listeners are called in the thread that made the
change, and whoever shows the state in a toolkit must be ready for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from workbench.apply.recipe import Recipe, Solution
from workbench.errors import Cancelled, InputError, RecipeError, WorkbenchError
from workbench.models import Architecture, LoadedModel, load
from workbench.progress import Job, JobState
from workbench.store import Store
from workbench.view import loop
from workbench.view.loop import Look, Settings, Trial

T = TypeVar("T")

log = logging.getLogger(__name__)

# A listener hears of progress at most this often; changes of anything else always reach it.
PROGRESS_INTERVAL_S = 0.2


@dataclass(frozen=True)
class State:
    """One moment. Parts that did not change are the same objects as before, so a skin redraws what differs.

    Attributes:
        model: name or path of the dense model.
        busy: what the worker is doing (``Analysing``, ``Running``), or an empty string.
        cancelling: a cancel was asked for and takes effect at the next safe point.
        progress: of the present stage, None when idle.
        message: one line of what happened last.
        error: one line of what went wrong last, or an empty string.
        architecture: of the model, once it was loaded.
        look: what was seen, once analysed.
        budget: effective bits asked for.
        budget_range: smallest and largest effective bits that the widths and pins allow; None before the analysis.
        pinned: unit id to the bits that the user fixed.
        recipe: the widths of every unit under the budget; None before the analysis, or where no choice meets it.
        trial: the last run's result; it stays while another choice is made, and says which bits it was for.
    """

    model: str
    budget: float
    busy: str = ""
    cancelling: bool = False
    progress: JobState | None = None
    message: str = ""
    error: str = ""
    architecture: Architecture | None = None
    look: Look | None = None
    budget_range: tuple[float, float] | None = None
    pinned: Mapping[str, int] = field(default_factory=dict)
    recipe: Recipe | None = None
    trial: Trial | None = None

    @property
    def solution(self) -> Solution | None:
        """The solver's record of the recipe."""
        return self.recipe.solution if self.recipe is not None else None


Listener = Callable[[State], None]


class Controller:
    """State and actions of one sitting with one model.

    Args:
        model: what ``models.load`` takes.
        budget: effective bits to begin with.
        settings: how much is looked at and measured.
        store: where analyses are kept; None opens the default store.
        out: folder for the compressed model, replaced by every run; None for one per model inside the store's home.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        budget: float = 4.5,
        settings: Settings | None = None,
        store: Store | None = None,
        out: Path | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self._store = store or Store()
        self._out = out
        self._dense: LoadedModel | None = None
        self._job = Job()
        self._work: Future[Any] | None = None
        self._told = 0.0
        self._telling = False
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="workbench")
        self._state = State(model=str(model), budget=budget)

    # State -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    def subscribe(self, listener: Listener) -> Callable[[], None]:
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
                told: State | None = None
                while told is not self._state:
                    told = self._state
                    for listener in list(self._listeners):
                        listener(told)
            finally:
                self._telling = False

    # Actions: quick, in the caller's thread ------------------------------------------------------------------------

    def set_budget(self, bits: float) -> None:
        """Ask for so many effective bits and solve. A budget that cannot be met becomes ``state.error``."""
        self._change(budget=float(bits), **self._solved(float(bits), self._state.pinned))

    def pin(self, unit: str, bits: int | None) -> None:
        """Fix one unit's bits, or with None leave it to the solver again. An impossible pin becomes ``state.error``."""
        pinned = dict(self._state.pinned)
        try:
            if self._state.architecture is not None:
                self._state.architecture.unit(unit)
            if bits is not None and bits not in self.settings.looking.widths:
                allowed = ", ".join(map(str, self.settings.looking.widths))
                raise RecipeError(f"{unit} cannot have {bits} bits: choose one of {allowed}.")
        except WorkbenchError as error:
            self._change(error=str(error))
            return
        if bits is None:
            pinned.pop(unit, None)
        else:
            pinned[unit] = bits
        self._change(pinned=pinned, **self._solved(self._state.budget, pinned))

    def unpin_all(self) -> None:
        """Leave every unit to the solver."""
        self._change(pinned={}, **self._solved(self._state.budget, {}))

    def cancel(self) -> None:
        """Stop the work under way at its next safe point; nothing happens where there is none."""
        with self._lock:  # said before it is done: work that ends at once must have the last word
            if self._state.busy:
                self._change(cancelling=True, message=f"{self._state.busy}: cancelling.")
                self._job.cancel()

    def wait(self) -> State:
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

    # Actions: long, in the worker ----------------------------------------------------------------------------------

    def analyse(self) -> Future[Look]:
        """Load the model, look at its decoding steps and units, and solve for the budget.

        Raises:
            InputError: something else is under way.
        """
        return self._start("Analysing", self._analyse)

    def run(self) -> Future[Trial]:
        """Compress with the bits picked, then generate, and measure latency and quality against dense.

        Raises:
            InputError: something else is under way, or there is nothing solved yet.
        """
        recipe = self._state.recipe
        if recipe is None:
            raise InputError(
                "There are no bits to run with yet: analyse the model, and choose a budget that is possible."
            )
        return self._start("Running", lambda: self._run(recipe))

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

    def _analyse(self) -> Look:
        model = self._model()
        self._change(architecture=model.architecture)
        seen = loop.look(model, self.settings, self._store, self._job)
        self._change(look=seen)
        low, high = seen.possible_bits(self._state.pinned)
        budget = min(max(self._state.budget, low), high)
        self._change(budget=budget, **self._solved(budget, self._state.pinned))
        return seen

    def _run(self, recipe: Recipe) -> Trial:
        trial = loop.try_recipe(self._model(), recipe, self.folder, self.settings, self._store, self._job)
        self._change(trial=trial)
        return trial

    @property
    def folder(self) -> Path:
        """Where a run puts the compressed model."""
        if self._out is not None:
            return self._out
        return self._store.model_folder(Path(self._state.model).name)

    # Solving -------------------------------------------------------------------------------------------------------

    def _solved(self, budget: float, pinned: Mapping[str, int]) -> dict[str, Any]:
        """The parts of the state that follow from a budget and pins."""
        seen = self._state.look
        if seen is None:
            return {"error": ""}
        limits = seen.possible_bits(pinned)
        try:
            recipe = loop.solve(seen, budget, pinned, self.settings)
        except WorkbenchError as error:
            return {"recipe": None, "budget_range": limits, "error": str(error)}
        return {"recipe": recipe, "budget_range": limits, "error": ""}
