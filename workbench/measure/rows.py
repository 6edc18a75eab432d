"""The keys that every bench row has, and JSON that any reader takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# In the order of tables: who and what, sizes, quality, speed, cost.
ROW_KEYS = (
    "name",
    "method",
    "variant",
    "engine",
    "activation_mode",
    "bits",
    "activation_bits",
    "effective_bits",
    "read_bits",
    "output_bits",
    "group_size",
    "sparsity",
    "effective_sparsity",
    "text",
    "calibration",
    "n_tokens",
    "perplexity",
    "delta_nll",
    "delta_nll_low",
    "delta_nll_high",
    "kl_mean",
    "kl_p999",
    "top1_agreement",
    "measured_at",  # the quality, where an earlier run measured it
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "ms_per_token",
    "ms_p95",
    "bytes_per_token",
    "bandwidth_share",
    "peak_rss_bytes",
    "weight_bytes",
    "fit_seconds",
    "repeats",
)


def row(**values: Any) -> dict[str, Any]:
    """Return a row with every key, None where nothing is known; keys that are not in ``ROW_KEYS`` come last."""
    return {**dict.fromkeys(ROW_KEYS), **values}


def plain(value: Any) -> Any:
    """Return ``value`` as strict JSON values: NaN and infinity become None, arrays lists, paths text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
