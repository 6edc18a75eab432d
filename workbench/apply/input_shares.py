"""How a share of all weights to be left out is split over units: tables of shares by target. numpy alone.

Leaving out a share s of a unit's inputs leaves out that share of its weights, so shares weighted by the units' weights
add up to the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from workbench.errors import RecipeError

HIGHEST = 0.9  # share of a unit's inputs: above, quantiles and damages are those of a few outliers
_FINE = 0.01  # step of the shares that are solved over
_TINY = 1e-12


def check_room(targets: Sequence[float], sizes: np.ndarray) -> None:
    """Refuse targets that units which may be sparse cannot make up for those that are protected.

    Args:
        targets: shares of all weights.
        sizes: float64 (U,), each unit's share of all weights, 0 for those that are protected.

    Raises:
        RecipeError: they cannot.
    """
    most = HIGHEST * float(sizes.sum())
    if targets[-1] > most:
        raise RecipeError(
            f"Method 'input-sparsity': {targets[-1]:g} of all weights cannot be left out with these blocks protected: "
            f"the others have {sizes.sum():.3f} of the weights and leave out {HIGHEST} of them at most; give targets "
            f"up to {most:.2f}, or protect fewer blocks."
        )


def uniform_shares(targets: Sequence[float], sizes: np.ndarray) -> np.ndarray:
    """The same share for every unit that is not protected, float64 (T, U). Arguments as ``check_room``."""
    return np.outer(np.asarray(targets) / sizes.sum(), sizes > 0)


def greedy_path(
    error: Callable[[np.ndarray], float], sizes: np.ndarray, highest: float, step: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Raise one unit's share at a time, the one whose step moves the block's output least (TEAL, algorithm 1).

    A step of a unit is ``step`` times the mean size of the units over its own, so that every step leaves out as many
    weights.

    Args:
        error: of the block's output at shares float64 (u,).
        sizes: float64 (u,) of the block's units.
        highest: share of the block's weights to go to.
        step: of a unit of mean size.

    Returns:
        Shares of the block's weights float64 (S,), ascending from 0 to ``highest`` or more, and shares by unit (S, u).
    """
    weights = sizes / sizes.sum()
    steps = step * weights.mean() / weights
    shares, path = np.zeros(len(sizes)), [np.zeros(len(sizes))]
    while shares @ weights < highest - _TINY:
        candidates = []
        for unit in range(len(sizes)):
            if shares[unit] < HIGHEST - _TINY:
                tried = shares.copy()
                tried[unit] = min(tried[unit] + steps[unit], HIGHEST)
                candidates.append((error(tried), unit, tried))
        if not candidates:
            break
        shares = min(candidates, key=lambda one: one[:2])[2]
        path.append(shares)
    found = np.stack(path)
    return found @ weights, found


def shares_along(path: tuple[np.ndarray, np.ndarray], share: float) -> np.ndarray:
    """Shares by unit float64 (u,) where a path passes a share of the block's weights."""
    at, shares = path
    return np.array([np.interp(share, at, shares[:, unit]) for unit in range(shares.shape[1])])


def solved_shares(
    targets: Sequence[float], sizes: np.ndarray, nodes: Sequence[float], damage: np.ndarray
) -> np.ndarray:
    """Shares whose damages, taken one unit at a time, add up least for each target; float64 (T, U).

    Damages between the shares they were measured at follow a power law (a straight line in logarithms), and are made
    convex, so that the best split is had by taking the cheapest steps first: cost per weight left out.

    Args:
        targets: shares of all weights, ascending.
        sizes: float64 (U,), each unit's share of all weights; 0 for those that are protected.
        nodes: shares that damages were measured at, ascending, above 0.
        damage: float64 (U, nodes), 0 or more.
    """
    grid = np.arange(0, nodes[-1] + _FINE / 2, _FINE)
    steps: list[tuple[float, int, float]] = []
    for unit in np.flatnonzero(sizes > 0).tolist():
        curve = _convex(grid, _curve(grid, np.asarray(nodes), damage[unit]))
        slopes = np.diff(curve) / (np.diff(grid) * sizes[unit])
        steps += [(float(slope), unit, float(width)) for slope, width in zip(slopes, np.diff(grid), strict=True)]
    steps.sort(key=lambda one: one[0])  # stable: a unit's steps stay in their order
    found, shares, total = [], np.zeros(len(sizes)), 0.0
    at = 0
    for target in targets:
        while at < len(steps):
            _, unit, width = steps[at]
            if total + width * sizes[unit] > target:
                break
            shares[unit] += width
            total += width * sizes[unit]
            at += 1
        exact = shares.copy()
        if at < len(steps):
            exact[steps[at][1]] += (target - total) / sizes[steps[at][1]]
        found.append(exact)
    return np.stack(found)


def _curve(grid: np.ndarray, nodes: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Damage at the shares of a grid, which begins at 0, from that at the nodes."""
    known = np.log(np.maximum(np.maximum.accumulate(damage), _TINY))
    x = np.log(nodes)
    found = np.interp(np.log(np.maximum(grid, _TINY)), x, known)
    first = grid < nodes[0]
    power = np.clip((known[1] - known[0]) / (x[1] - x[0]), 1.0, 4.0) if len(nodes) > 1 else 2.0
    found[first] = known[0] + power * (np.log(np.maximum(grid[first], _TINY)) - x[0])
    return np.where(grid > 0, np.exp(found), 0.0)


def _convex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The greatest convex function below points (x, y), at x."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return np.interp(x, x[hull], y[hull])
