"""A sitting with outliers, without any UI toolkit: where they are, what protects from them, and what that gives."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.profile import Profile
from workbench.apply.awq_predict import PredictedUnit
from workbench.errors import InputError, WorkbenchError
from workbench.formats.compressed import CompressedModel
from workbench.models import Architecture
from workbench.operate.fits import fitted
from workbench.store import Store
from workbench.view import outliers_loop
from workbench.view.outliers_loop import Look
from workbench.view.outliers_picks import Method, OutlierSettings, Protection, Rounding
from workbench.view.outliers_trial import ChannelTrial, try_recipes
from workbench.view.sitting import Sitting, SittingState

PREDICTING = "Predicting"


@dataclass(frozen=True)
class Totals:
    """Every unit under a protection: the table of ``predict_all``, and the protection that it is of."""

    protection: Protection
    table: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class OutlierState(SittingState):
    """One moment of a sitting with outliers.

    Attributes:
        method: what is picked: ``awq`` (a protection of weights) or ``tender`` (groups of integer inputs).
        architecture: of the model, once it was loaded.
        look: what was seen, once analysed.
        unit: that is looked at; empty before the analysis.
        first_step: beginning of the range of steps that is looked at; None for all.
        surface: profile of ``InputSurface``; of another unit while that of this one is on its way.
        protection, rounding: picked, for the one method and for the other.
        predicted: the unit under the protection.
        totals: every unit; of another protection while those of this one are on their way.
        interventions: table of ``outliers_loop.intervene``, of the unit it was asked for.
        trial: the last run's result; it stays while something else is picked, and says what it was of.
    """

    method: Method
    architecture: Architecture | None = None
    look: Look | None = None
    unit: str = ""
    first_step: int | None = None
    surface: Profile | None = None
    protection: Protection = field(default_factory=Protection)
    rounding: Rounding = field(default_factory=Rounding)
    predicted: PredictedUnit | None = None
    totals: Totals | None = None
    interventions: pd.DataFrame | None = None
    trial: ChannelTrial | None = None

    @property
    def waiting(self) -> bool:
        """Whether work that is asked for by hand can begin: a prediction under way makes room for it."""
        return self.busy in ("", PREDICTING) and not self.cancelling

    @property
    def picked(self) -> Protection | Rounding:
        """What is picked, of the method."""
        return self.protection if self.method == "awq" else self.rounding

    @property
    def picked_name(self) -> str:
        """What is picked, in a word."""
        if self.method == "awq":
            kept = f", {100 * self.protection.share:g} % kept" if self.protection.share else ""
            return f"awq{kept}, {self.protection.bits} bits"
        return f"tender, {self.rounding.bits} bits"

    @cached_property
    def channels(self) -> pd.DataFrame | None:
        """The unit's input channels at the steps that are looked at (``Look.channels``); None before the analysis."""
        return None if self.look is None else self.look.channels(self.unit, self.first_step)

    @property
    def current_surface(self) -> Profile | None:
        """The surface, if it is that of the unit."""
        if self.surface is None or self.surface.provenance.parameters["unit"] != self.unit:
            return None
        return self.surface

    @cached_property
    def every_unit(self) -> pd.DataFrame | None:
        """What is picked, predicted for every unit: ``block``, ``unit``, ``error``, ``plain``; None while not known.

        ``plain`` is that of rounding at the same bits without what is picked.
        """
        if self.method == "tender":
            if self.look is None or self.look.groups is None:
                return None
            return outliers_loop.predicted_groups(self.look.groups.table, self.rounding)
        if self.totals is None or self.totals.protection != self.protection:
            return None
        return self.totals.table.rename(columns={"rounded": "plain"})

    @property
    def scaling(self) -> tuple[str, np.ndarray] | None:
        """What the unit's input channels are divided by under what is picked, (in,), and what to call it."""
        if self.look is None or self.channels is None:
            return None
        if self.method == "awq":
            found = self.predicted
            if found is None or found.scales is None:
                return "divided by AWQ's scales (none: as it is)", np.ones(len(self.channels))
            return f"divided by AWQ's scales, exponent {found.alpha:.2f}", found.scales.numpy().astype(np.float64)
        every = self.every_unit
        own = every[every["unit"] == self.unit] if every is not None else None
        groups = int(own["groups"].iloc[0]) if own is not None and len(own) else self.rounding.groups or 1
        factors = outliers_loop.group_factors(self.look, self.unit, self.rounding, groups)
        return f"divided by the scales of {groups} groups", factors


