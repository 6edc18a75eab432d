"""A sitting with widths chosen per token, without any UI toolkit: the target, thresholds moved by hand, a run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.analysis.precision import require_selectors
from workbench.analysis.precision_thresholds import (
    average_bits,
    chosen_widths,
    expected_average,
    policy_thresholds,
    thresholds,
    with_threshold,
)
from workbench.analysis.profile import Profile
from workbench.errors import InputError, WorkbenchError
from workbench.formats.compressed import CompressedModel
from workbench.models import LoadedModel
from workbench.runtime.precision import Rule, target_range
from workbench.store import Store
from workbench.view import precision_loop
from workbench.view.precision_loop import PrecisionSettings, TargetTrial
from workbench.view.sitting import Sitting, SittingState


@dataclass(frozen=True, kw_only=True)
class PrecisionState(SittingState):
    """One moment of a sitting in which widths are chosen per token.

    Attributes:
        target: average bits asked for.
        rule: that chooses the widths.
        compressed: the model, once it was made or read.
        possible: lowest and highest target; None before.
        look: profile of ``PrecisionSteps``, once analysed.
        cuts: table of ``analysis.precision_thresholds.thresholds`` for the target, with those moved by hand.
        expected: average bits on calibration text under ``cuts``.
        moved: units and narrower widths whose threshold was moved by hand.
        trial: the last run's result; it stays while another target is chosen, and says which it was for.
    """

    target: float
    rule: Rule = "gain"
    compressed: CompressedModel | None = None
    possible: tuple[float, float] | None = None
    look: Profile | None = None
    cuts: pd.DataFrame | None = None
    expected: float | None = None
    moved: frozenset[tuple[str, int]] = frozenset()
    trial: TargetTrial | None = None

    @cached_property
    def choices(self) -> pd.DataFrame | None:
        """What the thresholds as they are would choose at the steps that were looked at, inputs as they were seen.

        Columns of ``analysis.precision_thresholds.chosen_widths``. None before there are both, and where other widths
        were looked at: under the rule ``error`` another target compares others.
        """
        if self.look is None or self.cuts is None:
            return None
        if self.rule == "error" and self.look.provenance.parameters["target"] != self.target:
            return None
        return chosen_widths(self.look.table, self.cuts, self.rule)

    @property
    def seen(self) -> float | None:
        """Average bits of ``choices`` over all their tokens and weights."""
        if self.choices is None or self.compressed is None:
            return None
        return float(average_bits(self.choices, self.compressed.architecture).mean())


class PrecisionSitting(Sitting[PrecisionState]):
    """State and actions.

    Args:
        model: what ``models.load`` takes, or the folder of a compressed model with selectors.
        target: average bits of codes to begin with.
        rule: ``gain``, or ``error`` for DP-LLM as published.
        settings: how the model is made, and how much is looked at and measured.
        store: where fits and analyses are kept; None opens the default store.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        target: float = 3.5,
        rule: Rule = "gain",
        settings: PrecisionSettings | None = None,
        store: Store | None = None,
    ) -> None:
        super().__init__(PrecisionState(model=str(model), target=float(target), rule=rule), store)
        self.settings = settings or PrecisionSettings()

    # Actions: quick, in the caller's thread ------------------------------------------------------------------------

    def set_target(self, bits: float) -> None:
        """Ask for another average: thresholds follow at once, no byte of the model changes, moved ones are dropped."""
        self._change(target=float(bits), **self._decided(float(bits), self._state.rule))

    def set_rule(self, rule: Rule) -> None:
        """Choose by another rule; what was seen was chosen by the one before, so it is dropped."""
        self._change(rule=rule, look=None, **self._decided(self._state.target, rule))

    def move_threshold(self, unit: str, low: int, threshold: float) -> None:
        """Move the threshold of one step of one unit. An impossible one becomes ``state.error``."""
        state = self._state
        if state.compressed is None or state.cuts is None:
            return
        arch, selectors = state.compressed.architecture, require_selectors(state.compressed)
        try:
            cuts = with_threshold(arch, selectors, state.cuts, unit, low, threshold, state.rule)
        except WorkbenchError as error:
            self._change(error=str(error))
            return
        self._change(**self._follows(cuts, state.moved | {(unit, low)}))

    def reset_thresholds(self) -> None:
        """Back to the thresholds of the target."""
        self._change(**self._decided(self._state.target, self._state.rule))

    def _decided(self, target: float, rule: Rule) -> dict[str, Any]:
        """The parts of the state that follow from a target and a rule."""
        compressed = self._state.compressed
        if compressed is None:
            return {"error": ""}
        try:
            cuts = thresholds(compressed.architecture, require_selectors(compressed), target, rule)
        except WorkbenchError as error:
            return {"cuts": None, "expected": None, "moved": frozenset(), "error": str(error)}
        return self._follows(cuts, frozenset())

    def _follows(self, cuts: pd.DataFrame, moved: frozenset[tuple[str, int]]) -> dict[str, Any]:
        """The parts of the state that follow from thresholds."""
        compressed = self._state.compressed
        assert compressed is not None
        expected = expected_average(compressed.architecture, require_selectors(compressed), cuts)
        return {"cuts": cuts, "moved": moved, "expected": expected, "error": ""}

    # Actions: long, in the worker ----------------------------------------------------------------------------------

    def analyse(self) -> Future[Profile]:
        """Make or read the model, let it reply at the target, and look at what was chosen at every step.

        Raises:
            InputError: something else is under way.
        """
        return self._start("Analysing", self._analyse)

    def run(self) -> Future[TargetTrial]:
        """Generate and measure at the target, with the thresholds as they are.

        Raises:
            InputError: something else is under way, or there are no thresholds yet.
        """
        state = self._state
        if state.compressed is None or state.cuts is None:
            raise InputError(
                "There is nothing to run with yet: analyse the model, and choose a target that is possible."
            )
        return self._start("Running", lambda: self._run(state))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; their numbers while the model is not loaded."""
        return self._dense.decode(tokens, skip_special_tokens=False) if self._dense is not None else str(list(tokens))

    def _opened(self) -> tuple[LoadedModel, CompressedModel]:
        compressed = self._state.compressed
        if self._dense is None or compressed is None:
            self._dense, compressed = precision_loop.opened(self._state.model, self.settings, self._store, self._job)
            selectors = require_selectors(compressed)
            low, high = target_range(compressed.architecture, selectors)
            target = min(max(self._state.target, low), high)
            self._change(compressed=compressed, possible=(low, high), target=target)
            self._change(**self._decided(target, self._state.rule))
        return self._dense, compressed

    def _analyse(self) -> Profile:
        _, compressed = self._opened()
        state = self._state
        seen = precision_loop.look_at_choices(
            compressed, state.target, state.rule, self.settings, self._store, self._job
        )
        if self._state.rule == state.rule:  # another may have been chosen meanwhile, and what was seen is not its own
            self._change(look=seen)
        return seen

    def _run(self, state: PrecisionState) -> TargetTrial:
        dense, compressed = self._opened()
        own = None
        if state.moved and state.cuts is not None:
            own = policy_thresholds(compressed.architecture, require_selectors(compressed), state.cuts, state.rule)
        trial = precision_loop.try_target(
            dense, compressed, state.target, state.rule, own, self.settings, self._store, self._job
        )
        self._change(trial=trial)
        return trial
