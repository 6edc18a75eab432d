"""One function per architecture family: where its blocks, linears, heads, neurons and norms are.

A family function takes a transformers config and returns an ``Architecture``. Nothing here looks at weights, so a
model can be named (and refused) before a byte of it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import ModelError, suggest
from workbench.models.base import UNIT_KINDS, Architecture, Linear, Unit, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

UNIT_OF_ROLE: Mapping[str, UnitKind] = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "qkv": "qkv",
    "o": "o",
    "gate": "gate_up",
    "up": "gate_up",
    "gate_up": "gate_up",
    "down": "down",
}


@dataclass(frozen=True)
class _Matrix:
    """A linear of one block: its role, its module relative to the block, and its shape."""

    role: str
    path: str
    in_features: int
    out_features: int
    bias: bool = False


@dataclass(frozen=True)
class _Sizes:
    """The numbers that all families share, read from a config."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


def _sizes(config: PreTrainedConfig, neurons: str = "intermediate_size") -> _Sizes:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ModelError(f"The config has {heads} heads and {kv_heads} key/value heads: the first must be a multiple.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _Sizes(config.hidden_size, heads, kv_heads, head_dim, getattr(config, neurons))


def _architecture(
    family: str,
    config: PreTrainedConfig,
    sizes: _Sizes,
    matrices: list[_Matrix],
    *,
    block_norms: Mapping[str, str],
    final_norm: str | None,
    activation: str,
    blocks_path: str = "model.layers",
    embedding_path: str = "model.embed_tokens",
) -> Architecture:
    """Repeat one block's matrices and norms over all blocks and group them into units."""
    linears: list[Linear] = []
    units: list[Unit] = []
    norms: dict[str, str] = {}
    for block in range(config.num_hidden_layers):
        here = [
            Linear(
                id=f"blocks.{block}.{m.role}",
                path=f"{blocks_path}.{block}.{m.path}",
                block=block,
                unit=f"blocks.{block}.{UNIT_OF_ROLE[m.role]}",
                role=m.role,
                in_features=m.in_features,
                out_features=m.out_features,
                bias=m.bias,
            )
            for m in matrices
        ]
        linears += here
        for kind in UNIT_KINDS:
            unit_id = f"blocks.{block}.{kind}"
            units.append(Unit(unit_id, block, kind, tuple(x for x in here if x.unit == unit_id)))
        norms |= {f"blocks.{block}.{name}": f"{blocks_path}.{block}.{path}" for name, path in block_norms.items()}
    if final_norm is not None:
        norms["final"] = final_norm
    return Architecture(
        family=family,
        model_type=config.model_type,
        n_blocks=config.num_hidden_layers,
        hidden_size=sizes.hidden,
        n_heads=sizes.heads,
        n_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        n_neurons=sizes.neurons,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        activation=activation,
        gated=any(m.role in ("gate", "gate_up") for m in matrices),
        tied_embeddings=bool(config.tie_word_embeddings),
        blocks_path=blocks_path,
        embedding_path=embedding_path,
        output_path="lm_head",
        norms=norms,
        linears=tuple(linears),
        units=tuple(units),
    )


def _attention(s: _Sizes, *, qkv_bias: bool, o_bias: bool, o_path: str = "self_attn.o_proj") -> list[_Matrix]:
    return [
        _Matrix("q", "self_attn.q_proj", s.hidden, s.queries, qkv_bias),
        _Matrix("k", "self_attn.k_proj", s.hidden, s.keys, qkv_bias),
        _Matrix("v", "self_attn.v_proj", s.hidden, s.keys, qkv_bias),
        _Matrix("o", o_path, s.queries, s.hidden, o_bias),
    ]


def _gated_mlp(s: _Sizes, bias: bool = False) -> list[_Matrix]:
    return [
        _Matrix("gate", "mlp.gate_proj", s.hidden, s.neurons, bias),
        _Matrix("up", "mlp.up_proj", s.hidden, s.neurons, bias),
        _Matrix("down", "mlp.down_proj", s.neurons, s.hidden, bias),
    ]


_PRE_NORMS = {"input": "input_layernorm", "post_attention": "post_attention_layernorm"}
_HEAD_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}


def _llama(config: Any) -> Architecture:
    """Llama and Mistral: gated MLP, rotary positions, grouped key/value heads."""
    s = _sizes(config)
    bias = bool(getattr(config, "attention_bias", False))
    matrices = _attention(s, qkv_bias=bias, o_bias=bias) + _gated_mlp(s, bool(getattr(config, "mlp_bias", False)))
    return _architecture(
        "llama",
        config,
        s,
        matrices,
        block_norms=_PRE_NORMS,
        final_norm="model.norm",
        activation=config.hidden_act,
    )


