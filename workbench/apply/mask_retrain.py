"""Train a stored mask predictor on from what it read and should have said in requests that ran dense.

The calibration text is gone, so the network starts from the numbers that are stored and sees logged tokens alone. Every
eighth request is held out: it ends the training, and says whether the outcome is better than what there was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from workbench.apply.mask_examples import Examples
from workbench.apply.mask_net import MaskNet, NetSpec, PartSpec
from workbench.apply.mask_statistics import score_error
from workbench.apply.mask_training import group_means, part_roots, part_weights, regress
from workbench.errors import InputError
from workbench.formats.mask_predictor import MaskPart, MaskPredictor, mask_groups
from workbench.formats.selectors import quantile_levels
from workbench.models.base import Architecture
from workbench.progress import Job
from workbench.runtime.feature_log import FeatureLog, why_no_features
from workbench.runtime.plan import Tap

FEWEST_TOKENS, FEWEST_REQUESTS = 256, 16  # below which neither thresholds nor the comparison mean anything
_HELD_OUT = 8  # every eighth request, as ``mask_training`` has it
_DECISIONS = 64


@dataclass(frozen=True)
class Retrained:
    """The predictor, and squared errors on held-out requests as a share of the scores' variance about their means
    there: of the network that there was, ``before``, and of the new one, as it is stored, ``after``."""

    predictor: MaskPredictor
    before: float
    after: float


def retrained(
    architecture: Architecture,
    predictor: MaskPredictor,
    log: FeatureLog,
    *,
    epochs: int = 20,
    seed: int = 0,
    job: Job | None = None,
) -> Retrained:
    """Return a predictor of the same shape, trained on from what is stored.

    Its thresholds (quantiles) and what is known of its errors are those of the logged tokens; of the calibration text
    it keeps how texts scatter, and mean scores.

    Raises:
        InputError: a predictor whose scores are not known while running, or too few tokens or requests.
        Cancelled: by ``job``.
    """
    if (why := why_no_features(predictor)) is not None:
        raise InputError(f"This predictor cannot be trained on from logged features: {why}.")
    requests = len(np.unique(log.requests))
    held = np.flatnonzero(log.requests % _HELD_OUT == _HELD_OUT - 1)
    if len(log.scores) < FEWEST_TOKENS or requests < FEWEST_REQUESTS or not len(held):
        raise InputError(
            f"The features are of {len(log.scores)} tokens in {requests} requests, too few to train on: at least "
            f"{FEWEST_TOKENS} in {FEWEST_REQUESTS}, after the first {predictor.facts['prefix']} tokens of each."
        )
    spec, examples = _spec(architecture, predictor), _examples(architecture, predictor, log)
    net = MaskNet(architecture, spec, len(predictor.parts[0].hidden), seed)
    net.load_rounded(predictor.parts)
    found = regress(net, examples, epochs, seed, job)
    scale, parts = found.scale.numpy(), net.rounded()
    means = group_means(examples.targets)
    roots = [part_roots(net, examples, means, index).double().numpy() for index in range(len(spec.parts))]
    # Scores are in units of their calibration text's means; told in those of the log, both can be compared.
    ratio = predictor.scale.astype(np.float64) / scale
    before = _error(spec, net, predictor.parts, log, roots, held, ratio)
    after = _error(spec, net, parts, log, roots, held, np.ones(len(ratio)))
    levels, quantiles = quantile_levels(predictor.quantiles.shape[1]), np.empty_like(predictor.quantiles)
    errors, hidden = [], []
    few = held[np.linspace(0, len(held) - 1, min(_DECISIONS, len(held))).round().astype(int)]
    for part, new, taps, root in zip(spec.parts, parts, log.inputs, roots, strict=True):
        scores = new.scores(taps)
        hidden.append(new.hidden_of(taps[few]).astype(np.float16))
        for index, (_, a, b) in enumerate(spec.blocks_of(part), start=part.begin):
            quantiles[index] = np.quantile(scores[:, a:b], levels)
            errors.append(score_error(scores[held, a:b].astype(np.float64), root[held, a:b]))
    known = predictor.statistics
    if known is not None:
        known = replace(known, errors=np.array(errors, np.float32), held=tuple(hidden))
    made = replace(predictor, parts=parts, scale=scale.astype(np.float32), quantiles=quantiles, statistics=known)
    return Retrained(made, before, after)


def _spec(architecture: Architecture, predictor: MaskPredictor) -> NetSpec:
    groups = mask_groups(architecture, range(predictor.first_block, architecture.n_blocks))
    parts = tuple(PartSpec(Tap(part.tap, part.block), *part.groups) for part in predictor.parts)  # type: ignore[arg-type]
    return NetSpec(predictor.first_block, groups, parts)


def _examples(architecture: Architecture, predictor: MaskPredictor, log: FeatureLog) -> Examples:
    spec = _spec(architecture, predictor)
    scores, targets, begin = torch.from_numpy(log.scores), [], 0
    for group in spec.groups:
        targets.append(scores[:, begin : begin + group.size].bfloat16())
        begin += group.size
    inputs = {part.tap: torch.from_numpy(rows) for part, rows in zip(spec.parts, log.inputs, strict=True)}
    return Examples(torch.from_numpy(log.requests), inputs, targets, {}, len(scores))


def _error(
    spec: NetSpec,
    net: MaskNet,
    parts: Sequence[MaskPart],
    log: FeatureLog,
    roots: Sequence[np.ndarray],
    held: np.ndarray,
    ratio: np.ndarray,
) -> float:
    """Weighted squared error of stored parts on held-out tokens, as a share of the variance about units' means."""
    left = total = 0.0
    for index, (part, stored) in enumerate(zip(spec.parts, parts, strict=True)):
        sizes = [group.size for group in spec.groups[part.begin : part.end]]
        scores = stored.scores(log.inputs[index][held]) * np.repeat(ratio[part.begin : part.end], sizes)
        weights, wanted = part_weights(net, index).numpy(), roots[index][held]
        left += float((np.square(scores - wanted) * weights).sum())
        total += float((np.square(wanted - wanted.mean(axis=0)) * weights).sum())
    return left / max(total, 1e-30)
