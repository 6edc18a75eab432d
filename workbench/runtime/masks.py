"""Plans that leave out heads and neurons: predicted per token, or by a fixed mask, at any sparsity.

Sparsity is the share left out of the weights of all heads (query rows, columns of ``o``) and neurons (rows of gate and
up, columns of ``down``) of *all* blocks, those that stay whole included; keys and values are always written.

How a share is spread over the groups (the heads, or the neurons, of one block):

* ``local``: the same share of every group.
* ``global``: one threshold for the heads of all blocks and one for all neurons, the same share of either kind
  (ShadowLLM, Akhauri et al. 2024, arXiv 2406.16635). Scores are normalised by group, so that blocks can be compared.
* ``hybrid``: that, but at least one head and 3 % of the neurons of every block are kept.
* ``joint``: one threshold for everything, on scores per weight that can be compared between groups: of a tuned
  predictor as it learnt them. Floors as ``hybrid``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from workbench.errors import InputError, suggest
from workbench.formats.mask_predictor import MaskPart, MaskPredictor
from workbench.models.base import Architecture
from workbench.runtime.mask_shares import (
    Allocation,
    allocation_of,
    floors_of,
    mask_of_scores,
    mask_thresholds,
    predictor_groups,
)
from workbench.runtime.plan import (
    ConstantMask,
    Consumer,
    Decider,
    Plan,
    Policy,
    PredictedMask,
    Scope,
    Tap,
)

Kind = Literal["predicted", "static", "random", "magnitude", "oracle"]
KINDS: tuple[Kind, ...] = ("predicted", "static", "random", "magnitude", "oracle")


def mask_plan(
    architecture: Architecture,
    predictor: MaskPredictor,
    sparsity: float,
    *,
    kind: Kind = "predicted",
    allocation: Allocation | None = None,
    heads: float | None = None,
    protected: Sequence[int] = (),
    scope: Scope | None = None,
    prefix: int | None = None,
    criterion: str | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan that leaves out a share of the heads' and neurons' weights.

    Args:
        architecture: of the model.
        predictor: that the model keeps.
        sparsity: share of the weights of all heads and neurons. A predicted mask holds it on average, on text like
            the held-out text; the others hold it exactly, to one unit.
        kind: ``predicted``; ``static``, the least mean scores of a criterion over calibration text; ``magnitude``,
            that of the criterion ``magnitude``; ``random``; ``oracle``, slots whose masks are given as recorded
            decisions (``oracle_decisions``) when a text is run.
        allocation: see above; None takes the one that the predictor was made for.
        heads: share of the heads' weights, where it is not to be that of the neurons; not with ``joint``.
        protected: blocks that stay whole, beside those before the predictor's first.
        scope: when is decided; None takes what the predictor was trained for. Fixed masks are in force at every
            token after the prefix, with ``reply`` after the prompt.
        prefix: tokens at the beginning that stay whole; None takes the predictor's. With scope ``reply`` it is the
            prompt, whatever its length.
        criterion: of ``static``; None takes the predictor's.
        seed: of ``random``.

    Raises:
        InputError: a sparsity, block, kind or criterion that is not possible.
    """
    sparsity = float(sparsity)
    prefix = int(predictor.facts["prefix"]) if prefix is None else prefix
    if kind not in KINDS:
        raise InputError(f"Unknown kind of mask '{kind}'; allowed are {', '.join(KINDS)}." + suggest(kind, KINDS))
    parts = predictor.parts if kind == "predicted" else (_one_part(predictor),)
    if kind == "predicted":
        thresholds = mask_thresholds(
            architecture, predictor, sparsity, allocation=allocation, heads=heads, protected=protected
        )
        scope = scope_of_predictor(predictor) if scope is None else scope
        floors = floors_of(predictor_groups(architecture, predictor), allocation_of(predictor, allocation))
        programs: list[Any] = [
            _program(architecture, predictor, part, thresholds, floors, 0 if scope.kind == "reply" else prefix)
            for part in parts
        ]
    else:
        by_reply = (scope_of_predictor(predictor) if scope is None else scope).kind == "reply"
        scope = Scope("reply") if by_reply else Scope("token")
        if kind == "oracle":
            mask = np.ones(sum(group.size for group in predictor_groups(architecture, predictor)), dtype=np.float32)
        else:
            mask = constant_mask(
                architecture,
                predictor,
                sparsity,
                kind=kind,
                allocation=allocation,
                heads=heads,
                protected=protected,
                criterion=criterion,
                seed=seed,
            )
        programs = [ConstantMask(values=mask, first=0 if by_reply else prefix)]
    groups = predictor_groups(architecture, predictor)
    deciders, consumers = [], []
    for part, program in zip(parts, programs, strict=True):
        slot = _slot(part, len(parts))
        deciders.append(Decider(slot, Tap(part.tap, part.block), program, scope, default=1.0))  # type: ignore[arg-type]
        offset = 0
        for group in groups[part.groups[0] : part.groups[1]]:
            expected = 1 - sparsity if kind == "predicted" else None
            consumers.append(Consumer(slot, group.kind, f"blocks.{group.block}", offset=offset, expected=expected))
            offset += group.size
    return Plan(tuple(deciders), tuple(consumers))


