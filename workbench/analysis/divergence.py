"""The divergence of a changed model from the dense one, differentiable: what fits minimise and analyses attribute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from workbench.models.base import LoadedModel


def final_states(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """States before the output layer, (tokens, hidden) of ids (1, tokens); a hundredth of the size of the logits."""
    with half_products(model):
        return model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


def log_probabilities(model: LoadedModel, states: torch.Tensor) -> torch.Tensor:
    """Of every next token, float32 (tokens, vocabulary), from states (tokens, hidden)."""
    with half_products(model):
        logits = model.module.get_output_embeddings()(states).float()
    cap = getattr(model.module.config, "final_logit_softcapping", None)
    return (torch.tanh(logits / cap) * cap if cap else logits).log_softmax(1)


def divergence(model: LoadedModel, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean KL over tokens, nats, from dense states (tokens, hidden) to what the model does now with ids (1, tokens)."""
    with torch.no_grad():
        wanted = log_probabilities(model, dense)
    found = log_probabilities(model, final_states(model, ids))
    return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


@contextmanager
def in_place_of_dense(
    model: LoadedModel, weights: Mapping[str, nn.Parameter], vectors: Mapping[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """Run the model with other parameters; its own come back as the very same objects.

    Args:
        model: whose parameters are exchanged for the while.
        weights: by linear id.
        vectors: norms and biases by state-dict name.
    """
    changed = {f"{model.architecture.linear(name).path}.weight": parameter for name, parameter in weights.items()}
    for name, vector in (vectors or {}).items():
        changed[name] = nn.Parameter(vector.to(model.device, model.dtype), requires_grad=False)
    places = {name: (model.submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in changed}
    dense = {name: getattr(module, part) for name, (module, part) in places.items()}
    try:
        for name, (module, part) in places.items():
            setattr(module, part, changed[name])
        yield
    finally:
        for name, (module, part) in places.items():
            setattr(module, part, dense[name])


def dense_states(model: LoadedModel, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What ``final_states`` gives for each window as the model is now; without gradients."""
    with torch.no_grad():
        return [final_states(model, torch.tensor([list(window)], device=model.device)) for window in windows]


def half_products(model: LoadedModel) -> torch.autocast:
    """Products in bf16 where this processor has them: twice as fast, and statistics need no more digits."""
    fast = model.device.type == "cpu" and torch.backends.mkldnn.is_available()
    fast = fast and model.dtype == torch.float32 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(fast))
