"""Hold the average width on its target while decoding: thresholds follow from what was read so far.

Text that is unlike the calibration text has other norms, so thresholds that gave the target there give something else
here. The controller looks at tokens that are done and moves the price of a step (see ``runtime.precision``) for those
to come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workbench.formats.selectors import Selectors
from workbench.models.base import Architecture
from workbench.runtime.base import StepTrace
from workbench.runtime.plan import Policy
from workbench.runtime.precision import WidthReader, cuts_of, expected_bits, gain_plan, gain_thresholds

_HORIZON = 512  # tokens within which what was read too much or too little is made up for
_DAMPING = 0.5  # share of the measured distance that one update corrects: blocks of tokens differ by chance
_FACTOR = 4.0  # thresholds stay within this factor of those of calibration


class PrecisionController:
    """Thresholds of the rule ``gain`` that keep the average of all tokens seen on a target.

    Args:
        architecture: of the model.
        selectors: its statistics.
        target: average bits of codes.

    Attributes:
        realised: average bits of the tokens seen so far, NaN before the first.
        policy: thresholds for the tokens to come.
    """

    def __init__(self, architecture: Architecture, selectors: Selectors, target: float) -> None:
        self.target = target
        self._start = gain_thresholds(architecture, selectors, target)
        self._scale = 0.0  # logarithm of the factor on all thresholds
        self._tokens, self._bits = 0, 0.0
        self._read = WidthReader(architecture, gain_plan(architecture, selectors, self._start))
        cuts = cuts_of(architecture, selectors, self._start)
        around = [expected_bits(architecture, selectors, cuts * np.exp(shift)) for shift in (-0.1, 0.1)]
        # Bits by which the average falls where all thresholds grow e-fold; never so flat that a small error runs away.
        self._slope = max((around[0] - around[1]) / 0.2, 0.2)

    @property
    def realised(self) -> float:
        return self._bits / self._tokens if self._tokens else float("nan")

    @property
    def policy(self) -> Policy:
        factor = float(np.exp(self._scale))
        return Policy(thresholds={name: tuple(cut * factor for cut in cuts) for name, cuts in self._start.items()})

    def observe(self, steps: Sequence[StepTrace]) -> None:
        """Take in steps that are done.

        Raises:
            EngineError: steps of another plan.
        """
        if not steps:
            return
        read = self._read(steps)
        self._tokens += len(read)
        self._bits += float(read.sum())
        debt = (self._bits - self.target * self._tokens) / max(_HORIZON, len(read))
        # A block of few tokens says little about the average, and moves it by as little.
        trust = _DAMPING * min(1.0, len(read) / 64)
        shift = (trust * (float(read.mean()) - self.target) + trust * debt) / self._slope
        self._scale = float(np.clip(self._scale + shift, -np.log(_FACTOR), np.log(_FACTOR)))
