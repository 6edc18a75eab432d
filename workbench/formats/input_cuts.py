"""What a model keeps so that inputs of small magnitude may be left out: quantiles by unit, and shares for targets.

An input x_i of a unit is left out where |x_i| f_i is at most the unit's threshold. Thresholds are not stored: any
sparsity up to the highest target is turned into them when it is asked for (``runtime.input_sparsity``), so that
another one needs no other bytes. numpy alone, for engines without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from workbench.errors import IntegrityError
from workbench.formats.checked import check_array
from workbench.formats.selectors import quantile_levels
from workbench.models.base import Architecture

PREFIX = "input_cuts."
CRITERIA = ("magnitude", "weighted", "learnt")
_AGAIN = "compress the model again."
# Shares are float32 and solved on a grid: their weighted mean may be off its target by this much.
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class InputCuts:
    """Statistics of calibration text and what was decided with them, units in the order of the architecture (U).

    Quantiles are of all calibration tokens and input channels of a unit at the levels (k + 1/2) / K, ascending; the
    first tokens of a text are left out, since they are kept whole.

    Attributes:
        criterion: what f is: ``magnitude`` 1 (TEAL, Liu et al. 2024, arXiv 2408.14690), ``weighted`` the Euclidean
            norm of the column of the unit's weights (WINA, Chen et al. 2025, arXiv 2505.19427), ``learnt`` by gradient.
        quantiles: float32 (U, K), of |x_i| f_i.
        targets: float32 (T,), ascending, between 0 and 1: shares of the weights of all units that are left out.
        shares: float32 (T, U), the share of its inputs that each unit leaves out for each target. Weighted by the
            units' weights their mean is the target.
        first: int32 (), tokens at the beginning of a text that are kept whole, at least 1: all later ones attend to
            them.
        texts: int32 (), texts of calibration.
        factors: float16 (in,) by unit, positive, in any unit of measure; empty for ``magnitude``.
    """

    criterion: str
    quantiles: np.ndarray
    targets: np.ndarray
    shares: np.ndarray
    first: np.ndarray
    texts: np.ndarray
    factors: Mapping[int, np.ndarray] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by name on disk."""
        found = {name: getattr(self, name) for name in _PLAIN}
        found["criterion"] = np.array(CRITERIA.index(self.criterion), dtype=np.int8)
        found |= {f"factors.{unit}": factors for unit, factors in self.factors.items()}
        return {PREFIX + name: array for name, array in found.items()}

    @property
    def stored_bits(self) -> int:
        return 8 * sum(array.nbytes for array in self.arrays().values())

    @property
    def highest(self) -> float:
        """The highest sparsity that may be asked for."""
        return float(self.targets[-1])

    def factors_of(self, unit: int) -> np.ndarray | None:
        """Factors float32 (in,) of a unit, None where all are 1."""
        found = self.factors.get(unit)
        return None if found is None else found.astype(np.float32)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], architecture: Architecture) -> Self:
        """Check and take apart what ``arrays`` gave.

        Raises:
            IntegrityError: something is missing, too much, of another type or shape, not finite, or not possible.
        """
        left = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
        units = architecture.units
        try:
            plain = {name: left.pop(name) for name in _PLAIN}
            code = left.pop("criterion")
        except KeyError as error:
            raise IntegrityError(f"The input cuts lack {error}: {_AGAIN}") from error
        quantiles = plain["quantiles"]
        counts = {"U": len(units), "K": quantiles.shape[-1] if quantiles.ndim else 0, "T": plain["targets"].size}
        for name, (dtype, shape) in _PLAIN.items():
            check_array(f"The input cuts' {name}", plain[name], dtype, tuple(counts[axis] for axis in shape))
        if code.dtype != np.int8 or code.shape != () or not 0 <= int(code) < len(CRITERIA):
            raise IntegrityError(f"The input cuts' criterion is none of {', '.join(CRITERIA)}: {_AGAIN}")
        _check_values(plain, np.array([unit.n_weights for unit in units], dtype=np.float64))
        criterion = CRITERIA[int(code)]
        factors = {}
        for index in range(len(units)) if criterion != "magnitude" else ():
            given = left.pop(f"factors.{index}", None)
            if given is None:
                raise IntegrityError(f"The input cuts lack the factors of {units[index].id}: {_AGAIN}")
            width = units[index].linears[0].in_features
            check_array(f"The input cuts' factors of {units[index].id}", given, np.float16, (width,))
            if not (given > 0).all():  # 0 would leave a channel out at every sparsity, 0 included
                raise IntegrityError(f"The input cuts' factors of {units[index].id} are not all positive: {_AGAIN}")
            factors[index] = given
        if left:
            raise IntegrityError(f"The input cuts have an unknown part '{sorted(left)[0]}': {_AGAIN}")
        return cls(criterion=criterion, factors=factors, **plain)


def threshold(quantiles: np.ndarray, share: float) -> float:
    """The value at or below which a share of the inputs lie whose quantiles (K,) were kept; 0 for a share of 0."""
    levels = np.concatenate([[0.0], quantile_levels(len(quantiles))])
    return float(np.float32(np.interp(share, levels, np.concatenate([[0.0], quantiles.astype(np.float64)]))))


def share_below(quantiles: np.ndarray, cut: float) -> float:
    """The share of inputs at or below a threshold, the inverse of ``threshold``; 0 at 0."""
    if cut <= 0:
        return 0.0
    levels = np.concatenate([[0.0], quantile_levels(len(quantiles))])
    return float(np.interp(cut, np.concatenate([[0.0], quantiles.astype(np.float64)]), levels, right=1.0))


def _check_values(plain: Mapping[str, np.ndarray], sizes: np.ndarray) -> None:
    quantiles, targets, shares = plain["quantiles"], plain["targets"].astype(np.float64), plain["shares"]
    if not targets.size or (np.diff(targets, prepend=0.0) <= 0).any() or targets[-1] >= 1:
        raise IntegrityError(f"The input cuts' targets do not ascend between 0 and 1: {_AGAIN}")
    if not quantiles.shape[1] or (quantiles < 0).any() or (np.diff(quantiles, axis=1) < 0).any():
        raise IntegrityError(f"The input cuts' quantiles do not ascend from 0: {_AGAIN}")
    if (shares < 0).any() or (shares > 1).any():
        raise IntegrityError(f"The input cuts' shares are not between 0 and 1: {_AGAIN}")
    if np.abs(shares.astype(np.float64) @ (sizes / sizes.sum()) - targets).max() > _TOLERANCE:
        raise IntegrityError(f"The input cuts' shares do not add up to their targets: {_AGAIN}")
    if plain["first"] < 1 or plain["texts"] < 1:
        raise IntegrityError(f"The input cuts' first tokens or texts are fewer than 1: {_AGAIN}")


_PLAIN: dict[str, tuple[type, tuple[str, ...]]] = {
    "quantiles": (np.float32, ("U", "K")),
    "targets": (np.float32, ("T",)),
    "shares": (np.float32, ("T", "U")),
    "first": (np.int32, ()),
    "texts": (np.int32, ()),
}
