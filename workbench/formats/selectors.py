"""What a model of several widths keeps beside its codes to choose among them at every token: small tables, by unit.

They hold no threshold: any target of average bits is turned into thresholds when it is asked for
(``runtime.precision``), so that another target needs no other bytes. numpy alone, for engines without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from workbench.errors import IntegrityError
from workbench.formats.checked import check_array
from workbench.models.base import Architecture

PREFIX = "selectors."


@dataclass(frozen=True)
class Selectors:
    """Statistics of calibration text, with units in the order of the architecture (U) and W ascending widths.

    A *step* j goes from width j to width j + 1; there are W - 1. Quantiles are of the calibration tokens at the levels
    (k + 1/2) / K, ascending; the first token of a text is left out, since it is always read at the widest width.

    Attributes:
        widths: int8 (W,), bits.
        highest: int8 (U,), the widest width of each unit.
        norms: float32 (U, K), quantiles of the Euclidean norm of the unit's input.
        power: float32 (U,), mean of the squared norm.
        gains: float32 (U, W - 1), what a step of this unit takes off the model's divergence from dense, nats per token.
        targets: float32 (P,), average bits that precisions were learnt for, ascending; may be empty.
        precision: float32 (P, U), the average width learnt for each unit.
        errors: float32 (U, W - 1, K), quantiles of ``||dW x||``, dW what a step changes in the unit's weights.
        regression: float32 (U, W - 1, 3): slope and intercept of that error on the norm, and R^2.
        texts: int32 (), texts of calibration.
        lengths: int32 (L,), ascending; numbers of tokens from the beginning of a text.
        spread: float32 (U, L), how far texts scatter: the mean over them of (a - 1/2)^2, where a is the average rank (0
            to 1, among all tokens) of the norms of a text's first tokens, as many as ``lengths`` says. Of n independent
            tokens it is 1 / (12 n), so the effective sample size of a text of n tokens is 1 / (12 spread). Models made
            before this was measured have no lengths.
        projections: by (unit, step): int8 (k, in) and float32 (k,), rows and their steps, whose product with the input
            has about the norm of the error; only where the regression is not good enough.
    """

    widths: np.ndarray
    highest: np.ndarray
    norms: np.ndarray
    power: np.ndarray
    gains: np.ndarray
    targets: np.ndarray
    precision: np.ndarray
    errors: np.ndarray
    regression: np.ndarray
    texts: np.ndarray
    lengths: np.ndarray
    spread: np.ndarray
    projections: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by name on disk."""
        found = {name: getattr(self, name) for name in _PLAIN}
        for (unit, step), (rows, steps) in self.projections.items():
            found[f"rows.{unit}.{step}"] = rows
            found[f"steps.{unit}.{step}"] = steps
        return {PREFIX + name: array for name, array in found.items()}

    @property
    def stored_bits(self) -> int:
        return 8 * sum(array.nbytes for array in self.arrays().values())

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], architecture: Architecture) -> Self:
        """Check and take apart what ``arrays`` gave.

        Raises:
            IntegrityError: something is missing, too much, of another type or shape, or not finite.
        """
        left = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
        units = architecture.units
        for name, empty in _SCATTER.items() if not _SCATTER.keys() & left.keys() else ():
            left[name] = empty(len(units))
        try:
            plain = {name: left.pop(name) for name in _PLAIN}
        except KeyError as error:
            raise IntegrityError(f"The selectors lack {error}: compress the model again.") from error
        counts = {"U": len(units), "W": plain["widths"].size, "P": plain["targets"].size, "K": plain["norms"].shape[-1]}
        counts["L"] = plain["lengths"].size
        counts["S"] = counts["W"] - 1
        for name, (dtype, shape) in _PLAIN.items():
            expected = tuple(counts[axis] if axis in counts else int(axis) for axis in shape)
            check_array(f"The selectors' {name}", plain[name], dtype, expected)
        lengths = plain["lengths"]
        if (np.diff(lengths, prepend=0) <= 0).any() or plain["texts"] < 0 or (plain["spread"] < 0).any():
            raise IntegrityError("The selectors' scatter of texts is not possible: compress the model again.")
        widths = plain["widths"]
        if counts["W"] < 1 or (np.diff(widths) <= 0).any() or not np.isin(plain["highest"], widths).all():
            raise IntegrityError("The selectors' widths do not ascend, or a unit has another: compress it again.")
        projections = {}
        for name in [name for name in left if name.startswith("rows.")]:
            parts = name.split(".")
            rows, steps = left.pop(name), left.pop("steps." + name.removeprefix("rows."), None)
            known = len(parts) == 3 and all(part.isdigit() for part in parts[1:])
            unit, step = (int(parts[1]), int(parts[2])) if known else (-1, -1)
            if not (0 <= unit < counts["U"] and 0 <= step < counts["S"]) or steps is None:
                raise IntegrityError(f"The selectors' {name} belongs to nothing: compress the model again.")
            fits = rows.dtype == np.int8 and steps.dtype == np.float32 and rows.ndim == 2
            if not fits or rows.shape != (steps.size, units[unit].linears[0].in_features):
                raise IntegrityError(f"The selectors' {name} has another type or shape: compress the model again.")
            projections[unit, step] = (rows, steps)
        if left:
            raise IntegrityError(f"The selectors have an unknown part '{sorted(left)[0]}': compress the model again.")
        return cls(**plain, projections=projections)


def quantile_levels(count: int) -> np.ndarray:
    """Levels that ``count`` quantiles of a distribution are kept at, float64 (count,)."""
    return (np.arange(count) + 0.5) / count


def quantile(kept: np.ndarray, level: float) -> float:
    """The quantile at any level of a distribution of which ``kept`` (K,) are."""
    return float(np.interp(level, quantile_levels(len(kept)), kept))


def share_above(kept: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Share of a distribution above each of ``cuts``, float64 of their shape; ``kept`` (K,) are its quantiles."""
    return 1 - np.interp(cuts, kept, quantile_levels(len(kept)), left=0.0, right=1.0)


_PLAIN: dict[str, tuple[type, tuple[str, ...]]] = {
    "widths": (np.int8, ("W",)),
    "highest": (np.int8, ("U",)),
    "norms": (np.float32, ("U", "K")),
    "power": (np.float32, ("U",)),
    "gains": (np.float32, ("U", "S")),
    "targets": (np.float32, ("P",)),
    "precision": (np.float32, ("P", "U")),
    "errors": (np.float32, ("U", "S", "K")),
    "regression": (np.float32, ("U", "S", "3")),
    "texts": (np.int32, ()),
    "lengths": (np.int32, ("L",)),
    "spread": (np.float32, ("U", "L")),
}
_SCATTER = {
    "texts": lambda units: np.zeros((), dtype=np.int32),
    "lengths": lambda units: np.zeros(0, dtype=np.int32),
    "spread": lambda units: np.zeros((units, 0), dtype=np.float32),
}
