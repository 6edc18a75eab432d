"""Thresholds of widths chosen per token, as tables on the scale of an error, and what they let units read.

A target of average bits is turned into thresholds without other bytes; a threshold may then be moved by hand, and what
that gives is known at once: on calibration text from its quantiles, on tokens that were seen from their estimates.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.formats.selectors import Selectors, share_above
from workbench.models.base import Architecture
from workbench.runtime.precision import (
    Rule,
    error_thresholds,
    estimated_by_norm,
    gain_thresholds,
    precision_plan,
)


def error_scale(selectors: Selectors, unit: int, step: int) -> float:
    """Error over norm on calibration text, both as root mean squares: what the rule ``gain`` takes errors to be."""
    errors = selectors.errors[unit, step].astype(np.float64)
    power = float(selectors.power[unit])
    return float(np.sqrt(np.square(errors).mean() / power)) if power > 0 else 0.0


def thresholds(architecture: Architecture, selectors: Selectors, target: float, rule: Rule = "gain") -> pd.DataFrame:
    """Thresholds for a target, on the scale of ``estimate``: ``unit``, ``low``, ``high``, ``threshold``, ``share``.

    ``share`` is that of calibration tokens whose estimate exceeds the threshold, which therefore read ``high`` or
    wider; a threshold of infinity is never exceeded, one of minus infinity always. Steps that a unit does not decide
    about are left out.

    Raises:
        InputError: a target outside the widths.
        EngineError: the rule ``error`` where nothing was learnt.
    """
    widths = [int(width) for width in selectors.widths]
    rows: list[tuple[str, int, int, float, float]] = []
    if rule == "gain":
        given = gain_thresholds(architecture, selectors, target)
        for index, unit in enumerate(architecture.units):
            shares = share_above(selectors.norms[index], np.array(given[unit.id]))
            for step, (cut, share) in enumerate(zip(given[unit.id], shares, strict=True)):
                scaled = cut * error_scale(selectors, index, step)
                rows.append((unit.id, widths[step], widths[step + 1], scaled, float(share)))
    else:
        cuts = error_thresholds(architecture, selectors, target)
        plan = precision_plan(architecture, selectors, target, "error")
        pairs = {consumer.target: consumer.widths for consumer in plan.consumers}
        for index, unit in enumerate(architecture.units):
            if len(pairs[unit.id]) == 2:
                low, high = pairs[unit.id]
                cut = cuts[unit.id]
                share = float(share_above(selectors.errors[index, widths.index(low)], np.array([cut]))[0])
                rows.append((unit.id, low, high, cut, share if np.isfinite(cut) else float(cut < 0)))
    return pd.DataFrame(rows, columns=["unit", "low", "high", "threshold", "share"])


def policy_thresholds(
    architecture: Architecture, selectors: Selectors, cuts: pd.DataFrame, rule: Rule = "gain"
) -> dict[str, tuple[float, ...]]:
    """Thresholds as a policy takes them, on what the deciders of ``precision_plan`` score, by unit.

    Under ``gain``, later steps of a unit are taken only after earlier ones: a threshold below that of the step before
    is raised to it. Under ``error``, units with an infinite threshold decide nothing and are left out.

    Args:
        architecture: of the model.
        selectors: its statistics.
        cuts: ``unit``, ``low`` and ``threshold``, as ``thresholds`` gives them.
        rule: that they are for.
    """
    widths = [int(width) for width in selectors.widths]
    by_unit = dict(tuple(cuts.sort_values("low").groupby("unit", sort=False)))
    found: dict[str, tuple[float, ...]] = {}
    for index, unit in enumerate(architecture.units):
        rows = by_unit.get(unit.id, cuts.head(0))
        steps = [widths.index(int(low)) for low in rows["low"]]
        given = rows["threshold"].to_numpy(np.float64)
        if rule == "gain":
            scales = [max(error_scale(selectors, index, step), 1e-30) for step in steps]
            found[unit.id] = tuple(np.maximum.accumulate(given / scales).tolist())
        elif len(steps) and np.isfinite(given).all():
            slope, intercept, _ = map(float, selectors.regression[index, steps[0]])
            by_norm = estimated_by_norm(selectors, index, steps[0])
            found[unit.id] = ((float(given[0]) - intercept) / slope if by_norm else float(given[0]),)
    return found


def with_threshold(
    architecture: Architecture,
    selectors: Selectors,
    cuts: pd.DataFrame,
    unit: str,
    low: int,
    threshold: float,
    rule: Rule = "gain",
) -> pd.DataFrame:
    """The table of ``thresholds`` with one of them moved, and its unit's shares with it.

    The shares are those of what is read: a step that lies below the one before it is taken no more often than that.

    Raises:
        InputError: a step that is not decided about, or a threshold that is negative, infinite or NaN.
    """
    at = (cuts["unit"] == unit) & (cuts["low"] == low)
    if not (at.any() and (rule == "gain" or np.isfinite(cuts.loc[at, "threshold"]).all())):
        raise InputError(f"{unit} decides nothing from {low} bits on.")
    if not 0 <= threshold < np.inf:
        raise InputError(f"A threshold on an error is a number of 0 or more, got {threshold:g}.")
    index = [one.id for one in architecture.units].index(unit)
    found = cuts.copy()
    found.loc[at, "threshold"] = threshold
    own = found["unit"] == unit
    if rule == "gain":
        norms = policy_thresholds(architecture, selectors, found[own])[unit]
        found.loc[own, "share"] = share_above(selectors.norms[index], np.array(norms))
    else:
        step = [int(width) for width in selectors.widths].index(low)
        found.loc[own, "share"] = share_above(selectors.errors[index, step], np.array([threshold]))
    return found


def expected_average(architecture: Architecture, selectors: Selectors, shares: pd.DataFrame) -> float:
    """Average bits on calibration text where units take their steps by these shares (table of ``thresholds``)."""
    sizes = {unit.id: unit.n_weights for unit in architecture.units}
    lowest = shares.groupby("unit")["low"].min()
    total = sum(sizes.values())
    bits = sum(sizes[unit] * float(lowest.get(unit, selectors.widths[0])) for unit in sizes)
    steps = shares["unit"].map(sizes) * shares["share"] * (shares["high"] - shares["low"])
    return (bits + float(steps.sum())) / total


def chosen_widths(table: pd.DataFrame, cuts: pd.DataFrame, rule: Rule = "gain") -> pd.DataFrame:
    """What units would read at the steps of a table under other thresholds, their inputs as they were seen.

    Inputs move a little with the widths of the units before, so this is what a first glance gives, not a measurement.

    Args:
        table: of ``PrecisionSteps``.
        cuts: of ``thresholds``, for the same rule; units that it leaves out keep what they read.
        rule: under ``gain`` the first token of a sequence reads the widest.

    Returns:
        ``sequence``, ``step``, ``unit`` and ``bits``, one row per sequence, step and unit.
    """
    keys = ["sequence", "step", "unit"]
    known = table[[*keys, "low", "high", "estimate", "bits"]].merge(
        cuts[["unit", "low", "threshold"]], on=["unit", "low"], how="left"
    )
    known = known.sort_values([*keys, "low"], kind="stable")
    exceeds = known["estimate"] > known["threshold"]
    if rule == "gain":
        exceeds |= known["step"] == 0
    groups = known.assign(exceeds=exceeds).groupby(keys, sort=False, observed=True)
    # A later step is taken only after the earlier ones.
    read = np.where(groups["exceeds"].cummin(), known["high"], groups["low"].transform("min"))
    known["bits"] = np.where(known["threshold"].isna(), known["bits"], read)
    return known.groupby(keys, sort=False, observed=True)["bits"].max().reset_index()


def average_bits(widths: pd.DataFrame, architecture: Architecture) -> pd.Series:
    """Average width over the weights of all units, by ``sequence`` and ``step``.

    Args:
        widths: ``sequence``, ``step``, ``unit``, ``bits``, one row per sequence, step and unit.
        architecture: of the model, whose units weigh by their size.
    """
    sizes = {unit.id: unit.n_weights for unit in architecture.units}
    weighted = widths["bits"] * widths["unit"].map(sizes).astype(np.float64)
    return weighted.groupby([widths["sequence"], widths["step"]]).sum() / sum(sizes.values())
