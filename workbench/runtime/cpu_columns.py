"""Which weights the cpu engine lays out input by input: those whose inputs a plan leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.models.base import Architecture
from workbench.runtime.cpu_source import Matrix
from workbench.runtime.plan import Plan

# Bytes of a channel that one thread reads side by side. With shorter runs it is faster to read all of them: a line that
# is asked for by itself takes up to twice the time of one in a stream (docs/notes/sparsity.md).
_SHORTEST_RUN = 512
_BITS = 4  # of group codes that are laid out so: two channels' codes of other widths do not share bytes


def column_units(plan: Plan, architecture: Architecture) -> set[str]:
    """Ids of units whose weights are worth laying out input by input.

    Those with an ``input_threshold``, unless their width is chosen while running or their inputs are transformed
    linear by linear.
    """
    chosen = {c.target for c in plan.consumers if c.kind == "input_threshold"}
    chosen -= {c.target for c in plan.consumers if c.kind == "width"}
    return {
        unit.id
        for unit in architecture.units
        if unit.id in chosen and not any(linear.id in plan.transforms for linear in unit.linears)
    }


def set_columns(engine: Any, parts: Sequence[tuple[str, Matrix]], *, threads: int, always: bool) -> bool:
    """Hand over the linears of one unit, (name, matrix) each, input by input.

    Args:
        engine: the decoder that is being built.
        parts: all linears of the unit.
        threads: that share the outputs.
        always: also where the runs of a channel are too short for it to pay.

    Returns:
        Whether they were: all are 4-bit group codes of one group size without minima, or all are bf16.
    """
    names = [name for name, _ in parts]
    matrices = [matrix for _, matrix in parts]
    inputs = int(matrices[0].meta["shape"][1])
    bits = 16 if matrices[0].kind == "dense" else _BITS
    if not always and sum(int(m.meta["shape"][0]) for m in matrices) * bits < 8 * _SHORTEST_RUN * threads:
        return False
    tensors = [{name: np.ascontiguousarray(t) for name, t in m.tensors.items()} for m in matrices]
    if all(m.kind == "dense" for m in matrices):
        engine.set_bf16_columns(names, inputs, [t["weight"] for t in tensors])
        return True
    if any(
        m.kind not in ("groups", "affine") or int(m.meta["bits"]) != _BITS or "minima" in m.tensors for m in matrices
    ):
        return False
    if len({(int(m.meta["group_size"]), "zeros" in m.tensors) for m in matrices}) > 1:
        return False
    linears = [(t["codes"], t["scales"].view(np.uint16), t.get("zeros")) for t in tensors]
    engine.set_columns(names, inputs, int(matrices[0].meta["group_size"]), linears)
    return True
