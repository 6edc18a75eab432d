"""Carry out a recipe: from a dense model to a ``CompressedModel``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from workbench.apply import anyprecision as anyprecision  # these modules' methods register themselves
from workbench.apply import awq as awq
from workbench.apply import bnb as bnb
from workbench.apply import gguf as gguf
from workbench.apply import gptq as gptq
from workbench.apply import input_sparsity as input_sparsity
from workbench.apply import integer as integer
from workbench.apply import masks as masks
from workbench.apply import nested as nested
from workbench.apply import precision as precision
from workbench.apply import rtn as rtn
from workbench.apply import salient as salient
from workbench.apply import tender as tender
from workbench.apply import tune as tune
from workbench.apply.draft import Draft, n_weights
from workbench.apply.folding import Folded
from workbench.apply.parts import Parts, Place
from workbench.apply.recipe import Recipe
from workbench.apply.registry import handler
from workbench.errors import RecipeError
from workbench.formats.compressed import Base, CompressedModel
from workbench.formats.manifest import Identity
from workbench.models.base import LoadedModel
from workbench.models.build import plain_config
from workbench.progress import Job


def compress(
    model: LoadedModel,
    recipe: Recipe,
    *,
    job: Job | None = None,
    allow_other_weights: bool = False,
    start: CompressedModel | None = None,
    keep: Callable[[Recipe], Place] | None = None,
) -> CompressedModel:
    """Make the compressed model that a recipe describes. The same model and recipe give the same bytes.

    Args:
        model: the dense model, left as it is.
        recipe: what to do.
        job: progress in weights encoded; cancels between two matrices.
        allow_other_weights: use a recipe that was written for other weights of this architecture.
        start: what the methods before the last gave for this model and seed, to go on from.
        keep: where the fit of the last method of a recipe keeps its finished parts, asked for every method in turn
            with the recipe up to it; a fit that finds parts there goes on after them. None keeps nothing.

    Raises:
        RecipeError: the recipe is for another model, or names units that this one does not have.
        EngineError: a method cannot run on this machine or model.
        Cancelled: by ``job``.
    """
    recipe.check_model(model, allow_other_weights=allow_other_weights)
    job = job or Job()
    started = time.perf_counter()
    identity = Identity(architecture=model.fingerprint.architecture, weights=model.fingerprint.weights)
    draft, before = Draft(model), 0.0
    first = 0
    if start is not None:
        before_last = recipe.without_last().model_dump(mode="json")
        same = all(start.recipe[key] == before_last[key] for key in ("methods", "seed"))
        if not same or start.base.fingerprint != identity:
            raise RecipeError("The model to start from was not made of this one by the methods before the last.")
        folded = Folded.of(model, start.input_scales)
        draft = Draft(
            model,
            dict(start.linears),
            start.embedding,
            start.output,
            start.selectors,
            start.input_cuts,
            start.mask_predictor,
            folded,
        )
        before, first = start.fit_seconds or 0.0, len(recipe.methods) - 1
    for index, config in enumerate(recipe.methods[first:], start=first):
        method = handler(config)
        draft.parts = Parts(None if keep is None else keep(recipe.up_to(index)))
        fitted = method.fit(draft, config, seed=recipe.seed, job=job)
        before += draft.parts.earlier_s
        job.stage(f"compress ({config.method})", n_weights(model.architecture))
        method.apply(draft, config, fitted, job=job)
    if draft.embedding is None:
        raise RecipeError("No method of the recipe stores the embedding: add one that stores the weights.")
    return CompressedModel(
        recipe=recipe.model_dump(mode="json"),
        base=Base(
            name=model.name,
            source=model.source,
            fingerprint=identity,
            bos=model.bos,
            stop_tokens=list(model.stop_tokens),
        ),
        config=plain_config(model.module),
        tokenizer=model.tokenizer,
        linears=draft.linears,
        embedding=draft.embedding,
        output=draft.output,
        others=_others(model) | {name: vector.float() for name, vector in draft.folded.vectors.items()},
        selectors=draft.selectors,
        input_cuts=draft.input_cuts,
        mask_predictor=draft.mask_predictor,
        input_scales=dict(draft.folded.scales),
        fit_seconds=before + time.perf_counter() - started,
    )


def _others(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Everything that is no encoded matrix: vectors in fp32 (they weigh nothing), other matrices in bf16."""
    parts = model.architecture
    paths = [linear.path for linear in parts.linears] + [parts.embedding_path, parts.output_path]
    encoded = {f"{path}.weight" for path in paths}
    others = {}
    for name, tensor in model.module.state_dict().items():
        if name in encoded:
            continue
        kind = tensor.dtype
        if tensor.is_floating_point():
            kind = torch.float32 if tensor.dim() < 2 else torch.bfloat16
        others[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
    return others
