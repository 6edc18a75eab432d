"""Integer encodings as the kernels take them; the definition is ``formats.integers``. Without torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from workbench.formats.paley import hadamard
from workbench.runtime.cpu_source import Matrix


def input_of(matrix: Matrix) -> dict[str, Any]:
    """What happens to the inputs of an integer matrix, by the names of the kernels' ``IntegerInput``."""
    meta, tensors = matrix.meta, matrix.tensors
    width = int(meta["shape"][1])
    channels, powers = [int(n) for n in meta["channels"]], [int(p) for p in meta["powers"]]
    apart = meta["accumulate"] == "apart"
    order = tensors["order"].astype(np.int64) if "order" in tensors else np.arange(width)
    multipliers = np.empty(width, np.float32)
    multipliers[order] = np.ldexp(np.float32(1), -np.repeat(powers, channels)).astype(np.float32)
    if "multipliers" in tensors:
        multipliers *= tensors["multipliers"]
    doublings = [0, *(before - after for before, after in pairwise(powers))]
    own_ranges = apart and not meta["starts"] and not any(powers)
    found: dict[str, Any] = {
        "inputs": width,
        "bits": int(meta["activation_bits"]),
        "weight_bits": int(meta["bits"]),
        "channels": channels,
        "doublings": [0] * len(powers) if apart else doublings,
        "apart": apart,
        "clip": float(meta["clip"]),
        "limit": float(meta["limit"]),
        "starts": [int(s) for s in meta["starts"]],
        "block": 0,
    }
    if "order" in tensors:
        found["order"] = order.tolist()
    if bool((multipliers != 1).any()):
        found["multipliers"] = multipliers.tolist()
    if "bias" in tensors:
        found["bias"] = tensors["bias"].astype(np.float32).tolist()
    if "steps" in tensors:
        found["steps"] = tensors["steps"].tolist()
    if apart and not own_ranges:
        found["section_scales"] = [float(2**power) for power in powers]
    if meta["factors"]:
        bits = np.unpackbits(tensors["signs"], bitorder="little")[:width]
        found["signs"] = (1.0 - 2.0 * bits).tolist()
        found["block"] = int(np.prod(meta["factors"]))
        found["factors"] = [hadamard(int(order)).reshape(-1).tolist() for order in meta["factors"]]
    return found
