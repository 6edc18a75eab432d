"""Hold the average width on its target, by the price of a step (``runtime.holding``, ``runtime.precision``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from workbench.formats.selectors import Selectors
from workbench.models.base import Architecture
from workbench.runtime.base import StepTrace
from workbench.runtime.holding import Follower
from workbench.runtime.plan import Policy
from workbench.runtime.precision import (
    WidthReader,
    bits_of_shares,
    cuts_of,
    expected_shares,
    gain_plan,
    gain_thresholds,
)
from workbench.runtime.precision_watch import PrecisionWatch

_FACTOR = 4.0  # thresholds stay within this factor of those of calibration
_GRID = 81  # factors between, at which shares are computed once: 3.5 % from one to the next


class PrecisionController:
    """Thresholds of the rule ``gain`` that keep the average of all tokens seen on a target.

    Args:
        architecture: of the model.
        selectors: its statistics.
        target: average bits of codes.
        hold: move thresholds; otherwise only watch.
        fail_safe: once the text is found to be unlike the calibration text, read every unit at its widest.

    Attributes:
        watch: what tells whether text is unlike the calibration text, by unit.
        realised: average bits of the tokens seen so far, NaN before the first.
        policy: thresholds for the tokens to come.
        warning: one line where the text is unlike the calibration text, else an empty string.
    """

    def __init__(
        self,
        architecture: Architecture,
        selectors: Selectors,
        target: float,
        *,
        hold: bool = True,
        fail_safe: bool = False,
    ) -> None:
        self.target, self._hold, self._fail_safe = target, hold, fail_safe
        self.watch = PrecisionWatch(architecture, selectors)
        self._start = gain_thresholds(architecture, selectors, target)
        self._scale = 0.0  # logarithm of the factor on all thresholds
        self._follower = Follower(target)
        self._read = WidthReader(architecture, gain_plan(architecture, selectors, self._start))
        cuts = cuts_of(architecture, selectors, self._start)
        self._grid = np.linspace(-math.log(_FACTOR), math.log(_FACTOR), _GRID)
        self._shares = np.stack([expected_shares(selectors, cuts * math.exp(scale)) for scale in self._grid])
        self._expected = np.array([bits_of_shares(architecture, selectors, shares) for shares in self._shares])

    @property
    def realised(self) -> float:
        return self._follower.average

    @property
    def policy(self) -> Policy:
        if self._safe:
            return Policy(thresholds={name: (-math.inf,) * len(cuts) for name, cuts in self._start.items()})
        factor = math.exp(self._scale)
        return Policy(thresholds={name: tuple(cut * factor for cut in cuts) for name, cuts in self._start.items()})

    @property
    def warning(self) -> str:
        outside = self.watch.outside
        if not outside:
            return ""
        read, expected = self.watch.bits[self.watch.index(outside[0])]
        return (
            f"This text is unlike the calibration text: {len(outside)} of {len(self._start)} units chose other widths "
            f"than such text gives, most of all {outside[0]}, which read {read:.2f} bits on average where "
            f"{expected:.2f} were expected. Errors of narrow widths may be estimated as badly."
        )

    @property
    def _safe(self) -> bool:
        """Whether everything is read at the widest."""
        return self._fail_safe and bool(self.watch.outside)

    def observe(self, steps: Sequence[StepTrace]) -> None:
        """Take in steps that are done, and that ran under ``policy`` as it is before this call.

        Raises:
            EngineError: steps of another plan.
        """
        if not steps:
            return
        levels = self._read.levels(steps)
        read = self._read.bits(levels)
        # First tokens are read at the widest, whatever they are.
        chosen = np.array([step.position > 0 for step in steps]) & (not self._safe)
        self._follower.count(read[~chosen])
        if not chosen.any():
            return
        self._follower.see(read[chosen], float(np.interp(self._scale, self._grid, self._expected)))
        self.watch.see(levels[chosen], self._shares_now())
        if self._hold:
            wanted = self._follower.aim(len(read))
            self._scale = float(np.interp(wanted, self._expected[::-1], self._grid[::-1]))

    def _shares_now(self) -> np.ndarray:
        """Predicted share of tokens that take each step under the thresholds in force, float64 (U, W - 1)."""
        place = (self._scale - self._grid[0]) / (self._grid[1] - self._grid[0])
        below = min(max(int(place), 0), _GRID - 2)
        return self._shares[below] + (place - below) * (self._shares[below + 1] - self._shares[below])
