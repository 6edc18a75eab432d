"""Compressed models made once: what a recipe gives for a model is kept in the store and read from there again.

While a fit lasts its finished parts are kept too, method by method, so that one that was cancelled or killed goes on
where it stopped and gives the same bytes as one that was not.
"""

from __future__ import annotations

from pathlib import Path

import torch

from workbench.analysis.common import model_provenance
from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.formats.compressed import CompressedModel
from workbench.formats.folder import is_compressed
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime import choose_engine
from workbench.store import Store


def fitted(store: Store, model: LoadedModel, recipe: Recipe, job: Job | None = None) -> CompressedModel:
    """Return the compressed model of a recipe, made now or read from the store.

    It is stored under the recipe, the weights and the model's source; its ``fit_seconds`` is the time of the first fit.

    Raises:
        RecipeError: as ``compress``.
        IntegrityError: the stored one was changed; ``workbench store gc`` removes it.
        Cancelled: by ``job``; finished parts are kept.
    """
    folder = store.model_folder(f"fit-{model.fingerprint.weights[:12]}-{recipe.sha256[:16]}")
    if is_compressed(folder):
        return CompressedModel.load(folder)
    # Methods before the last are kept too: the next recipe may differ in the last alone.
    start = fitted(store, model, recipe.without_last(), job) if len(recipe.methods) > 1 else None
    # Another process may have made the same in the meantime: its bytes are these.
    return compress_into(store, model, recipe, folder, overwrite=True, start=start, job=job)


def compress_into(
    store: Store,
    model: LoadedModel,
    recipe: Recipe,
    folder: Path,
    *,
    overwrite: bool = False,
    allow_other_weights: bool = False,
    start: CompressedModel | None = None,
    job: Job | None = None,
) -> CompressedModel:
    """Carry out a recipe and write a folder; asked for again after an interruption, it goes on after the last part.

    Args:
        store: where finished parts are until the folder is written; ``gc`` removes those that nobody asked for again.
        model: the dense model.
        recipe: what to do.
        folder: as ``CompressedModel.save``, and ``overwrite``.
        overwrite: replace a compressed model that is there.
        allow_other_weights, start: as ``compress``.
        job: progress and cancel.

    Returns:
        The compressed model, as it was written. Its ``fit_seconds`` count the interrupted fits up to their last part.

    Raises:
        RecipeError, EngineError: as ``compress``.
        InputError, StoreError: as ``CompressedModel.save``.
        Cancelled: by ``job``; finished parts are kept.
    """
    made = compress(
        model,
        recipe,
        job=job,
        allow_other_weights=allow_other_weights,
        start=start,
        keep=lambda so_far: store.checkpoint(parts_key(model, so_far)),
    )
    made.save(folder, overwrite=overwrite)
    for index in range(len(recipe.methods)):
        store.checkpoint(parts_key(model, recipe.up_to(index))).discard()
    return made


def parts_key(model: LoadedModel, recipe: Recipe) -> str:
    """Name of the checkpoint of the last method of a recipe: everything that the parts of its fit depend on."""
    parameters = {
        "methods": [[config.version, config.model_dump(mode="json")] for config in recipe.methods],
        "sampled_by": choose_engine("auto", model),
        "threads": torch.get_num_threads(),  # sums are split among them, and rounded so
    }
    return model_provenance("fit", model, None, recipe.seed, parameters).key