def mask_policy(architecture: Architecture, predictor: MaskPredictor, sparsity: float, **options: Any) -> Policy:
    """Another sparsity for a running predicted plan, from the next decision on: thresholds alone. ``options`` as
    ``allocation``, ``heads`` and ``protected`` of ``mask_plan``, as they were given to it."""
    found = mask_thresholds(architecture, predictor, sparsity, **options)
    return Policy(thresholds=slot_thresholds(predictor, found))


def slot_thresholds(predictor: MaskPredictor, thresholds: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Thresholds (groups,) by the slots of a predicted plan."""
    parts = predictor.parts
    return {_slot(part, len(parts)): tuple(thresholds[part.groups[0] : part.groups[1]].tolist()) for part in parts}


def whole_policy(plan: Plan) -> Policy:
    """Everything computed under a predicted plan, from the next decision on: thresholds below every score."""
    lowest = float(np.finfo(np.float32).min)
    sizes = {decider.slot: len(getattr(decider.program, "thresholds", ())) for decider in plan.deciders}
    return Policy(thresholds={slot: (lowest,) * size for slot, size in sizes.items() if size})


def constant_mask(
    architecture: Architecture,
    predictor: MaskPredictor,
    sparsity: float,
    *,
    kind: Kind,
    allocation: Allocation | None = None,
    heads: float | None = None,
    protected: Sequence[int] = (),
    criterion: str | None = None,
    seed: int = 0,
) -> np.ndarray:
    """One mask for all tokens, float32 (units of the predictor's groups,), 1 = computed; see ``mask_plan``."""
    groups = predictor_groups(architecture, predictor)
    sizes = [group.size for group in groups]
    if kind == "random":
        scores, allocation = np.random.default_rng(seed).random(sum(sizes)), "local"
    else:
        name = "magnitude" if kind == "magnitude" else criterion or str(predictor.facts["criterion"])
        if name not in predictor.aggregates:
            known = ", ".join(predictor.aggregates) or "none"
            raise InputError(
                f"This model has no mean scores by '{name}'; it has {known}: compress it with '{name}' among its "
                "'aggregates'." + suggest(name, predictor.aggregates)
            )
        scores = predictor.aggregates[name].astype(np.float64)
    cuts = np.cumsum([0, *sizes])
    return mask_of_scores(
        architecture,
        groups,
        [scores[begin:end] for begin, end in itertools.pairwise(cuts)],
        sparsity,
        allocation=allocation_of(predictor, allocation),
        heads=heads,
        protected=protected,
    ).astype(np.float32)


def oracle_decisions(
    architecture: Architecture,
    predictor: MaskPredictor,
    scores: np.ndarray,
    sparsity: float,
    *,
    prefix: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Recorded decisions, for ``replay`` under a plan of kind ``oracle``, from what a text's units really score.

    These are no masks that anything could choose while writing: they know the scores.

    Args:
        architecture: of the model.
        predictor: whose groups are masked.
        scores: float (tokens, units of its groups), at every position.
        sparsity: as of ``mask_plan``, held at every token.
        prefix: as of ``mask_plan``.
        options: ``allocation``, ``heads`` and ``protected`` of ``mask_plan``.

    Returns:
        One entry per position.
    """
    groups = predictor_groups(architecture, predictor)
    units = sum(group.size for group in groups)
    if scores.ndim != 2 or scores.shape[1] != units:
        raise InputError(f"Scores of {units} units at every position are needed, got {scores.shape}.")
    prefix = int(predictor.facts["prefix"]) if prefix is None else prefix
    options["allocation"] = allocation_of(predictor, options.get("allocation"))
    cuts = np.cumsum([0, *(group.size for group in groups)])
    slot, found = _slot(_one_part(predictor), 1), []
    for position, row in enumerate(scores):
        mask = np.ones(units, dtype=np.uint8)
        if position >= prefix:
            apart = [row[begin:end] for begin, end in itertools.pairwise(cuts)]
            mask = mask_of_scores(architecture, groups, apart, sparsity, **options).astype(np.uint8)
        found.append({slot: mask})
    return found


def scope_of_predictor(predictor: MaskPredictor) -> Scope:
    """When it was trained to decide."""
    return Scope(predictor.facts["scope"], int(predictor.facts["n"]))


def _slot(part: MaskPart, parts: int) -> str:
    return "masks" if parts == 1 else f"masks.{part.block}.{'heads' if part.tap == 'block_input' else 'neurons'}"


def _one_part(predictor: MaskPredictor) -> MaskPart:
    """Where masks of all groups are decided without a predictor: before anything that they could mask."""
    ends = (predictor.parts[0].groups[0], predictor.parts[-1].groups[1])
    return replace(predictor.parts[0], tap="residual", block=predictor.first_block, groups=ends)


def _program(
    architecture: Architecture,
    predictor: MaskPredictor,
    part: MaskPart,
    thresholds: np.ndarray,
    floors: np.ndarray,
    first: int,
) -> PredictedMask:
    begin, end = part.groups
    sizes = [group.size for group in predictor_groups(architecture, predictor)[begin:end]]
    return PredictedMask(
        hidden=part.hidden,
        hidden_steps=part.hidden_steps,
        hidden_bias=part.hidden_bias,
        rows=part.rows,
        row_steps=part.row_steps,
        mean=part.mean,
        groups=np.cumsum([0, *sizes]),
        thresholds=tuple(thresholds[begin:end].tolist()),
        floors=floors[begin:end],
        first=first,
    )
