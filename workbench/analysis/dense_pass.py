"""The dense model's states at any block, kept for windows of text, so that a change is run from its own block on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workbench.analysis.blocks import block_calls, run_block
from workbench.analysis.divergence import half_products
from workbench.models.base import LoadedModel


class DensePass:
    """The dense model's states at the input of one block, for every window, and its output probabilities."""

    def __init__(self, model: LoadedModel, windows: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._states: list[torch.Tensor] = []
        self._arguments: list[list[dict[str, Any]]] = []
        self._final: list[torch.Tensor] = []
        self._log_probabilities: list[torch.Tensor] = []
        self.block = 0
        for window in windows:
            self._record(window)

    def _record(self, window: Sequence[int]) -> None:
        """Run one window through the dense model, keeping how each block was called."""
        calls, final = block_calls(self._model, window)
        self._states.append(calls[0][0])
        self._arguments.append([inputs for _, inputs in calls])
        self._final.append(final[0])
        self._log_probabilities.append(self._head(final[0]).log_softmax(dim=1))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.module.get_output_embeddings()(hidden).float()

    def _forward(self, block: int, hidden: torch.Tensor, window: int) -> torch.Tensor:
        return run_block(self._model, block, hidden, self._arguments[window][block])

    def advance(self, block: int) -> None:
        """Move all windows' states to the input of ``block``."""
        while self.block < block:
            self._states = [self._forward(self.block, state, i) for i, state in enumerate(self._states)]
            self.block += 1

    def kl(self) -> float:
        """Mean KL over all tokens between the dense output and that of the model's present weights, nats.

        With ``p`` the dense probabilities and ``d`` the change of the logits, ``KL = log sum p exp(d) - sum p d``.
        Where the change is small this loses its digits, and ``log1p(sum p expm1(d)) - sum p d`` keeps them.
        """
        total, count = 0.0, 0
        path = self._model.architecture.norms.get("final")
        cap = getattr(self._model.module.config, "final_logit_softcapping", None)
        for i, state in enumerate(self._states):
            hidden = state
            for block in range(self.block, self._model.architecture.n_blocks):
                hidden = self._forward(block, hidden, i)
            hidden = (self._model.submodule(path)(hidden) if path else hidden)[0]
            if cap:
                change = cap * (torch.tanh(self._head(hidden) / cap) - torch.tanh(self._head(self._final[i]) / cap))
            else:
                # One product in place of two, which keeps the digits of a small change, also in bf16. A bias cancels.
                with half_products(self._model):
                    weight = self._model.module.get_output_embeddings().weight
                    change = torch.nn.functional.linear(hidden - self._final[i], weight).float()
            total += float(divergence_of_change(self._log_probabilities[i], change).double().sum())
            count += len(change)
        return max(total / count, 0.0)


def divergence_of_change(log_p: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, with ``q`` the softmax of the logits of ``p`` plus ``change``; float32 (rows,)."""
    p = log_p.exp()
    mean = (p * change).sum(dim=1)
    small = change.abs().amax(dim=1) < 1
    kl = torch.empty_like(mean)
    kl[small] = torch.log1p((p[small] * change[small].expm1()).sum(dim=1)) - mean[small]
    kl[~small] = (log_p[~small] + change[~small]).logsumexp(dim=1) - mean[~small]
    return kl
