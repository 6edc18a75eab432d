"""How large the error of reading a unit at a narrower width is at a token, and what estimates it cheaply.

The exact error of a step between two widths is ``||dW x||``: as many products as the unit itself. DP-LLM (Kwon et al.
2025, arXiv 2508.06041) estimates it from the norm of x where a regression is good enough (R^2 at least 0.9), else from
``||A dW x||`` with a random matrix A of few rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.stats import rankdata
from torch import nn

from workbench.errors import RecipeError
from workbench.formats.nested import NestedCodes
from workbench.formats.selectors import quantile_levels
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job

_NORMAL = 30  # tokens whose average is about normally distributed, as a rule of thumb
_LEVELS = 128  # quantiles kept of every distribution: shares of tokens are known to half a percent


@dataclass(frozen=True)
class UnitErrors:
    """One unit on calibration text, without the first token of each window (T tokens, S steps between widths).

    Attributes:
        norms: float32 (T,), of the unit's input.
        errors: float32 (T, S), ``||dW x||``.
        projected: float32 (T, S, k), rows ``A dW x``.
        rows: float32 (S, k, in), ``A dW``.
    """

    norms: np.ndarray
    errors: np.ndarray
    projected: np.ndarray
    rows: np.ndarray


def unit_errors(
    model: LoadedModel,
    codes: Mapping[str, NestedCodes],
    windows: Sequence[Sequence[int]],
    rows: int,
    seed: int,
    job: Job,
) -> list[UnitErrors]:
    """Measure every unit on the inputs that the dense model gives it.

    Args:
        model: the dense model, left as it is.
        codes: of every linear, by id.
        windows: token windows of calibration text, of two tokens or more.
        rows: k, of each projection.
        seed: of the random projections.
        job: a stage, advanced by window.

    Raises:
        RecipeError: an activation is not finite.
    """
    watched = [
        _Watched(unit, codes, rows, torch.Generator().manual_seed(seed + index), model)
        for index, unit in enumerate(model.architecture.units)
    ]
    hooks = [model.submodule(one.path).register_forward_pre_hook(one.see) for one in watched]
    job.stage("measure errors of widths", len(windows))
    try:
        with torch.no_grad():
            for window in windows:
                model.module.base_model(input_ids=torch.tensor([list(window)], device=model.device), use_cache=False)
                job.advance()
    finally:
        for hook in hooks:
            hook.remove()
    found = [one.found() for one in watched]
    for one, unit in zip(found, model.architecture.units, strict=True):
        if not np.isfinite(one.errors).all():
            raise RecipeError(f"The activations that enter {unit.id} are not finite: load {model.name} in float32.")
    return found


class _Watched:
    """A unit whose inputs are looked at."""

    def __init__(
        self, unit: Unit, codes: Mapping[str, NestedCodes], rows: int, random: torch.Generator, model: LoadedModel
    ) -> None:
        self.path = unit.linears[0].path
        widths = codes[unit.linears[0].id].widths
        outputs = sum(linear.out_features for linear in unit.linears)
        projection = torch.randn(rows, outputs, generator=random) / rows**0.5
        changes, projected = [], []
        for low, high in itertools.pairwise(widths):
            change = torch.cat([codes[x.id].dequantize(high) - codes[x.id].dequantize(low) for x in unit.linears])
            projected.append(projection @ change)
            changes.append(change.to(model.device, torch.bfloat16))
        self._changes = changes
        inputs = unit.linears[0].in_features
        self._rows = torch.stack(projected) if projected else torch.zeros(0, rows, inputs)
        self._norms: list[torch.Tensor] = []
        self._errors: list[torch.Tensor] = []
        self._projected: list[torch.Tensor] = []

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])[1:]
        self._norms.append(x.float().norm(dim=1).cpu())
        half = x.to(torch.bfloat16)
        errors = [(half @ change.T).float().norm(dim=1) for change in self._changes]
        self._errors.append(torch.stack(errors, 1).cpu() if errors else torch.zeros(len(x), 0))
        self._projected.append(torch.einsum("ti,ski->tsk", x.float().cpu(), self._rows))

    def found(self) -> UnitErrors:
        def joined(parts: list[torch.Tensor]) -> np.ndarray:
            return torch.cat(parts).numpy()

        return UnitErrors(joined(self._norms), joined(self._errors), joined(self._projected), self._rows.numpy())


def quantiles(values: np.ndarray) -> np.ndarray:
    """Quantiles at (k + 1/2) / K along the first axis, moved to the last: float32 (..., K)."""
    return np.moveaxis(np.quantile(values, quantile_levels(_LEVELS), axis=0), 0, -1).astype(np.float32)


def spread_of_texts(norms: Sequence[np.ndarray], texts: Sequence[int], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """How far texts scatter around the whole calibration text: ``Selectors.lengths`` and ``Selectors.spread``.

    Args:
        norms: of each unit (U), float32 (T,), text after text.
        texts: tokens of each text, T in all.
        longest: tokens, at most those of the shortest text; halved as long as an average of ranks is about normal.
    """
    lengths = [longest]
    while lengths[0] // 2 >= _NORMAL:
        lengths.insert(0, lengths[0] // 2)
    begins = np.cumsum([0, *texts[:-1]])
    spread = np.zeros((len(norms), len(lengths)), dtype=np.float32)
    for unit, values in enumerate(norms):
        ranks = (rankdata(values) - 0.5) / len(values)
        for at, length in enumerate(lengths):
            averages = np.array([ranks[begin : begin + length].mean() for begin in begins])
            spread[unit, at] = np.square(averages - 0.5).mean()
    return np.array(lengths, dtype=np.int32), spread


def regress(norms: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Least squares of errors (T,) on norms (T,): slope, intercept and R^2, float32 (3,)."""
    x, y = norms.astype(np.float64), errors.astype(np.float64)
    dx, dy = x - x.mean(), y - y.mean()
    square = float(dx @ dx)
    slope = float(dx @ dy) / square if square > 0 else 0.0
    spread = float(dy @ dy)
    fit = 1 - float(np.square(dy - slope * dx).sum()) / spread if spread > 0 else 0.0
    return np.array([slope, y.mean() - slope * x.mean(), fit], dtype=np.float32)


def refine(rows: np.ndarray, projected: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit how much each row of a projection counts, and round it.

    The square of the error is regressed on the squares of the projected rows, with weights of at least zero: what k
    random rows have in excess in some directions they lose there.

    Args:
        rows: float32 (k, in).
        projected: float32 (T, k), the rows' products with the inputs.
        errors: float32 (T,).

    Returns:
        int8 (k', in) and float32 (k',) rows and their steps; rows of no weight are left out.
    """
    weights, _ = nnls(np.square(projected, dtype=np.float64), np.square(errors, dtype=np.float64))
    kept = weights > 0
    if not kept.any():
        kept, weights = np.ones(len(rows), dtype=bool), np.ones(len(rows))
    scaled = rows[kept] * np.sqrt(weights[kept])[:, None]
    steps = np.maximum(np.abs(scaled).max(axis=1), 1e-12) / 127
    return np.rint(scaled / steps[:, None]).astype(np.int8), steps.astype(np.float32)
