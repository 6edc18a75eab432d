"""A model with heads and neurons left out, in PyTorch and differentiable: for many texts at once, and for training.

It computes what the reference engine computes under a plan with masks (a test holds them together), on batches (texts,
tokens) and with gradients, which no engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from workbench.models.base import LoadedModel
from workbench.runtime.plan import Tap

MaskKind = Literal["heads", "neurons"]
See = Callable[[Tap, torch.Tensor], None]
MaskOf = Callable[[int, MaskKind], torch.Tensor | None]

_UNIT_OF_TAP = {"block_input": "qkv", "attention_output": "o", "mlp_input": "gate_up", "mlp_inner": "down"}
_UNIT_OF_MASK: dict[MaskKind, str] = {"heads": "o", "neurons": "down"}


@contextmanager
def masking(model: LoadedModel, taps: Sequence[Tap], see: See, mask_of: MaskOf) -> Iterator[None]:
    """Run the model's module with masks for the while.

    Args:
        model: its module is hooked, not changed.
        taps: what ``see`` is shown, as it comes in: (texts, tokens, width), or the two first as one.
        see: called when a tap is reached, before anything that follows it is computed.
        mask_of: asked at every block for its mask, (texts, tokens, heads or neurons), 1 = computed; None keeps all.
    """
    hooks: list[Any] = []
    architecture = model.architecture
    for tap in taps:
        if tap.kind == "residual":
            hooks.append(model.block(tap.block).register_forward_pre_hook(_residual(tap, see), with_kwargs=True))
        else:
            unit = architecture.unit(f"blocks.{tap.block}.{_UNIT_OF_TAP[tap.kind]}")
            hooks.append(model.linear_module(unit.linears[0].id).register_forward_pre_hook(_input(tap, see)))
    for block in range(architecture.n_blocks):
        for kind, unit_kind in _UNIT_OF_MASK.items():
            linear = architecture.unit(f"blocks.{block}.{unit_kind}").linears[0]
            hooks.append(model.linear_module(linear.id).register_forward_pre_hook(_masked(block, kind, mask_of)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _residual(tap: Tap, see: See) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        see(tap, args[0] if args else kwargs["hidden_states"])

    return hook


def _input(tap: Tap, see: See) -> Callable:
    def hook(module: nn.Module, args: tuple) -> None:
        see(tap, args[0])

    return hook


def _masked(block: int, kind: MaskKind, mask_of: MaskOf) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple | None:
        mask = mask_of(block, kind)
        if mask is None:
            return None
        x = args[0]
        wide = mask.to(x.dtype).unsqueeze(-1).expand(*mask.shape, x.shape[-1] // mask.shape[-1])
        return (x * wide.reshape(x.shape), *args[1:])

    return hook
