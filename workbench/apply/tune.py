"""Learnt scales: those of stored group codes, tuned so that the whole model predicts as the dense one does.

Follows a method that stores group codes (``rtn``, ``awq``, ``gptq``) and leaves their codes, zero points and size as
they are. What the methods before do unit by unit is judged here at the model's output, as block-wise fits such as
AutoRound do at a block's (Cheng et al. 2024).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from workbench.analysis.divergence import dense_states
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.configs import TuneConfig as TuneConfig
from workbench.apply.draft import Draft
from workbench.apply.registry import register
from workbench.apply.scale_tune import NotFinite, Scales, by_group, tune, tuning_rate
from workbench.corpus import TextRecord
from workbench.errors import RecipeError
from workbench.formats.codes import GroupCodes
from workbench.formats.encodings import Groups
from workbench.models.base import LoadedModel
from workbench.progress import Job


@dataclass(frozen=True)
class FittedScales:
    """What ``fit`` found: codes by linear id, of every linear that has group codes, and the text."""

    codes: dict[str, GroupCodes]
    text: TextRecord


@register(TuneConfig)
class Tune:
    """Handler of ``TuneConfig``."""

    def fit(self, draft: Draft, config: TuneConfig, *, seed: int, job: Job) -> FittedScales:
        """Tune scales; the model is left as it was, also after an error or a cancel.

        Memory: the weights in codes beside the dense ones, one gradient at a time, and the activations of one window.

        Raises:
            RecipeError: linears without group codes, or an output that is not finite.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``, between steps.
        """
        model = draft.model
        stored: dict[str, GroupCodes] = {}
        for linear in model.architecture.linears:
            encoding = draft.linears.get(linear.id)
            if not isinstance(encoding, Groups):
                raise RecipeError(f"Method 'tune': {linear.id} has no group codes; give it 2 to 8 bits.")
            stored[linear.id] = encoding.codes
        check_finite(model)
        tokens, text = calibration_windows(
            model, config.calibration_tokens, seed, job, text=config.calibration, parts=draft.parts
        )
        bits = Counter(codes.bits for codes in stored.values()).most_common(1)[0][0]
        with torch.inference_mode(False):
            windows = [torch.tensor([list(window)], device=model.device) for window in tokens[: config.steps]]
            dense = dense_states(model, tokens[: config.steps])
            scales = {name: _scales(codes, model) for name, codes in stored.items()}
            job.stage("tune scales", config.steps)
            try:
                tune(
                    model,
                    scales,
                    windows,
                    dense,
                    steps=config.steps,
                    rate=tuning_rate(bits),
                    job=job,
                    vectors=draft.folded.vectors,
                )
            except NotFinite:
                raise RecipeError(f"The outputs of {model.name} in codes are not finite: leave 'tune' out.") from None
        return FittedScales({name: replace(stored[name], scales=one.stored()) for name, one in scales.items()}, text)

    def apply(self, draft: Draft, config: TuneConfig, fitted: FittedScales, *, job: Job) -> None:
        for name, codes in fitted.codes.items():
            draft.linears[name] = Groups.of_codes(codes)
            job.advance(codes.codes.numel())


def _scales(codes: GroupCodes, model: LoadedModel) -> Scales:
    def units() -> torch.Tensor:
        zeros = 2 ** (codes.bits - 1) if codes.zeros is None else codes.zeros.float().unsqueeze(2)
        return by_group(codes.codes.float(), codes.group_size) - zeros

    return Scales(units, codes.scales, (codes.codes.shape[0], codes.codes.shape[1]), model)
