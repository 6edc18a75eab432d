"""Hold the share of weights that is left out on what was asked for (``runtime.holding``).

A tuned predictor leaves out less where text is hard, and inputs of another text are larger or smaller: thresholds of
calibration then give another share. The controller asks tables for another sparsity than the user did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.formats.input_cuts import InputCuts
from workbench.formats.mask_predictor import MaskPredictor
from workbench.models.base import Architecture
from workbench.runtime.base import StepTrace
from workbench.runtime.holding import Follower
from workbench.runtime.input_sparsity import expected_sparsity, input_shares, input_thresholds
from workbench.runtime.mask_shares import expected_left_out, highest_sparsity, mask_thresholds, total_weights
from workbench.runtime.masks import slot_thresholds
from workbench.runtime.plan import Policy

_GRID = 25  # sparsities that thresholds are made for once; between two of them they lie on a straight line
_FACTOR = 3.0  # the sparsity asked of tables stays within this factor of the user's


class ShareController:
    """Thresholds under which the tokens seen leave out, on average, the share of weights that was asked for.

    Args:
        architecture: of the model.
        tables: its predictor of heads and neurons, or the quantiles of its inputs.
        sparsity: as of ``mask_plan`` or ``input_plan``.
        first: tokens at the beginning of a text that stay whole and are not made up for; None for as many as the
            tables were made with.
        options: ``allocation``, ``heads`` and ``protected`` of ``mask_plan``, as they were given to it.

    Attributes:
        target: share of all weights of the blocks; masks leave keys and values whole.

    Raises:
        InputError: a sparsity that is not possible.
    """

    def __init__(
        self,
        architecture: Architecture,
        tables: MaskPredictor | InputCuts,
        sparsity: float,
        *,
        first: int | None = None,
        **options: Any,
    ) -> None:
        if not sparsity > 0:
            raise InputError(f"A sparsity of {sparsity:g} leaves nothing to hold: give one above 0.")
        whole = sum(unit.n_weights for unit in architecture.units)
        if isinstance(tables, MaskPredictor):
            made_with, highest = int(tables.facts["prefix"]), highest_sparsity(architecture, tables, **options)
            self.target = sparsity * total_weights(architecture) / whole
        else:
            input_shares(tables, sparsity)  # refuses what may not be asked for
            # Beyond the highest target, so that it too is held where text leaves out less than calibration's.
            made_with, highest, self.target = int(tables.first), (1 + tables.highest) / 2, sparsity
        self._first = made_with if first is None else first
        self._grid = np.linspace(sparsity / _FACTOR, max(min(sparsity * _FACTOR, highest), sparsity), _GRID)
        made = []
        for asked in self._grid:
            if isinstance(tables, MaskPredictor):
                found = mask_thresholds(architecture, tables, float(asked), **options)
                made.append((slot_thresholds(tables, found), expected_left_out(architecture, tables, found)))
            else:
                cuts = input_thresholds(architecture, tables, float(asked), beyond=True)
                made.append((cuts, expected_sparsity(architecture, tables, cuts)))
        self._slots = {slot: np.array([thresholds[slot] for thresholds, _ in made]) for slot in made[0][0]}
        self._expected = np.maximum.accumulate([expected for _, expected in made])
        self._asked = sparsity
        self._follower = Follower(self.target)

    @property
    def realised(self) -> float:
        """Share of all weights that the tokens seen left out, first ones apart; NaN before any."""
        return self._follower.average

    @property
    def asked(self) -> float:
        """Sparsity that tables are asked for now."""
        return self._asked

    @property
    def policy(self) -> Policy:
        place = float(np.interp(self._asked, self._grid, np.arange(_GRID)))
        below = min(int(place), _GRID - 2)
        part = place - below
        between = {slot: rows[below] + part * (rows[below + 1] - rows[below]) for slot, rows in self._slots.items()}
        return Policy(thresholds={slot: tuple(row.tolist()) for slot, row in between.items()})

    def observe(self, steps: Sequence[StepTrace]) -> None:
        """Take in steps that are done, and that ran under ``policy`` as it is before this call."""
        left = np.array([1 - step.kept_weights for step in steps if step.position >= self._first])
        if not len(left):
            return
        self._follower.see(left, float(np.interp(self._asked, self._grid, self._expected)))
        self._asked = float(np.interp(self._follower.aim(len(left)), self._expected, self._grid))
