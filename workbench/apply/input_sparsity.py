"""Input sparsity: what a model keeps so that every unit may leave out its small inputs while running.

TEAL (Liu et al. 2024, arXiv 2408.14690) leaves out inputs of small magnitude, WINA (Chen et al. 2025, arXiv
2505.19427) those of small magnitude times norm of the weights' column. No weight changes. Three phases:

1. Distributions of the inputs' sizes on calibration text, whose quantiles are the thresholds of any share.
2. How a share of all weights is split over units (``apply.input_shares``): by block, from errors of its output, or over
   all units, from the divergence that each of them causes alone.
3. Where they are learnt, factors of channels and thresholds (``apply.learn_cuts``).

All of it is seen through the weights that are stored, and not through those before rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from workbench.analysis.dense_pass import DensePass
from workbench.analysis.divergence import dense_states
from workbench.analysis.input_cuts import BlockErrors, InputMasks, Sizes, column_norms, measure_sizes, unit_damage
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.draft import Draft
from workbench.apply.input_shares import check_room, greedy_path, shares_along, solved_shares, uniform_shares
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.learn_cuts import LearntCuts, Teacher, learn_cuts
from workbench.apply.parts import Parts
from workbench.apply.registry import register
from workbench.apply.stored_weights import output_layer, stored_weights
from workbench.corpus import TextRecord
from workbench.errors import RecipeError
from workbench.formats.input_cuts import InputCuts
from workbench.formats.selectors import quantile_levels
from workbench.models.base import LoadedModel
from workbench.progress import Job

_QUANTILES = 256  # float32 by unit: 0.01 bit per weight of SmolLM2-135M
# Shares that a unit's own damage is measured at. Between them it follows a power law well.
_NODES = (0.3, 0.5, 0.7, 0.9)
_HELD = 8  # one window of so many is held out while factors are learnt
_FACTORS = (1e-4, 6e4)  # that half precision holds with all their digits; they vary by far less


_CutsOf = Callable[[Mapping[int, float]], dict[int, float]]  # thresholds of shares, both by unit


@dataclass(frozen=True)
class FittedCuts:
    """What ``fit`` found, and the text it was fitted on."""

    cuts: InputCuts
    text: TextRecord


@register(InputSparsityConfig)
class InputSparsity:
    """Handler of ``InputSparsityConfig``."""

    def fit(self, draft: Draft, config: InputSparsityConfig, *, seed: int, job: Job) -> FittedCuts:
        """Measure, split and learn; the dense model is left as it was.

        Raises:
            RecipeError: a protected block that is not there, targets that the others cannot make up for, outputs that
                are not finite.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``, between windows or steps.
        """
        model = draft.model
        sizes = _sizes(model, config)
        check_room(config.goals, sizes)
        check_finite(model)
        windows, text = calibration_windows(model, config.calibration_tokens, seed, job, "tuning", parts=draft.parts)
        if len(windows[0]) <= config.first:
            raise RecipeError(f"Method 'input-sparsity': texts of {len(windows[0])} tokens have none to look at.")
        with torch.inference_mode(False):
            learnt_from_dense = config.criterion == "learnt" and config.teacher == "dense"
            states = dense_states(model, windows) if learnt_from_dense else None
            head = model.module.get_output_embeddings().weight
            with stored_weights(draft):
                _check_outputs(model, windows[0])
                if states is not None:
                    teacher = Teacher(states, lambda: output_layer(model, head))
                else:
                    teacher = Teacher([], nullcontext)
                cuts = _Fit(model, config, windows, sizes, draft.parts, job).run(teacher)
        return FittedCuts(cuts, text)

    def apply(self, draft: Draft, config: InputSparsityConfig, fitted: FittedCuts, *, job: Job) -> None:
        draft.input_cuts = fitted.cuts


def _sizes(model: LoadedModel, config: InputSparsityConfig) -> np.ndarray:
    """Each unit's share of all weights of the units, 0 where its block is protected."""
    parts = model.architecture
    for block in config.protected:
        if block >= parts.n_blocks:
            raise RecipeError(
                f"Method 'input-sparsity': protected names block {block}, which this model does not have: blocks are "
                f"0 to {parts.n_blocks - 1}; nearest is {parts.n_blocks - 1}."
            )
    weights = np.array([unit.n_weights for unit in parts.units], dtype=np.float64)
    kept = np.isin([unit.block for unit in parts.units], config.protected)
    return np.where(kept, 0.0, weights / weights.sum())


