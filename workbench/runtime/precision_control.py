"""Hold the average width on its target: thresholds follow from what was read so far.

Text that is unlike the calibration text has other norms, so thresholds that gave the target there give something else
here. The controller looks at tokens that are done and moves the price of a step (see ``runtime.precision``) for those
to come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from workbench.formats.selectors import Selectors
from workbench.models.base import Architecture
from workbench.runtime.base import Engine, EngineSequence, StepTrace
from workbench.runtime.plan import Policy
from workbench.runtime.precision import (
    WidthReader,
    bits_of_shares,
    cuts_of,
    expected_shares,
    gain_plan,
    gain_thresholds,
)
from workbench.runtime.precision_log import PrecisionLog
from workbench.runtime.precision_watch import PrecisionWatch

_FACTOR = 4.0  # thresholds stay within this factor of those of calibration
_GRID = 81  # factors between, at which shares are computed once: 3.5 % from one to the next
_EVERY = 8  # tokens between two changes: looking at a step in Python takes a tenth of a millisecond
# Tokens within which what was read too much or too little is made up for: half as many as were read, so that the
# average is near its target after any of them, within bounds. The first token at the widest takes what 32 later ones
# save at a tenth of a bit each; over 512 tokens texts of a sitting even out.
_SOONEST, _LATEST = 32, 512


class PrecisionController:
    """Thresholds of the rule ``gain`` that keep the average of all tokens seen on a target.

    What tokens read beyond what calibration predicts for their thresholds is averaged over the latest of them; the next
    thresholds are those for which calibration predicts the target less that, and less what is to be made up for.

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
        self._tokens, self._bits = 0, 0.0
        self._beyond, self._weight = 0.0, 0.0  # bits read beyond the prediction, and the tokens they are summed over
        self._read = WidthReader(architecture, gain_plan(architecture, selectors, self._start))
        cuts = cuts_of(architecture, selectors, self._start)
        self._grid = np.linspace(-math.log(_FACTOR), math.log(_FACTOR), _GRID)
        self._shares = np.stack([expected_shares(selectors, cuts * math.exp(scale)) for scale in self._grid])
        self._expected = np.array([bits_of_shares(architecture, selectors, shares) for shares in self._shares])

    @property
    def realised(self) -> float:
        return self._bits / self._tokens if self._tokens else float("nan")

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
        self._tokens += len(read)
        self._bits += float(read.sum())
        chosen = np.array(
            [step.position > 0 for step in steps]
        )  # first tokens are read at the widest, whatever they are
        if self._safe or not chosen.any():
            return
        count = int(chosen.sum())
        expected = float(np.interp(self._scale, self._grid, self._expected))
        self._beyond += float((read[chosen] - expected).sum())
        self._weight += count
        if self._weight > _LATEST:
            self._beyond *= _LATEST / self._weight
            self._weight = _LATEST
        self.watch.see(levels[chosen], self._shares_now())
        if self._hold:
            horizon = max(min(max(self._tokens / 2, _SOONEST), _LATEST), len(read))
            debt = (self._bits - self.target * self._tokens) / horizon
            wanted = self.target - self._beyond / self._weight - debt
            self._scale = float(np.interp(wanted, self._expected[::-1], self._grid[::-1]))

    def _shares_now(self) -> np.ndarray:
        """Predicted share of tokens that take each step under the thresholds in force, float64 (U, W - 1)."""
        place = (self._scale - self._grid[0]) / (self._grid[1] - self._grid[0])
        below = min(max(int(place), 0), _GRID - 2)
        return self._shares[below] + (place - below) * (self._shares[below + 1] - self._shares[below])


class Held:
    """A text whose average a controller watches: ``on_token`` of ``Engine.generate``, and its ``look`` is ``between``.

    Thresholds change between two pieces of the prompt and every few tokens of the reply, each time after what was read
    before: no token's choice depends on a later token.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: EngineSequence,
        controller: PrecisionController,
        log: PrecisionLog | None = None,
    ) -> None:
        self._engine, self._sequence = engine, sequence
        self.controller, self.log = controller, log
        self._seen = 0

    def __call__(self, token: int) -> None:
        """Look now and then, as tokens of the reply are chosen."""
        if not self._seen or self._sequence.position - self._seen >= _EVERY:
            self.look()

    def look(self) -> None:
        """Look at what was read since the last look, and change the thresholds of the tokens to come."""
        self.finish()
        self._engine.set_policy(self.controller.policy)

    def finish(self) -> None:
        """Look at the last tokens, so that the controller's average covers the whole text."""
        done = self._sequence.position
        steps = self._sequence.trace[self._seen : done]
        if self.log is not None:
            self.log = self.log.added(self._engine.model.architecture, steps, self.controller.policy.thresholds)
        self.controller.observe(steps)
        self._seen = done
