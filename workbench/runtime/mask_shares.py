"""How a share of weights that is left out is spread over blocks, heads and neurons, and the thresholds that give it.

The ways are those of ``runtime.masks``, where sparsity is explained too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from workbench.errors import InputError, suggest
from workbench.formats.mask_predictor import MaskGroup, MaskPredictor, mask_groups
from workbench.formats.selectors import quantile, share_above
from workbench.models.base import Architecture

Allocation = Literal["local", "global", "hybrid", "joint"]
ALLOCATIONS: tuple[Allocation, ...] = ("local", "global", "hybrid", "joint")
NEURON_FLOOR = 0.03
_KEEP_ALL = float(np.finfo(np.float32).min)  # a threshold below every score


def predictor_groups(architecture: Architecture, predictor: MaskPredictor) -> tuple[MaskGroup, ...]:
    """The groups that it decides."""
    return mask_groups(architecture, range(predictor.first_block, architecture.n_blocks))


def mask_thresholds(
    architecture: Architecture,
    predictor: MaskPredictor,
    sparsity: float,
    *,
    allocation: Allocation | None = None,
    heads: float | None = None,
    protected: Sequence[int] = (),
) -> np.ndarray:
    """Thresholds on predicted scores, float64 (groups,), at which the share is left out on held-out text; see
    ``mask_plan``."""
    allocation = allocation_of(predictor, allocation)
    groups = predictor_groups(architecture, predictor)
    free = _free(architecture, groups, protected)
    found = np.full(len(groups), _KEEP_ALL)
    scale = predictor.scale.astype(np.float64) if allocation == "joint" else np.ones(len(groups))
    floors = floors_of(groups, allocation)
    most = np.array([1 - floor / group.size for floor, group in zip(floors, groups, strict=True)])

    def left_out(members: np.ndarray, limits: np.ndarray) -> np.ndarray:
        cuts = zip(members.tolist(), limits, strict=True)
        shares = [1 - float(share_above(predictor.quantiles[i], cut)) for i, cut in cuts]
        return np.minimum(shares, most[members])

    for members, wanted in _pools(architecture, groups, free, sparsity, allocation, heads):
        weights = np.array([groups[i].size * groups[i].weights for i in members], dtype=np.float64)
        if allocation == "local":
            share = wanted / weights.sum()
            for i in members:
                found[i] = quantile(predictor.quantiles[i], min(share, most[i]))
            continue
        ends = predictor.quantiles[members].astype(np.float64) * scale[members, None]
        low, high = float(ends.min()) - 1, float(ends.max()) + 1
        for _ in range(60):
            middle = (low + high) / 2
            left = weights @ left_out(members, middle / scale[members])
            low, high = (middle, high) if left < wanted else (low, middle)
        found[members] = high / scale[members]
    return found


def expected_shares(predictor: MaskPredictor, thresholds: np.ndarray) -> np.ndarray:
    """Share of each group's units left out on held-out text at thresholds (groups,), floors not counted."""
    pairs = zip(predictor.quantiles, thresholds, strict=True)
    return np.array([1 - float(share_above(kept, np.asarray(cut))) for kept, cut in pairs])


def expected_left_out(architecture: Architecture, predictor: MaskPredictor, thresholds: np.ndarray) -> float:
    """Share of the weights of all blocks, keys and values included, that thresholds (groups,) leave out of held-out
    text: what ``StepTrace.kept_weights`` comes to. Floors are not counted."""
    groups = predictor_groups(architecture, predictor)
    weights = np.array([group.size * group.weights for group in groups], dtype=np.float64)
    return float(weights @ expected_shares(predictor, thresholds)) / sum(unit.n_weights for unit in architecture.units)


def mask_of_scores(
    architecture: Architecture,
    groups: Sequence[MaskGroup],
    scores: Sequence[np.ndarray],
    sparsity: float,
    *,
    allocation: Allocation,
    heads: float | None = None,
    protected: Sequence[int] = (),
) -> np.ndarray:
    """The mask that leaves out the least scores, bool (units of all groups,), true = computed.

    For ``global`` and ``hybrid`` scores are divided by their group's mean, for ``joint`` by a unit's weights.

    Args:
        architecture: of the model.
        groups: of the scores.
        scores: by group, (size,), not negative.
        sparsity: share of the weights of all heads and neurons of the model.
        allocation: see the module.
        heads: see ``mask_plan``.
        protected: see ``mask_plan``.
    """
    free = _free(architecture, groups, protected)
    floors = floors_of(groups, allocation)
    starts = np.cumsum([0, *(group.size for group in groups)])
    kept = np.ones(starts[-1], dtype=bool)
    for members, wanted in _pools(architecture, groups, free, sparsity, allocation, heads):
        values, weights, owner, inside = [], [], [], []
        for i in members:
            row = np.asarray(scores[i], dtype=np.float64)
            order = np.argsort(-row, kind="stable")
            if allocation in ("global", "hybrid"):
                row = row / max(float(row.mean()), 1e-300)
            elif allocation == "joint":
                row = row / groups[i].weights
            droppable = np.sort(order[int(floors[i]) :])
            if allocation == "local":  # ranks, so that the same share of every group comes first
                row = np.empty(groups[i].size)
                row[order] = 1 - (np.arange(groups[i].size) + 0.5) / groups[i].size
            values.append(row[droppable])
            weights.append(np.full(len(droppable), groups[i].weights))
            owner.append(np.full(len(droppable), i))
            inside.append(droppable)
        of, which = np.concatenate(owner), np.concatenate(inside)
        order = np.argsort(np.concatenate(values), kind="stable")
        total = np.cumsum(np.concatenate(weights)[order], dtype=np.float64)
        count = int(np.searchsorted(total, wanted * (1 + 1e-12), side="right"))
        if count < len(total) and total[count] - wanted < wanted - (total[count - 1] if count else 0):
            count += 1  # one more is nearer
        kept[starts[of[order[:count]]] + which[order[:count]]] = False
    return kept


