"""Factors of input channels and thresholds of units, learnt by gradient: which inputs the model misses least.

A mask 1[|x_i| f_i > t] has no gradient, so it gets that of a sigmoid of ln(|x_i| f_i / t) (a straight-through
estimate, Bengio et al. 2013, arXiv 1308.3432). With all weights frozen, ln f and ln t are moved by Adam for

    KL from the teacher - price * share,

with one second moment for all factors of a unit: with one for each, channels of whose use little can be told would move
as far as those that matter. Share is that of all weights left out and price the Lagrange multiplier of the target: what
KL gains by the share along the thresholds' gradient. After each step all thresholds are multiplied by one number, a
Newton step towards the target. Each step takes the next target, which has thresholds and a price of its own; factors
are common to all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from workbench.analysis.divergence import final_states, log_probabilities
from workbench.analysis.input_cuts import InputMasks
from workbench.apply.parts import Parts
from workbench.apply.soft_masks import SoftMask
from workbench.errors import RecipeError
from workbench.models.base import LoadedModel
from workbench.progress import Job

_FACTOR_RATE, _THRESHOLD_RATE = 0.02, 0.02  # change of a logarithm in the first step; falls to zero as a cosine
_MOMENTUM, _MEMORY = 0.9, 0.99  # of Adam
_SMOOTHING = 0.9  # of price and share, which differ from text to text
_NEWTON = 0.3  # part of a Newton step on the share that is taken: texts differ
_CHECK, _PATIENCE = 10, 4  # steps between looks at held-out text; looks without gain before the fit ends


@dataclass(frozen=True)
class Teacher:
    """What the sparse model is to predict.

    Attributes:
        states: of each window, before the output layer, (tokens, hidden).
        head: context in which the model's output layer is the teacher's.
    """

    states: Sequence[torch.Tensor]
    head: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class LearntCuts:
    """What the fit found.

    Attributes:
        factors: ln f, float32 (in,) by unit.
        thresholds: ln t, float32 (targets, units).
        before, after: held-out KL from the teacher, nats per token, mean over targets, at the start and of this.
        steps: that were taken before it ended.
    """

    factors: list[torch.Tensor]
    thresholds: torch.Tensor
    before: float
    after: float
    steps: int


class _State:
    """All that moves, as flat tensors, so that it can be kept and found again."""

    def __init__(self, factors: torch.Tensor, thresholds: torch.Tensor) -> None:
        targets, units = thresholds.shape
        self.factors, self.thresholds = factors.clone(), thresholds.clone()
        self.moments = {"mean": torch.zeros_like(factors), "square": factors.new_zeros(units)}
        self.threshold_moments = {name: torch.zeros_like(thresholds) for name in ("mean", "square")}
        self.price = torch.zeros(targets, dtype=torch.float64)
        self.share = torch.full((targets,), -1.0, dtype=torch.float64)  # -1: none seen yet
        self.best, self.best_factors, self.best_thresholds = math.inf, self.factors.clone(), self.thresholds.clone()
        self.before, self.kl, self.step, self.waited = math.inf, math.inf, 0, 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as ``take`` reads them."""
        return {
            "factors": self.factors,
            "thresholds": self.thresholds,
            "price": self.price,
            "share": self.share,
            "best_factors": self.best_factors,
            "best_thresholds": self.best_thresholds,
            **{f"factors_{name}": value for name, value in self.moments.items()},
            **{f"thresholds_{name}": value for name, value in self.threshold_moments.items()},
        }

    def facts(self) -> list[float]:
        return [self.best, self.before, self.kl, self.step, self.waited]

    def take(self, tensors: dict[str, torch.Tensor], facts: list[float]) -> None:
        """Become what ``tensors`` and ``facts`` gave."""
        device = self.factors.device
        moved = {name: t if name in ("price", "share") else t.to(device) for name, t in tensors.items()}
        for name in ("mean", "square"):
            self.moments[name] = moved.pop(f"factors_{name}")
            self.threshold_moments[name] = moved.pop(f"thresholds_{name}")
        for name, value in moved.items():
            setattr(self, name, value)
        self.best, self.before, self.kl = facts[:3]
        self.step, self.waited = int(facts[3]), int(facts[4])


