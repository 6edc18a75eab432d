"""Masks of heads and neurons beside what turned out to matter, at every step of a text.

What matters at a token is a criterion's score of the dense model (``analysis.sparsity``). Those by gradient know the
tokens that follow: they say what turned out to matter, which no choice could know while the text was being written.
Masks are what a plan's own programs give on the dense model's taps; in a text that is written under masks each tap has
seen the masks of the tokens before it, too.

A unit at a step is one of ``OUTCOMES``: a *hit* is left out and could be, a *miss* is computed though it could be left
out, a *false skip* is left out though it matters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from workbench.analysis.masking import MaskKind, masking
from workbench.analysis.sparsity import check_criteria, score_units
from workbench.errors import InputError
from workbench.formats.mask_predictor import MaskGroup, MaskPredictor
from workbench.models.base import Architecture, LoadedModel
from workbench.progress import Job
from workbench.runtime.mask_shares import Allocation, mask_of_scores, predictor_groups
from workbench.runtime.plan import Plan, Scope, Tap

OUTCOMES = ("kept", "hit", "miss", "false skip")
KEPT, HIT, MISS, FALSE_SKIP = range(len(OUTCOMES))


@dataclass(frozen=True, eq=False)
class ScoredText:
    """A text as the dense model ran it.

    Attributes:
        tokens: ids.
        prompt_length: tokens that were given; the rest was written after them.
        groups: whose units are scored.
        taps: what the predictor's parts read, by tap float32 (tokens, width).
        scores: by criterion float32 (tokens from ``first`` on, units of all groups).
        first: position of the first scored token.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    groups: tuple[MaskGroup, ...]
    taps: Mapping[Tap, np.ndarray]
    scores: Mapping[str, np.ndarray]
    first: int


def score_text(
    model: LoadedModel,
    predictor: MaskPredictor,
    tokens: Sequence[int],
    prompt_length: int,
    criteria: Sequence[str],
    job: Job | None = None,
) -> ScoredText:
    """Run a text through the dense model once, and keep what it says of every head and neuron.

    Args:
        model: the dense model.
        predictor: whose taps are kept, and whose groups are scored.
        tokens: prompt and reply.
        prompt_length: tokens of the prompt.
        criteria: of ``analysis.sparsity.CRITERIA``. The square of another is not held twice: ``fisher`` comes of
            ``plainact``.

    Raises:
        InputError: nothing is decided in so short a text, or an unknown criterion.
    """
    check_criteria(criteria)
    first = min(int(predictor.facts["prefix"]), prompt_length)
    if len(tokens) <= max(first, 1):
        raise InputError(
            f"A text of {len(tokens)} tokens has nothing to look at: its first {first} stay whole. Let replies be "
            "longer, or give longer prompts."
        )
    groups = predictor_groups(model.architecture, predictor)
    index = {(group.block, group.kind): i for i, group in enumerate(groups)}
    starts = np.cumsum([0, *(group.size for group in groups)])
    wanted = tuple(dict.fromkeys("plainact" if name == "fisher" else name for name in criteria))
    scores = {name: np.empty((len(tokens) - first, starts[-1]), dtype=np.float32) for name in wanted}
    taps: dict[Tap, np.ndarray] = {}

    def see(tap: Tap, x: torch.Tensor) -> None:
        taps[tap] = x.detach().reshape(-1, x.shape[-1]).float().cpu().numpy()

    def sink(block: int, kind: MaskKind, found: Mapping[str, torch.Tensor]) -> None:
        group = index.get((block, kind))
        if group is not None:
            for name, rows in scores.items():
                if name in found:
                    rows[:, starts[group] : starts[group + 1]] = found[name][0, first:].cpu().numpy()
        if job is not None:
            job.check()

    places = [Tap(part.tap, part.block) for part in predictor.parts]  # type: ignore[arg-type]
    with masking(model, tuple(dict.fromkeys(places)), see, lambda block, kind: None):
        score_units(model, torch.tensor([list(tokens)]), wanted, sink)
    named = {name: np.square(scores["plainact"]) if name == "fisher" else scores[name] for name in criteria}
    return ScoredText(tuple(tokens), prompt_length, groups, taps, named, first)


