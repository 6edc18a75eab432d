"""Programs of contextual sparsity: a threshold for inputs, and masks that are predicted or given.

Engines read them through ``runtime.plan``, which offers their names. A mask is one byte an entry, 1 = computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from workbench.errors import EngineError
from workbench.formats.mask_scores import hidden_of, scores_of

_ROWS = 64  # tokens whose scores are held at once: 12 MB for 46,350 units


@dataclass(frozen=True)
class Threshold:
    """``thresholds``' one value whatever the tap, and 0 at the ``first`` positions of a sequence.

    For ``input_threshold`` consumers: inputs of magnitude (times a factor) at most this are left out.
    """

    thresholds: tuple[float, ...]
    first: int = 0
    size: ClassVar[int] = 1
    multiply_adds: ClassVar[int] = 0
    bytes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if len(self.thresholds) != 1 or not 0 <= self.thresholds[0] < np.inf:
            raise EngineError(f"A Threshold takes one number of at least 0, got {list(self.thresholds)}.")

    def __call__(self, taps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.where(positions < self.first, np.float32(0), np.float32(self.thresholds[0]))


@dataclass(frozen=True, eq=False)
class ConstantMask:
    """``values`` whatever the tap, and ones at the ``first`` positions: static, random and magnitude masks.

    ``values`` is (size,), of zeros and ones.
    """

    values: np.ndarray
    first: int = 0
    multiply_adds: ClassVar[int] = 0
    bytes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        values = np.asarray(self.values)
        if values.ndim != 1 or not len(values) or not np.isin(values, (0, 1)).all():
            raise EngineError(f"A ConstantMask takes a row of zeros and ones, got values of shape {values.shape}.")

    @property
    def size(self) -> int:
        return len(self.values)

    @cached_property
    def choices(self) -> np.ndarray:
        """The two masks there are, uint8 (2, size): that of the first positions, and the values."""
        values = np.asarray(self.values).astype(np.uint8)
        return np.stack([np.ones_like(values), values])

    def chosen(self, positions: np.ndarray) -> np.ndarray:
        """Which of the choices is in force at positions (n,), int64 (n,)."""
        return (positions >= self.first).astype(np.int64)

    def __call__(self, taps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.choices[self.chosen(positions)]


@dataclass(frozen=True, eq=False, kw_only=True)
class PredictedMask:
    """Scores of many units (heads, neurons) from one tap by a small network, cut group by group.

        h = relu(hidden_steps * (hidden @ (tap / rms(tap))) + hidden_bias)
        score = mean + row_steps * (rows @ h rounded to multiples of max(h) / 127)
        mask = score > thresholds[group]

    and of a group at least ``floors`` units are kept, those of the highest scores (ties to the lower index). At the
    ``first`` positions of a sequence all are.

    Args:
        hidden: int8 (H, width) with ``hidden_steps`` and ``hidden_bias`` float32 (H,).
        rows: int8 (size, H) with ``row_steps`` and ``mean`` float32 (size,).
        groups: where each group of units begins, ascending from 0 to size, (G + 1,).
        thresholds: one per group, in any order.
        floors: int (G,).
    """

    hidden: np.ndarray
    hidden_steps: np.ndarray
    hidden_bias: np.ndarray
    rows: np.ndarray
    row_steps: np.ndarray
    mean: np.ndarray
    groups: np.ndarray
    thresholds: tuple[float, ...]
    floors: np.ndarray
    first: int = 0

    def __post_init__(self) -> None:
        n_hidden, size = self.hidden.shape[0], self.rows.shape[0]
        if self.hidden.dtype != np.int8 or self.rows.dtype != np.int8 or self.hidden.ndim != 2 or self.rows.ndim != 2:
            raise EngineError("A PredictedMask's hidden and rows are int8 matrices.")
        for name, expected in (
            ("hidden_steps", (n_hidden,)),
            ("hidden_bias", (n_hidden,)),
            ("rows", (size, n_hidden)),
            ("row_steps", (size,)),
            ("mean", (size,)),
            ("floors", (len(self.groups) - 1,)),
            ("thresholds", (len(self.groups) - 1,)),
        ):
            found = np.shape(getattr(self, name))
            if found != expected:
                raise EngineError(f"A PredictedMask's {name} must have shape {expected}, got {found}.")
        groups = np.asarray(self.groups)
        if len(groups) < 2 or groups[0] != 0 or groups[-1] != size or (np.diff(groups) < 1).any():
            raise EngineError(f"Groups of a PredictedMask must ascend from 0 to {size}, got {groups.tolist()}.")
        if np.isnan(np.asarray(self.thresholds, np.float64)).any():
            raise EngineError("A PredictedMask's thresholds must be numbers, one of them is NaN.")
        if (np.asarray(self.floors) < 0).any() or (np.asarray(self.floors) > np.diff(groups)).any():
            raise EngineError("A PredictedMask cannot keep fewer than none of a group's units, or more than there are.")

    @property
    def size(self) -> int:
        return int(self.rows.shape[0])

    @property
    def multiply_adds(self) -> int:
        return int(self.hidden.size + self.rows.size)

    @property
    def bytes(self) -> int:
        """Codes, steps, bias and means, and a threshold and a floor per group: the most that a decision reads."""
        return int(self.hidden.nbytes + self.rows.nbytes + 8 * len(self.hidden) + 8 * self.size + 8 * len(self.floors))

    def scores(self, taps: np.ndarray) -> np.ndarray:
        """Scores float32 (n, size) of taps (n, width)."""
        return scores_of(self, hidden_of(self, taps))

    def __call__(self, taps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        mask = np.ones((len(positions), self.size), np.uint8)
        where = np.flatnonzero(positions >= self.first)
        cuts = np.repeat(np.asarray(self.thresholds, np.float32), np.diff(self.groups))
        for begin in range(0, len(where), _ROWS):
            part = where[begin : begin + _ROWS]
            scores = self.scores(taps[part])
            kept = scores > cuts
            self._fill(kept, scores)
            mask[part] = kept
        return mask

    def _fill(self, kept: np.ndarray, scores: np.ndarray) -> None:
        """Keep each group's floor, in place."""
        counts = np.add.reduceat(kept, np.asarray(self.groups[:-1], np.int64), axis=1, dtype=np.int64)
        for row, group in np.argwhere(counts < np.asarray(self.floors)):
            begin, end = int(self.groups[group]), int(self.groups[group + 1])
            found = scores[row, begin:end]
            order = np.argsort(-np.where(np.isnan(found), -np.inf, found), kind="stable")
            kept[row, begin + order[: int(self.floors[group])]] = True
