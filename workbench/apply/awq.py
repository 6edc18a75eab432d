"""AWQ: weights that strong inputs read are scaled up before rounding, and ranges are clipped where that costs less.

Lin et al. 2024 (MLSys), "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration".
Scales are folded into what comes before (``apply.folding``), so that the result is group codes like any other: it runs
in the same kernels at the same speed. What is stored is rounded to nearest; ``gptq`` may follow and choose the codes
anew on this grid.

Scales of q, k, v and of gate, up are judged by the output of the attention and the MLP that they are in
(``apply.awq_judge``), those of o and down by their own outputs. What differs from the authors' code: scales are judged
after clipping; ``o`` is scaled with grouped heads too, by tied scales; a clipped range keeps its own zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.apply.awq_judge import ModuleJudges
from workbench.apply.awq_search import Found, Judge, Matrix, Options, make_grid, search_unit
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.configs import AwqConfig as AwqConfig
from workbench.apply.draft import Draft
from workbench.apply.folding import find_fold
from workbench.apply.moments import Inputs, input_moments
from workbench.apply.parts import Parts
from workbench.apply.registry import register
from workbench.apply.rtn import linear_bits
from workbench.apply.workers import side_by_side
from workbench.corpus import TextRecord
from workbench.formats.encodings import DENSE_BITS, Dense, Encoding, Groups
from workbench.models.base import Linear, Unit
from workbench.progress import Job

_UNCLIPPED = ("q", "k", "qkv")  # the error of a product of the two is not that of either


def search_options(config: AwqConfig) -> Options:
    """How every unit is searched."""
    return Options(
        config.group_size,
        config.symmetric,
        config.alpha_steps,
        config.weight_factor,
        config.clip,
        config.joint,
        config.alpha,
    )


@dataclass(frozen=True)
class FittedAwq:
    """What ``fit`` found.

    Attributes:
        bits: of every linear, by id.
        units: what the search found, by unit id.
        text: what it was fitted on.
    """

    bits: dict[str, int]
    units: dict[str, Found]
    text: TextRecord


@register(AwqConfig)
class Awq:
    """Handler of ``AwqConfig``."""

    def fit(self, draft: Draft, config: AwqConfig, *, seed: int, job: Job) -> FittedAwq:
        """Search scales and ranges of every unit; the model is left as it was.

        Memory: moments of as many units as fit a fixed bound (``apply.moments``), and a few copies of one unit.

        Raises:
            RecipeError: ``unit_bits`` names what is not there, or a weight or an activation is not finite.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``, between windows or tries.
        """
        model = draft.model
        bits = linear_bits(config, model.architecture)
        check_finite(model, "choose 'rtn', which needs no text")
        tokens, text = calibration_windows(
            model, config.calibration_tokens, seed, job, text=config.calibration, parts=draft.parts
        )

        judged = config.scale and config.alpha is None and config.judge == "module"  # else nothing is chosen
        judges = ModuleJudges(model, tokens) if judged else None

        def search(inputs: Inputs, judge: Judge | None) -> Found:
            job.check()
            unit, moment, magnitude = inputs
            fold = find_fold(model.architecture, unit) if config.scale else None
            matrices = [matrix_of(linear, draft.weight(linear.path), bits[linear.id]) for linear in unit.linears]
            tie = fold.tie if fold else None
            made = search_unit(matrices, moment, magnitude, search_options(config), tie, job.check, judge)
            _keep(draft.parts, unit, made)
            return made

        units = model.architecture.units
        found = {unit.id: kept for unit in units if (kept := _kept(draft.parts, unit)) is not None}
        missing = [unit for unit in units if unit.id not in found]
        total = sum(unit.n_weights for unit in units)
        done = total - sum(unit.n_weights for unit in missing)
        for inputs in input_moments(model, tokens, job, missing):
            job.stage("search scales and ranges", total, done)
            with side_by_side() as pool:
                running = [
                    (one.unit, pool.submit(search, one, judges.judge(one.unit) if judges else None)) for one in inputs
                ]
                inputs.clear()
                for unit, future in running:
                    found[unit.id] = future.result()
                    done += unit.n_weights
                    job.advance(unit.n_weights)
        return FittedAwq(bits, found, text)

    def apply(self, draft: Draft, config: AwqConfig, fitted: FittedAwq, *, job: Job) -> None:
        architecture = draft.model.architecture
        shares: dict[str, torch.Tensor | None] = {}
        for unit in architecture.units:
            found = fitted.units[unit.id]
            shares |= {linear.id: share for linear, share in zip(unit.linears, found.shares, strict=True)}
            if found.scales is not None:
                draft.folded.scale(draft.model, unit, found.scales)

        def encode(linear: Linear, weight: torch.Tensor) -> Encoding:
            bits = fitted.bits[linear.id]
            if bits == DENSE_BITS:
                return Dense.of(weight)
            grid = make_grid(weight, bits, config.group_size, config.symmetric, shares[linear.id])
            return Groups.of_codes(grid.nearest(weight))

        draft.encode_linears(encode, job)
        draft.encode_outputs(config.output_bits, config.group_size, config.symmetric, job)


def _keep(parts: Parts, unit: Unit, found: Found) -> None:
    tensors = {f"shares.{i}": share for i, share in enumerate(found.shares) if share is not None}
    if found.scales is not None:
        tensors["scales"] = found.scales
    parts.keep(unit.id, tensors, {"alpha": found.alpha, "error": found.error, "before": found.before})


def _kept(parts: Parts, unit: Unit) -> Found | None:
    part = parts.find(unit.id)
    if part is None:
        return None
    shares = [part.tensors.get(f"shares.{i}") for i in range(len(unit.linears))]
    return Found(part.tensors.get("scales"), shares=shares, **part.facts)


def matrix_of(linear: Linear, weight: torch.Tensor, bits: int) -> Matrix:
    """A linear with its weight (out, in), or some of its rows, as the search takes it."""
    return Matrix(weight, None if bits == DENSE_BITS else bits, linear.role not in _UNCLIPPED)
