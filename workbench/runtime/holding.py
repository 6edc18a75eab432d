"""Hold an average over tokens on its target: what is asked of the tokens to come follows from what was, so far.

Thresholds come from calibration text, and other text scores otherwise, so what holds an average there gives something
else here. A controller looks at tokens that are done and moves the thresholds of those to come, never the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from workbench.runtime.base import Engine, EngineSequence, StepTrace
from workbench.runtime.plan import Policy

_EVERY = 8  # tokens between two changes: looking at a step in Python takes a tenth of a millisecond
# Tokens within which what was too much or too little is made up for: half as many as were seen, so that the average is
# near its target after any of them, within bounds. What is whole at the beginning of a text takes what 32 later tokens
# make up for; over 512 tokens texts of a sitting even out.
_SOONEST, _LATEST = 32, 512


class Follower:
    """What calibration should predict for the next tokens, so that the average of all of them comes to the target.

    What tokens took beyond what calibration predicts for their thresholds is averaged over the latest of them; the next
    aim is the target less that, and less what is to be made up for.

    Attributes:
        target: of the average.
        tokens: seen so far.
    """

    def __init__(self, target: float) -> None:
        self.target, self.tokens = target, 0
        self._total = 0.0
        self._beyond, self._weight = 0.0, 0.0  # beyond the prediction, and the tokens that is summed over

    @property
    def average(self) -> float:
        """Of the tokens seen so far, NaN before the first."""
        return self._total / self.tokens if self.tokens else float("nan")

    def count(self, values: np.ndarray) -> None:
        """Take in tokens whose values (n,) no threshold chose: they count in the average alone."""
        self.tokens += len(values)
        self._total += float(values.sum())

    def see(self, values: np.ndarray, expected: float) -> None:
        """Take in tokens of values (n,) under thresholds that calibration predicts ``expected`` for."""
        self.count(values)
        self._beyond += float((values - expected).sum())
        self._weight += len(values)
        if self._weight > _LATEST:
            self._beyond *= _LATEST / self._weight
            self._weight = _LATEST

    def aim(self, soonest: int = 0) -> float:
        """What calibration should predict for what comes next; ``soonest`` tokens are the fewest to make up within."""
        horizon = max(min(max(self.tokens / 2, _SOONEST), _LATEST), soonest)
        debt = (self._total - self.target * self.tokens) / horizon
        return self.target - (self._beyond / self._weight if self._weight else 0.0) - debt


class Controller(Protocol):
    """Looks at what tokens did, and says by what policy the next ones run."""

    @property
    def policy(self) -> Policy: ...

    def observe(self, steps: Sequence[StepTrace]) -> None: ...


class Held:
    """A text that a controller watches: ``on_token`` of ``Engine.generate``, and its ``look`` is ``between``.

    Thresholds change between two pieces of the prompt and every few tokens of the reply, each time after what was read
    before: no token's choice depends on a later token.

    Args:
        engine: whose policy is set.
        sequence: of it.
        controller: that watches.
        seen: called with the steps of each look and the policy that they ran under.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: EngineSequence,
        controller: Controller,
        seen: Callable[[Sequence[StepTrace], Policy], None] | None = None,
    ) -> None:
        self._engine, self._sequence = engine, sequence
        self.controller, self._tell = controller, seen
        self._seen = 0

    def __call__(self, token: int) -> None:
        """Look now and then, as tokens of the reply are chosen."""
        if not self._seen or self._sequence.position - self._seen >= _EVERY:
            self.look()

    def look(self) -> None:
        """Look at what was done since the last look, and change the thresholds of the tokens to come."""
        self.finish()
        self._engine.set_policy(self.controller.policy)

    def finish(self) -> None:
        """Look at the last tokens, so that the controller has seen the whole text."""
        done = self._sequence.position
        steps = self._sequence.trace[self._seen : done]
        if self._tell is not None:
            self._tell(steps, self.controller.policy)
        self.controller.observe(steps)
        self._seen = done
