"""The draft's model run with what is stored by now, for fits that must see what will run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from workbench.analysis.divergence import in_place_of_dense
from workbench.apply.draft import Draft
from workbench.models.base import LoadedModel


@contextmanager
def stored_weights(draft: Draft) -> Iterator[None]:
    """Run the draft's model with what is stored by now: linears, embedding, output layer, and folded norms."""
    model, parts = draft.model, draft.model.architecture
    weights = {
        name: nn.Parameter(encoding.dequantize().to(model.device, model.dtype), requires_grad=False)
        for name, encoding in draft.linears.items()
    }
    others = dict(draft.folded.vectors)
    if draft.embedding is not None:
        table = draft.embedding.dequantize()
        others[f"{parts.embedding_path}.weight"] = table
        others[f"{parts.output_path}.weight"] = table if draft.output is None else draft.output.dequantize()
    with in_place_of_dense(model, weights, others):
        yield


def output_layer(model: LoadedModel, weight: torch.Tensor) -> AbstractContextManager[None]:
    """Context in which the output layer has these weights."""
    return in_place_of_dense(model, {}, {f"{model.architecture.output_path}.weight": weight})
