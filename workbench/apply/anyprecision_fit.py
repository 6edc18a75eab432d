"""Table codes of one matrix: importance-weighted k-means per output row, refined by splitting every cluster in two.

Any-Precision LLM (Park et al. 2024, section 4.1): the clusters of the narrowest width are found by weighted k-means
(as in SqueezeLLM, Kim et al. 2024, section 4.1); each further bit splits every cluster into the two whose weighted
squared error is least. Clusters of numbers are intervals of the sorted row, so all that is needed of one are prefix
sums at its ends, and a whole round of Lloyd's algorithm is one binary search per boundary.

Shapes: R rows, n input channels, K clusters. Rows are sorted; ``bounds`` is int64 (R, K + 1), cluster k being the
positions from ``bounds[:, k]`` up to ``bounds[:, k + 1]``, which may be none. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch.nn.functional import pad

from workbench.errors import RecipeError
from workbench.formats.tables import TableCodes

_LARGEST = 65504.0  # of fp16
_ROUNDS = 50  # of Lloyd's algorithm, as in the paper's code
# Of k-means++: importance is so unevenly spread that one start ends 18 % above the best of many in mean loss, four end
# 3 % above (SmolLM2-135M, 8 clusters).
_STARTS = 4
_SEED_BITS = 4  # most that k-means++ begins with: its work grows with the clusters, that of splitting does not
# Relative to the row's mean: enough that every cluster has a mean of its own in float64, too little to move any other.
_FLOOR = 1e-6
_PIECE = 2**17  # weights fitted at a time: some fifteen float64 tensors of that size are held, near a core's caches


@dataclass(frozen=True)
class SortedRows:
    """Rows in ascending order, with what any of their intervals sums to.

    Attributes:
        values: float64 (R, n), ascending.
        mass: float64 (R, n), importance of each, above zero.
        masses: float64 (R, n + 1), sums of the mass before each position.
        moments: float64 (R, n + 1), sums of mass times value.
    """

    values: torch.Tensor
    mass: torch.Tensor
    masses: torch.Tensor
    moments: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, importance: torch.Tensor) -> Self:
        """Args: ``values`` (R, n) ascending, and their ``importance`` (R, n), at least 0; all zero means all alike."""
        values, mass = values.double(), importance.double()
        mean = mass.mean(dim=1, keepdim=True)
        mass = torch.where(mean > 0, (mass / mean).clamp(min=_FLOOR), 1.0)
        return cls(values, mass, _sums(mass), _sums(mass * values))

    def centroids(self, bounds: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """Weighted means of clusters, float64 (R, K); ``empty`` (R, K) where one has no members."""
        mass, moment = (of.gather(1, bounds).diff(dim=1) for of in (self.masses, self.moments))
        first, last = bounds[:, :-1].clamp(max=self.values.shape[1] - 1), (bounds[:, 1:] - 1).clamp_(min=0)
        # A rounded mean may lie outside its members: kept among them, means ascend as clusters do.
        means = (moment / mass).clamp(self.values.gather(1, first), self.values.gather(1, last))
        return torch.where(bounds.diff(dim=1) > 0, means, empty)

    def losses(self, bounds: torch.Tensor) -> torch.Tensor:
        """Weighted squared distance to the clusters' means, float64 (R,), less a term that all clusterings share."""
        mass, moment = (of.gather(1, bounds).diff(dim=1) for of in (self.masses, self.moments))
        return -torch.where(mass > 0, moment.square() / mass, 0.0).sum(dim=1)


