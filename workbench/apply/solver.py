"""Bits per unit under a budget: minimise predicted damage, exactly.

A multiple-choice knapsack: each unit takes one width, damages add up, stored bits add up to at most the budget. It is
solved as a mixed-integer linear program by HiGHS (through SciPy). What the solver tolerates in floating point is
settled in integers afterwards, so a budget is never exceeded by a bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
from scipy.optimize import Bounds, LinearConstraint, isotonic_regression, milp
from scipy.sparse import csr_array

from workbench.apply.native_output import native_output_dropped
from workbench.apply.recipe import Budget, DamageSource, Solution
from workbench.errors import RecipeError, suggest
from workbench.formats.encodings import DENSE_BITS

_COLUMNS = ("unit", "bits", "damage", "stored_bits", "n_weights")
_SCALE = 1e6  # HiGHS stops within 1e-6 of the optimum in absolute terms: 1e-12 of a feasible cost scaled to this
_CAPACITY = 1e2  # budget after scaling; what its feasibility tolerance of 1e-6 lets by is caught in integers


class Choice(NamedTuple):
    """One width of one unit: what it damages and what it costs on disk."""

    bits: int
    damage: float
    stored_bits: int


@dataclass(frozen=True)
class Choices:
    """What the solver chooses from: for each unit its weights and its widths, narrowest first."""

    n_weights: dict[str, int]
    by_unit: dict[str, list[Choice]]

    @property
    def total_weights(self) -> int:
        return sum(self.n_weights.values())

    def bounds(self) -> tuple[int, int]:
        """Fewest and most stored bits that any assignment has."""
        return (
            sum(min(c.stored_bits for c in choices) for choices in self.by_unit.values()),
            sum(max(c.stored_bits for c in choices) for choices in self.by_unit.values()),
        )


def solve(
    damage: pd.DataFrame,
    budget: Budget,
    pinned: Mapping[str, int] | None = None,
    *,
    monotone: bool = True,
    source: DamageSource | None = None,
    time_limit_s: float = 60.0,
) -> Solution:
    """Choose the width of every unit.

    Args:
        damage: columns ``unit``, ``bits``, ``damage`` (any additive unit), ``stored_bits``, ``n_weights``; one row for
            each unit and width. Row order does not matter.
        budget: average effective bits, or bytes, of all units together.
        pinned: widths that the user fixes, by unit. 16 is always possible and does no damage.
        monotone: see ``monotone_damage``.
        source: where the damages came from, for the record.
        time_limit_s: after which the best solution so far is returned, with its gap.

    Returns:
        The solution. Where several are equally good, the one with fewer bits per unit is preferred.

    Raises:
        RecipeError: a table that is incomplete or not finite, an unknown unit or width, or a budget that no
            assignment meets; the message says which range is possible, and why.
    """
    pinned = dict(pinned or {})
    free = read_choices(damage, monotone)
    choices = _pin(free, pinned)
    limit = _limit(budget, choices.total_weights)
    if limit < choices.bounds()[0]:
        raise RecipeError(_impossible(budget, free, choices, pinned))
    picked, gap = _optimise(choices, limit, time_limit_s)
    stored = sum(choice.stored_bits for choice in picked.values())
    return Solution(
        budget=budget,
        achieved_bits=stored / choices.total_weights,
        achieved_bytes=-(-stored // 8),
        predicted_damage=math.fsum(choice.damage for choice in picked.values()),
        gap=gap,
        unit_bits={unit: choice.bits for unit, choice in picked.items()},
        pinned=pinned,
        monotone=monotone,
        solver=f"HiGHS (SciPy {scipy.__version__})",
        damage=source,
    )


def pareto(
    damage: pd.DataFrame, points: int = 16, pinned: Mapping[str, int] | None = None, *, monotone: bool = True
) -> pd.DataFrame:
    """Solve for evenly spaced budgets from the least to the most possible.

    Args:
        damage, pinned, monotone: as for ``solve``.
        points: number of budgets, at least 2.

    Returns:
        Columns ``budget_bits``, ``achieved_bits``, ``achieved_bytes``, ``damage``, ``gap``; one row for each budget.

    Raises:
        RecipeError: as ``solve``, or fewer than 2 points.
    """
    if points < 2:
        raise RecipeError(f"points={points} is not possible: a trade-off curve needs at least 2.")
    choices = _pin(read_choices(damage, monotone), dict(pinned or {}))
    low, high = (bits / choices.total_weights for bits in choices.bounds())
    rows = []
    for bits in np.linspace(low, high, points):
        found = solve(damage, Budget(average_bits=float(bits)), pinned, monotone=monotone)
        rows.append((float(bits), found.achieved_bits, found.achieved_bytes, found.predicted_damage, found.gap))
    return pd.DataFrame(rows, columns=["budget_bits", "achieved_bits", "achieved_bytes", "damage", "gap"])


def monotone_damage(damages: np.ndarray) -> np.ndarray:
    """Return the closest damages (least squares) that do not rise with bits: isotonic regression.

    Finer codes cannot do more harm except by chance, but measured damages are noisy, and an optimiser seeks out just
    those widths that look better than they are. Pooling neighbours that are out of order takes away that luck.

    Args:
        damages: float (widths,), narrowest width first.
    """
    return np.asarray(isotonic_regression(damages, increasing=False).x)


def read_choices(damage: pd.DataFrame, monotone: bool = True) -> Choices:
    """Check a damage table and turn it into choices, units in order of their names.

    Raises:
        RecipeError: missing columns, rows, or values.
    """
    absent = [column for column in _COLUMNS if column not in damage.columns]
    if absent:
        raise RecipeError(f"The damage table lacks the column '{absent[0]}': it needs {', '.join(_COLUMNS)}.")
    if damage.empty:
        raise RecipeError("The damage table has no rows: run the analysis again.")
    table = damage.loc[:, list(_COLUMNS)].sort_values(["unit", "bits"])
    values = table[["bits", "damage", "stored_bits", "n_weights"]].to_numpy(dtype=float)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        row = table.iloc[bad[0]]
        raise RecipeError(
            f"The damage of {row['unit']} at {row['bits']} bits is {row['damage']}: a solution needs every value. Run "
            "the analysis again, or pick bits by hand."
        )
    twice = table.duplicated(["unit", "bits"])
    if twice.any():
        row = table[twice].iloc[0]
        raise RecipeError(f"The damage table has {row['unit']} at {row['bits']} bits twice: one row each is needed.")
    n_weights: dict[str, int] = {}
    by_unit: dict[str, list[Choice]] = {}
    for unit, rows in table.groupby("unit", sort=True):
        damages = rows["damage"].to_numpy(dtype=float)
        if monotone:
            damages = monotone_damage(damages)
        if rows["n_weights"].nunique() != 1 or rows["stored_bits"].min() <= 0:
            raise RecipeError(f"The damage table contradicts itself on the size of {unit}: run the analysis again.")
        n_weights[str(unit)] = int(rows["n_weights"].iloc[0])
        by_unit[str(unit)] = [
            Choice(int(bits), float(value), int(stored))
            for bits, value, stored in zip(rows["bits"], damages, rows["stored_bits"], strict=True)
        ]
    return Choices(n_weights, by_unit)


def _pin(free: Choices, pinned: Mapping[str, int]) -> Choices:
    """Leave pinned units their one choice."""
    by_unit = dict(free.by_unit)
    for unit, bits in pinned.items():
        if unit not in by_unit:
            raise RecipeError(f"The pinned unit '{unit}' is not in the damage table.{suggest(unit, by_unit)}")
        known = {choice.bits: choice for choice in by_unit[unit]}
        known.setdefault(DENSE_BITS, Choice(DENSE_BITS, 0.0, DENSE_BITS * free.n_weights[unit]))
        if bits not in known:
            nearest = min(known, key=lambda width: (abs(width - bits), width))
            raise RecipeError(
                f"{unit} is pinned to {bits} bits, whose damage is not known; allowed are "
                f"{', '.join(map(str, sorted(known)))}; nearest is {nearest}."
            )
        by_unit[unit] = [known[bits]]
    return Choices(free.n_weights, by_unit)


def _limit(budget: Budget, n_weights: int) -> int:
    """Budget in whole stored bits."""
    if budget.bytes is not None:
        return budget.bytes * 8
    # A budget read off an achieved average must not fall one bit short of it through rounding.
    return math.floor(float(budget.average_bits or 0) * n_weights * (1 + 1e-12))


def _impossible(budget: Budget, free: Choices, choices: Choices, pinned: Mapping[str, int]) -> str:
    """One line: what is possible, and which part of the least size comes from where."""
    total = choices.total_weights
    low, high = choices.bounds()
    least = free.bounds()[0]
    narrowest = {unit: min(c, key=lambda x: x.stored_bits) for unit, c in free.by_unit.items()}
    codes = sum(choice.bits * free.n_weights[unit] for unit, choice in narrowest.items())
    if budget.bytes is None:
        span = f"{low / total:.3f} to {high / total:.3f} average bits"
    else:
        span = f"{-(-low // 8):,} to {-(-high // 8):,} bytes"
    why = (
        f"the narrowest widths take {codes / total:.3f} bits per weight in codes and {(least - codes) / total:.3f} in "
        "group scales, zero points and padding"
    )
    way_out = "raise the budget, use larger groups or allow narrower widths"
    if low > least:
        why += f", and {len(pinned)} pinned unit{'s' * (len(pinned) > 1)} add{'s' * (len(pinned) == 1)} "
        why += f"{(low - least) / total:.3f}"
        way_out = "raise the budget, unpin units, use larger groups or allow narrower widths"
    return f"A budget of {budget} is impossible; possible are {span}: {why}. {way_out.capitalize()}."


def _useful(choices: list[Choice]) -> list[Choice]:
    """Drop what costs as much as another choice, or more, without doing less damage. Cheapest first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.stored_bits, c.damage, c.bits)):
        if not kept or choice.damage < kept[-1].damage:
            kept.append(choice)
    return kept


