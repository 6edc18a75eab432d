"""Predicted sparsity: fit what a model keeps to choose heads and neurons per token.

Targets are scores of the dense model (``analysis.sparsity``) on text that it sampled; a regression predicts them
(``apply.mask_training``), and tuning through the model's own divergence may follow (``apply.mask_tuning``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from workbench.analysis.masking import masking
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.draft import Draft
from workbench.apply.mask_examples import Examples, Span, collect, joined
from workbench.apply.mask_net import MaskNet, NetSpec, per_layer_spec, unified_spec
from workbench.apply.mask_statistics import statistics_of
from workbench.apply.mask_training import regress
from workbench.apply.mask_tuning import tune
from workbench.apply.parts import Parts
from workbench.apply.registry import register
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.corpus import TextRecord
from workbench.errors import RecipeError
from workbench.formats.mask_predictor import MaskPart, MaskPredictor
from workbench.models.base import Architecture, LoadedModel
from workbench.progress import Job
from workbench.runtime.plan import Tap

QUANTILES = 256
_PIECE = 4  # texts of one part of the examples
_MOST_VALUES = 1 << 18  # scores of a group that its quantiles are read from
_HELD_OUT = 8  # every eighth text; the regression stops by them too


@dataclass(frozen=True)
class FittedMasks:
    """What ``fit`` found: what is stored, held-out errors of the regression by epoch as a share of the variance,
    divergences of the tuning by step, and the text."""

    predictor: MaskPredictor
    errors: list[float]
    losses: list[float]
    text: TextRecord


@register(PredictedSparsityConfig)
class PredictedSparsityMethod:
    """Handler of ``PredictedSparsityConfig``."""

    def fit(self, draft: Draft, config: PredictedSparsityConfig, *, seed: int, job: Job) -> FittedMasks:
        """Measure and learn; the dense model is left as it was.

        Raises:
            RecipeError: blocks or a tap that the model does not have, outputs that are not finite, too little text, or
                texts too short for a decision; the last before anything is sampled.
            Cancelled: by ``job``, between texts, epochs or steps.
        """
        model, parts = draft.model, draft.parts
        spec = spec_of(model.architecture, config)
        config.check_text(model.architecture.context_length)
        check_finite(model)
        windows, text = calibration_windows(model, config.calibration_tokens, seed, job, "tuning", parts=parts)
        span = Span(config.scope, config.n, config.span, config.prefix)
        examples = _examples(model, windows, spec, span, config, seed, job, parts)
        net = MaskNet(model.architecture, spec, config.width, seed)
        found = parts.once("regression", functools.partial(_regressed, net, examples, config, seed, job))
        _load(net, found)
        scale, losses = found["scale"], []
        if config.tune_steps:
            held = windows[_HELD_OUT - 1 :: _HELD_OUT]
            rest = [window for window in windows if window not in held]
            tuned = parts.once("tuning", functools.partial(_tuned, model, net, scale, rest, span, config, seed, job))
            _load(net, tuned)
            scale, losses = torch.ones_like(scale), tuned["losses"].tolist()
        predictor = stored(
            model, net, scale, windows[_HELD_OUT - 1 :: _HELD_OUT], span, facts_of(config), examples, job
        )
        predictor = replace(predictor, statistics=statistics_of(model, net, predictor, examples, windows, parts, job))
        return FittedMasks(predictor, found["errors"].tolist(), losses, text)

    def apply(self, draft: Draft, config: PredictedSparsityConfig, fitted: FittedMasks, *, job: Job) -> None:
        draft.mask_predictor = fitted.predictor


def spec_of(architecture: Architecture, config: PredictedSparsityConfig) -> NetSpec:
    """Parts and groups of a config's predictor.

    Raises:
        RecipeError: blocks or a tap that do not go together, or that the model does not have.
    """
    if config.whole_blocks >= architecture.n_blocks:
        raise RecipeError(
            f"whole_blocks = {config.whole_blocks} leaves no block to leave anything out of: this model has "
            f"{architecture.n_blocks}; give at most {architecture.n_blocks - 1}."
        )
    if config.predictor == "per-layer":
        return per_layer_spec(architecture, config.whole_blocks)
    if config.tap == "residual":
        return unified_spec(architecture, Tap("residual", config.whole_blocks))
    if config.whole_blocks != 1:
        raise RecipeError(
            f"whole_blocks = {config.whole_blocks} needs the tap 'residual': 'attention_output' is that of block 0, "
            "and the blocks after it are decided."
        )
    return unified_spec(architecture)


def facts_of(config: PredictedSparsityConfig) -> dict[str, str | int]:
    """What the stored predictor says of itself."""
    return {
        "criterion": config.criterion,
        "predictor": config.predictor,
        "scope": config.scope,
        "n": config.n if config.scope == "every" else 1,
        "prefix": config.prefix,
        "allocation": config.allocation or ("joint" if config.tune_steps else "hybrid"),
        "tuned": config.tune_steps,
    }


def stored(
    model: LoadedModel,
    net: MaskNet,
    scale: torch.Tensor,
    held_out: Sequence[Sequence[int]],
    span: Span,
    facts: dict[str, str | int],
    examples: Examples | None,
    job: Job | None = None,
    *,
    batch: int = 1,
) -> MaskPredictor:
    """Round a net and measure what it predicts on held-out text.

    Args:
        model: the dense model.
        net: trained.
        scale: of its groups.
        held_out: texts of one length, not trained on.
        span: when is decided.
        facts: what is stored of its making.
        examples: whose means are stored as aggregates; None stores none.
        job: a stage, advanced by text.
        batch: texts at once.
    """
    parts = net.rounded()
    quantiles = _quantiles(model, net.spec, parts, held_out, span, job or Job(), batch)
    aggregates = {}
    if examples is not None:
        aggregates = {n: (s / examples.tokens).to(torch.float32).numpy() for n, s in examples.means.items()}
    return MaskPredictor(facts, net.spec.first_block, parts, scale.float().cpu().numpy(), quantiles, aggregates)


def _examples(
    model: LoadedModel,
    windows: Sequence[Sequence[int]],
    spec: NetSpec,
    span: Span,
    config: PredictedSparsityConfig,
    seed: int,
    job: Job,
    parts: Parts,
) -> Examples:
    """Examples of all texts, a few texts a part."""
    job.stage("measure what heads and neurons matter", len(windows))
    aggregates = tuple(dict.fromkeys((config.criterion, *config.aggregates)))
    found = []
    for begin in range(0, len(windows), _PIECE):
        piece = windows[begin : begin + _PIECE]
        kept = parts.find(f"examples {begin}")
        if kept is not None:
            found.append(_unpacked(kept.tensors, spec, aggregates, kept.facts))
            job.advance(len(piece))
            continue
        made = collect(
            model,
            piece,
            spec,
            config.criterion,
            span,
            aggregates=aggregates,
            per_text=config.decisions_per_text,
            first_text=begin,
            seed=seed,
            job=job,
        ).cpu()
        parts.keep(f"examples {begin}", _packed(made, spec), made.tokens)
        found.append(made)
    return joined(found)


def _packed(examples: Examples, spec: NetSpec) -> dict[str, torch.Tensor]:
    found = {"texts": examples.texts}
    found |= {f"input.{i}": examples.inputs[tap] for i, tap in enumerate(spec.taps)}
    found |= {f"target.{i}": target for i, target in enumerate(examples.targets)}
    return found | {f"mean.{name}": mean for name, mean in examples.means.items()}


def _unpacked(tensors: dict[str, torch.Tensor], spec: NetSpec, aggregates: Sequence[str], tokens: int) -> Examples:
    return Examples(
        tensors["texts"],
        {tap: tensors[f"input.{i}"] for i, tap in enumerate(spec.taps)},
        [tensors[f"target.{i}"] for i in range(len(spec.groups))],
        {name: tensors[f"mean.{name}"] for name in aggregates},
        tokens,
    )


def _regressed(
    net: MaskNet, examples: Examples, config: PredictedSparsityConfig, seed: int, job: Job
) -> dict[str, torch.Tensor]:
    found = regress(net, examples, config.epochs, seed, job)
    return dict(net.state_dict()) | {"scale": found.scale, "errors": torch.tensor(found.errors, dtype=torch.float64)}


def _tuned(
    model: LoadedModel,
    net: MaskNet,
    scale: torch.Tensor,
    windows: Sequence[Sequence[int]],
    span: Span,
    config: PredictedSparsityConfig,
    seed: int,
    job: Job,
) -> dict[str, torch.Tensor]:
    net.to(model.device)
    losses = tune(model, net, scale, windows, span, config.tune_sparsities, config.tune_steps, seed=seed, job=job)
    return dict(net.state_dict()) | {"losses": torch.tensor(losses, dtype=torch.float64)}


def _load(net: MaskNet, found: dict[str, torch.Tensor] | object) -> None:
    assert isinstance(found, dict)  # of tensors by name
    net.load_state_dict({name: found[name] for name in net.state_dict()})
    net.cpu()


def _quantiles(
    model: LoadedModel,
    spec: NetSpec,
    parts: Sequence[MaskPart],
    windows: Sequence[Sequence[int]],
    span: Span,
    job: Job,
    batch: int,
) -> np.ndarray:
    """Of what the rounded parts predict at deciding tokens of held-out text, float32 (groups, K)."""
    job.stage("predict on held-out text", len(windows))
    by_tap: dict[Tap, list[torch.Tensor]] = {tap: [] for tap in spec.taps}
    length = len(windows[0])
    places = torch.tensor([place[0] for place in span.places(length)])

    with torch.no_grad():
        for begin in range(0, len(windows), batch):
            ids = torch.tensor([list(w) for w in windows[begin : begin + batch]], device=model.device)

            def see(tap: Tap, x: torch.Tensor, rows: int = len(ids)) -> None:
                by_tap[tap].append(x.reshape(rows, length, -1)[:, places].flatten(0, 1).float().cpu())

            with masking(model, spec.taps, see, lambda block, kind: None):
                model.module.base_model(input_ids=ids, use_cache=False)
            job.advance(len(ids))
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    found = np.empty((len(spec.groups), QUANTILES), dtype=np.float32)
    for part, stored_part in zip(spec.parts, parts, strict=True):
        taps = torch.cat(by_tap[part.tap]).numpy()
        for number, (group, begin, end) in enumerate(spec.blocks_of(part), start=part.begin):
            few = taps[:: max(1, len(taps) * group.size // _MOST_VALUES)]
            found[number] = np.quantile(_rows(stored_part, begin, end).scores(few), levels)
    return found


def _rows(part: MaskPart, begin: int, end: int) -> MaskPart:
    """A part of some of its units alone."""
    return MaskPart(
        part.tap,
        part.block,
        part.groups,
        part.hidden,
        part.hidden_steps,
        part.hidden_bias,
        part.rows[begin:end],
        part.row_steps[begin:end],
        part.mean[begin:end],
    )
