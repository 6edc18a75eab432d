"""Train a mask predictor to give scores: regression, by text that it has not seen stopped early.

As ShadowLLM (Akhauri et al. 2024): mean squared error, AdamW at 1e-3 falling as a cosine, targets normalised by layer.
Three things differ. A target is the square root of a score over its group's mean: scores have long tails, and what a
mask needs is the order about its threshold. Inputs are divided by their root mean square, which needs no second pass
over them. And errors count by the weights that a unit takes along, so that nine heads weigh what they read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workbench.apply.mask_examples import Examples
from workbench.apply.mask_net import MaskNet
from workbench.errors import RecipeError
from workbench.progress import Job

_RATE, _BATCH = 1e-3, 128
_HELD_OUT = 8  # every eighth text stops the training and is not trained on
_PATIENCE = 3  # epochs without a better held-out error


@dataclass(frozen=True)
class Regressed:
    """Attributes:
    scale: float32 (groups,): with it predicted scores are roots of the criterion per weight.
    errors: held-out error after every epoch, as a share of the variance about the units' means.
    """

    scale: torch.Tensor
    errors: list[float]


def group_means(targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean score of each group, float32 (groups,).

    Raises:
        RecipeError: scores that are not finite.
    """
    means = torch.stack([target.float().mean().cpu() for target in targets])
    if not bool(means.isfinite().all()):
        raise RecipeError("Scores are not finite: load the model in float32, or give another criterion.")
    return means.clamp(min=1e-30)  # a dead group: any order will do


def regress(net: MaskNet, examples: Examples, epochs: int, seed: int, job: Job | None = None) -> Regressed:
    """Train ``net``, where it lies, to give roots of normalised scores.

    Args:
        net: fresh; on the device that trains.
        examples: of the net's taps and groups, anywhere.
        epochs: at most.
        seed: of the order of examples.
        job: a stage, advanced by epoch; cancels between two batches.

    Raises:
        RecipeError: scores that are not finite, or texts too few to hold some out.
    """
    job = job or Job()
    job.stage("train the mask predictor", epochs)
    spec, device = net.spec, net.parts[0].mean.device
    held = examples.texts % _HELD_OUT == _HELD_OUT - 1
    train, test = torch.nonzero(~held)[:, 0], torch.nonzero(held)[:, 0]
    if not len(test):
        raise RecipeError(f"Only {len(examples.texts.unique())} texts to train on: give more calibration tokens.")
    means = group_means(examples.targets)
    roots = [part_roots(net, examples, means, index).to(device) for index in range(len(spec.parts))]
    inputs = {tap: rows.to(device) for tap, rows in examples.inputs.items()}
    weights = [part_weights(net, index).to(device) for index in range(len(spec.parts))]
    variance = 0.0
    with torch.no_grad():
        for part, root, weight in zip(net.parts, roots, weights, strict=True):
            part.mean.copy_(root[train].float().mean(dim=0))
            variance += _squares(root, test, weight, part.mean)

    optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=0.01)
    steps = max(1, epochs * -(-len(train) // _BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    best, errors, since = copy.deepcopy(net.state_dict()), [1.0], 0
    for _ in range(epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for begin in range(0, len(order), _BATCH):
            job.check()
            at = order[begin : begin + _BATCH].to(device)
            optimizer.zero_grad(set_to_none=True)
            for spec_part, part, root, weight in zip(spec.parts, net.parts, roots, weights, strict=True):
                found = part(inputs[spec_part.tap][at])
                ((found - root[at].float()).square() * weight).sum(dim=1).mean().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            left = 0.0
            for spec_part, part, root, weight in zip(spec.parts, net.parts, roots, weights, strict=True):
                for at in test.split(_BATCH):
                    left += _squares(root, at, weight, part(inputs[spec_part.tap][at.to(device)]))
        errors.append(left / max(variance, 1e-30))
        if errors[-1] <= min(errors[:-1]):
            best, since = copy.deepcopy(net.state_dict()), 0
        else:
            since += 1
        job.advance()
        if since >= _PATIENCE:
            break
    net.load_state_dict(best)
    per_weight = means / torch.tensor([float(group.weights) for group in spec.groups])
    return Regressed(per_weight.sqrt(), errors)


def part_roots(net: MaskNet, examples: Examples, means: torch.Tensor, index: int) -> torch.Tensor:
    """Targets of one part, bf16 (examples, units)."""
    part = net.spec.parts[index]
    chosen = range(part.begin, part.end)
    return torch.cat([(examples.targets[g].float() / float(means[g])).sqrt().bfloat16() for g in chosen], dim=1)


def part_weights(net: MaskNet, index: int) -> torch.Tensor:
    """How much each unit's error counts, float32 (units,); all parts of a net add up to 1."""
    spec = net.spec
    total = sum(group.size * group.weights for group in spec.groups)
    part = spec.parts[index]
    return torch.cat([torch.full((g.size,), g.weights / total) for g in spec.groups[part.begin : part.end]])


def _squares(root: torch.Tensor, at: torch.Tensor, weight: torch.Tensor, found: torch.Tensor) -> float:
    if found.dim() == 1:  # the units' means
        return sum(float(((root[i.to(root.device)].float() - found).square() * weight).sum()) for i in at.split(_BATCH))
    return float(((root[at.to(root.device)].float() - found).square() * weight).sum())
