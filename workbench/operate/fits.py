"""Compressed models made once: what a recipe gives for a model is kept in the store and read from there again.

While a fit lasts its finished parts are kept too, method by method, so that one that was cancelled or killed goes on
where it stopped and gives the same bytes as one that was not.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from workbench.analysis.common import model_provenance
from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.corpus.sampled import sampled_by
from workbench.errors import IntegrityError
from workbench.formats.compressed import CompressedModel
from workbench.formats.folder import is_compressed
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.store import Store

log = logging.getLogger(__name__)


def fitted(
    store: Store,
    model: LoadedModel,
    recipe: Recipe,
    job: Job | None = None,
    *,
    allow_other_weights: bool = False,
) -> CompressedModel:
    """Return the compressed model of a recipe, made now or read from the store.

    It is stored under what decides its bytes: methods, seed, weights and kind of device, so that recipes that say no
    more than that in other words find it, and those that add a method go on from it. Its ``fit_seconds`` is the time of
    the first fit.

    Raises:
        RecipeError: as ``compress``.
        Cancelled: by ``job``; finished parts are kept.
    """
    job = job or Job()
    recipe.check_model(model, allow_other_weights=allow_other_weights)
    plain = Recipe.for_model(model, *recipe.methods, seed=recipe.seed)
    folder = fit_folder(store, model, plain)
    made = _stored(folder)
    if made is None:
        made = _fit(store, model, plain, job)
        made.save(folder, overwrite=True)  # another process may have made the same in the meantime: its bytes are these
        store.checkpoint(parts_key(model, plain)).discard()
    if recipe == plain and made.base.source == model.source:
        return made
    base = made.base.model_copy(update={"name": model.name, "source": model.source})
    said = recipe.model_dump(mode="json")
    return replace(made, recipe=said, base=base, folder=None, recorded_sha256=None)


def fit_folder(store: Store, model: LoadedModel, recipe: Recipe) -> Path:
    """Where the store keeps what a recipe gives that ``Recipe.for_model`` wrote."""
    # Version 1 goes without saying. What an older version of a method made is not taken for the newer one's.
    versions = "".join(f"-{m.method}.{m.version}" for m in recipe.methods if m.version > 1)
    # A fit on another device learns from other text, and sums in another order: other bytes.
    where = "" if model.device.type == "cpu" or not recipe.learns else f"-{model.device.type}"
    return store.model_folder(f"fit-{model.fingerprint.weights[:12]}-{recipe.sha256[:16]}{versions}{where}")


def _stored(folder: Path) -> CompressedModel | None:
    """The fit in a folder of the store, None where there is none, or a damaged one."""
    if not is_compressed(folder):
        return None
    try:
        return CompressedModel.load(folder)
    except IntegrityError as error:
        log.warning("A stored fit is damaged and will be made again: %s", error)
        return None


def _fit(store: Store, model: LoadedModel, recipe: Recipe, job: Job) -> CompressedModel:
    start = None
    if len(recipe.methods) > 1:
        # Methods before the last are kept too: the next recipe may differ in the last alone.
        before = recipe.without_last()
        if is_compressed(fit_folder(store, model, before)):
            job.note(f"Going on from the stored fit of {before.label}.")
        start = fitted(store, model, before, job)
    place = store.checkpoint(parts_key(model, recipe))
    if n := len(place):
        label = recipe.methods[-1].label
        job.note(f"Going on after an interrupted fit of {label}: {n} finished part{'s' * (n > 1)} kept.")
    return compress(model, recipe, job=job, start=start, keep=lambda _: place)


def compress_into(
    store: Store,
    model: LoadedModel,
    recipe: Recipe,
    folder: Path,
    *,
    overwrite: bool = False,
    allow_other_weights: bool = False,
    job: Job | None = None,
) -> CompressedModel:
    """Carry out a recipe and write a folder; asked for again after an interruption, it goes on after the last part.

    Args:
        store: keeps what was fitted on text (``fitted``), so that the next recipe may go on from it; what takes
            seconds is made anew.
        model: the dense model.
        recipe: what to do.
        folder: as ``CompressedModel.save``, and ``overwrite``.
        overwrite: replace a compressed model that is there.
        allow_other_weights: as ``compress``.
        job: progress, notes of what need not be done again, and cancel.

    Returns:
        The compressed model, as it was written. Its ``fit_seconds`` count the interrupted fits up to their last part.

    Raises:
        RecipeError, EngineError: as ``compress``.
        InputError, StoreError: as ``CompressedModel.save``.
        Cancelled: by ``job``; finished parts are kept.
    """
    job = job or Job()
    if not recipe.learns:
        made = compress(model, recipe, job=job, allow_other_weights=allow_other_weights)
    else:
        plain = Recipe.for_model(model, *recipe.methods, seed=recipe.seed)
        if is_compressed(fit_folder(store, model, plain)):
            job.note("The store has this fit already: it is written once more, and nothing is computed again.")
        made = fitted(store, model, recipe, job, allow_other_weights=allow_other_weights)
    made.save(folder, overwrite=overwrite)
    return made


def parts_key(model: LoadedModel, recipe: Recipe) -> str:
    """Name of the checkpoint of the last method of a recipe: everything that the parts of its fit depend on."""
    parameters = {
        "methods": [[config.version, config.model_dump(mode="json")] for config in recipe.methods],
        "sampled_by": sampled_by(model),
        "threads": torch.get_num_threads(),  # sums are split among them, and rounded so
    }
    return model_provenance("fit", model, None, recipe.seed, parameters).key