def fit_tables(
    weight: torch.Tensor, importance: torch.Tensor, widths: Sequence[int], generator: torch.Generator
) -> TableCodes:
    """Choose codes and tables of a matrix.

    Args:
        weight: float32 (out, in) on the CPU.
        importance: float32 (out, in), at least 0: what a squared error of each weight costs. A row of zeros counts
            all its weights alike.
        widths: ascending, each 2 to 8.
        generator: of k-means++; used alike for any values, so that equal seeds give equal codes.

    Raises:
        RecipeError: a weight or an importance is not finite, or a weight is too large for fp16.
    """
    if not bool(weight.isfinite().all()):
        raise RecipeError("A weight is NaN or infinite: the model is damaged and cannot be quantized.")
    if bool((weight.abs() > _LARGEST).any()):
        raise RecipeError("A weight is too large for fp16 tables: this model cannot be stored in table codes.")
    if not bool(importance.isfinite().all()):
        raise RecipeError("A gradient is NaN or infinite: load the model in float32.")
    seed_bits = min(widths[0], _SEED_BITS)
    draws = torch.rand(_STARTS, weight.shape[0], 2**seed_bits, generator=generator)
    step = max(1, _PIECE // weight.shape[1])
    parts = [
        _fit_rows(weight[i : i + step], importance[i : i + step], widths, draws[:, i : i + step])
        for i in range(0, weight.shape[0], step)
    ]
    tables = {bits: torch.cat([part.tables[bits] for part in parts]) for bits in widths}
    return TableCodes(torch.cat([part.codes for part in parts]), tables)


def _fit_rows(weight: torch.Tensor, importance: torch.Tensor, widths: Sequence[int], draws: torch.Tensor) -> TableCodes:
    values, order = weight.sort(dim=1)
    rows = SortedRows.of(values, importance.gather(1, order))
    bounds, centroids = seed(rows, draws)
    bits = draws.shape[2].bit_length() - 1
    while bits < widths[0]:
        bounds, centroids = split(rows, bounds, centroids)
        bits += 1
    if draws.shape[2] < 2**bits:
        bounds, centroids = lloyd(rows, centroids)
    tables = {bits: centroids.half()}
    while bits < widths[-1]:
        bounds, centroids = split(rows, bounds, centroids)
        bits += 1
        if bits in widths:
            tables[bits] = centroids.half()
    codes = torch.empty_like(order, dtype=torch.uint8)
    return TableCodes(codes.scatter_(1, order, _cluster_of(bounds, order.shape[1]).to(torch.uint8)), tables)


def seed(rows: SortedRows, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds and centroids of k-means: per row the best of starts at equal masses and by k-means++.

    Args:
        rows: R of them.
        draws: float32 (starts, R, K), uniform in [0, 1).
    """
    starts = [equal_masses(rows, draws.shape[2])] + [_plus_plus(rows, draw) for draw in draws]
    bounds, centroids = lloyd(rows, starts[0])
    losses = rows.losses(bounds)
    for start in starts[1:]:
        other_bounds, other = lloyd(rows, start)
        other_losses = rows.losses(other_bounds)
        better = (other_losses < losses).unsqueeze(1)
        bounds, centroids = torch.where(better, other_bounds, bounds), torch.where(better, other, centroids)
        losses = torch.minimum(losses, other_losses)
    return bounds, centroids


def equal_masses(rows: SortedRows, clusters: int) -> torch.Tensor:
    """The values in the middle of ``clusters`` parts of equal mass, float64 (R, K), ascending."""
    shares = (torch.arange(clusters) + 0.5) / clusters
    return _values_at(rows, rows.masses[:, 1:].contiguous(), shares.double() * rows.masses[:, -1:])


def _plus_plus(rows: SortedRows, draws: torch.Tensor) -> torch.Tensor:
    """Weighted k-means++ (Arthur and Vassilvitskii 2007): float64 (R, K), ascending; one draw (R, K) for each.

    Chances are computed in float32: a start needs no more digits.
    """
    values, mass = rows.values.float(), rows.mass.float()
    chances, nearest, chosen = mass, None, []
    for draw in draws.unbind(dim=1):
        sums = chances.cumsum(dim=1)
        chosen.append(_values_at(rows, sums, draw.unsqueeze(1) * sums[:, -1:]))
        distance = (values - chosen[-1].float()).square_()
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        chances = mass * nearest
    return torch.cat(chosen, dim=1).sort(dim=1).values


def _values_at(rows: SortedRows, sums: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The values at which running ``sums`` (R, n) first exceed ``at`` (R, K)."""
    place = torch.searchsorted(sums, at.contiguous(), right=True)
    return rows.values.gather(1, place.clamp_(max=sums.shape[1] - 1))


def lloyd(rows: SortedRows, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm from ``centroids`` (R, K), ascending; returns bounds and centroids. Empty clusters stay."""
    for _ in range(_ROUNDS):
        middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
        inner = torch.searchsorted(rows.values, middles.contiguous())
        bounds = pad(pad(inner, (1, 0)), (0, 1), value=rows.values.shape[1])
        before, centroids = centroids, rows.centroids(bounds, centroids)
        if torch.equal(before, centroids):
            break
    return bounds, centroids


def split(rows: SortedRows, bounds: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split every cluster in two with the least weighted squared error; returns bounds and centroids of (R, 2 K).

    All places to split at are tried: a split into masses a and b with means p and q takes ``a b / (a + b) (p - q)^2``
    off the cluster's error. A cluster of one leaves its second child empty; the children of an empty cluster, and an
    empty child, have the parent's centroid.
    """
    n = rows.values.shape[1]
    first = bounds[:, :-1]
    parent = _cluster_of(bounds, n)

    def sides(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the members of its cluster before each position sum to, and those from it on."""
        ends, here = sums.gather(1, bounds), sums[:, :-1]
        return here - ends[:, :-1].gather(1, parent), ends[:, 1:].gather(1, parent) - here

    (a, b), (left, right) = sides(rows.masses), sides(rows.moments)
    gain = left.div_(a).sub_(right.div_(b)).square_().mul_(a).mul_(b)
    gain.masked_fill_(a <= 0, -1.0)  # nothing is before a cluster's first member
    best = torch.zeros_like(centroids).scatter_reduce_(1, parent, gain, "amax")
    places = torch.arange(n).expand_as(parent)
    found = torch.where(gain == best.gather(1, parent), places, n)
    middle = torch.full_like(first, n).scatter_reduce_(1, parent, found, "amin").minimum(bounds[:, 1:])
    inner = torch.stack([first, middle], dim=2).flatten(1)
    bounds = torch.cat([inner, bounds[:, -1:]], dim=1)
    return bounds, rows.centroids(bounds, centroids.repeat_interleave(2, dim=1))


def _cluster_of(bounds: torch.Tensor, n: int) -> torch.Tensor:
    """The cluster that each position is in, int64 (R, n)."""
    begins = torch.zeros(bounds.shape[0], n + 1, dtype=torch.int64)
    inner = bounds[:, 1:-1]
    return begins.scatter_add_(1, inner, torch.ones_like(inner)).cumsum(dim=1)[:, :n]


def _sums(of: torch.Tensor) -> torch.Tensor:
    """Sums before each position, (R, n + 1)."""
    return pad(of.cumsum(dim=1), (1, 0))