@dataclass(frozen=True, eq=False)
class MaskOutcomes:
    """A mask beside the truth, unit by unit.

    Attributes:
        groups: of the units.
        positions: int64 (steps,), positions in the text at which the mask is in force.
        codes: uint8 (steps, units), indices into ``OUTCOMES``.
        importance: float64 (units,), the mean of the true scores over these steps.
        starts: where each group begins among the units, and the end.
    """

    groups: tuple[MaskGroup, ...]
    positions: np.ndarray
    codes: np.ndarray
    importance: np.ndarray
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum([0, *(group.size for group in self.groups)]))

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(group.block for group in self.groups))

    def of(self, block: int, kind: str) -> np.ndarray:
        """Codes uint8 (steps, units) of one group."""
        return self.codes[:, self._span(block, kind)]

    def importance_of(self, block: int, kind: str) -> np.ndarray:
        """Mean true scores float64 (units,) of one group."""
        return self.importance[self._span(block, kind)]

    def _span(self, block: int, kind: str) -> slice:
        for i, group in enumerate(self.groups):
            if (group.block, group.kind) == (block, kind):
                return slice(self.starts[i], self.starts[i + 1])
        raise InputError(
            f"The {kind} of block {block} are not masked: choose one of blocks {self.blocks[0]} to {self.blocks[-1]}."
        )

    def counts(self) -> pd.DataFrame:
        """One row per kind, and ``all`` by weights: shares of all units and steps that are each of ``OUTCOMES``.

        Beside them ``left_out``; ``wrongly``, the share of what is left out that matters; and ``found``, the share
        of what could be left out that is.
        """
        rows = []
        sizes = np.repeat([group.weights for group in self.groups], [group.size for group in self.groups])
        kinds = np.repeat([group.kind for group in self.groups], [group.size for group in self.groups])
        for kind in ("heads", "neurons", "all"):
            weights = np.where(kinds == kind, sizes, 0) if kind != "all" else sizes
            found = [
                float((self.codes == code).mean(axis=0) @ weights) / weights.sum() for code in range(len(OUTCOMES))
            ]
            left, could = found[HIT] + found[FALSE_SKIP], found[HIT] + found[MISS]
            shares = {
                "left_out": left,
                "wrongly": found[FALSE_SKIP] / left if left else np.nan,
                "found": found[HIT] / could if could else np.nan,
            }
            rows.append({"kind": kind, **dict(zip(OUTCOMES, found, strict=True)), **shares})
        return pd.DataFrame(rows)


def plan_masks(plan: Plan, text: ScoredText, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """What a plan of masks decides on a text's taps.

    Args:
        plan: of ``runtime.masks.mask_plan``, of a kind that needs no recorded decisions.
        text: that was scored.
        prefix: tokens that stay whole, as the plan was made for.

    Returns:
        positions int64 (steps,) at which it is in force, and masks bool (steps, units), true = computed.

    Raises:
        InputError: it is in force nowhere in this text.
    """
    scope = plan.deciders[0].scope
    positions, deciding = _in_force(scope, len(text.tokens), text.prompt_length, prefix)
    positions, deciding = positions[positions >= text.first], deciding[positions >= text.first]
    if not len(positions):
        raise InputError(
            f"A text of {len(text.tokens)} tokens is whole: nothing is decided in it. Let replies be longer."
        )
    masks = []
    for decider in plan.deciders:
        rows = text.taps.get(decider.tap)
        if rows is None:  # a fixed mask reads nothing
            rows = np.zeros((len(text.tokens), 1), dtype=np.float32)
        masks.append(decider.program(rows[deciding], deciding).astype(bool))
    return positions, np.concatenate(masks, axis=1)


def true_masks(
    architecture: Architecture,
    text: ScoredText,
    positions: np.ndarray,
    criterion: str,
    sparsity: float,
    allocation: Allocation = "hybrid",
) -> np.ndarray:
    """Masks bool (steps, units) that leave out what scored least at each position."""
    if criterion not in text.scores:
        raise InputError(f"This text was not scored by '{criterion}': choose one of {', '.join(text.scores)}.")
    cuts = list(itertools.pairwise(np.cumsum([0, *(group.size for group in text.groups)])))
    found = []
    for row in text.scores[criterion][positions - text.first]:
        apart = [row[begin:end] for begin, end in cuts]
        found.append(mask_of_scores(architecture, text.groups, apart, sparsity, allocation=allocation))
    return np.array(found)


def outcomes(
    text: ScoredText, positions: np.ndarray, kept: np.ndarray, true: np.ndarray, criterion: str
) -> MaskOutcomes:
    """Compare a mask with the true one, both bool (steps, units)."""
    if kept.shape != true.shape:
        raise InputError(f"Masks of {true.shape} (steps, units) are needed, got {kept.shape}.")
    codes = np.where(kept, np.where(true, KEPT, MISS), np.where(true, FALSE_SKIP, HIT)).astype(np.uint8)
    importance = text.scores[criterion][positions - text.first].mean(axis=0, dtype=np.float64)
    return MaskOutcomes(text.groups, positions, codes, importance)


def _in_force(scope: Scope, length: int, prompt_length: int, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions at which a decision is in force, and the positions at which each was taken, as engines do it."""
    at = np.arange(length)
    if scope.kind == "reply":
        at = at[prompt_length:]
        return at, np.full(len(at), prompt_length - 1)
    taken = at // scope.n * scope.n if scope.kind == "every" else at
    return at[taken >= prefix], taken[taken >= prefix]
