"""Decoding speed of nested copies at uniform widths and of widths chosen per token, in turns in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext
from workbench.measure.benches.engine import GET_LLAMA, bench_prompt, step_columns, time_in_turns
from workbench.measure.rows import row
from workbench.measure.statistics import median_bootstrap
from workbench.models.base import LoadedModel
from workbench.models.loading import gguf_file

Key = tuple[str, float | None]


def measure_speed(
    model: LoadedModel, compressed: CompressedModel, targets: Sequence[float], context: BenchContext
) -> dict[Key, dict[str, Any]]:
    """Time everything; return columns by (method, bits), and under ``("llama.cpp", None)`` that rival's own row."""
    widths = [int(bits) for bits in compressed.widths]
    # A target's neighbours are all that its line needs.
    timed = [bits for bits in widths if not context.quick or bits < max(targets) + 1]
    with tempfile.TemporaryDirectory() as folder:
        source = str(compressed.folder or compressed.save(Path(folder) / "model"))
        common = {"engine": "cpu", "source": source, "dtype": "float32", "widths": widths}
        keys: list[Key] = [("nested", bits) for bits in timed]
        sides: list[dict[str, Any]] = [common | {"bits": bits} for bits in timed]
        for target in targets:
            for method, rule in (("dynamic", "gain"), ("dpllm", "error")):
                keys.append((method, target))
                sides.append(common | {"bits": None, "target": target, "rule": rule})
        path = gguf_file(model.source)
        llama = path is not None and find_spec("llama_cpp") is not None
        if llama:
            keys.append(("llama.cpp", None))
            sides.append({"engine": "llama.cpp", "source": str(path), "dtype": "float32", "bits": None})
        answer = time_in_turns(sides, bench_prompt(model), context, prefill_repeats=3)
    sides_of = dict(zip(keys, answer["sides"], strict=True))
    medians = {key: np.array([np.median(run["step_s"]) for run in side["runs"]]) for key, side in sides_of.items()}
    bytes_of = {
        key: float(np.mean([run["touched_bytes"] for run in side["runs"]]))
        for key, side in sides_of.items()
        if key[0] != "llama.cpp"
    }
    rival = medians.get(("llama.cpp", None))
    bandwidth = max(answer["bandwidth"])
    found = {
        key: _speed(side, medians[key], bytes_of.get(key), rival, bandwidth, answer["prefill_tokens"])
        for key, side in sides_of.items()
    }
    for key in keys:
        if key[0] in ("dynamic", "dpllm"):
            found[key]["to_line"] = _to_line(key, medians, bytes_of, timed)
    entry = row(name="llama.cpp", method="gguf", engine="llama.cpp", variant="as in the file")
    if llama:
        entry |= found.pop(("llama.cpp", None))
    else:
        entry["note"] = GET_LLAMA if path is not None else "this model has no GGUF file for llama.cpp to run"
    return found | {("llama.cpp", None): {"rows": [entry]}}


def _speed(
    side: dict[str, Any],
    medians: np.ndarray,
    touched: float | None,
    rival: np.ndarray | None,
    bandwidth: float,
    prefill_tokens: int,
) -> dict[str, Any]:
    values = step_columns(side, prefill_tokens)
    if touched is not None:
        parts = [run["parts"] for run in side["runs"]]
        values |= {
            "bytes_per_token": touched,
            "bandwidth_share": touched / (values["ms_per_token"] / 1000) / bandwidth,
            "selector_share": float(np.median([p["deciders"] / sum(p.values()) for p in parts])),
        }
        if rival is not None:
            ratio = median_bootstrap(rival / medians)
            values |= {"speed_ratio": ratio.value, "speed_low": ratio.low, "speed_high": ratio.high}
    return values


def _to_line(key: Key, medians: dict[Key, np.ndarray], bytes_of: dict[Key, float], widths: Sequence[int]) -> float:
    """Time over that of the line through the two uniform widths around these bytes, minus one; median over rounds."""
    uniform = [("nested", bits) for bits in widths]
    at = int(np.clip(sum(bytes_of[u] <= bytes_of[key] for u in uniform), 1, len(uniform) - 1))
    low, high = uniform[at - 1], uniform[at]
    share = (bytes_of[key] - bytes_of[low]) / (bytes_of[high] - bytes_of[low])
    line = medians[low] + share * (medians[high] - medians[low])
    return float(np.median(medians[key] / line)) - 1
