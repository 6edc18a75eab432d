"""GPTQ and GPTAQ: codes chosen anew on a stored grid, so that the outputs and not the weights are kept.

Follows a method that stores group codes (``rtn``, ``awq``) and keeps its grid, widths and folded scales: a recipe
``awq`` then ``gptq`` is AWQ's scales and ranges under GPTQ's rounding. Frantar et al. 2023, "GPTQ"; asymmetric: Li et
al. 2025, "GPTAQ". The mathematics is ``apply.compensate``.

Units are done in the order of computation. Each is weighed by the inputs that it gets from everything before it as it
will be stored, blocks one at a time: what is held is the states of all calibration tokens (tokens x hidden, twice if
asymmetric) and one unit's moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from workbench.analysis.blocks import BlockStates
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.compensate import damped
from workbench.apply.configs import GptqConfig as GptqConfig
from workbench.apply.draft import Draft
from workbench.apply.gptq_fit import Target, compensated
from workbench.apply.registry import register
from workbench.apply.workers import side_by_side
from workbench.corpus import TextRecord
from workbench.errors import RecipeError
from workbench.formats.codes import GroupCodes, dequantize
from workbench.formats.encodings import Encoding, Groups
from workbench.models.base import Linear, LoadedModel, Unit
from workbench.progress import Job


@dataclass(frozen=True)
class FittedGptq:
    """What ``fit`` found.

    Attributes:
        codes: by linear id, of every linear that has group codes.
        text: what they were fitted on.
    """

    codes: dict[str, GroupCodes]
    text: TextRecord


@register(GptqConfig)
class Gptq:
    """Handler of ``GptqConfig``."""

    def fit(self, draft: Draft, config: GptqConfig, *, seed: int, job: Job) -> FittedGptq:
        """Choose codes of every linear in turn; the model is left as it was, also after an error or a cancel.

        Raises:
            RecipeError: no group codes to work on, or a weight or an activation is not finite.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``, between windows or linears.
        """
        model = draft.model
        stored = group_codes(draft.linears)
        if not stored:
            raise RecipeError("Method 'gptq': no group codes are stored yet; put 'rtn' or 'awq' before it.")
        check_finite(model, "choose 'rtn' alone, which needs no text")
        tokens, text = calibration_windows(
            model, config.calibration_tokens, seed, job, text=config.calibration, parts=draft.parts
        )
        units = model.architecture.units
        job.stage("compensate errors", len(units))
        found: dict[str, GroupCodes] = {}
        with torch.inference_mode(False), torch.no_grad():
            coded = BlockStates(model, tokens)
            dense = BlockStates(model, tokens) if config.asymmetric else None
            for block in range(model.architecture.n_blocks):
                here = [unit for unit in units if unit.block == block]
                was = {} if dense is None else dense.advance(job.check, [unit.linears[0].path for unit in here])
                weights = {linear: draft.folded_weight(linear) for unit in here for linear in unit.linears}
                with _Changed(model, weights, draft.folded.vectors) as changed:
                    for unit in here:
                        kept = draft.parts.encodings(unit.id)
                        if kept is None:
                            target = _target(draft, config, unit, coded, was.get(unit.linears[0].path), job)
                            wanted = {linear: weights[linear] for linear in unit.linears if linear.id in stored}
                            made = _codes(wanted, stored, target, config, job)
                            draft.parts.keep_encodings(unit.id, {i: Groups.of_codes(c) for i, c in made.items()})
                        else:
                            made = group_codes(kept)
                        found |= made
                        for linear in unit.linears:
                            weight = dequantize(found[linear.id]) if linear.id in found else None
                            changed.settle(linear, weight)
                        job.advance()
                    coded.advance(job.check)
        return FittedGptq(found, text)

    def apply(self, draft: Draft, config: GptqConfig, fitted: FittedGptq, *, job: Job) -> None:
        for name, codes in fitted.codes.items():
            draft.linears[name] = Groups.of_codes(codes)
            job.advance(codes.codes.numel())


def group_codes(linears: Mapping[str, Encoding]) -> dict[str, GroupCodes]:
    """Return the codes of those encodings that are group codes, by linear id."""
    return {name: encoding.codes for name, encoding in linears.items() if isinstance(encoding, Groups)}


def _codes(
    weights: Mapping[Linear, torch.Tensor],
    stored: Mapping[str, GroupCodes],
    target: Target,
    config: GptqConfig,
    job: Job,
) -> dict[str, GroupCodes]:
    """Codes of the linears of one unit, by id; their weights (out, in) are those after folding."""

    def fit(linear: Linear) -> GroupCodes:
        job.check()
        return compensated(weights[linear], stored[linear.id], target, act_order=config.act_order, refit=config.refit)

    with side_by_side() as pool:
        running = {linear.id: pool.submit(fit, linear) for linear in weights}
        return {name: future.result() for name, future in running.items()}


def _target(
    draft: Draft, config: GptqConfig, unit: Unit, coded: BlockStates, was: list[torch.Tensor] | None, job: Job
) -> Target:
    """Moments of a unit's inputs x' as they now are, and of how far they are from the dense model's, ``was``."""
    first = unit.linears[0]
    moment = torch.zeros(first.in_features, first.in_features)
    drift = None if was is None else torch.zeros_like(moment)
    scales = draft.folded.columns.get(first.id)
    tokens = 0
    for index in range(len(coded.states)):
        job.check()
        now = coded.inputs(first.path, index).cpu()
        moment.addmm_(now.T, now)
        tokens += len(now)
        if was is not None and drift is not None:
            dense = was[index].float().cpu()
            drift.addmm_(((dense if scales is None else dense / scales) - now).T, now)
    if not bool(moment.isfinite().all()):
        raise RecipeError(f"The activations that enter {unit.id} are not finite: load {draft.model.name} in float32.")
    moment = damped(moment.div_(tokens), config.damping)
    return Target(moment, None if drift is None else drift.mul_(config.drift / tokens))


class _Changed:
    """Context in which one block has other weights: folded at first, then unit by unit as they are stored."""

    def __init__(
        self, model: LoadedModel, weights: Mapping[Linear, torch.Tensor], vectors: Mapping[str, torch.Tensor]
    ) -> None:
        """
        Args:
            model: whose block it is.
            weights: (out, in) by linear of the block.
            vectors: norms and biases by state-dict name, also of other blocks.
        """
        self._model = model
        self._changed: dict[str, nn.Parameter] = {}
        self._dense: dict[str, nn.Parameter] = {}
        for linear, weight in weights.items():
            self.settle(linear, weight)
        prefix = f"{model.architecture.blocks_path}.{next(iter(weights)).block}."
        for name, vector in vectors.items():
            if name.startswith(prefix):
                self._changed[name] = self._parameter(vector)

    def settle(self, linear: Linear, weight: torch.Tensor | None) -> None:
        """Give a linear other weights (out, in); None leaves those that it has."""
        if weight is not None:
            self._changed[f"{linear.path}.weight"] = self._parameter(weight)
            if self._dense:
                self._put({f"{linear.path}.weight": self._changed[f"{linear.path}.weight"]})

    def __enter__(self) -> _Changed:
        for name in self._changed:
            path, _, part = name.rpartition(".")
            self._dense[name] = getattr(self._model.submodule(path), part)
        self._put(self._changed)
        return self

    def __exit__(self, *error: object) -> None:
        self._put(self._dense)

    def _parameter(self, values: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self._model.device, self._model.dtype), requires_grad=False)

    def _put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            path, _, part = name.rpartition(".")
            setattr(self._model.submodule(path), part, parameter)
