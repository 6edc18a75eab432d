"""What one decoding step uses of the blocks' linears under a plan: stored bytes and weights, from the decisions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from workbench.models.base import Architecture, Linear
from workbench.runtime.decisions import Decisions
from workbench.runtime.plan import PATH_SKIP_ATTENTION, PATH_SKIP_BLOCK, PATH_SKIP_MLP, Consumer, Plan


class ReadCounter:
    """Counts what each token uses of the block linears: bytes that must be read, and the share of weights.

    A width consumer reads the linear at its width. A head mask scales the query rows and ``o``; a neuron mask scales
    gate, up and down; a skipped attention leaves out the query rows and ``o`` (keys and values are still written);
    an input threshold scales a linear by its share of inputs kept. What a decider itself reads is added to the bytes
    when it decides, and when its decisions are replayed; not where a policy gives its slot a value.

    Args:
        architecture: the model's parts.
        plan: what may change.
        stored_bytes: (linear id, bits or None) to bytes read.
    """

    def __init__(
        self, architecture: Architecture, plan: Plan, stored_bytes: Callable[[str, int | None], float]
    ) -> None:
        self._architecture = architecture
        self._plan = plan
        self._stored_bytes = stored_bytes
        self._base = {linear.id: float(stored_bytes(linear.id, None)) for linear in architecture.linears}
        self._total = sum(self._base.values())
        self._kept_inputs: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Forget what the previous chunk noted."""
        self._kept_inputs = {}

    def note_inputs(self, linear_id: str, kept: torch.Tensor) -> None:
        """Note which inputs of a linear passed their threshold, bool (..., tokens, in)."""
        self._kept_inputs[linear_id] = kept.reshape(-1, kept.shape[-1]).float().mean(dim=1).cpu().numpy()

    def per_token(self, decisions: Decisions, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes read, and share of the linears' weights used, of each of the chunk's ``count`` tokens, float64."""
        if not self._plan.consumers:
            return np.full(count, self._total), np.ones(count)
        read, weights = np.zeros(count), np.zeros(count)
        for linear in self._architecture.linears:
            share = self._share(linear, decisions, count)
            read += share * self._bytes(linear, decisions, count)
            weights += share * linear.n_weights
        for decider in self._plan.deciders:
            if decisions.fixed(decider.slot):
                continue
            every = {"token": 1, "every": decider.scope.n, "reply": 0}[decider.scope.kind]
            if every:
                read += decider.program.bytes / every
        return read, weights / sum(linear.n_weights for linear in self._architecture.linears)

    def _bytes(self, linear: Linear, decisions: Decisions, count: int) -> np.ndarray:
        for consumer in self._plan.consumers:
            if consumer.target == linear.unit and consumer.kind == "width":
                sizes = {b: self._stored_bytes(linear.id, b) for b in consumer.widths}
                return np.array([sizes[int(b)] for b in consumer.bits(decisions.in_force(consumer.slot))])
        return np.full(count, self._base[linear.id])

    def _share(self, linear: Linear, decisions: Decisions, count: int) -> np.ndarray:
        """Share of a linear's weights that each token uses, (count,)."""
        kind = linear.unit.rsplit(".", 1)[1]
        inputs = self._kept_inputs.get(linear.id)
        share = np.ones(count) if inputs is None else inputs.astype(np.float64)
        for consumer in self._plan.consumers:
            if consumer.target != f"blocks.{linear.block}":
                continue
            if inputs is not None and (consumer.kind, kind) in (("heads", "o"), ("neurons", "down")):
                continue  # what is masked passes no threshold: it is counted already
            kept = self._kept_share(consumer, kind, decisions)
            rows = self._query_share(linear) if kind == "qkv" else 1.0
            share = share * (1 - rows + rows * kept)
        return share

    def _kept_share(self, consumer: Consumer, kind: str, decisions: Decisions) -> np.ndarray | float:
        attention = kind in ("qkv", "o")
        if consumer.kind == ("heads" if attention else "neurons"):
            size = self._architecture.n_heads if attention else self._architecture.n_neurons
            return decisions.mask(consumer.slot, consumer.offset, consumer.offset + size).mean(axis=1)
        if consumer.kind == "path":
            skipped = PATH_SKIP_ATTENTION if attention else PATH_SKIP_MLP
            return 1.0 - np.isin(decisions.in_force(consumer.slot), (skipped, PATH_SKIP_BLOCK))
        return 1.0

    def _query_share(self, linear: Linear) -> float:
        """Share of a qkv linear's rows that are query rows."""
        if linear.role == "q":
            return 1.0
        if linear.role in ("k", "v"):
            return 0.0
        return self._architecture.n_heads / (self._architecture.n_heads + 2 * self._architecture.n_kv_heads)
