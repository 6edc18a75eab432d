"""What the user is doing, without any UI toolkit: the model, the bits picked, the work under way, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.apply.recipe import Recipe, Solution
from workbench.errors import InputError, RecipeError, WorkbenchError
from workbench.models import Architecture
from workbench.store import Store
from workbench.view import loop
from workbench.view.loop import Look, Settings, Trial
from workbench.view.sitting import Sitting, SittingState


@dataclass(frozen=True, kw_only=True)
class State(SittingState):
    """One moment of a sitting in which bits are picked.

    Attributes:
        architecture: of the model, once it was loaded.
        look: what was seen, once analysed.
        budget: effective bits asked for.
        budget_range: smallest and largest effective bits that the widths and pins allow; None before the analysis.
        pinned: unit id to the bits that the user fixed.
        recipe: the widths of every unit under the budget; None before the analysis, or where no choice meets it.
        trial: the last run's result; it stays while another choice is made, and says which bits it was for.
    """

    budget: float
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


class Controller(Sitting[State]):
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
        super().__init__(State(model=str(model), budget=budget), store)
        self.settings = settings or Settings()
        self._out = out

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
