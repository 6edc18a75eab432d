"""Plans that choose widths per token, for any target of average bits, from a compressed model's selectors.

Bits here are those of codes: the average over weights and tokens of the width that is read.

Two rules:

* ``gain``: a step of a unit is worth, at one token, its mean gain times the squared norm of the unit's input over the
  mean of that square: errors grow with the input, and what they cost with the square of the error. All steps of all
  units are taken whose worth per weight exceeds one common price, and the price follows from the target.
* ``error``: DP-LLM (Kwon et al. 2025, arXiv 2508.06041). Every unit has an average width p that was learnt for the
  target, and reads the wider of the two widths around p where an estimate of ``||dW x||`` exceeds the quantile that
  leaves a share p - floor(p) of the calibration tokens above it. The estimate is a regression on the norm where its
  R^2 is at least 0.9, else a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from workbench.errors import EngineError, InputError
from workbench.formats.selectors import Selectors, quantile, share_above
from workbench.models.base import Architecture, Unit
from workbench.runtime.base import StepTrace
from workbench.runtime.plan import (
    Consumer,
    Decider,
    NormLevels,
    Plan,
    PositionTable,
    Program,
    ProjectionLevels,
    Scope,
    Tap,
    TapKind,
)

Rule = Literal["gain", "error"]
INPUT_TAPS: dict[str, TapKind] = {
    "qkv": "block_input",
    "o": "attention_output",
    "gate_up": "mlp_input",
    "down": "mlp_inner",
}
GOOD_FIT = 0.9  # R^2 from which the norm alone estimates the error (DP-LLM)
_FIRST = 1  # positions read at the widest width: every later token attends to the first, at no cost to speak of
_OTHER_PLAN = "These steps chose no width per unit: they ran another plan."
_NEVER, _ALWAYS = 0.01, 0.99  # shares of tokens below and above which a unit does not decide (DP-LLM)


def precision_plan(architecture: Architecture, selectors: Selectors, target: float, rule: Rule = "gain") -> Plan:
    """Return the plan that holds a target of average bits on text like the calibration text.

    Under the rule ``gain`` plans of all targets differ in thresholds alone, so ``gain_thresholds`` as a policy
    changes the target of a running engine.

    Raises:
        InputError: a target outside the widths.
        EngineError: precisions or estimators that were not learnt.
    """
    if rule == "gain":
        return gain_plan(architecture, selectors, gain_thresholds(architecture, selectors, target))
    return _error_plan(architecture, selectors, target)


def target_range(architecture: Architecture, selectors: Selectors) -> tuple[float, float]:
    """Lowest and highest average bits that can be asked for."""
    return float(selectors.widths[0]), float(_shares(architecture) @ selectors.highest.astype(np.float64))


def gain_plan(architecture: Architecture, selectors: Selectors, thresholds: Mapping[str, Sequence[float]]) -> Plan:
    """Return the plan of the rule ``gain`` with these thresholds, by unit."""
    deciders, consumers = [], []
    for index, unit in enumerate(architecture.units):
        widths = _widths(selectors, index)
        deciders.append(_decider(unit, NormLevels(tuple(thresholds[unit.id]), first=_FIRST)))
        consumers.append(Consumer(unit.id, "width", unit.id, widths, widths))
    return Plan(tuple(deciders), tuple(consumers))


def gain_thresholds(architecture: Architecture, selectors: Selectors, target: float) -> dict[str, tuple[float, ...]]:
    """Thresholds on the norm of each unit's input, one per step, ascending, under which the average is ``target``.

    Args:
        architecture: of the model.
        selectors: its statistics.
        target: average bits.
    """
    _check_target(architecture, selectors, target)
    low, high = 1e-40, 1e20  # far beyond what any step is worth: at the ends all or none are taken
    for _ in range(100):
        price = float(np.sqrt(low * high))
        if expected_bits(architecture, selectors, cuts := _cuts(architecture, selectors, price)) > target:
            low = price
        else:
            high = price
    return {
        unit.id: tuple(float(cut) for cut in cuts[index, : len(_widths(selectors, index)) - 1])
        for index, unit in enumerate(architecture.units)
    }


def expected_bits(architecture: Architecture, selectors: Selectors, cuts: np.ndarray) -> float:
    """Average bits on the tokens of calibration.

    Args:
        architecture: of the model.
        selectors: its statistics.
        cuts: (U, W - 1), thresholds on the norm; infinity where a step is never taken.
    """
    return bits_of_shares(architecture, selectors, expected_shares(selectors, cuts))


def expected_shares(selectors: Selectors, cuts: np.ndarray) -> np.ndarray:
    """Share of the tokens of calibration that take each step under thresholds (U, W - 1), float64 of that shape."""
    return np.stack([share_above(kept, cut) for kept, cut in zip(selectors.norms, cuts, strict=True)])


def bits_of_shares(architecture: Architecture, selectors: Selectors, shares: np.ndarray) -> float:
    """Average bits where each step is taken by these shares of tokens, (U, W - 1)."""
    widths = selectors.widths.astype(np.float64)
    return float(widths[0] + _shares(architecture) @ (shares @ np.diff(widths)))


def cuts_of(architecture: Architecture, selectors: Selectors, thresholds: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Thresholds by unit as an array (U, W - 1), infinity where a unit does not have the step."""
    cuts = np.full((len(architecture.units), len(selectors.widths) - 1), np.inf)
    for index, unit in enumerate(architecture.units):
        cuts[index, : len(thresholds[unit.id])] = thresholds[unit.id]
    return cuts


