"""Hold the average width on its target while decoding: thresholds follow from what was read so far.

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
from workbench.runtime.precision import WidthReader, cuts_of, expected_bits, gain_plan, gain_thresholds
from workbench.runtime.precision_log import PrecisionLog

_HORIZON = 512  # tokens within which what was read too much or too little is made up for
_DAMPING = 0.5  # share of the measured distance that one update corrects: blocks of tokens differ by chance
_FACTOR = 4.0  # thresholds stay within this factor of those of calibration
_EVERY = 8  # tokens between two changes: looking at a step in Python takes a tenth of a millisecond
_BAND = 0.25  # bits that the average may be off what thresholds of calibration should give, before it is said
_ENOUGH = 32  # tokens that say something about an average


class PrecisionController:
    """Thresholds of the rule ``gain`` that keep the average of all tokens seen on a target.

    Args:
        architecture: of the model.
        selectors: its statistics.
        target: average bits of codes.
        hold: move thresholds; otherwise only watch.
        fail_safe: once the text is found to be unlike the calibration text, read every unit at its widest.

    Attributes:
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
        self._unlike = 0.0  # bits beyond the target that unmoved thresholds would have read, summed over tokens
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
        if self._fail_safe and self.warning:
            return Policy(thresholds={name: (-math.inf,) * len(cuts) for name, cuts in self._start.items()})
        factor = float(np.exp(self._scale))
        return Policy(thresholds={name: tuple(cut * factor for cut in cuts) for name, cuts in self._start.items()})

    @property
    def warning(self) -> str:
        off = self._unlike / self._tokens if self._tokens >= _ENOUGH else 0.0
        if abs(off) <= _BAND:
            return ""
        return (
            f"This text is unlike the calibration text: thresholds for {self.target:g} bits read "
            f"{self.target + off:.2f} on it. Errors may be estimated as badly."
        )

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
        # To first order thresholds that were moved by this scale read so many bits less than unmoved ones would.
        self._unlike += float((read - self.target).sum()) + self._slope * self._scale * len(read)
        if not self._hold:
            return
        debt = (self._bits - self.target * self._tokens) / max(_HORIZON, len(read))
        # A block of few tokens says little about the average, and moves it by as little.
        trust = _DAMPING * min(1.0, len(read) / 64)
        shift = (trust * (float(read.mean()) - self.target) + trust * debt) / self._slope
        self._scale = float(np.clip(self._scale + shift, -np.log(_FACTOR), np.log(_FACTOR)))


class Held:
    """A text whose average a controller watches, given to ``Engine.generate`` as ``on_token``, its ``look`` as ``between``.

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