class OutlierSitting(Sitting[OutlierState]):
    """State and actions.

    Args:
        model: what ``models.load`` takes.
        method: ``awq`` or ``tender``: what is picked.
        unit: that is looked at first; empty for the one with the largest activation relative to its other channels.
        settings: how much is looked at and measured.
        store: where analyses and fits are kept; None opens the default store.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        method: Method = "awq",
        unit: str = "",
        settings: OutlierSettings | None = None,
        store: Store | None = None,
    ) -> None:
        if method not in ("awq", "tender"):
            raise InputError(f"method='{method}' is not possible: choose 'awq' or 'tender'.")
        super().__init__(OutlierState(model=str(model), method=method, unit=unit), store)
        self.settings = settings or OutlierSettings()
        self._before_predicting = ""

    # Actions: quick, in the caller's thread ------------------------------------------------------------------------

    def select_unit(self, unit: str) -> None:
        """Look at another unit: its channels and its prediction at once, its surface when the worker has it.

        An unknown one becomes ``state.error``.
        """
        state = self._state
        if state.architecture is None or state.look is None:
            return
        try:
            state.architecture.unit(unit)
            predicted = self._predicted(unit, state.protection)
        except WorkbenchError as error:
            self._change(error=str(error))
            return
        self._change(unit=unit, predicted=predicted, error="")
        self._follow()

    def select_steps(self, first_step: int | None) -> None:
        """Look at the range of steps that begins there, or at all. An unknown one becomes ``state.error``."""
        seen = self._state.look
        if seen is not None and first_step is not None and first_step not in seen.first_steps:
            known = ", ".join(map(str, seen.first_steps))
            self._change(error=f"No range of steps begins at {first_step}: choose one of {known}, or all.")
            return
        self._change(first_step=first_step, error="")

    def set_protection(self, **changes: Any) -> None:
        """Pick other values of ``Protection``: predictions follow. Impossible ones become ``state.error``."""
        try:
            picked = replace(self._state.protection, **changes)
            picked.awq(self.settings.calibration_tokens)
            picked.salient(self.settings.calibration_tokens)
            predicted = self._predicted(self._state.unit, picked)
        except WorkbenchError as error:
            self._change(error=str(error))
            return
        self._change(protection=picked, predicted=predicted, error="")
        self._follow()

    def set_rounding(self, **changes: Any) -> None:
        """Pick other values of ``Rounding``: predictions follow. Impossible ones become ``state.error``."""
        try:
            picked = replace(self._state.rounding, **changes)
            picked.tender(self.settings.calibration_tokens)
        except WorkbenchError as error:
            self._change(error=str(error))
            return
        self._change(rounding=picked, error="")

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; their numbers while the model is not loaded."""
        return self._dense.decode(tokens, skip_special_tokens=False) if self._dense is not None else str(list(tokens))

    def _predicted(self, unit: str, protection: Protection) -> PredictedUnit | None:
        seen = self._state.look
        if seen is None or self._dense is None or self._state.method != "awq":
            return None
        return outliers_loop.predict(self._dense, seen, unit, protection)

    # Actions: long, in the worker ----------------------------------------------------------------------------------

    def analyse(self) -> Future[Look]:
        """Load the model and look at all its inputs.

        Raises:
            InputError: something else is under way.
        """
        return self._instead(lambda: self._start("Analysing", self._analyse))

    def intervene(self) -> Future[pd.DataFrame]:
        """Set a massive activation, and channels of the unit, to zero, and measure the divergence from dense.

        Raises:
            InputError: something else is under way, or nothing was analysed yet.
        """
        state = self._analysed()
        return self._instead(lambda: self._start("Intervening", lambda: self._intervene(state)))

    def run(self) -> Future[ChannelTrial]:
        """Carry out what is picked, and measure it beside dense and its plain rival.

        Raises:
            InputError: something else is under way, or nothing was analysed yet.
        """
        state = self._analysed()
        return self._instead(lambda: self._start("Running", lambda: self._run(state)))

    def compress(self) -> Future[CompressedModel]:
        """Carry out what is picked without measuring it; what was made before is read from the store.

        Raises:
            InputError: something else is under way, or nothing was analysed yet.
        """
        state = self._analysed()
        return self._instead(lambda: self._start("Compressing", lambda: self._compress(state)))

    def _analysed(self) -> OutlierState:
        if self._state.look is None:
            raise InputError("There is nothing to work with yet: analyse the model first.")
        return self._state

    def _analyse(self) -> Look:
        model, state = self._model(), self._state
        if state.unit:
            model.architecture.unit(state.unit)
        seen = outliers_loop.look(model, state.method, self.settings, self._store, self._job)
        unit = state.unit or _most_extreme(seen)
        self._change(architecture=model.architecture, look=seen, unit=unit)
        self._change(predicted=self._predicted(unit, self._state.protection))
        return seen

    def _intervene(self, state: OutlierState) -> pd.DataFrame:
        assert state.look is not None
        found = outliers_loop.intervene(self._model(), state.look, state.unit, self._store, self._job)
        self._change(interventions=found)
        return found

    def _compress(self, state: OutlierState) -> CompressedModel:
        model = self._model()
        recipe = list(state.picked.recipes(model, self.settings).values())[-1]
        return fitted(self._store, model, recipe, self._job)

    def _run(self, state: OutlierState) -> ChannelTrial:
        model = self._model()
        if state.every_unit is None:  # the prediction was still under way: what is measured is shown beside it
            totals = self._totals(state.protection)
            state = replace(state, totals=totals)
            self._change(totals=totals)
        assert state.every_unit is not None
        recipes = state.picked.recipes(model, self.settings)
        plain, own = (float(state.every_unit[name].sum()) for name in ("plain", "error"))
        predicted = dict(zip(recipes, (plain, own), strict=True))
        trial = try_recipes(model, recipes, predicted, self.settings, self._store, self._job)
        self._change(trial=trial)
        return trial

    # Predictions that follow what is picked, in the worker whenever it is free -------------------------------------

    def _behind(self) -> bool:
        """Whether the worker has something to catch up with."""
        state = self._state
        if state.look is None:
            return False
        return state.current_surface is None or (state.method == "awq" and state.every_unit is None)

    def _follow(self) -> None:
        with self._lock:
            if not self._state.busy and self._behind():
                self._before_predicting = self._state.message
                self._start(PREDICTING, self._catch_up)

    def _instead(self, start: Any) -> Any:
        """Start work; a prediction under way makes room for it, and is taken up again afterwards."""
        with self._lock:
            work = self._work if self._state.busy == PREDICTING else None
            if work is not None:
                self._job.cancel()
        if work is not None:
            wait_for([work])
        return start()

    def _finish(self, **changes: Any) -> None:
        predicted = self._state.busy == PREDICTING
        failed = bool(changes.get("error")) or self._job.cancelled
        if predicted and not changes.get("error"):  # what was asked for by hand is what the last line is about
            changes["message"] = self._before_predicting
        super()._finish(**changes)
        if not failed:  # something may have been picked meanwhile
            self._follow()

    def _catch_up(self) -> None:
        model = self._model()
        while self._behind():
            state = self._state
            assert state.look is not None
            if state.current_surface is None:
                surface = outliers_loop.see_surface(
                    model, state.look, state.unit, self.settings, self._store, self._job
                )
                self._change(surface=surface)
            elif (totals := self._totals(state.protection)) is not None:
                self._change(totals=totals)

    def _totals(self, protection: Protection) -> Totals | None:
        """Every unit under a protection; None where another was picked meanwhile and this is a prediction."""
        seen = self._state.look
        assert seen is not None

        def dropped() -> bool:
            return self._state.busy == PREDICTING and self._state.protection != protection

        table = outliers_loop.predict_all(self._model(), seen, protection, dropped, self._job)
        return None if table is None else Totals(protection, table)


def _most_extreme(seen: Look) -> str:
    """The unit with the largest value relative to the others of its token."""
    table = seen.massive.table
    units = table[table["site"].str.count(r"\.") == 2]
    return str(units["site"].iloc[int(units["ratio"].fillna(0).to_numpy().argmax())])
