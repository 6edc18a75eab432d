"""Compressed models made once: what a recipe gives for a model is kept in the store and read from there again."""

from __future__ import annotations

from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.formats.compressed import CompressedModel
from workbench.formats.folder import is_compressed
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.store import Store


def fitted(store: Store, model: LoadedModel, recipe: Recipe, job: Job | None = None) -> CompressedModel:
    """Return the compressed model of a recipe, made now or read from the store.

    It is stored under the recipe, the weights and the model's source; its ``fit_seconds`` is the time of the first fit.

    Raises:
        RecipeError: as ``compress``.
        IntegrityError: the stored one was changed; ``workbench store gc`` removes it.
        Cancelled: by ``job``.
    """
    folder = store.model_folder(f"fit-{model.fingerprint.weights[:12]}-{recipe.sha256[:16]}")
    if is_compressed(folder):
        return CompressedModel.load(folder)
    # Methods before the last are kept too: the next recipe may differ in the last alone.
    start = fitted(store, model, recipe.without_last(), job) if len(recipe.methods) > 1 else None
    made = compress(model, recipe, job=job, start=start)
    made.save(folder)
    return made
