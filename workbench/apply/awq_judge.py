"""The module whose output error counts in AWQ's search: the attention behind q, k and v, the MLP behind gate and up.

Lin et al. 2024, section 3.2, and the authors' code. Errors of q and k meet in a softmax and those of gate and up in a
product, so the sum of the linears' own errors ranks scales otherwise than what comes out behind them does. On
SmolLM2-135M at 3 bits that is a tenth of perplexity and more (docs/notes/awq.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from workbench.analysis.blocks import BlockStates
from workbench.apply.awq_search import Judge
from workbench.models.base import LoadedModel, Unit

TOKENS = 2048  # that a module is run on at every try; eight times as many find hardly better scales
_READER = {"qkv": "o", "gate_up": "down"}  # what reads the unit's outputs inside the module

_Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


class ModuleJudges:
    """Judges of units, asked for in the order of their blocks. A judge holds what enters its module and what comes out.

    Args:
        model: the dense model; its weights must not change between two calls.
        windows: of calibration text, all of one length; the first ``TOKENS`` tokens are used, at least one window.
    """

    def __init__(self, model: LoadedModel, windows: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._windows = windows[: max(1, TOKENS // len(windows[0]))]
        self._states: BlockStates | None = None
        self._block = -1
        self._calls: dict[str, _Calls] = {}

    def judge(self, unit: Unit) -> Judge | None:
        """What squared error the output of the unit's module has with other weights, one (out, in) for each linear.

        None for units that no module stands behind: ``o`` and ``down`` are what comes out themselves, and some
        families have no module of the MLP's own.
        """
        path = self._module_of(unit)
        if path is None:
            return None
        self._advance(unit.block)
        module, calls = self._model.submodule(path), self._calls[path]
        names = [linear.path.removeprefix(f"{path}.") + ".weight" for linear in unit.linears]
        with torch.no_grad():
            wanted = [_first(module(*args, **kwargs)) for args, kwargs in calls]

        def error(weights: Sequence[torch.Tensor]) -> float:
            changed = {
                name: weight.to(self._model.device, self._model.dtype)
                for name, weight in zip(names, weights, strict=True)
            }
            total = torch.zeros((), dtype=torch.float64, device=self._model.device)
            with torch.no_grad():
                for (args, kwargs), right in zip(calls, wanted, strict=True):
                    found = _first(functional_call(module, changed, args, kwargs))
                    total += (found - right).float().square().sum(dtype=torch.float64)
            return float(total)

        return error

    def _module_of(self, unit: Unit) -> str | None:
        """Path of the module that holds the unit's linears and what reads them; None where that is the whole block."""
        reader = _READER.get(unit.kind)
        if reader is None:
            return None
        readers = self._model.architecture.unit(f"blocks.{unit.block}.{reader}").linears
        parents = {linear.path.rpartition(".")[0] for linear in (*unit.linears, *readers)}
        path = parents.pop()
        return None if parents or self._model.submodule(path) is self._model.block(unit.block) else path

    def _advance(self, block: int) -> None:
        """Note how the modules of a block are called."""
        if self._block == block:
            return
        if self._states is None:
            self._states = BlockStates(self._model, self._windows)
        while self._states.block < block:
            self._states.advance()
        units = [unit for unit in self._model.architecture.units if unit.block == block]
        paths = {path for unit in units if (path := self._module_of(unit)) is not None}
        calls: dict[str, _Calls] = {path: [] for path in paths}

        def note(path: str) -> Callable[[nn.Module, tuple, dict], None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                calls[path].append((tuple(map(self._plain, args)), {k: self._plain(v) for k, v in kwargs.items()}))

            return hook

        hooks = [self._model.submodule(p).register_forward_pre_hook(note(p), with_kwargs=True) for p in paths]
        try:
            self._states.advance()
        finally:
            for hook in hooks:
                hook.remove()
        self._block, self._calls = block, calls

    def _plain(self, value: Any) -> Any:
        """States as the module takes them: they may come out of products in half precision."""
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self._model.dtype)
        return value


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
