"""A model one block at a time: the states of many windows at the input of a block, and how blocks are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from workbench.analysis.divergence import half_products
from workbench.models.base import LoadedModel


class _Reached(Exception):
    """The linear whose input was wanted."""


def block_calls(model: LoadedModel, window: Sequence[int]) -> tuple[list[tuple[torch.Tensor, dict[str, Any]]], Any]:
    """Run one window through the model; return how each block was called, and the final states (1, tokens, hidden).

    Returns:
        Per block the states (1, tokens, hidden) that enter it and its other arguments, and the last hidden state.
    """
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = dict(kwargs)
        hidden = args[0] if args else inputs.pop("hidden_states")
        calls.append((hidden, inputs))

    blocks = [model.block(i) for i in range(model.architecture.n_blocks)]
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        ids = torch.tensor([list(window)], device=model.device)
        final = model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return calls, final


def run_block(model: LoadedModel, block: int, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Return what a block makes of states (1, tokens, hidden), of the same shape."""
    out = model.block(block)(states, **arguments)
    return out[0] if isinstance(out, tuple) else out


class BlockStates:
    """States of windows of one length on their way through a model's blocks, with whatever weights it has by then.

    Only the states at the input of ``block`` are held: tokens x hidden numbers. Products are in bf16 where this
    processor has them, states are float32.
    """

    def __init__(self, model: LoadedModel, windows: Sequence[Sequence[int]]) -> None:
        """
        Args:
            model: in whose blocks they go; its weights may change between two calls.
            windows: token windows, all of one length, each no longer than the context.
        """
        self._model = model
        self.block = 0
        with torch.no_grad():
            calls, _ = block_calls(model, windows[0])
        self._arguments = [inputs for _, inputs in calls]
        self.states = [calls[0][0].float()]
        for window in windows[1:]:
            self.states.append(self._entering(window))

    def _entering(self, window: Sequence[int]) -> torch.Tensor:
        """What enters the first block."""
        found: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = self._model.block(0).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            ids = torch.tensor([list(window)], device=self._model.device)
            self._model.module.base_model(input_ids=ids, use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0].float()

    def inputs(self, path: str, index: int) -> torch.Tensor:
        """Return what enters the linear at a module path of the present block, float32 (tokens, in), of one window.

        Nothing after it in the block is run.
        """
        found: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple) -> None:
            found.append(args[0])
            raise _Reached

        hook = self._model.submodule(path).register_forward_pre_hook(stop)
        try:
            self._run(index)
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0].reshape(-1, found[0].shape[-1]).float()

    def advance(
        self, tick: Callable[[], None] | None = None, watch: Sequence[str] = ()
    ) -> dict[str, list[torch.Tensor]]:
        """Move all windows past the present block.

        Args:
            tick: called after each window.
            watch: module paths of linears of the block.

        Returns:
            By path of ``watch`` what entered it, (tokens, in) for every window, of the type that it came in.
        """
        seen: dict[str, list[torch.Tensor]] = {path: [] for path in watch}

        def note(path: str) -> Callable[[nn.Module, tuple], None]:
            return lambda _, args: seen[path].append(args[0].reshape(-1, args[0].shape[-1]))

        hooks = [self._model.submodule(path).register_forward_pre_hook(note(path)) for path in watch]
        try:
            for index in range(len(self.states)):
                self.states[index] = self._run(index).float()
                if tick is not None:
                    tick()
        finally:
            for hook in hooks:
                hook.remove()
        self.block += 1
        return seen

    def _run(self, index: int) -> torch.Tensor:
        with torch.no_grad(), half_products(self._model):
            kind = self._model.dtype
            return run_block(self._model, self.block, self.states[index].to(kind), self._arguments[self.block])
