"""Salient channels kept in high precision, chosen by activation, by weight or at random.

The experiment that AWQ starts from (Lin et al. 2024, section 3.1, table 1): one percent of the input channels kept in
16 bits recovers most of what rounding costs, if they are chosen by the activations; chosen by the weights or at random
they recover next to nothing. Follows a method that stores group codes. Runs on the reference engine only: no other has
kernels that mix codes and 16-bit columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.configs import SalientConfig as SalientConfig
from workbench.apply.draft import Draft
from workbench.apply.moments import input_magnitudes
from workbench.apply.registry import register
from workbench.corpus import TextRecord
from workbench.errors import RecipeError
from workbench.formats.encodings import Groups
from workbench.formats.salient import Salient
from workbench.models.base import Unit
from workbench.progress import Job


@dataclass(frozen=True)
class FittedSalient:
    """What ``fit`` found.

    Attributes:
        channels: kept channels, int64 (k,), by unit id.
        text: what they were chosen on, None where no text was needed.
    """

    channels: dict[str, torch.Tensor]
    text: TextRecord | None


def top_channels(score: torch.Tensor, share: float) -> torch.Tensor:
    """Return the channels with the highest scores, int64, ascending: the share of all, rounded, and at least one.

    Args:
        score: (in,); the earlier of two alike counts as higher.
        share: 0 to 1.
    """
    kept = max(1, round(share * len(score)))
    return score.argsort(descending=True, stable=True)[:kept].sort().values


@register(SalientConfig)
class SalientMethod:
    """Handler of ``SalientConfig``."""

    def fit(self, draft: Draft, config: SalientConfig, *, seed: int, job: Job) -> FittedSalient:
        """Choose channels of every unit.

        Raises:
            RecipeError: no group codes to work on, or an activation is not finite.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``.
        """
        model = draft.model
        if not any(isinstance(encoding, Groups) for encoding in draft.linears.values()):
            raise RecipeError("Method 'salient': no group codes are stored yet; put 'rtn' or 'awq' before it.")
        scores: dict[str, torch.Tensor] = {}
        text = None
        if config.by == "activation":
            check_finite(model, "choose by 'weight'")
            tokens, text = calibration_windows(
                model, config.calibration_tokens, seed, job, text=config.calibration, parts=draft.parts
            )
            scores = input_magnitudes(model, tokens, job)
        generator = torch.Generator().manual_seed(seed)
        for unit in model.architecture.units:
            if config.by == "random":
                scores[unit.id] = torch.rand(unit.linears[0].in_features, generator=generator)
            elif config.by == "weight":
                scores[unit.id] = _column_norms(draft, unit)
        return FittedSalient({name: top_channels(score, config.share) for name, score in scores.items()}, text)

    def apply(self, draft: Draft, config: SalientConfig, fitted: FittedSalient, *, job: Job) -> None:
        for linear in draft.model.architecture.linears:
            stored = draft.linears[linear.id]
            if isinstance(stored, Groups):
                weight = draft.folded_weight(linear)
                draft.linears[linear.id] = Salient.of(stored, weight, fitted.channels[linear.unit])
            job.advance(linear.n_weights)


def _column_norms(draft: Draft, unit: Unit) -> torch.Tensor:
    """Euclidean norm of every column over the linears of a unit, as they are without folding, float32 (in,)."""
    return torch.stack([draft.weight(linear.path).square().sum(0) for linear in unit.linears]).sum(0).sqrt()
