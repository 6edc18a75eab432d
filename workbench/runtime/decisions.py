"""Slot values of one run: what is decided when, held how long, and in force for which token.

A mask may be long (all heads and neurons of a model), so one that is in force for many tokens is held once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.errors import EngineError
from workbench.runtime.plan import ConstantMask, Decider, Plan, Policy, Program, with_thresholds


def programs_of(plan: Plan, policy: Policy) -> dict[str, Program]:
    """Programs by slot, with the thresholds that a policy gives them."""
    found: dict[str, Program] = {}
    for decider in plan.deciders:
        program = decider.program
        if decider.slot in policy.thresholds:
            program = with_thresholds(program, policy.thresholds[decider.slot])
        found[decider.slot] = program
    return found


def slot_value(value: Any, size: int) -> np.ndarray:
    """One value of a slot: float32 () of a scalar slot, uint8 (size,) of a mask (one number stands for all entries)."""
    if size == 1:
        return np.asarray(value, np.float32).reshape(())
    found = np.asarray(value)
    if found.ndim == 0:
        found = np.full(size, found)
    if found.shape != (size,):
        raise EngineError(f"A mask of {size} entries is needed, got shape {found.shape}.")
    return found.astype(np.uint8, copy=False)


def distinct_masks(values: Sequence[Any], size: int) -> tuple[list[np.ndarray], list[int]]:
    """The distinct objects among recorded values of a slot, as ``slot_value`` gives them, and which one each is."""
    found: list[np.ndarray] = []
    known: dict[int, int] = {}  # by identity: what was held for many tokens is one object, or shares its memory
    which = []
    for value in values:
        key = value.__array_interface__["data"][0] if isinstance(value, np.ndarray) and value.ndim else id(value)
        if key not in known:
            known[key] = len(found)
            found.append(np.require(slot_value(value, size), requirements="C"))
        which.append(known[key])
    return found, which


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
        self._fixed = {slot: slot_value(v, plan.decider(slot).program.size) for slot, v in policy.values.items()}
        self._replay = replay
        self._held: dict[str, np.ndarray] = {}
        # By slot: the values of a chunk (k,) or (k, size), and which of them is in force for each of its tokens (n,).
        self._values: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._positions = np.zeros(0, dtype=np.int64)
        self._prompt_length = 0

    def begin(self, start: int, count: int, prompt_length: int) -> None:
        """Start a chunk of ``count`` tokens at position ``start``."""
        self._positions = np.arange(start, start + count)
        self._prompt_length = prompt_length
        self._values = {}
        for decider in self._plan.deciders:
            if decider.slot in self._fixed:
                self._hold(decider.slot, self._fixed[decider.slot])
            elif self._replay is not None:
                self._values[decider.slot] = self._recorded(decider)
            elif decider.scope.kind == "reply":
                value = self._held.get(decider.slot) if start >= prompt_length else None
                self._hold(decider.slot, self._initial(decider) if value is None else value)

    def decide(self, decider: Decider, taps: np.ndarray) -> None:
        """Take the decisions that fall into this chunk from taps (count, width) float32."""
        slot, scope, count = decider.slot, decider.scope, len(self._positions)
        if slot in self._fixed or self._replay is not None:
            return
        if scope.kind == "reply":
            where = np.flatnonzero(self._positions == self._prompt_length - 1)
            if len(where):
                self._held[slot] = self._programs[slot](taps[where], self._positions[where])[0]
            return
        if scope.kind == "token":
            program = self._programs[slot]
            if isinstance(program, ConstantMask):
                self._values[slot] = (program.choices, program.chosen(self._positions))
            else:
                self._values[slot] = (program(taps, self._positions), np.arange(count))
            return
        where = np.flatnonzero(self._positions % scope.n == 0)
        held = self._held.get(slot)
        choices = [(self._initial(decider) if held is None else held)[None]]
        if len(where):
            choices.append(self._programs[slot](taps[where], self._positions[where]))
        choice = np.concatenate(choices)
        last = np.searchsorted(where, np.arange(count), side="right")  # 0: still the held value
        self._values[slot] = (choice, last)
        # Copied: a view would keep the choices of the whole chunk.
        self._held[slot] = choice[last[-1]].copy()

    def fixed(self, slot: str) -> bool:
        """Whether a policy gives the slot a value, so that nothing is decided."""
        return slot in self._fixed

    def in_force(self, slot: str) -> np.ndarray:
        """Values for the chunk's tokens: float32 (count,), of a mask uint8 (count, size)."""
        values, which = self._values[slot]
        return values[which]

    def mask(self, slot: str, begin: int, end: int) -> np.ndarray:
        """Entries ``begin`` to ``end`` of a mask, for the chunk's tokens, uint8 (count, end - begin)."""
        values, which = self._values[slot]
        return values.reshape(len(values), -1)[:, begin:end][which]

    def record(self, index: int) -> dict[str, Any]:
        """The decisions in force at the chunk's token ``index``: plain numbers, and masks uint8 (size,).

        Tokens for which one decision is in force share its mask, which is not to be written to.
        """
        found: dict[str, Any] = {}
        for slot, (values, which) in self._values.items():
            value = values[which[index]]
            if value.ndim == 0:
                found[slot] = float(value)
                continue
            value.flags.writeable = False
            found[slot] = value
        return found

    def _hold(self, slot: str, value: np.ndarray) -> None:
        self._values[slot] = (value[None], np.zeros(len(self._positions), np.int64))

    def _initial(self, decider: Decider) -> np.ndarray:
        return slot_value(decider.default, decider.program.size)

    def _recorded(self, decider: Decider) -> tuple[np.ndarray, np.ndarray]:
        replay = self._replay or ()
        end = int(self._positions[-1]) + 1
        if end > len(replay):
            raise EngineError(f"The recorded decisions end at position {len(replay)}, position {end} was asked.")
        values = [replay[position][decider.slot] for position in self._positions.tolist()]
        found, which = distinct_masks(values, decider.program.size)
        return np.stack(found), np.asarray(which)
