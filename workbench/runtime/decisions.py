"""Slot values of one run: what is decided when, held how long, and in force for which token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from workbench.errors import EngineError
from workbench.runtime.plan import Decider, Plan, Policy, Program


def programs_of(plan: Plan, policy: Policy) -> dict[str, Program]:
    """Programs by slot, with the thresholds that a policy gives them."""
    found: dict[str, Program] = {}
    for decider in plan.deciders:
        program: Any = decider.program
        if decider.slot in policy.thresholds:
            program = replace(program, thresholds=tuple(policy.thresholds[decider.slot]))
        found[decider.slot] = program
    return found


class Decisions:
    """The slots of one sequence.

    Tokens are fed in chunks: ``begin`` sets the positions of a chunk, ``decide`` is called when a decider's tap is
    known for the whole chunk, ``in_force`` gives the value for each token of the chunk. A chunk never spans the end
    of the prompt when the plan has a decider of scope ``reply`` (the engine splits there).

    Args:
        plan: the deciders.
        policy: fixed values that replace decisions.
        replay: recorded decisions per position (slot to value) that replace decisions.
        programs: of the plan's slots, by slot; whoever changes this mapping changes the decisions of every sequence
            that holds it. None for the plan's own.
    """

    def __init__(
        self,
        plan: Plan,
        policy: Policy,
        replay: Sequence[Mapping[str, Any]] | None = None,
        programs: Mapping[str, Program] | None = None,
    ) -> None:
        self._plan = plan
        self._programs = programs if programs is not None else programs_of(plan, policy)
        self._policy = policy
        self._replay = replay
        self._held: dict[str, np.ndarray] = {}
        self._values: dict[str, np.ndarray] = {}
        self._positions = np.zeros(0, dtype=np.int64)
        self._prompt_length = 0

    def begin(self, start: int, count: int, prompt_length: int) -> None:
        """Start a chunk of ``count`` tokens at position ``start``."""
        self._positions = np.arange(start, start + count)
        self._prompt_length = prompt_length
        self._values = {}
        for decider in self._plan.deciders:
            known = self._fixed(decider, count)
            if known is None and decider.scope.kind == "reply":
                value = self._held.get(decider.slot) if start >= prompt_length else None
                known = _spread(decider.default if value is None else value, decider.program.size, count)
            if known is not None:
                self._values[decider.slot] = known

    def decide(self, decider: Decider, taps: np.ndarray) -> None:
        """Take the decisions that fall into this chunk from taps (count, width) float32."""
        slot, scope, count = decider.slot, decider.scope, len(self._positions)
        if self._fixed(decider, count) is not None:
            return
        if scope.kind == "reply":
            where = np.flatnonzero(self._positions == self._prompt_length - 1)
            if len(where):
                self._held[slot] = self._programs[slot](taps[where], self._positions[where])[0]
            return
        if scope.kind == "token":
            self._values[slot] = self._programs[slot](taps, self._positions)
            return
        where = np.flatnonzero(self._positions % scope.n == 0)
        held = self._held.get(slot, np.float32(decider.default))
        choices = [_spread(held, decider.program.size, 1)]
        if len(where):
            choices.append(self._programs[slot](taps[where], self._positions[where]))
        choice = np.concatenate(choices)
        last = np.searchsorted(where, np.arange(count), side="right")  # 0: still the held value
        self._values[slot] = choice[last]
        self._held[slot] = choice[last[-1]]

    def in_force(self, slot: str) -> np.ndarray:
        """Values for the chunk's tokens, float32 (count,) or (count, size)."""
        return self._values[slot]

    def record(self, index: int) -> dict[str, Any]:
        """The decisions in force at the chunk's token ``index``, as plain numbers and tuples."""
        return {
            slot: float(values[index]) if values.ndim == 1 else tuple(values[index].tolist())
            for slot, values in self._values.items()
        }

    def _fixed(self, decider: Decider, count: int) -> np.ndarray | None:
        if decider.slot in self._policy.values:
            return _spread(self._policy.values[decider.slot], decider.program.size, count)
        if self._replay is None:
            return None
        end = int(self._positions[-1]) + 1
        if end > len(self._replay):
            raise EngineError(f"The recorded decisions end at position {len(self._replay)}, position {end} was asked.")
        rows = [np.asarray(self._replay[p][decider.slot], dtype=np.float32) for p in self._positions.tolist()]
        return np.stack(rows)


def _spread(value: float | np.floating | np.ndarray, size: int, count: int) -> np.ndarray:
    """One value for ``count`` tokens: (count,) for a scalar slot, (count, size) for a mask."""
    shape = (count,) if size == 1 else (count, size)
    return np.broadcast_to(np.asarray(value, dtype=np.float32), shape).copy()
