"""What a mask predictor remembers of its calibration text: its errors, its inputs, and how far texts scatter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from workbench.analysis.masking import masking
from workbench.apply.mask_examples import Examples
from workbench.apply.mask_net import MaskNet
from workbench.apply.mask_training import group_means, part_roots
from workbench.apply.parts import Parts
from workbench.formats.mask_predictor import MaskPredictor
from workbench.formats.mask_statistics import MaskStatistics
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime.plan import Tap

_HELD_OUT = 8  # every eighth text, as in the training
_DECISIONS = 64  # of held-out text that are kept
_SHORTEST = 8  # tokens of a text that say where it lies
_LEAST = 0.01  # correlation, so that errors stay finite where nothing is predicted


def statistics_of(
    model: LoadedModel,
    net: MaskNet,
    predictor: MaskPredictor,
    examples: Examples,
    windows: Sequence[Sequence[int]],
    parts: Parts,
    job: Job,
) -> MaskStatistics:
    """Measure them.

    Args:
        model: the dense model.
        net: what the predictor was rounded from.
        predictor: as it is stored.
        examples: that it was trained on, with those that were held out.
        windows: the texts, of one length; one pass through the model each.
        parts: where that pass is kept.
        job: a stage, advanced by text.
    """
    tap = net.spec.parts[0].tap
    inputs = examples.inputs[tap].float().cpu()
    inputs = inputs / (inputs.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
    center = inputs.double().mean(dim=0).float().numpy()
    variance = inputs.double().var(dim=0, correction=0).clamp(min=1e-8).float().numpy()

    held = torch.nonzero(examples.texts % _HELD_OUT == _HELD_OUT - 1)[:, 0]
    few = held[torch.linspace(0, len(held) - 1, min(_DECISIONS, len(held))).round().long()]
    means = group_means(examples.targets)
    errors, hidden = [], []
    for index, (part, stored) in enumerate(zip(net.spec.parts, predictor.parts, strict=True)):
        rows = examples.inputs[part.tap].float().cpu().numpy()
        hidden.append(stored.hidden_of(rows[few.numpy()]).astype(np.float16))
        scores = stored.scores(rows[held.numpy()]).astype(np.float64)
        roots = part_roots(net, examples, means, index)[held].double().numpy()
        errors += [score_error(scores[:, a:b], roots[:, a:b]) for _, a, b in net.spec.blocks_of(part)]
    lengths = [_SHORTEST]
    while 2 * lengths[-1] < len(windows[0]):
        lengths.append(2 * lengths[-1])
    empty = np.zeros((len(lengths), 2), np.float32)
    found = MaskStatistics(
        np.array(errors, dtype=np.float32),
        center,
        variance,
        np.array(len(windows), dtype=np.int32),
        np.array(lengths, dtype=np.int32),
        empty,
        tuple(hidden),
    )
    logs = parts.once("drift", lambda: {"logs": _logs(model, tap, found, windows, job)})["logs"].double()
    drift = torch.stack([logs.mean(dim=0), logs.std(dim=0).clamp(min=1e-6)], dim=1)
    return replace(found, drift=drift.float().numpy())


def score_error(scores: np.ndarray, roots: np.ndarray) -> float:
    """Scatter of scores about what they stand for, in units of the score; see ``MaskStatistics``."""
    spread, wanted = float(scores.std()), float(roots.std())
    if spread == 0 or wanted == 0:
        return 1.0  # all alike: every distance from a threshold is as good
    r = float(((scores - scores.mean()) * (roots - roots.mean())).mean()) / (spread * wanted)
    r = min(max(r, _LEAST), 1.0)
    return max(spread * (1 - r * r) ** 0.5 / r, 1e-6 * spread)


def _logs(
    model: LoadedModel, tap: Tap, statistics: MaskStatistics, windows: Sequence[Sequence[int]], job: Job
) -> torch.Tensor:
    """Logarithm of the mean distance of each text's first tokens, float64 (texts, L)."""
    job.stage("see how texts scatter", len(windows))
    found: list[list[float]] = []

    def see(tap: Tap, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])[1:].float().cpu().numpy()
        means = np.cumsum(statistics.distance(rows)) / np.arange(1, len(rows) + 1)
        found.append([float(np.log(means[length - 1])) for length in statistics.lengths.tolist()])

    with torch.no_grad(), masking(model, (tap,), see, lambda block, kind: None):
        for window in windows:
            model.module.base_model(input_ids=torch.tensor([list(window)], device=model.device), use_cache=False)
            job.advance()
    return torch.tensor(found, dtype=torch.float64)
