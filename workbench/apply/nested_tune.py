"""Tuning of the scales of nested codes: the whole model at one width, against the dense model's next-token choice."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from workbench.analysis.divergence import dense_states
from workbench.apply.parts import Parts
from workbench.apply.scale_tune import NotFinite, Scales, by_group, tune, tuning_rate
from workbench.errors import RecipeError
from workbench.formats.nested import NestedCodes, zero_points
from workbench.models.base import LoadedModel
from workbench.progress import Job

WIDEST = 4  # bits that are tuned: above, a handful of windows is as much noise as there is to gain


def tune_scales(
    model: LoadedModel,
    codes: Mapping[str, NestedCodes],
    windows: Sequence[Sequence[int]],
    steps: int,
    job: Job,
    parts: Parts,
) -> dict[str, NestedCodes]:
    """Return the same codes with scales under which the model at widths up to ``WIDEST`` comes closer to the dense one.

    Per such width ``steps`` steps of Adam (Kingma and Ba 2015), each on one window, minimise the mean KL divergence of
    the dense model's next-token distribution from that of the model read at this width. Scales belong to one width,
    so widths are tuned apart; codes and zero points stay.

    Args:
        model: the dense model; left as it was, also after an error or a cancel.
        codes: by linear id, of every linear.
        windows: token windows of calibration text.
        steps: per width, at least 1.
        job: a stage per width, advanced by step.
        parts: of the fit; the scales of each width are one.

    Raises:
        RecipeError: an output of the model is not finite.
    """
    widths = next(iter(codes.values())).widths
    scales = {name: dict(nested.scales) for name, nested in codes.items()}
    with torch.inference_mode(False):
        ids = [torch.tensor([list(window)], device=model.device) for window in windows[:steps]]
        dense = functools.cache(lambda: dense_states(model, windows[:steps]))

        def tuned(bits: int) -> dict[str, torch.Tensor]:
            moving = {name: _scales(nested, bits, model) for name, nested in codes.items()}
            job.stage(f"tune scales at {bits} bits", steps)
            try:
                tune(model, moving, ids, dense(), steps=steps, rate=tuning_rate(bits), job=job)
            except NotFinite:
                raise RecipeError(
                    f"The outputs of {model.name} at {bits} bits are not finite: set tune_steps to 0."
                ) from None
            return {name: one.stored() for name, one in moving.items()}

        for bits in [bits for bits in widths if bits <= WIDEST]:
            for name, found in parts.once(f"scales at {bits} bits", functools.partial(tuned, bits)).items():
                scales[name][bits] = found
    return {name: replace(nested, scales=scales[name]) for name, nested in codes.items()}


def _scales(nested: NestedCodes, bits: int, model: LoadedModel) -> Scales:
    def units() -> torch.Tensor:
        top = (nested.codes >> (nested.bits - bits)).float()
        return by_group(top, nested.group_size).sub_(zero_points(nested.zeros[bits], bits).unsqueeze(2))

    return Scales(units, nested.scales[bits], (nested.codes.shape[0], nested.codes.shape[1]), model)
