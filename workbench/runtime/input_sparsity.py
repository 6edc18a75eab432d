"""Plans that leave out small inputs, for any sparsity up to the highest that a model's ``InputCuts`` have a target for.

Every unit has a slot of its own with a threshold, so that a policy moves all of them, each by its own table, from the
next token on: no bytes change. Sparsity is the share of the units' weights that is not used, on average over text like
that of calibration; what text really leaves out is in the engines' traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from workbench.errors import EngineError, InputError
from workbench.formats.input_cuts import InputCuts, share_below, threshold
from workbench.models.base import Architecture, Unit
from workbench.runtime.mask_programs import Threshold
from workbench.runtime.plan import Consumer, Decider, Plan, Policy, Scope, Tap

_SLOT = "cut."


def input_plan(architecture: Architecture, cuts: InputCuts, sparsity: float, *, first: int | None = None) -> Plan:
    """A plan under which units leave out inputs so that this share of all their weights is not used.

    At a sparsity of 0 all thresholds are 0: only inputs that are 0 are left out, and outputs are those without a plan.
    The slots are there, so that a policy may raise them later. Engines lay out weights for the sparsity that they are
    opened with (the cpu engine input by input where that pays): one that a policy moves far from it is as right, but
    not as fast, as one opened for it.

    Args:
        architecture: of the model.
        cuts: its tables.
        sparsity: 0 to ``cuts.highest``.
        first: tokens at the beginning of a text that are kept whole, None for as many as in calibration.

    Raises:
        InputError: a sparsity beyond the tables.
        EngineError: fewer than no first tokens.
    """
    kept = int(cuts.first) if first is None else first
    if kept < 0:
        raise EngineError(f"{kept} first tokens cannot be kept whole: give 0 or more; calibration kept {cuts.first}.")
    thresholds = input_thresholds(architecture, cuts, sparsity)
    shares = input_shares(cuts, sparsity)
    return Plan(
        # The program does not look at its tap: this one is there before any unit is run.
        deciders=tuple(
            Decider(slot, Tap("residual", 0), Threshold(tuple(given), first=kept), Scope("token"))
            for slot, given in thresholds.items()
        ),
        consumers=tuple(
            Consumer(
                _slot(unit),
                "input_threshold",
                unit.id,
                expected=float(np.clip(1 - shares[index], 0, 1)),
                factors=cuts.factors_of(index),
            )
            for index, unit in enumerate(architecture.units)
        ),
    )


def input_policy(architecture: Architecture, cuts: InputCuts, sparsity: float) -> Policy:
    """Another sparsity for an engine that runs an ``input_plan`` of this model, from the next token on.

    Weights stay laid out for the sparsity that the engine was opened with.

    Raises:
        InputError: a sparsity beyond the tables.
    """
    return Policy(thresholds=input_thresholds(architecture, cuts, sparsity))


def input_thresholds(
    architecture: Architecture, cuts: InputCuts, sparsity: float, *, beyond: bool = False
) -> dict[str, tuple[float, ...]]:
    """One threshold of |x_i| f_i by slot. Arguments and errors as ``input_plan`` and ``input_shares``."""
    shares = input_shares(cuts, sparsity, beyond=beyond)
    return {
        _slot(unit): (threshold(cuts.quantiles[index], float(shares[index])),)
        for index, unit in enumerate(architecture.units)
    }


def input_shares(cuts: InputCuts, sparsity: float, *, beyond: bool = False) -> np.ndarray:
    """Share of its inputs that each unit leaves out, float64 (units,): on the straight line between two targets.

    Weighted by the units' weights shares are linear in the sparsity, so they add up to it there too.

    Args:
        cuts: tables of the model.
        sparsity: 0 to ``cuts.highest``.
        beyond: go on up to 1, on the line from the highest target to units that leave out everything, but for those
            that leave out nothing there. For who holds a share on text that leaves out less than calibration's
            (``share_control``).

    Raises:
        InputError: a sparsity beyond the tables.
    """
    if not 0 <= sparsity <= (1.0 if beyond else cuts.highest + 1e-6):  # targets are float32
        raise InputError(
            f"A sparsity of {sparsity:g} is not possible with this model: give 0 to {cuts.highest:g}, or compress it "
            "with higher 'targets' of 'input-sparsity'."
        )
    n_units = cuts.shares.shape[1]
    at = np.concatenate([[0.0], cuts.targets.astype(np.float64), [1.0]])
    rows = np.vstack([np.zeros(n_units), cuts.shares.astype(np.float64), cuts.shares[-1] > 0])
    return np.array([np.interp(sparsity, at, rows[:, unit]) for unit in range(n_units)])


def expected_sparsity(architecture: Architecture, cuts: InputCuts, thresholds: Mapping[str, Sequence[float]]) -> float:
    """Share of the units' weights that these thresholds (by slot) leave out of calibration text, first tokens apart.

    Raises:
        EngineError: a slot of ``input_plan`` has no threshold.
    """
    total = left = 0.0
    for index, unit in enumerate(architecture.units):
        if _slot(unit) not in thresholds:
            raise EngineError(f"There is no threshold for the slot '{_slot(unit)}': give one for every unit.")
        left += unit.n_weights * share_below(cuts.quantiles[index], float(thresholds[_slot(unit)][0]))
        total += unit.n_weights
    return left / total


def _slot(unit: Unit) -> str:
    return _SLOT + unit.id
