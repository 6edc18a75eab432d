"""Nested group codes: one stored parent that is read at any of several widths, chosen while running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.configs import NestedConfig as NestedConfig
from workbench.apply.draft import Draft
from workbench.apply.moments import input_moments
from workbench.apply.nested_fit import fit_matrix, round_matrix
from workbench.apply.nested_tune import tune_scales
from workbench.apply.registry import register
from workbench.apply.workers import side_by_side
from workbench.corpus import TextRecord
from workbench.formats.encodings import Encoding
from workbench.formats.nested import Nested, NestedCodes
from workbench.models.base import LoadedModel, Unit, UnitKind
from workbench.progress import Job

# Damping of the moments, as a share of their mean power: the more, the fewer calibration tokens there are per channel
# and the heavier the tails of the inputs. Found on SmolLM2-135M, on other text than is sampled here.
_DAMPING: dict[UnitKind, float] = {"qkv": 0.1, "o": 0.2, "gate_up": 0.25, "down": 0.3}


@dataclass(frozen=True)
class FittedNested:
    """What ``fit`` found.

    Attributes:
        codes: by linear id.
        text: what it was fitted on, None where no text was needed.
    """

    codes: dict[str, NestedCodes]
    text: TextRecord | None


@register(NestedConfig)
class NestedMethod:
    """Handler of ``NestedConfig``."""

    def fit(self, draft: Draft, config: NestedConfig, *, seed: int, job: Job) -> FittedNested:
        """Choose codes of every linear; the model is left as it was.

        Raises:
            RecipeError: a weight or an activation is not finite, or too large for fp16 scales.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``, between matrices or steps.
        """
        model = draft.model
        if config.fit == "rounded":
            return FittedNested(_rounded(model, config, job), None)
        check_finite(model, "give fit='rounded', which needs no text")
        tokens, text = calibration_windows(model, config.calibration_tokens, seed, job, parts=draft.parts)
        codes = _compensated(draft, config, tokens, job)
        if config.tune_steps:
            codes = tune_scales(model, codes, tokens, config.tune_steps, job, draft.parts)
        return FittedNested(codes, text)

    def apply(self, draft: Draft, config: NestedConfig, fitted: FittedNested, *, job: Job) -> None:
        draft.encode_linears(lambda linear, _: Nested.of(fitted.codes[linear.id]), job)
        draft.encode_outputs(config.output_bits, config.group_size, False, job)


def _rounded(model: LoadedModel, config: NestedConfig, job: Job) -> dict[str, NestedCodes]:
    draft, codes = Draft(model), {}
    job.stage("round to nested codes", sum(linear.n_weights for linear in model.architecture.linears))
    for linear in model.architecture.linears:
        codes[linear.id] = round_matrix(draft.weight(linear.path), config.widths, config.group_size)
        job.advance(linear.n_weights)
    return codes


def nested_codes(linears: Mapping[str, Encoding]) -> dict[str, NestedCodes]:
    """Return the codes of those encodings that are nested, by linear id."""
    return {name: encoding.codes for name, encoding in linears.items() if isinstance(encoding, Nested)}


def _compensated(draft: Draft, config: NestedConfig, tokens: list[tuple[int, ...]], job: Job) -> dict[str, NestedCodes]:
    """Fit every unit; its linears share their inputs, so their rows are fitted as one matrix."""
    units = draft.model.architecture.units

    def fit(unit: Unit, moment: torch.Tensor) -> dict[str, NestedCodes]:
        job.check()
        weight = torch.cat([draft.weight(linear.path) for linear in unit.linears])
        found = _split(unit, fit_matrix(weight, moment, config.widths, config.group_size, _DAMPING[unit.kind]))
        draft.parts.keep_encodings(unit.id, {name: Nested.of(one) for name, one in found.items()})
        return found

    codes: dict[str, NestedCodes] = {}
    missing = []
    for unit in units:
        kept = draft.parts.encodings(unit.id)
        if kept is None:
            missing.append(unit)
        else:
            codes |= nested_codes(kept)
    total = sum(unit.n_weights for unit in units)
    done = total - sum(unit.n_weights for unit in missing)
    for moments in input_moments(draft.model, tokens, job, missing):
        job.stage("fit nested codes", total, done)
        with side_by_side() as pool:
            running = [(unit, pool.submit(fit, unit, moment)) for unit, moment, _ in moments]
            moments.clear()
            for unit, future in running:
                codes |= future.result()
                done += unit.n_weights
                job.advance(unit.n_weights)
    return codes


def _split(unit: Unit, fitted: NestedCodes) -> dict[str, NestedCodes]:
    """The rows of a unit's matrix, by linear id."""
    parts, begin = {}, 0
    for linear in unit.linears:
        rows = slice(begin, begin + linear.out_features)
        parts[linear.id] = replace(
            fitted,
            codes=fitted.codes[rows],
            scales={bits: scales[rows] for bits, scales in fitted.scales.items()},
            zeros={bits: zeros[rows] for bits, zeros in fitted.zeros.items()},
        )
        begin += linear.out_features
    return parts
