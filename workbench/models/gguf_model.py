"""Turn a GGUF file into an ordinary transformers module: its config, its tensor names, its layouts.

The file is read here and not by transformers because it parses the header several times over (the embedded model
took four times as long) and carries neither scaled rotary positions nor Gemma's local ones over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import quants

from workbench.errors import ModelError
from workbench.models.build import assign, empty_module
from workbench.models.gguf_header import GgufHeader, TensorInfo, damaged, read_header
from workbench.models.gguf_tokenizer import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# GGUF's architecture to transformers' model type. Mistral writes itself as 'llama'; OPT has no GGUF form.
MODEL_TYPES = {"gemma3": "gemma3_text", "llama": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3"}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_OF: Mapping[str, Mapping[str, str]] = {
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
_WEIGHTS_AT_ONCE = 1 << 20  # 4 MB of float32: as many as one matrix of a small model
_GEMMA_LOCAL_THETA = 10_000.0  # Gemma 3 report, section 2: local layers keep the base of Gemma 2


def check_gguf(path: Path) -> GgufHeader:
    """Read the header and refuse what would load wrongly or not at all.

    Raises:
        ModelError: a damaged file, an unsupported architecture or vocabulary, or scaled rotary positions.
    """
    header = read_header(path)
    name = header.architecture
    if name not in MODEL_TYPES:
        raise ModelError(
            f"{path} holds a '{name}' model. GGUF files of these architectures are read: {', '.join(MODEL_TYPES)}."
        )
    check_tokenizer(path, header.metadata)
    scaling = header.metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.startswith("rope_f") for tensor in header.tensors):
        raise ModelError(
            f"{path} scales its rotary positions ({scaling}), which a GGUF file describes only in part. Load the "
            "model's safetensors release instead."
        )
    return header


def load_module(path: Path, header: GgufHeader, dtype: torch.dtype) -> PreTrainedModel:
    """Return the module (CPU, ``dtype``, eval mode) of a file that ``check_gguf`` has passed.

    Raises:
        ModelError: metadata or tensors that do not make a whole model, or a type that cannot be dequantized.
    """
    config = config_of(path, header)
    data = np.memmap(path, mode="r", dtype=np.uint8)
    layout = layout_of(header, config)
    state: dict[str, torch.Tensor] = {}
    for name, info in header.tensors.items():
        values = layout(name, _dequantize(path, name, info, data))
        state[state_name(path, header.architecture, name)] = torch.from_numpy(values).to(dtype)
    return assign(empty_module(config), state)


def config_of(path: Path, header: GgufHeader) -> dict[str, Any]:
    """Return the plain transformers config that the metadata of a GGUF file describes.

    Raises:
        ModelError: a value that the architecture needs is missing.
    """
    arch, metadata, tensors = header.architecture, header.metadata, header.tensors

    def need(key: str) -> Any:
        value = metadata.get(f"{arch}.{key}")
        if value is None or isinstance(value, list):
            raise damaged(path, f"'{arch}.{key}' is missing or not one number")
        return value

    if "token_embd.weight" not in tensors:
        raise damaged(path, "it has no embedding")
    heads = need("attention.head_count")
    head_dim = metadata.get(f"{arch}.attention.key_length") or need("embedding_length") // heads
    theta = _decimal(metadata.get(f"{arch}.rope.freq_base", 10_000.0))
    config: dict[str, Any] = {
        "model_type": MODEL_TYPES[arch],
        "num_hidden_layers": need("block_count"),
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _decimal(need("attention.layer_norm_rms_epsilon")),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if arch in ("gemma3", "llama", "qwen3"):  # in the others it follows from the hidden size
        config["head_dim"] = head_dim
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    elif arch == "phi3":
        rotated = metadata.get(f"{arch}.rope.dimension_count", head_dim)
        config["rope_parameters"]["partial_rotary_factor"] = rotated / head_dim
        config["sliding_window"] = metadata.get(f"{arch}.attention.sliding_window") or None
    elif arch == "gemma3":
        config["query_pre_attn_scalar"] = head_dim
        config["sliding_window"] = need("attention.sliding_window")
        config["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": _GEMMA_LOCAL_THETA},
        }
    return config


def _decimal(value: float) -> float:
    """Undo the widening of an fp32 value: 9.999999747378752e-06 was written as 1e-05."""
    return float(f"{value:.7g}")


def state_name(path: Path, arch: str, name: str) -> str:
    """Return the state-dict name of a GGUF tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    inside = _BLOCK_OF.get(arch, {}).get(block[2], _BLOCK.get(block[2])) if block else None
    if block is None or inside is None:
        raise ModelError(f"{path} holds '{name}', which a {arch} model does not have: it is another kind of model.")
    return f"model.layers.{block[1]}.{inside}.{suffix}"


def _dequantize(path: Path, name: str, info: TensorInfo, data: np.ndarray) -> np.ndarray:
    """Return one tensor as float32 of its shape.

    A few rows at a time: gguf's reader holds a second copy of what it is given, in pieces small enough to stay behind
    in the heap, which for an embedding would be the peak of the whole process.
    """
    width = info.shape[-1]
    raw = np.asarray(data[info.begin : info.begin + info.n_bytes]).reshape(math.prod(info.shape[:-1]), -1)
    values = np.empty((len(raw), width), dtype=np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // width)
    try:
        for first in range(0, len(raw), step):
            values[first : first + step] = quants.dequantize(raw[first : first + step], info.kind)
    except NotImplementedError as error:
        raise ModelError(f"{path}: '{name}' is stored as {info.kind.name}, which cannot be read.") from error
    return values.reshape(info.shape)


def layout_of(header: GgufHeader, config: Mapping[str, Any]) -> Callable[[str, np.ndarray], np.ndarray]:
    """Return the function (tensor name, values) that undoes what converting to GGUF changes in this architecture."""

    def llama(name: str, values: np.ndarray) -> np.ndarray:
        for part, key in ((".attn_q.", "num_attention_heads"), (".attn_k.", "num_key_value_heads")):
            if part in name:
                return split_rotary_pairs(values, config[key])
        return values

    def gemma(name: str, values: np.ndarray) -> np.ndarray:
        # GGUF stores the whole factor; Gemma's norm adds one to its weight.
        return values - 1 if name.endswith("norm.weight") else values

    layouts = {"llama": llama, "gemma3": gemma}
    return layouts.get(header.architecture, lambda name, values: values)


def split_rotary_pairs(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder rows of q or k from neighbouring rotary pairs (GGUF) to first halves, then second halves (transformers).

    Args:
        rows: shape (n_heads * head_dim, ...).
    """
    half = rows.shape[0] // n_heads // 2
    pairs = rows.reshape(n_heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
