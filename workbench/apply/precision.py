"""Dynamic precision: what nested codes need beside them so that every token can choose the width of every unit.

Three phases, as in DP-LLM (Kwon et al. 2025, arXiv 2508.06041), and a measurement that replaces the second in the rule
``gain`` of ``runtime.precision``:

1. The widest width of each unit under a bound on memory: an integer program over Fisher scores.
2. The average width of each unit, learnt for targets (``apply.learn_precision``).
3. Distributions of errors on calibration tokens, whose quantiles are the thresholds of any target, with what estimates
   those errors at run time (``apply.estimators``).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workbench.analysis.damage import UnitScores, unit_scores
from workbench.analysis.divergence import dense_states
from workbench.analysis.gains import token_gains
from workbench.analysis.profile import run
from workbench.apply.allocation import allocate
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.draft import Draft
from workbench.apply.estimators import UnitErrors, quantiles, refine, regress, spread_of_texts, unit_errors
from workbench.apply.learn_precision import learn_precision
from workbench.apply.nested import nested_codes
from workbench.apply.parts import Parts
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.registry import register
from workbench.corpus import TextRecord
from workbench.errors import RecipeError
from workbench.formats.nested import Nested, NestedCodes
from workbench.formats.selectors import Selectors
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime.precision import GOOD_FIT

_FISHER_WINDOW = 128  # many short windows estimate squared gradients better than few long ones


@dataclass(frozen=True)
class FittedPrecision:
    """What ``fit`` found.

    Attributes:
        selectors: what is stored.
        highest: widest width of each unit, by id.
        text: what it was fitted on.
    """

    selectors: Selectors
    highest: dict[str, int]
    text: TextRecord


@register(PrecisionConfig)
class PrecisionMethod:
    """Handler of ``PrecisionConfig``."""

    def fit(self, draft: Draft, config: PrecisionConfig, *, seed: int, job: Job) -> FittedPrecision:
        """Measure and learn; the dense model is left as it was.

        Raises:
            RecipeError: codes of one width, a target that memory leaves no room for, outputs that are not finite.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``, between windows or steps.
        """
        model = draft.model
        check_finite(model)
        codes, parts = _all_nested(draft), draft.parts
        tokens, text = calibration_windows(model, config.calibration_tokens, seed, job, "tuning", parts=parts)
        highest = _highest(model, codes, config.memory_bits, tokens, job, parts)
        _check_targets(model, highest, config)
        selectors = _selectors(model, codes, config, highest, tokens, seed, job, parts)
        return FittedPrecision(selectors, highest, text)

    def apply(self, draft: Draft, config: PrecisionConfig, fitted: FittedPrecision, *, job: Job) -> None:
        for unit in draft.model.architecture.units:
            for linear in unit.linears:
                encoding = draft.linears[linear.id]
                if isinstance(encoding, Nested) and encoding.bits > fitted.highest[unit.id]:
                    draft.linears[linear.id] = Nested.of(encoding.codes.cut(fitted.highest[unit.id]))
        draft.selectors = fitted.selectors


def _all_nested(draft: Draft) -> dict[str, NestedCodes]:
    found = nested_codes(draft.linears)
    if len(found) < len(draft.model.architecture.linears) or len(next(iter(found.values())).widths) < 2:
        raise RecipeError("dynamic-precision chooses among widths: put 'nested' with two widths or more before it.")
    return found


def _highest(
    model: LoadedModel,
    codes: dict[str, NestedCodes],
    memory_bits: float | None,
    tokens: list[tuple[int, ...]],
    job: Job,
    parts: Parts,
) -> dict[str, int]:
    """Widest width by unit id: least Fisher score whose widths average at most ``memory_bits``."""
    widths = next(iter(codes.values())).widths
    units = model.architecture.units
    if memory_bits is None or memory_bits >= widths[-1]:
        return {unit.id: widths[-1] for unit in units}
    short = [
        window[begin : begin + _FISHER_WINDOW] for window in tokens for begin in range(0, len(window), _FISHER_WINDOW)
    ]
    short = [window for window in short if len(window) > 1]

    def scored() -> dict[str, torch.Tensor]:
        table = unit_scores(run(UnitScores(model, short, widths=widths, codes=codes), job))
        found = allocate(table.rename(columns={"fisher": "damage"}), memory_bits)
        return {"bits": torch.tensor([found[unit.id] for unit in units])}

    bits = parts.once("widest widths", scored)["bits"].tolist()
    return dict(zip((unit.id for unit in units), bits, strict=True))


def _check_targets(model: LoadedModel, highest: dict[str, int], config: PrecisionConfig) -> None:
    """Refuse targets above what the units' widest widths average: whole widths may stay a little below the memory."""
    sizes = {unit.id: unit.n_weights for unit in model.architecture.units}
    most = sum(sizes[name] * bits for name, bits in highest.items()) / sum(sizes.values())
    for target in config.targets:
        if target >= most:
            raise RecipeError(
                f"targets: {target:g} bits cannot be reached, since the widest widths that fit memory_bits = "
                f"{config.memory_bits:g} average {most:.4g}: give a lower target or more memory."
            )


