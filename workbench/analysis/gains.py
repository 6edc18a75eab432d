"""What a wider width of each unit would take off the divergence from the dense model, token by token.

All units are set half way between two widths, w = (w_low + w_high) / 2, and the loss L (the KL divergence of the dense
next-token distribution from the model's, summed over the text) is differentiated. For one unit and one token, whose
output is y and input x,

    gain = - <dL/dy, (W_high - W_low) x>.

Divergence is a quadratic form of small errors, and the difference of a quadratic between two points is its derivative
at their middle times their distance: so the gain is what reading this unit at the wider width instead of the narrower
takes off L, in nats, later tokens included, to the accuracy of that quadratic and with all other units half way. One
forward and one backward pass give it for all units and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.analysis.divergence import divergence, in_place_of_dense
from workbench.errors import InputError
from workbench.formats.nested import NestedCodes
from workbench.models.base import LoadedModel
from workbench.progress import Job


def token_gains(
    model: LoadedModel,
    codes: Mapping[str, NestedCodes],
    low: int,
    high: int,
    windows: Sequence[Sequence[int]],
    dense: Sequence[torch.Tensor],
    job: Job,
) -> np.ndarray:
    """Gains of reading each unit at ``high`` instead of ``low`` bits, by token.

    Args:
        model: the dense model; left as it was, also after an error or a cancel.
        codes: of every linear, by id.
        low: narrower width.
        high: wider width.
        windows: token windows.
        dense: of each window, what ``dense_states`` gave.
        job: a stage, advanced by window.

    Returns:
        float32 (tokens of all windows, units), nats.

    Raises:
        InputError: an output of the model is not finite.
    """
    units = {linear.id: index for index, unit in enumerate(model.architecture.units) for linear in unit.linears}
    job.stage(f"measure gains from {low} to {high} bits", len(windows))
    found = []
    with torch.inference_mode(False):
        middles, changes = _half_way(model, codes, low, high)
        table = np.zeros(0, dtype=np.float32)

        def watch(linear_id: str) -> Callable[..., None]:
            def forward(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                with torch.no_grad():
                    change = nn.functional.linear(inputs[0].to(changes[linear_id].dtype), changes[linear_id])[0]

                def backward(gradient: torch.Tensor) -> None:
                    table[:, units[linear_id]] -= (gradient[0].float() * change.float()).sum(1).cpu().numpy()

                output.register_hook(backward)

            return forward

        hooks: list[Any] = [model.linear_module(name).register_forward_hook(watch(name)) for name in units]
        # Nothing has a gradient of its own but the embedded tokens, through which all of it flows.
        embedding = model.module.get_input_embeddings()
        hooks.append(embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True)))
        try:
            with in_place_of_dense(model, middles), torch.enable_grad():
                for window, states in zip(windows, dense, strict=True):
                    table = np.zeros((len(window), len(model.architecture.units)), dtype=np.float32)
                    # Gains are of the loss summed over the text.
                    loss = divergence(model, states, torch.tensor([list(window)], device=model.device)) * len(window)
                    if not bool(loss.isfinite()):
                        raise InputError(f"The outputs of {model.name} between {low} and {high} bits are not finite.")
                    loss.backward()
                    found.append(table)
                    job.advance()
        finally:
            for hook in hooks:
                hook.remove()
    return np.concatenate(found)


def _half_way(
    model: LoadedModel, codes: Mapping[str, NestedCodes], low: int, high: int
) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """Weights half way between two widths, and what lies between the two, bf16; by linear id."""
    middles, changes = {}, {}
    for name, nested in codes.items():
        first = nested.dequantize(low)
        change = nested.dequantize(high).sub_(first)
        middles[name] = nn.Parameter(first.add_(change, alpha=0.5).to(model.device, model.dtype), requires_grad=False)
        changes[name] = change.to(model.device, torch.bfloat16)
    return middles, changes