def learn_cuts(
    model: LoadedModel,
    teacher: Teacher,
    windows: Sequence[Sequence[int]],
    held: int,
    targets: Sequence[float],
    start: torch.Tensor,
    *,
    first: int,
    protected: Sequence[int],
    steps: int,
    tokens: int,
    job: Job,
    parts: Parts,
) -> LearntCuts:
    """Learn factors and thresholds for targets.

    Args:
        model: with the weights that will run; its parameters get no gradient.
        teacher: of the same windows.
        windows: token windows of calibration text.
        held: how many of them, at the end, are held out; at least 1.
        targets: shares of all weights to be left out.
        start: ln t to begin with, with factors of 1, float32 (targets, units).
        first: tokens at the beginning of a window that are kept whole.
        protected: units that are kept whole, by number.
        steps: at most.
        tokens: of a step, at least; whole windows.
        job: a stage, advanced by step.
        parts: of the fit; every ``_CHECK`` steps are one.

    Raises:
        RecipeError: the sparse model's outputs are not finite.
        Cancelled: by ``job``, between windows.
    """
    learner = _Learner(model, teacher, windows, held, targets, first, protected, job)
    state = _State(torch.zeros(learner.n_factors, device=model.device), start.to(model.device, torch.float32))
    for step in reversed(range(0, steps + 1, _CHECK)):
        kept = parts.find(_part(step))
        if kept is not None:
            state.take(kept.tensors, kept.facts)
            break
    job.stage("learn which inputs are left out", steps, state.step)
    with InputMasks(model, first) as masks, torch.inference_mode(False):
        if state.before == math.inf:
            state.before = learner.look(masks, state)
            parts.keep(_part(0), state.tensors(), state.facts())
        order = learner.windows_of_steps(max(1, -(-tokens // len(windows[0]))))
        for _ in range(state.step):
            next(order)
        while state.step < steps and state.waited < _PATIENCE:
            rate = (1 + math.cos(math.pi * state.step / steps)) / 2
            learner.take_step(masks, state, next(order), rate)
            state.step += 1
            job.advance()
            if state.step % _CHECK == 0 or state.step == steps:
                learner.look(masks, state)
                parts.keep(_part(state.step), state.tensors(), state.facts())
    return LearntCuts(
        [part.cpu() for part in learner.by_unit(state.best_factors)],
        state.best_thresholds.cpu(),
        state.before,
        state.kl,
        state.step,
    )


def _part(step: int) -> str:
    return f"learnt by unit {step}"


class _Learner:
    """What does not change during the fit."""

    def __init__(
        self,
        model: LoadedModel,
        teacher: Teacher,
        windows: Sequence[Sequence[int]],
        held: int,
        targets: Sequence[float],
        first: int,
        protected: Sequence[int],
        job: Job,
    ) -> None:
        units = model.architecture.units
        self._model, self._teacher, self._job, self._first = model, teacher, job, first
        self._ids = [torch.tensor([list(window)], device=model.device) for window in windows]
        self._held, self._targets, self._protected = held, list(targets), frozenset(protected)
        sizes = torch.tensor([float(unit.n_weights) for unit in units], dtype=torch.float64)
        self._weights = (sizes / sizes.sum()).to(model.device, torch.float32)
        self._widths = [unit.linears[0].in_features for unit in units]
        self.n_factors = sum(self._widths)

    def by_unit(self, factors: torch.Tensor) -> list[torch.Tensor]:
        return list(factors.split(self._widths))

    def windows_of_steps(self, count: int) -> Iterator[list[int]]:
        """For every step the windows that it takes: all of them in turn, before one comes again."""
        turn = itertools.cycle(range(max(1, len(self._ids) - self._held)))
        while True:
            yield [next(turn) for _ in range(count)]

    def take_step(self, masks: InputMasks, state: _State, windows: list[int], rate: float) -> None:
        """One step of Adam for the next target."""
        at = state.step % len(self._targets)
        factors = state.factors.clone().requires_grad_(True)
        thresholds = state.thresholds[at].clone().requires_grad_(True)
        # Of this step's text: share left out, and what it rises by with ln t of each unit.
        share, rises = 0.0, torch.zeros_like(thresholds)
        price = float(state.price[at])
        for window in windows:
            with torch.enable_grad():
                found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
                masks.mask = self._soft(self.by_unit(factors), thresholds, found)
                loss = self._divergence(window)
                here = torch.stack([found[u][0] * self._weights[u] for u in sorted(found)]).sum()
                ((loss - price * here) / len(windows)).backward()
            share += float(here.detach()) / len(windows)
            for unit, (_, rise) in found.items():
                rises[unit] += rise * self._weights[unit] / len(windows)
            self._job.check()
        if factors.grad is None or thresholds.grad is None:
            raise RuntimeError("The masks took no part in the pass.")
        new = state.share[at] < 0
        exact = float((thresholds.grad + price * rises) @ rises / (rises @ rises + 1e-30))
        state.price[at] += (1.0 if new else 1 - _SMOOTHING) * (exact - price)
        state.share[at] += (1.0 if new else 1 - _SMOOTHING) * (share - float(state.share[at]))
        state.factors -= _FACTOR_RATE * rate * self._factor_step(state, factors.grad)
        mean, square = (state.threshold_moments[name][at] for name in ("mean", "square"))
        mean.lerp_(thresholds.grad, 1 - _MOMENTUM)
        square.lerp_(thresholds.grad.square(), 1 - _MEMORY)
        moved = _THRESHOLD_RATE * rate * _adam(mean, square, state.step // len(self._targets) + 1)
        # A step along the thresholds that hold the share, and one towards the target.
        moved -= (moved @ rises) / (rises.sum() + 1e-30)
        towards = _NEWTON * (self._targets[at] - share) / (float(rises.sum()) + 1e-30)
        state.thresholds[at] += max(-_NEWTON, min(towards, _NEWTON)) - moved

    def _factor_step(self, state: _State, gradient: torch.Tensor) -> torch.Tensor:
        mean, square = state.moments["mean"], state.moments["square"]
        mean.lerp_(gradient, 1 - _MOMENTUM)
        square.lerp_(torch.stack([part.square().mean() for part in self.by_unit(gradient)]), 1 - _MEMORY)
        widths = torch.tensor(self._widths, device=square.device)
        return _adam(mean, square.repeat_interleave(widths), state.step + 1)

    def look(self, masks: InputMasks, state: _State) -> float:
        """Judge the state on held-out text and keep it where it is the best; return its KL.

        Shares differ a little from look to look, so that each is taken at its price: what the KL would be at the
        target.
        """
        total = plain = 0.0
        by_unit = self.by_unit(state.factors)
        with torch.no_grad():
            for at, target in enumerate(self._targets):
                for window in range(len(self._ids) - self._held, len(self._ids)):
                    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
                    masks.mask = self._soft(by_unit, state.thresholds[at], found)
                    kl = float(self._divergence(window))
                    share = float(sum(found[u][0] * self._weights[u] for u in found))
                    total += kl + float(state.price[at]) * (target - share)
                    plain += kl
                    self._job.check()
        count = len(self._targets) * self._held
        if total / count < state.best:
            state.best, state.kl, state.waited = total / count, plain / count, 0
            state.best_factors, state.best_thresholds = state.factors.clone(), state.thresholds.clone()
        else:
            state.waited += 1
        return plain / count

    def _soft(
        self,
        factors: list[torch.Tensor],
        thresholds: torch.Tensor,
        shares: dict[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Masks whose gradients are those of sigmoids.

        The share that each unit leaves out, and what it rises by with ln t, are put into ``shares``.
        """

        def mask(unit: int, x: torch.Tensor) -> torch.Tensor:
            if unit in self._protected:
                return x
            masked, share, rise = SoftMask.apply(x, factors[unit], thresholds[unit], self._first)
            shares[unit] = (share, rise)
            return masked

        return mask

    def _divergence(self, window: int) -> torch.Tensor:
        """Mean KL over tokens from the teacher, nats."""
        with torch.no_grad(), self._teacher.head():
            wanted = log_probabilities(self._model, self._teacher.states[window])
        found = log_probabilities(self._model, final_states(self._model, self._ids[window]))
        loss = torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        if not bool(loss.isfinite()):
            raise RecipeError(f"The outputs of {self._model.name} without small inputs are not finite: ask for less.")
        return loss


def _adam(mean: torch.Tensor, square: torch.Tensor, count: int) -> torch.Tensor:
    """A step of Adam (Kingma and Ba 2015) of rate 1, from moments after ``count`` gradients."""
    size = (square / (1 - _MEMORY**count)).sqrt()
    return mean / (1 - _MOMENTUM**count) / (size + 1e-12)
