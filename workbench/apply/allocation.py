"""Static allocations of widths to units at an exact average of code bits: the rivals of choosing per token."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.apply.recipe import Budget
from workbench.apply.solver import solve
from workbench.formats.selectors import Selectors
from workbench.models.base import Architecture
from workbench.runtime.precision import learnt_precision


def allocate(damage: pd.DataFrame, target: float) -> dict[str, int]:
    """Return the widths of least summed damage whose average over weights is at most ``target``, by unit.

    Args:
        damage: columns ``unit``, ``bits``, ``damage``, ``n_weights``.
        target: average bits of codes; scales and zero points are not counted.

    Raises:
        RecipeError: less than the narrowest width.
    """
    table = damage.assign(stored_bits=damage["bits"] * damage["n_weights"])
    return solve(table, Budget(average_bits=target)).unit_bits


def gain_damage(architecture: Architecture, selectors: Selectors) -> pd.DataFrame:
    """What each width costs by unit, from the selectors' mean gains: the sum of those of the steps above it."""
    rows = []
    for index, unit in enumerate(architecture.units):
        left = np.append(np.cumsum(selectors.gains[index, ::-1])[::-1], 0.0)
        for bits, damage in zip(selectors.widths, left, strict=True):
            if bits <= selectors.highest[index]:
                rows.append((unit.id, int(bits), float(damage), unit.n_weights))
    return pd.DataFrame(rows, columns=["unit", "bits", "damage", "n_weights"])


def learnt_damage(architecture: Architecture, selectors: Selectors, target: float) -> pd.DataFrame:
    """What each width lacks of the precision learnt for a target, squared, by weight.

    Widths beyond the precision lack nothing, so rounding spends the whole average on the units that lack most.
    """
    precision = learnt_precision(architecture, selectors, target)
    rows = []
    for index, unit in enumerate(architecture.units):
        for bits in selectors.widths:
            if bits <= selectors.highest[index]:
                lack = unit.n_weights * max(precision[index] - float(bits), 0.0) ** 2
                rows.append((unit.id, int(bits), lack, unit.n_weights))
    return pd.DataFrame(rows, columns=["unit", "bits", "damage", "n_weights"])