def _qwen2(config: Any) -> Architecture:
    """Qwen2: as Llama, with biases on q, k and v."""
    s = _sizes(config)
    return _architecture(
        "qwen2",
        config,
        s,
        _attention(s, qkv_bias=True, o_bias=False) + _gated_mlp(s),
        block_norms=_PRE_NORMS,
        final_norm="model.norm",
        activation=config.hidden_act,
    )


def _qwen3(config: Any) -> Architecture:
    """Qwen3: as Llama, with a norm per head on queries and keys."""
    s = _sizes(config)
    bias = bool(config.attention_bias)
    return _architecture(
        "qwen3",
        config,
        s,
        _attention(s, qkv_bias=bias, o_bias=bias) + _gated_mlp(s),
        block_norms=_PRE_NORMS | _HEAD_NORMS,
        final_norm="model.norm",
        activation=config.hidden_act,
    )


def _gemma3(config: Any) -> Architecture:
    """Gemma 3 text models: four norms a block, norms on queries and keys, local and global attention blocks."""
    s = _sizes(config)
    bias = bool(config.attention_bias)
    norms = {"pre_mlp": "pre_feedforward_layernorm", "post_mlp": "post_feedforward_layernorm"}
    return _architecture(
        "gemma3",
        config,
        s,
        _attention(s, qkv_bias=bias, o_bias=bias) + _gated_mlp(s),
        block_norms=_PRE_NORMS | norms | _HEAD_NORMS,
        final_norm="model.norm",
        activation=config.hidden_activation,
    )


def _phi3(config: Any) -> Architecture:
    """Phi-3: q, k, v stored as one matrix (rows in that order), and gate and up as another."""
    s = _sizes(config)
    matrices = [
        _Matrix("qkv", "self_attn.qkv_proj", s.hidden, s.queries + 2 * s.keys),
        _Matrix("o", "self_attn.o_proj", s.queries, s.hidden),
        _Matrix("gate_up", "mlp.gate_up_proj", s.hidden, 2 * s.neurons),
        _Matrix("down", "mlp.down_proj", s.neurons, s.hidden),
    ]
    return _architecture(
        "phi3",
        config,
        s,
        matrices,
        block_norms=_PRE_NORMS,
        final_norm="model.norm",
        activation=config.hidden_act,
    )


def _opt(config: Any) -> Architecture:
    """OPT: learned positions, biases, an MLP without a gate. The 350M variant is refused: its embedding is projected
    and its norms follow the residual, which is another block than the one the workbench reasons about."""
    if config.word_embed_proj_dim != config.hidden_size or not config.do_layer_norm_before:
        raise ModelError(
            f"This OPT variant (word_embed_proj_dim={config.word_embed_proj_dim}, hidden_size={config.hidden_size}, "
            f"do_layer_norm_before={config.do_layer_norm_before}) is not supported: use one whose embedding is as wide "
            "as its blocks and whose norms come first, such as facebook/opt-125m or facebook/opt-1.3b."
        )
    s = _sizes(config, neurons="ffn_dim")
    bias = bool(config.enable_bias)
    matrices = [
        *_attention(s, qkv_bias=bias, o_bias=bias, o_path="self_attn.out_proj"),
        _Matrix("up", "fc1", s.hidden, s.neurons, bias),
        _Matrix("down", "fc2", s.neurons, s.hidden, bias),
    ]
    return _architecture(
        "opt",
        config,
        s,
        matrices,
        block_norms={"input": "self_attn_layer_norm", "post_attention": "final_layer_norm"},
        final_norm=None if config._remove_final_layer_norm else "model.decoder.final_layer_norm",
        activation=config.activation_function,
        blocks_path="model.decoder.layers",
        embedding_path="model.decoder.embed_tokens",
    )


FAMILIES: Mapping[str, Callable[[Any], Architecture]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "opt": _opt,
}


def architecture(config: PreTrainedConfig) -> Architecture:
    """Name the parts of the decoder that ``config`` describes.

    Args:
        config: a transformers config of one of ``FAMILIES``.

    Raises:
        ModelError: an unsupported architecture, or a variant of a supported one that is laid out differently.
    """
    if config.model_type == "gemma3":
        raise ModelError(
            "This Gemma 3 model also reads images, which the workbench does not: load its text part alone "
            "(Gemma3ForCausalLM, model type 'gemma3_text')."
        )
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"Architecture '{config.model_type}' is not supported. Supported: {', '.join(sorted(FAMILIES))}."
            + suggest(config.model_type, FAMILIES)
        )
    return family(config)