def learnt_precision(architecture: Architecture, selectors: Selectors, target: float) -> np.ndarray:
    """Average width of each unit, float64 (U,), between the targets that were learnt (and the widths at both ends).

    Raises:
        InputError: a target outside the widths.
        EngineError: nothing was learnt.
    """
    _check_target(architecture, selectors, target)
    if not len(selectors.targets):
        raise EngineError("This model has no learnt precisions: compress it with 'targets' to learn them for.")
    low, high = target_range(architecture, selectors)
    n = len(architecture.units)
    at = np.concatenate([[low], selectors.targets, [high]])
    rows = np.vstack([np.full(n, low), selectors.precision, selectors.highest.astype(np.float64)])
    return np.array([np.interp(target, at, rows[:, unit]) for unit in range(n)])


def ladder_plan(architecture: Architecture, allocations: Sequence[Mapping[str, int]], slot: str = "level") -> Plan:
    """One slot that chooses among whole allocations (bits by unit); the first is in force until a policy says else."""
    decider = Decider(slot, Tap("residual", 0), PositionTable((0,), (0.0,)), Scope("token"))
    consumers = []
    for unit in architecture.units:
        levels = tuple(allocation[unit.id] for allocation in allocations)
        consumers.append(Consumer(slot, "width", unit.id, tuple(sorted(set(levels))), levels))
    return Plan((decider,), tuple(consumers))


def estimated_by_norm(selectors: Selectors, unit: int, step: int) -> bool:
    """Whether the norm of a unit's input tells the error of a step well enough, so that nothing is projected."""
    slope, _, fit = selectors.regression[unit, step]
    return bool(fit >= GOOD_FIT and slope > 0)


class WidthReader:
    """Average width of each step under a plan, over the weights of all units.

    Args:
        architecture: of the model.
        plan: whose consumers of width read by level.
        cost: of a unit at a width, by weight, instead of the width itself.
    """

    def __init__(
        self, architecture: Architecture, plan: Plan, cost: Callable[[str, int], float] = lambda _, bits: bits
    ) -> None:
        sizes = {unit.id: unit.n_weights for unit in architecture.units}
        used = [consumer for consumer in plan.consumers if consumer.kind == "width"]
        self._slots = [consumer.slot for consumer in used]
        self._shares = np.array([sizes[c.target] for c in used], dtype=np.float64) / sum(sizes.values())
        longest = max(len(c.levels) for c in used)
        self._levels = np.full((len(used), longest), np.nan)
        for index, consumer in enumerate(used):
            self._levels[index, : len(consumer.levels)] = [cost(consumer.target, bits) for bits in consumer.levels]

    def __call__(self, steps: Sequence[StepTrace]) -> np.ndarray:
        """Bits, float64 (n,).

        Raises:
            EngineError: steps of another plan.
        """
        return self.bits(self.levels(steps))

    def levels(self, steps: Sequence[StepTrace]) -> np.ndarray:
        """Levels that steps chose, int64 (n, consumers of width); raises as a call does."""
        try:
            found = np.array([[step.decisions[slot] for slot in self._slots] for step in steps], dtype=np.int64)
        except KeyError as error:
            raise EngineError(_OTHER_PLAN) from error
        return found.reshape(len(steps), -1)

    def bits(self, levels: np.ndarray) -> np.ndarray:
        """Bits of levels, float64 (n,); raises as a call does."""
        try:
            return self._levels[np.arange(len(self._slots)), levels] @ self._shares
        except IndexError as error:
            raise EngineError(_OTHER_PLAN) from error


