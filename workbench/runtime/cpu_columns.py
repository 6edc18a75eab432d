"""Which weights the cpu engine lays out input by input: those whose inputs a plan leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.models.base import Architecture
from workbench.runtime.cpu_source import Matrix
from workbench.runtime.plan import Plan

# From what share of inputs left out on columns are faster, by the bytes of a channel that one thread reads side by side
# (its run): a line that is asked for by itself takes up to twice the time of one in a stream, and a run begins and ends
# within lines. Measured in runs of steps of one engine at a time (docs/notes/sparsity.md): steps of another one between
# them leave the prefetchers set for streams, which fetch the gaps. The later of one and two threads, of SmolLM2-135M (4
# bits: gate_up 0.32 with runs of 768 and 1536 bytes, qkv 0.45 with 480 and 0.5 with 240, o and down 0.6 with 288 and
# not below 0.75 with 144; bf16: gate_up 0.25, the others, beside it, 0.38) and of blocks of 2048 channels (4 bits:
# gate_up 0.3, o and down 0.2; bf16: 0.2).
_BREAK_EVEN = {4: ((512, 0.32), (384, 0.45), (224, 0.65)), 16: ((2048, 0.25), (512, 0.38))}
_BITS = 4  # of group codes that are laid out so: two channels' codes of other widths do not share bytes


def column_units(plan: Plan, architecture: Architecture) -> dict[str, float]:
    """Units whose weights may lie input by input, by id, with the share of inputs that is expected to be left out.

    Those with an ``input_threshold``, unless their width is chosen while running or their inputs are transformed
    linear by linear. Where nothing is expected, nothing is left out.
    """
    kept = {c.target: c.expected for c in plan.consumers if c.kind == "input_threshold"}
    widths = {c.target for c in plan.consumers if c.kind == "width"}
    found = {}
    for unit in architecture.units:
        if unit.id in kept and unit.id not in widths and not any(lin.id in plan.transforms for lin in unit.linears):
            share = kept[unit.id]
            found[unit.id] = 0.0 if share is None else 1.0 - share
    return found


def pays(run: float, bits: int, left_out: float) -> bool:
    """Whether columns are faster than tiles.

    Args:
        run: bytes of a channel that one thread reads side by side.
        bits: of a weight, 4 or 16.
        left_out: share of inputs.
    """
    return any(run >= shortest and left_out >= share for shortest, share in _BREAK_EVEN[bits])


def set_columns(
    engine: Any, parts: Sequence[tuple[str, Matrix]], *, threads: int, left_out: float, always: bool
) -> bool:
    """Hand over the linears of one unit, (name, matrix) each, input by input.

    Args:
        engine: the decoder that is being built.
        parts: all linears of the unit.
        threads: that share the outputs.
        left_out: share of their inputs that is expected to be.
        always: also where it does not pay.

    Returns:
        Whether they were: it pays, and all are 4-bit group codes of one group size without minima, or all are bf16.
    """
    names = [name for name, _ in parts]
    matrices = [matrix for _, matrix in parts]
    inputs = int(matrices[0].meta["shape"][1])
    bits = 16 if matrices[0].kind == "dense" else _BITS
    if not always and not pays(sum(int(m.meta["shape"][0]) for m in matrices) * bits / 8 / threads, bits, left_out):
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
