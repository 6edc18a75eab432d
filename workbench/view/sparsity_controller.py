"""A sitting with contextual sparsity, without any UI toolkit: what is left out, what mattered, and what that costs."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.mask_steps import MaskOutcomes, ScoredText, outcomes, plan_masks, true_masks
from workbench.errors import InputError, WorkbenchError
from workbench.measure.sparse_plans import sparse_plan
from workbench.store import Store
from workbench.view import sparsity_loop
from workbench.view.sitting import Sitting, SittingState
from workbench.view.sparsity_loop import Look, Tables
from workbench.view.sparsity_picks import CONTROL, Method, SparsityPick, SparsitySettings
from workbench.view.sparsity_trial import SparsityTrial, try_pick

_RIVALS: tuple[Method, ...] = ("predicted", "static", "random")  # masks whose counts are shown beside the pick's


@dataclass(frozen=True, kw_only=True)
class SparsityState(SittingState):
    """One moment of a sitting with contextual sparsity.

    Attributes:
        pick: what is left out.
        tables: the model, once it was made or read.
        look: what was seen, once analysed.
        text: number of the text that is looked at.
        outcomes: the pick's masks beside the true ones in that text; None where inputs are left out.
        counts: the same in numbers, of the pick and of its rivals: ``line`` and the columns of
            ``MaskOutcomes.counts``; None likewise.
        predicted: KL to dense that the pick is expected to cost, nats per token; None where that is not known.
        trial: the last run's result; it stays while something else is picked, and says what it was of.
    """

    pick: SparsityPick = field(default_factory=SparsityPick)
    tables: Tables | None = None
    look: Look | None = None
    text: int = 0
    outcomes: MaskOutcomes | None = None
    counts: pd.DataFrame | None = None
    predicted: float | None = None
    trial: SparsityTrial | None = None

    @property
    def scored(self) -> ScoredText | None:
        """The text that is looked at."""
        return self.look.texts[self.text] if self.look is not None and self.look.texts else None


class SparsitySitting(Sitting[SparsityState]):
    """State and actions.

    Args:
        model: what ``models.load`` takes, or the folder of a compressed model with a mask predictor or input cuts.
        pick: to begin with; None for predicted masks at 30 %.
        settings: how the model is made, and how much is looked at and measured.
        store: where fits and analyses are kept; None opens the default store.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        pick: SparsityPick | None = None,
        settings: SparsitySettings | None = None,
        store: Store | None = None,
    ) -> None:
        super().__init__(SparsityState(model=str(model), pick=pick or SparsityPick()), store)
        self.settings = settings or SparsitySettings()

    # Actions: quick, in the caller's thread ------------------------------------------------------------------------

    def set_pick(self, **changes: Any) -> None:
        """Pick other values of ``SparsityPick``: masks and the prediction follow. Impossible ones become
        ``state.error``."""
        try:
            picked = replace(self._state.pick, **changes)
            followed = self._followed(picked, self._state.text)
        except WorkbenchError as error:
            self._change(error=str(error))
            return
        self._change(pick=picked, error="", **followed)

    def select_text(self, text: int) -> None:
        """Look at another text. An unknown one becomes ``state.error``."""
        seen = self._state.look
        if seen is None or not 0 <= text < len(seen.texts):
            many = 0 if seen is None else len(seen.texts)
            self._change(error=f"There is no text {text}: {many} were looked at, the first is 0.")
            return
        self._change(text=text, error="", **self._followed(self._state.pick, text))

    def decode(self, tokens: Any) -> str:
        """Text of token ids; their numbers while the model is not loaded."""
        tables = self._state.tables
        return str(list(tokens)) if tables is None else tables.dense.decode(tokens, skip_special_tokens=False)

    def _followed(self, pick: SparsityPick, text: int) -> dict[str, Any]:
        """The parts of the state that follow from a pick and a text.

        Raises:
            InputError: a pick that the model cannot do, or a text in which nothing is decided.
        """
        state = self._state
        if state.tables is None:
            return {}
        state.tables.of(pick)
        if state.look is None:
            return {}
        predicted = sparsity_loop.predicted_kl(state.look.curves, pick)
        if not pick.masks or not state.look.texts:
            return {"outcomes": None, "counts": None, "predicted": predicted}
        shown, counts = compared(state.tables, state.look.texts[text], pick)
        return {"outcomes": shown, "counts": counts, "predicted": predicted}

    # Actions: long, in the worker ----------------------------------------------------------------------------------

    def analyse(self) -> Future[Look]:
        """Make or read the model, look at what mattered in replies, and measure every method on sampled text.

        Raises:
            InputError: something else is under way.
        """
        return self._start("Analysing", self._analyse)

    def run(self) -> Future[SparsityTrial]:
        """Generate and measure with the pick, beside its rivals and the weights whole.

        Raises:
            InputError: something else is under way, or nothing was analysed yet.
        """
        state = self._state
        if state.tables is None or state.look is None:
            raise InputError("There is nothing to run with yet: analyse the model first.")
        return self._start("Running", lambda: self._run(state))

    def _analyse(self) -> Look:
        if self._state.tables is None:
            self._change(tables=sparsity_loop.opened(self._state.model, self.settings, self._store, self._job))
        tables = self._state.tables
        assert tables is not None
        self._change(pick=_possible(tables, self._state.pick))
        seen = sparsity_loop.look(tables, self.settings, self._store, self._job)
        self._change(look=seen, text=0)
        self._change(**self._followed(self._state.pick, 0))
        return seen

    def _run(self, state: SparsityState) -> SparsityTrial:
        assert state.tables is not None
        assert state.look is not None
        trial = try_pick(state.tables, state.look.curves, state.pick, self.settings, self._store, self._job)
        self._change(trial=trial)
        return trial

    def close(self) -> None:
        """Cancel what runs, and free the model and the worker."""
        super().close()
        self._state = replace(self._state, tables=None, look=None, outcomes=None)


