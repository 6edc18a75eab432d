"""What methods that learn from text share: where the text comes from, and whether the model can give it."""

from __future__ import annotations

import torch

from workbench.apply.configs import FEWEST_TOKENS as FEWEST_TOKENS
from workbench.apply.configs import SHORTEST, WINDOW, sampled_length, window_length
from workbench.apply.configs import Calibrated as Calibrated
from workbench.apply.configs import CalibrationText as CalibrationText
from workbench.apply.parts import Parts
from workbench.corpus import Split, TextRecord, open_text, windows
from workbench.errors import CorpusError, RecipeError
from workbench.models.base import LoadedModel
from workbench.progress import Job


def check_finite(model: LoadedModel, way_out: str | None = None) -> None:
    """Refuse a damaged model before it is asked for text: sampling cannot say what is wrong with it.

    Args:
        model: the dense model.
        way_out: what else to do where its outputs overflow.

    Raises:
        RecipeError: a weight or an output is not finite.
    """
    for linear in model.architecture.linears:
        if not bool(model.linear_module(linear.id).weight.isfinite().all()):
            raise RecipeError(f"A weight of {linear.id} is NaN or infinite: the model is damaged, so load it anew.")
    ids = torch.tensor([model.encode("The")], device=model.device)
    with torch.no_grad():
        if not bool(model.module(input_ids=ids, use_cache=False).logits.isfinite().all()):
            raise RecipeError(
                f"The outputs of {model.name} are not finite, so no text can be sampled from it: load it in float32"
                + (f", or {way_out}." if way_out else ".")
            )


def calibration_windows(
    model: LoadedModel,
    n_tokens: int,
    seed: int,
    job: Job,
    split: Split = "calibration",
    text: CalibrationText = "self",
    parts: Parts | None = None,
) -> tuple[list[tuple[int, ...]], TextRecord]:
    """Windows of one length, of text that the model sampled or of a text's split: never what it is measured on.

    Sampled text is kept with the model: several methods of a recipe, and several recipes, learn from the same. It is
    one of the ``parts`` of the fit that asks for it.

    Raises:
        CorpusError: the model's context is too short to sample text.
    """
    if text != "self":
        return _windows_of(text, model, n_tokens, seed, split)
    key = ("calibration", split, n_tokens, seed)
    if key not in model.derived:
        model.derived[key] = _sampled(model, n_tokens, seed, job, split, parts or Parts())
    return model.derived[key]


def _sampled(
    model: LoadedModel, n_tokens: int, seed: int, job: Job, split: Split, parts: Parts
) -> tuple[list[tuple[int, ...]], TextRecord]:
    name = f"text {split} {n_tokens} {seed}"
    kept = parts.find(name)
    if kept is not None:
        return [tuple(window) for window in kept.tensors["windows"].tolist()], TextRecord.model_validate(kept.facts)
    length = sampled_length(n_tokens, model.architecture.context_length)
    corpus = open_text("self", split, model=model, n_tokens=n_tokens, seed=seed, length=length, job=job)
    found = [window.tokens for window in windows(corpus, model, window_length(length))]
    record = corpus.record(sum(map(len, found)))
    parts.keep(name, {"windows": torch.tensor(found, dtype=torch.int32)}, record.model_dump(mode="json"))
    return found, record


def _windows_of(
    text: str, model: LoadedModel, n_tokens: int, seed: int, split: Split
) -> tuple[list[tuple[int, ...]], TextRecord]:
    """Windows drawn evenly over a text's domains; shorter ones where its documents are short."""
    corpus = open_text(text, split)
    length = min(WINDOW, model.architecture.context_length)
    while True:
        try:
            found = windows(corpus, model, length, limit=-(-n_tokens // length), seed=seed)
        except CorpusError:
            found = []
        if len(found) * length >= n_tokens or length // 2 < SHORTEST:
            break
        length //= 2
    if not found:
        raise CorpusError(f"'{text}' has no {length} tokens in one document: calibrate on 'self'.")
    return [window.tokens for window in found], corpus.record(sum(len(window.tokens) for window in found))