def _check_outputs(model: LoadedModel, window: Sequence[int]) -> None:
    if not bool(dense_states(model, [window])[0].isfinite().all()):
        raise RecipeError(f"The outputs of {model.name} with the stored weights are not finite: store more bits.")


class _Fit:
    """The phases, on a model that has its stored weights."""

    def __init__(
        self,
        model: LoadedModel,
        config: InputSparsityConfig,
        windows: Sequence[Sequence[int]],
        sizes: np.ndarray,
        parts: Parts,
        job: Job,
    ) -> None:
        self._model, self._config, self._windows, self._sizes = model, config, windows, sizes
        self._parts, self._job = parts, job
        self._few = windows[: max(1, -(-config.allocation_tokens // len(windows[0])))]

    def run(self, teacher: Teacher) -> InputCuts:
        """Return what is stored. A teacher without states is the model itself, as it is."""
        config = self._config
        # What is stored has half the digits: everything is measured under what is stored.
        norms = column_norms(self._model) if config.criterion == "weighted" else {}
        factors = {unit: _stored(f) for unit, f in norms.items()}
        with InputMasks(self._model, config.first, _floats(factors)) as masks:
            sizes = self._measured(masks)
            shares = self._split(masks, sizes)
        if config.criterion != "learnt":
            return self._cuts(sizes, shares, factors)
        if not teacher.states:
            teacher = Teacher(dense_states(self._model, self._windows), nullcontext)
        return self._learnt(teacher, sizes, shares)

    def _measured(self, masks: InputMasks) -> Sizes:
        def count() -> Mapping[str, torch.Tensor]:
            self._job.stage("measure inputs", len(self._windows))
            into = Sizes(len(self._sizes))
            measure_sizes(self._model, masks, self._windows, self._config.first, self._job, into)
            return {"counts": into.counts}

        found = Sizes(len(self._sizes))
        found.counts = self._parts.once("sizes of inputs", count)["counts"]
        return found

    def _split(self, masks: InputMasks, sizes: Sizes) -> np.ndarray:
        """Shares by target and unit, float64."""
        goals = self._config.goals
        if self._config.allocation == "uniform":
            return uniform_shares(goals, self._sizes)
        # Thresholds of 0.01, 0.02 .. 0.99 and what lies between them.
        levels = np.arange(100) / 100
        table = sizes.quantiles(levels)
        table[:, 0] = 0.0

        def cuts(shares: Mapping[int, float]) -> dict[int, float]:
            return {unit: float(np.interp(share, levels, table[unit])) for unit, share in shares.items()}

        if self._config.allocation == "greedy":
            return self._greedy(masks, cuts)
        return solved_shares(goals, self._sizes, _NODES, self._damages(masks, cuts))

    def _greedy(self, masks: InputMasks, cuts: _CutsOf) -> np.ndarray:
        units = self._model.architecture.units
        blocks = sorted({unit.block for i, unit in enumerate(units) if self._sizes[i] > 0})
        goals = np.asarray(self._config.goals) / self._sizes.sum()
        found = np.zeros((len(goals), len(units)))
        self._job.stage("split shares within blocks", len(blocks))
        errors: BlockErrors | None = None
        for block in blocks:
            here = [i for i, unit in enumerate(units) if unit.block == block]

            def path(block: int = block, here: list[int] = here) -> Mapping[str, torch.Tensor]:
                nonlocal errors
                errors = errors or BlockErrors(self._model, self._few, masks, self._config.first)
                compare = errors

                def error(shares: np.ndarray) -> float:
                    self._job.check()
                    return compare(block, cuts(dict(zip(here, shares.tolist(), strict=True))))

                at, shares = greedy_path(error, self._sizes[here], float(goals[-1]))
                return {"at": torch.from_numpy(at), "shares": torch.from_numpy(shares)}

            kept = self._parts.once(f"path of block {block}", path)
            found[:, here] = [shares_along((kept["at"].numpy(), kept["shares"].numpy()), goal) for goal in goals]
            self._job.advance()
        return found

    def _damages(self, masks: InputMasks, cuts: _CutsOf) -> np.ndarray:
        units = self._model.architecture.units
        self._job.stage("measure what each unit's sparsity costs", len(units))
        found = np.zeros((len(units), len(_NODES)))
        dense: DensePass | None = None
        for index, unit in enumerate(units):
            if self._sizes[index] > 0:

                def damage(index: int = index, block: int = unit.block) -> Mapping[str, torch.Tensor]:
                    nonlocal dense
                    with torch.no_grad():
                        dense = dense or DensePass(self._model, self._few)
                        dense.advance(block)
                        at = [cuts({index: share})[index] for share in _NODES]
                        kl = unit_damage(dense, masks, index, at, self._job.within)
                    return {"kl": torch.tensor(kl, dtype=torch.float64)}

                found[index] = self._parts.once(f"damage of {unit.id}", damage)["kl"].numpy()
            self._job.advance()
        if not np.isfinite(found).all():
            raise RecipeError(f"The outputs of {self._model.name} without small inputs are not finite.")
        return found

    def _learnt(self, teacher: Teacher, sizes: Sizes, shares: np.ndarray) -> InputCuts:
        """Learn from shares on, and measure under what was learnt."""
        config, n_units = self._config, len(self._sizes)
        start = np.stack([self._at_shares(sizes, row) for row in shares])
        held = max(1, len(self._windows) // _HELD)
        if len(self._windows) - held < 1:
            raise RecipeError("Method 'input-sparsity': learning needs two windows of text: raise calibration_tokens.")
        with np.errstate(divide="ignore"):
            logs = torch.from_numpy(np.log(np.maximum(start, 1e-30))).float()
        learnt = learn_cuts(
            self._model,
            teacher,
            self._windows,
            held,
            config.goals,
            logs,
            first=config.first,
            protected=[unit for unit in range(n_units) if self._sizes[unit] == 0],
            steps=config.learning_steps,
            tokens=config.learning_tokens,
            job=self._job,
            parts=self._parts,
        )
        self._job.note(
            f"Learnt in {learnt.steps} steps: KL from the teacher on held-out text {learnt.before:.4f} before, "
            f"{learnt.after:.4f} after, nats per token."
        )
        return self._measured_under(learnt)

    def _measured_under(self, learnt: LearntCuts) -> InputCuts:
        """Shares of the learnt thresholds, and quantiles, of the model while it leaves inputs out."""
        factors, means = {}, []
        for unit, logs in enumerate(learnt.factors):
            means.append(float(logs.mean()))
            factors[unit] = _stored((logs - logs.mean()).exp())
        goals, windows = self._config.goals, self._windows
        self._job.stage("measure inputs under what was learnt", len(goals) * len(windows))
        total, shares = Sizes(len(self._sizes)), []
        with InputMasks(self._model, self._config.first, _floats(factors)) as masks:
            for row, goal in zip(learnt.thresholds, goals, strict=True):
                cuts = np.exp(row.double().numpy() - np.array(means)) * (self._sizes > 0)
                masks.cuts = dict(enumerate(cuts.tolist()))
                here = Sizes(len(self._sizes))
                measure_sizes(self._model, masks, windows, self._config.first, self._job, here)
                masks.cuts = {}
                shares.append(_moved_onto(goal, here, cuts, self._sizes))
                total.counts += here.counts
        return self._cuts(total, np.stack(shares), factors)

    def _at_shares(self, sizes: Sizes, shares: np.ndarray) -> np.ndarray:
        """Thresholds of shares, float64 (U,)."""
        return np.diagonal(sizes.quantiles(shares)).astype(np.float64)

    def _cuts(self, sizes: Sizes, shares: np.ndarray, factors: Mapping[int, np.ndarray]) -> InputCuts:
        return InputCuts(
            criterion=self._config.criterion,
            quantiles=sizes.quantiles(quantile_levels(_QUANTILES)),
            targets=np.array(self._config.goals, dtype=np.float32),
            shares=shares.astype(np.float32),
            first=np.array(self._config.first, dtype=np.int32),
            texts=np.array(len(self._windows), dtype=np.int32),
            factors=factors,
        )


def _moved_onto(goal: float, sizes: Sizes, cuts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares float64 (U,) of thresholds that were all multiplied by the one number that makes them meet a goal."""

    def shares(scale: float) -> np.ndarray:
        return np.array([sizes.share_below(unit, float(cut) * scale) for unit, cut in enumerate(cuts)])

    low, high = -8.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if shares(float(np.exp(middle))) @ weights > goal else (middle, high)
    return shares(float(np.exp(low)))


def _stored(factors: torch.Tensor) -> np.ndarray:
    return factors.clamp(*_FACTORS).to(torch.float16).numpy()


def _floats(factors: Mapping[int, np.ndarray]) -> dict[int, torch.Tensor]:
    return {unit: torch.from_numpy(f.astype(np.float32)) for unit, f in factors.items()}
