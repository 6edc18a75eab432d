"""Error-compensated rounding: columns are rounded one after another, and those to come make up for what went wrong.

GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
section 3.3) and its asymmetric successor GPTAQ (Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for
Asymmetric Calibration", arXiv 2504.02692), free of what the columns are rounded to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from workbench.errors import RecipeError

_BLOCK = 64  # columns whose corrections are applied one by one before the rest is corrected in one product


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return ``H + damping mean(diag H) I``; the identity where no input was ever active: nothing is known of them.

    Args:
        moment: ``H = E[x x^T]``, (n, n).
        damping: more where there is little text for the number of channels.
    """
    mean = float(moment.diagonal().mean())
    if mean <= 0:
        moment, mean = torch.eye(len(moment), dtype=moment.dtype), 1.0
    h = moment.clone()
    h.diagonal().add_(damping * mean)
    return h


def walking_order(h: torch.Tensor) -> torch.Tensor:
    """Return the columns from the strongest input to the weakest, int64 (n,): the last have little left to spoil.

    Args:
        h: second moment of the inputs, (n, n).
    """
    return h.diagonal().argsort(descending=True, stable=True)


def upper_factor(h: torch.Tensor) -> torch.Tensor:
    """Return ``U`` (n, n), upper triangular with ``U^T U = H^-1``.

    Raises:
        RecipeError: H is not positive definite; damping makes it so.
    """
    factor, failed = torch.linalg.cholesky_ex(h)
    if bool(failed.any()):
        raise RecipeError("The inputs' second moment is not positive definite: raise 'damping'.")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def drift_factor(upper: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """Return ``P = triu(D U^T, 1) U``: how much of a column's weight later columns take over for its drifted input.

    The residual term of GPTAQ. Column q's input has become x' where the dense model has x; ``w_q (x_q - x'_q)``
    is then missing from the output, and the columns after q give it back in the least-squares sense.

    Args:
        upper: ``upper_factor`` of the moment of x', (n, n), in walking order.
        drift: ``D = E[(x - x') x'^T]``, (n, n), in walking order.
    """
    return (drift @ upper.T).triu_(1) @ upper


def walk(
    targets: torch.Tensor,
    upper: torch.Tensor,
    residual: Callable[[int, torch.Tensor], torch.Tensor],
    drift: torch.Tensor | None = None,
) -> None:
    """Round all columns in their order. With ``e_i`` what column i lacks, later column j becomes
    ``w_j - e_i U_ij / U_ii + w_i P_ij``.

    Args:
        targets: float32 (n, ...), columns first, in walking order; overwritten by what each was rounded from.
        upper: ``upper_factor`` in walking order, (n, n).
        residual: rounds column i, given what it should be, and returns what should be less what it is.
        drift: ``drift_factor``, or None where the inputs have not drifted.
    """
    n = targets.shape[0]
    diagonal = upper.diagonal().tolist()
    each = [-1] + [1] * (targets.dim() - 1)
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        errors = torch.empty_like(targets[begin:end])
        for i in range(begin, end):
            error = errors[i - begin] = residual(i, targets[i]).div_(diagonal[i])
            targets[i + 1 : end].addcmul_(upper[i, i + 1 : end].view(each), error, value=-1)
            if drift is not None:
                targets[i + 1 : end].addcmul_(drift[i, i + 1 : end].view(each), targets[i])
        rest = targets[end:].flatten(1)
        rest.addmm_(upper[begin:end, end:].T, errors.flatten(1), alpha=-1)
        if drift is not None:
            rest.addmm_(drift[begin:end, end:].T, targets[begin:end].flatten(1))
