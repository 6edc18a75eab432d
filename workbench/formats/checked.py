"""The check of every array that is read beside a model's weights."""

from __future__ import annotations

import numpy as np

from workbench.errors import IntegrityError


def check_array(what: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    """Raise ``IntegrityError`` where an array ("The selectors' norms") is of another type or shape, or not finite."""
    if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
        raise IntegrityError(
            f"{what} is {array.dtype} {array.shape}, expected finite {np.dtype(dtype)} {shape}: compress the model "
            "again."
        )
