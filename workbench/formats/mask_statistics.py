"""What a mask predictor keeps of the text it was made on, to tell while running how sure it is and of what.

numpy alone, for engines without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.errors import IntegrityError
from workbench.formats.checked import check_array
from workbench.formats.mask_scores import by_rms

PREFIX = "statistics."


@dataclass(frozen=True)
class MaskStatistics:
    """Errors and inputs of a predictor with G groups, over calibration text; ``width`` is that of its first part's tap.

    Attributes:
        errors: float32 (G,), positive: standard deviation of the score, as an estimate of what it stands for, about the
            straight line between the two, in units of the score; over units and decisions of held-out text.
        center: float32 (width,), mean of the first part's tap divided by its root mean square, over deciding tokens.
        variance: float32 (width,), its variance, positive.
        texts: int32 (), texts that ``drift`` was measured on, at least 2.
        lengths: int32 (L,), ascending: tokens of a text, its first left out.
        drift: float32 (L, 2): mean and standard deviation over texts of the logarithm of the mean ``distance`` of a
            text's first tokens, as many as ``lengths`` says.
        held: by part float16 (n, H), the same n at least 1 for all parts: hidden activations at decisions of held-out
            text, from which scores follow.
    """

    errors: np.ndarray
    center: np.ndarray
    variance: np.ndarray
    texts: np.ndarray
    lengths: np.ndarray
    drift: np.ndarray
    held: tuple[np.ndarray, ...]

    def distance(self, taps: np.ndarray) -> np.ndarray:
        """How far taps (n, width) of the first part lie from its calibration text, float64 (n,).

        The mean over channels of the squared difference from the channel's mean, in units of its variance: 1 on average
        over the calibration text. How channels go together is left out.
        """
        taps = by_rms(np.asarray(taps, dtype=np.float64))
        return (np.square(taps - self.center) / self.variance).mean(axis=1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by name on disk."""
        found = {name: getattr(self, name) for name in _PLAIN}
        found |= {f"held.{index}": array for index, array in enumerate(self.held)}
        return {PREFIX + name: array for name, array in found.items()}

    @classmethod
    def taken_from(
        cls, left: dict[str, np.ndarray], groups: int, sizes: Sequence[tuple[int, int]]
    ) -> MaskStatistics | None:
        """Take what ``arrays`` gave out of ``left``; None where there is nothing, as in models made before there was.

        Args:
            left: arrays by name.
            groups: G.
            sizes: width and H of each part.

        Raises:
            IntegrityError: something is missing, of another type or shape, or not possible.
        """
        if not any(name.startswith(PREFIX) for name in left):
            return None
        lengths = left.get(PREFIX + "lengths")
        count = lengths.size if lengths is not None else 0
        first = left.get(PREFIX + "held.0")
        n = len(first) if first is not None and first.ndim else 0
        errors = _array(left, "errors", np.float32, (groups,))
        center = _array(left, "center", np.float32, (sizes[0][0],))
        variance = _array(left, "variance", np.float32, (sizes[0][0],))
        texts = _array(left, "texts", np.int32, ())
        lengths = _array(left, "lengths", np.int32, (count,))
        drift = _array(left, "drift", np.float32, (count, 2))
        held = tuple(_array(left, f"held.{i}", np.float16, (n, inner)) for i, (_, inner) in enumerate(sizes))
        possible = n > 0 and texts >= 2 and (np.diff(lengths, prepend=0) > 0).all() and (drift[:, 1] > 0).all()
        if not possible or (errors <= 0).any() or (variance <= 0).any():
            raise IntegrityError("The mask predictor's statistics are not possible: compress the model again.")
        return cls(errors, center, variance, texts, lengths, drift, held)


_PLAIN = ("errors", "center", "variance", "texts", "lengths", "drift")


def _array(left: dict[str, np.ndarray], name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    array = left.pop(PREFIX + name, None)
    if array is None:
        raise IntegrityError(f"The mask predictor's statistics lack '{name}': compress the model again.")
    check_array(f"The mask predictor's statistics: '{name}'", array, dtype, shape)
    return array
