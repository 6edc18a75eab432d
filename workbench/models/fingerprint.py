"""Fingerprints: SHA-256 identities of an architecture and of weights, the same on every machine and for every dtype."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.models.base import Fingerprint
from workbench.progress import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 20

# What changes the function that the parameters define. Token ids, dropout, caches and dtypes do not.
_CONFIG_FIELDS = (
    "_remove_final_layer_norm",
    "activation_function",
    "attention_bias",
    "attn_logit_softcapping",
    "do_layer_norm_before",
    "enable_bias",
    "ffn_dim",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_bidirectional_attention",
    "use_sliding_window",
    "vocab_size",
)


def _plain(value: Any) -> Any:
    """Canonical JSON value: floats to six digits, because GGUF stores in fp32 what a config writes as a decimal."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def architecture_sha256(module: PreTrainedModel) -> str:
    """Hash the config fields that shape the computation, and all parameter names and shapes (a tied one once)."""
    config = module.config
    fields = {name: _plain(getattr(config, name, None)) for name in _CONFIG_FIELDS}
    record = {
        "config": {name: value for name, value in fields.items() if value is not None},
        "parameters": sorted([name, list(p.shape)] for name, p in module.named_parameters()),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def files_sha256(files: Iterable[Path], job: Job | None = None) -> str:
    """Hash the content of weight files one after another in order of their names (not of their folders)."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if job is not None:
                    job.check()
    return digest.hexdigest()


def state_sha256(module: PreTrainedModel) -> str:
    """Hash all parameters and persistent buffers as fp32, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.view(-1).numpy().data)
    return digest.hexdigest()


def fingerprint(module: PreTrainedModel, weights_sha256: str | None = None) -> Fingerprint:
    """Return the identity of a model; without a hash of its weight files, its state is hashed."""
    return Fingerprint(architecture_sha256(module), weights_sha256 or state_sha256(module))