def _selectors(
    model: LoadedModel,
    codes: dict[str, NestedCodes],
    config: PrecisionConfig,
    highest: dict[str, int],
    tokens: list[tuple[int, ...]],
    seed: int,
    job: Job,
    parts: Parts,
) -> Selectors:
    """Gains of each pair of widths and precisions of each target are parts; what follows is one pass over the text."""
    widths = next(iter(codes.values())).widths
    pairs = list(itertools.pairwise(widths))
    dense = functools.cache(lambda: dense_states(model, tokens))

    def gained(low: int, high: int) -> dict[str, torch.Tensor]:
        by_token = token_gains(model, codes, low, high, tokens, dense(), job)
        return {"gains": torch.from_numpy(by_token.mean(axis=0))}

    def learnt(target: float) -> dict[str, torch.Tensor]:
        found = learn_precision(model, codes, highest, tokens, dense(), target, config.learning_steps, job)
        return {"bits": torch.tensor([found[unit.id] for unit in model.architecture.units], dtype=torch.float32)}

    of_pairs = [parts.once(f"gains {low} {high}", functools.partial(gained, low, high)) for low, high in pairs]
    gains = np.stack([found["gains"].numpy() for found in of_pairs], axis=1)
    precision = np.zeros((len(config.targets), len(highest)), dtype=np.float32)
    for row, target in enumerate(config.targets):
        precision[row] = parts.once(f"precision {target!r}", functools.partial(learnt, target))["bits"].numpy()
    found = unit_errors(model, codes, tokens, config.projection_rows, seed, job)
    regression = np.stack(
        [np.stack([regress(one.norms, one.errors[:, step]) for step in range(len(pairs))]) for one in found]
    )
    counts = [len(window) - 1 for window in tokens]  # without the first, which is always read at the widest
    lengths, spread = spread_of_texts([one.norms for one in found], counts, min(counts))
    return Selectors(
        widths=np.array(widths, dtype=np.int8),
        highest=np.array([highest[unit.id] for unit in model.architecture.units], dtype=np.int8),
        norms=np.stack([quantiles(one.norms) for one in found]),
        power=np.array([np.square(one.norms, dtype=np.float64).mean() for one in found], dtype=np.float32),
        gains=gains.astype(np.float32),
        targets=np.array(config.targets, dtype=np.float32),
        precision=precision,
        errors=np.stack([quantiles(one.errors) for one in found]),
        regression=regression,
        texts=np.array(len(tokens), dtype=np.int32),
        lengths=lengths,
        spread=spread,
        projections=_projections(found, regression, precision, np.array(widths), config.targets),
    )


def _projections(
    found: list[UnitErrors], regression: np.ndarray, precision: np.ndarray, widths: np.ndarray, targets: Any
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Estimators of the steps that targets between the learnt ones may decide, where the norm does not tell enough."""
    made = {}
    for unit, one in enumerate(found):
        if not len(targets):
            continue
        first, last = (
            int(np.clip(np.searchsorted(widths, p, side="right") - 1, 0, len(widths) - 2))
            for p in (precision[:, unit].min(), precision[:, unit].max())
        )
        for step in range(first, last + 1):
            if regression[unit, step, 2] < GOOD_FIT or regression[unit, step, 0] <= 0:
                made[unit, step] = refine(one.rows[step], one.projected[:, step], one.errors[:, step])
    return made