def _possible(tables: Tables, pick: SparsityPick) -> SparsityPick:
    """The pick, with a method and a criterion that the model has in place of those that it has not."""
    if pick.method not in tables.methods:
        pick = replace(pick, method=tables.methods[0])
    if tables.criteria and pick.criterion not in tables.criteria:
        pick = replace(pick, criterion=tables.criteria[0])
    return pick


def compared(tables: Tables, text: ScoredText, pick: SparsityPick) -> tuple[MaskOutcomes, pd.DataFrame]:
    """A pick's masks beside the true ones in a text, and counts of it and of the other kinds of mask.

    All by the same true masks: the criterion's, at the pick's sparsity, in the steps in which choices of the pick's
    scope are in force.
    """
    model = tables.of(pick)
    assert tables.predictor is not None  # it masks heads and neurons
    prefix = int(tables.predictor.facts["prefix"])
    of_scope = replace(pick, method="predicted")
    positions, predicted = plan_masks(sparse_plan(model, of_scope.asked), text, prefix)
    true = true_masks(model.architecture, text, positions, pick.criterion, pick.sparsity, CONTROL)

    def beside(one: SparsityPick) -> MaskOutcomes:
        kept = predicted if one.method == "predicted" else true
        if one.method in ("static", "random"):  # the same mask wherever it is in force
            kept = np.broadcast_to(plan_masks(sparse_plan(model, one.asked), text, prefix)[1][-1], true.shape)
        return outcomes(text, positions, kept, true, pick.criterion)

    shown = beside(pick)
    rivals = [replace(pick, method=method) for method in _RIVALS]
    counts = [shown.counts().assign(line=pick.line)]
    counts += [beside(one).counts().assign(line=one.line) for one in rivals if one.line != pick.line]
    return shown, pd.concat(counts, ignore_index=True)