def mask_sparsity(architecture: Architecture, groups: Sequence[MaskGroup], kept: np.ndarray) -> np.ndarray:
    """Share of the weights of all heads and neurons that masks (..., units of the groups) leave out, float64 (...)."""
    weights = np.repeat([float(g.weights) for g in groups], [g.size for g in groups])
    return (1 - np.asarray(kept, dtype=np.float64)) @ weights / total_weights(architecture)


def total_weights(architecture: Architecture) -> int:
    """Weights of all heads and neurons of all blocks."""
    return sum(group.size * group.weights for group in mask_groups(architecture))


def allocation_of(predictor: MaskPredictor, given: Allocation | None) -> Allocation:
    found: Any = predictor.facts.get("allocation", "hybrid") if given is None else given
    if found not in ALLOCATIONS:
        raise InputError(
            f"Unknown allocation '{found}'; allowed are {', '.join(ALLOCATIONS)}." + suggest(str(found), ALLOCATIONS)
        )
    return found


def highest_sparsity(
    architecture: Architecture,
    predictor: MaskPredictor,
    *,
    allocation: Allocation | None = None,
    heads: float | None = None,
    protected: Sequence[int] = (),
) -> float:
    """The most that ``mask_thresholds`` can be asked for with these options."""
    groups = predictor_groups(architecture, predictor)
    free = _free(architecture, groups, protected)
    return _highest(architecture, groups, free, allocation_of(predictor, allocation), heads)


def _highest(
    architecture: Architecture,
    groups: Sequence[MaskGroup],
    free: np.ndarray,
    allocation: Allocation,
    heads: float | None,
) -> float:
    # What each pool should leave out lies on a straight line in the sparsity: two points of it say where it is full.
    none, half = (_wanted(architecture, groups, free, at, allocation, heads) for at in (0.0, 0.5))
    pairs = [(start, 2 * (middle - start), room) for (_, start, room), (_, middle, _) in zip(none, half, strict=True)]
    if any(start > room for start, _, room in pairs):
        return 0.0
    return min(max(0.0, (room - start) / slope) for start, slope, room in pairs if slope > 0)


def _pools(
    architecture: Architecture,
    groups: Sequence[MaskGroup],
    free: np.ndarray,
    sparsity: float,
    allocation: Allocation,
    heads: float | None,
) -> list[tuple[np.ndarray, float]]:
    """Groups that share a threshold, with the weights that they leave out together."""
    _check_share("sparsity", sparsity)
    pools = _wanted(architecture, groups, free, sparsity, allocation, heads)
    size = total_weights(architecture)
    for members, wanted, room in pools:
        if wanted < -1e-9 or wanted > room * (1 + 1e-9):
            most = _highest(architecture, groups, free, allocation, heads)
            kinds = " and ".join(sorted({groups[i].kind for i in members.tolist()})) or "units"
            raise InputError(
                f"A sparsity of {sparsity:g} is not possible here: the {kinds} that may be left out hold "
                f"{room / size:.3g} of the weights, and {wanted / size:.3g} is asked of them: "
                f"ask for at most {math.floor(1000 * most) / 1000:g}, or protect fewer blocks."
            )
    return [(members, wanted) for members, wanted, _ in pools if wanted > 0]


def _wanted(
    architecture: Architecture,
    groups: Sequence[MaskGroup],
    free: np.ndarray,
    sparsity: float,
    allocation: Allocation,
    heads: float | None,
) -> list[tuple[np.ndarray, float, float]]:
    """Groups that share a threshold, with the weights that they should leave out together, and that they can."""
    everything = mask_groups(architecture)
    size = {kind: float(sum(g.size * g.weights for g in everything if g.kind == kind)) for kind in ("heads", "neurons")}
    of = {kind: np.flatnonzero(free & np.array([g.kind == kind for g in groups])) for kind in ("heads", "neurons")}
    total = sparsity * sum(size.values())
    if allocation == "joint":
        if heads is not None:
            raise InputError("The allocation 'joint' finds the share of heads itself: leave 'heads' out.")
        pools = [(np.flatnonzero(free), total)]
    else:
        share = sparsity if heads is None else heads
        _check_share("heads", share)
        pools = [(of["heads"], share * size["heads"]), (of["neurons"], total - share * size["heads"])]
    floors = floors_of(groups, allocation)
    return [
        (members, wanted, float(sum((groups[i].size - floors[i]) * groups[i].weights for i in members.tolist())))
        for members, wanted in pools
    ]


def _check_share(name: str, share: float) -> None:
    if not (math.isfinite(share) and 0 <= share < 1):
        raise InputError(f"A {name} of {share:g} is not possible: give a share from 0 to below 1.")


def _free(architecture: Architecture, groups: Sequence[MaskGroup], protected: Sequence[int]) -> np.ndarray:
    wrong = [block for block in protected if not 0 <= block < architecture.n_blocks]
    if wrong:
        raise InputError(f"There is no block {wrong[0]} to protect: blocks are 0 to {architecture.n_blocks - 1}.")
    return np.array([group.block not in set(protected) for group in groups])


def floors_of(groups: Sequence[MaskGroup], allocation: Allocation) -> np.ndarray:
    """At least so many of each group are kept, int64 (groups,)."""
    if allocation == "global":
        return np.zeros(len(groups), dtype=np.int64)
    return np.array([1 if g.kind == "heads" else math.ceil(NEURON_FLOOR * g.size) for g in groups])