def _greedy(options: Mapping[str, list[Choice]], limit: int) -> dict[str, Choice]:
    """A feasible start: from the cheapest choices, always the step that saves most damage per bit and still fits."""
    picked = {unit: choices[0] for unit, choices in options.items()}
    room = limit - sum(choice.stored_bits for choice in picked.values())
    while True:
        steps = [
            ((now.damage - to.damage) / (to.stored_bits - now.stored_bits), unit, to)
            for unit, now in picked.items()
            for to in options[unit]
            if now.stored_bits < to.stored_bits <= now.stored_bits + room
        ]
        if not steps:
            return picked
        _, unit, to = max(steps, key=lambda step: step[0])
        room -= to.stored_bits - picked[unit].stored_bits
        picked[unit] = to


def _optimise(choices: Choices, limit: int, time_limit_s: float) -> tuple[dict[str, Choice], float]:
    """Return the best assignment within ``limit`` stored bits, and its proven relative gap."""
    options = {unit: _useful(list_) for unit, list_ in choices.by_unit.items()}
    best = _greedy(options, limit)
    floor = {unit: list_[-1].damage for unit, list_ in options.items()}  # the least damage that each unit can do
    excess = _excess(best, floor)
    if excess == 0:
        return best, 0.0
    # No optimal assignment holds a choice that alone does more than the start does, and the cheapest always stays
    # possible through others: leaving the rest out keeps the costs within what HiGHS resolves.
    flat = [
        (unit, choice)
        for unit, list_ in options.items()
        for choice in list_
        if choice.damage - floor[unit] <= excess * (1 + 1e-9)
    ]
    cost = np.array([choice.damage - floor[unit] for unit, choice in flat]) * (_SCALE / excess)
    size = np.array([choice.stored_bits for _, choice in flat], dtype=float) * (_CAPACITY / limit)
    units = {unit: i for i, unit in enumerate(options)}
    one_each = csr_array((np.ones(len(flat)), ([units[unit] for unit, _ in flat], range(len(flat)))))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None, :], -np.inf, _CAPACITY)]
    while True:
        with native_output_dropped():
            found = milp(
                cost,
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
            )
        if found.x is None:  # out of time before anything better than the start was found
            break
        chosen = found.x > 0.5
        picked = {unit: choice for (unit, choice), taken in zip(flat, chosen, strict=True) if taken}
        if sum(choice.stored_bits for choice in picked.values()) <= limit:
            if _excess(picked, floor) < excess:
                best = picked
            break
        # HiGHS let a fraction of a bit pass: exclude exactly this assignment and ask again.
        constraints.append(LinearConstraint(chosen[None, :].astype(float), -np.inf, len(units) - 1))
    return best, _gap(best, floor, found.mip_dual_bound, excess)


def _excess(picked: Mapping[str, Choice], floor: Mapping[str, float]) -> float:
    """Damage above the least possible, summed exactly so that equal assignments compare equal."""
    return math.fsum(choice.damage - floor[unit] for unit, choice in picked.items())


def _gap(best: Mapping[str, Choice], floor: Mapping[str, float], bound: float | None, unit: float) -> float:
    """Distance of the assignment's damage from the proven bound (``_SCALE`` of it is ``unit``), relative to it."""
    excess = _excess(best, floor)
    proven = bound * unit / _SCALE if bound is not None and math.isfinite(bound) else 0.0
    missing = excess - proven
    if missing <= 1e-9 * excess:  # what the arithmetic of the bound itself loses
        return 0.0
    total = abs(math.fsum(choice.damage for choice in best.values()))
    return missing / max(total, missing)