def _cuts(architecture: Architecture, selectors: Selectors, price: float) -> np.ndarray:
    """Norms (U, W - 1) above which a step is worth more per weight than ``price``."""
    steps = np.diff(selectors.widths.astype(np.float64))
    worth = selectors.gains.astype(np.float64) / (_shares(architecture)[:, None] * steps)
    # Later steps are taken only after earlier ones, and a step that seems to do harm (noise) is the last to be taken.
    worth = np.minimum.accumulate(np.maximum(worth, 1e-12), axis=1)
    cuts = np.sqrt(price / worth * selectors.power.astype(np.float64)[:, None])
    return np.where(selectors.widths[1:] <= selectors.highest[:, None], cuts, np.inf)


def error_thresholds(architecture: Architecture, selectors: Selectors, target: float) -> dict[str, float]:
    """DP-LLM's threshold on the error of each unit, by id; infinite where the unit does not decide."""
    precision = learnt_precision(architecture, selectors, target)
    found = {}
    for index, unit in enumerate(architecture.units):
        step, share = _pair(selectors, index, precision[index])
        if step < 0 or share < _NEVER or share > _ALWAYS:
            found[unit.id] = -np.inf if share > _ALWAYS else np.inf
            continue
        found[unit.id] = quantile(selectors.errors[index, step], 1 - share)
    return found


def _pair(selectors: Selectors, unit: int, precision: float) -> tuple[int, float]:
    """The step that a unit decides about (-1: it has one width), and the share of tokens that take it."""
    widths = _widths(selectors, unit)
    step = min(int(np.searchsorted(widths, precision, side="right")) - 1, len(widths) - 2)
    if step < 0:
        return -1, 0.0
    return step, float((precision - widths[step]) / (widths[step + 1] - widths[step]))


def _error_plan(architecture: Architecture, selectors: Selectors, target: float) -> Plan:
    precision = learnt_precision(architecture, selectors, target)
    thresholds = error_thresholds(architecture, selectors, target)
    deciders, consumers = [], []
    for index, unit in enumerate(architecture.units):
        step, _ = _pair(selectors, index, precision[index])
        widths = _widths(selectors, index)
        pair = widths[step : step + 2] if step >= 0 else widths
        deciders.append(_decider(unit, _error_program(selectors, index, step, thresholds[unit.id])))
        consumers.append(Consumer(unit.id, "width", unit.id, pair, pair))
    return Plan(tuple(deciders), tuple(consumers))


def _error_program(selectors: Selectors, unit: int, step: int, threshold: float) -> Program:
    """Level 1 where the estimated error exceeds the threshold."""
    if not np.isfinite(threshold):
        return PositionTable((0,), (float(threshold < 0),))
    slope, intercept, _ = map(float, selectors.regression[unit, step])
    if estimated_by_norm(selectors, unit, step):
        return NormLevels(((threshold - intercept) / slope,))
    if (unit, step) not in selectors.projections:
        raise EngineError(
            "This model has no estimators for that target: it was compressed for other targets, so compress it with "
            "the targets that are wanted."
        )
    rows, steps = selectors.projections[unit, step]
    return ProjectionLevels((threshold,), matrix=rows, steps=steps)


def _decider(unit: Unit, program: Program) -> Decider:
    return Decider(unit.id, Tap(INPUT_TAPS[unit.kind], unit.block), program, Scope("token"))


def _widths(selectors: Selectors, unit: int) -> tuple[int, ...]:
    return tuple(int(bits) for bits in selectors.widths if bits <= selectors.highest[unit])


def _shares(architecture: Architecture) -> np.ndarray:
    """Share of each unit in the weights, float64 (U,)."""
    sizes = np.array([unit.n_weights for unit in architecture.units], dtype=np.float64)
    return sizes / sizes.sum()


def _check_target(architecture: Architecture, selectors: Selectors, target: float) -> None:
    low, high = target_range(architecture, selectors)
    if not low - 1e-9 <= target <= high + 1e-9:
        raise InputError(f"A target of {target:g} bits is not possible: this model reads {low:g} to {high:.4g} bits.")
