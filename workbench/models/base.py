"""What the rest of the workbench knows about a model: names of its parts, and a loaded instance.

A *linear* is one weight matrix of a block. A *unit* is the set of linears that must share one format because
serving engines fuse them: ``qkv``, ``o``, ``gate_up`` and ``down`` of a block. Pickers, solvers, recipes and
decisions speak in units.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from workbench.errors import InputError, suggest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"  # name of the model that comes with the workbench

UnitKind = Literal["qkv", "o", "gate_up", "down"]
UNIT_KINDS: tuple[UnitKind, ...] = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block, ``y = x W^T (+ b)`` with ``W`` of shape (out_features, in_features).

    ``id`` is stable across families (``blocks.3.q``); ``path`` is the module's name inside the transformers model.
    ``role`` is one of q, k, v, o, gate, up, down, or ``qkv`` / ``gate_up`` where the architecture stores them fused.
    """

    id: str
    path: str
    block: int
    unit: str
    role: str
    in_features: int
    out_features: int
    bias: bool

    @property
    def n_weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Unit:
    """Linears of one block that share one format. ``id`` is ``blocks.<i>.<kind>``."""

    id: str
    block: int
    kind: UnitKind
    linears: tuple[Linear, ...]

    @property
    def n_weights(self) -> int:
        return sum(linear.n_weights for linear in self.linears)


@dataclass(frozen=True)
class Architecture:
    """Names and sizes of a decoder, independent of any weights.

    ``context_length`` is in tokens. ``norms`` maps a norm's id (``blocks.3.input``, ``final``) to its module path.
    ``activation`` is the transformers name of the MLP activation. ``gated`` is False where the MLP has no gate.
    """

    family: str
    model_type: str
    n_blocks: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_neurons: int
    vocab_size: int
    context_length: int
    activation: str
    gated: bool
    tied_embeddings: bool
    blocks_path: str
    embedding_path: str
    output_path: str
    norms: Mapping[str, str]
    linears: tuple[Linear, ...]
    units: tuple[Unit, ...]

    def unit(self, unit_id: str) -> Unit:
        """Return the unit of that id, or raise ``InputError`` naming the nearest one."""
        for unit in self.units:
            if unit.id == unit_id:
                return unit
        raise InputError(
            f"Unknown unit '{unit_id}': units are named blocks.<0..{self.n_blocks - 1}>.<qkv|o|gate_up|down>."
            + suggest(unit_id, [u.id for u in self.units])
        )

    def linear(self, linear_id: str) -> Linear:
        """Return the linear of that id, or raise ``InputError`` naming the nearest one."""
        for linear in self.linears:
            if linear.id == linear_id:
                return linear
        raise InputError(f"Unknown linear '{linear_id}'." + suggest(linear_id, [x.id for x in self.linears]))

    def kv_group(self, head: int) -> int:
        """Return the key/value head that query head ``head`` reads."""
        return head // (self.n_heads // self.n_kv_heads)


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model: SHA-256 (hex) of its architecture and of its weights, apart.

    A recipe may be carried to another fine-tune of the same architecture, but only knowingly.
    """

    architecture: str
    weights: str


class TextModel:
    """What engines and measurements need of a model beside its weights: its names, its tokens, its tokenizer."""

    name: str
    source: str
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    fingerprint: Fingerprint
    bos: int | None
    stop_tokens: tuple[int, ...]

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of plain text; begins with the beginning-of-sequence token where the model has one."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.bos, *ids] if bos and self.bos is not None else list(ids)

    def encode_chat(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a user prompt (or a list of messages) in the model's chat template, ready for the reply.

        A model without a chat template gets the plain text.
        """
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self.encode("\n".join(m["content"] for m in messages))
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.bos is not None and (not ids or ids[0] != self.bos):
            ids = [self.bos, *ids]
        return list(ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)  # type: ignore[return-value]


@dataclass
class LoadedModel(TextModel):
    """A transformers model ready to be looked into, with everything that quietly ruins numbers settled.

    Attributes:
        name: short name for tables.
        source: what ``load`` was given, resolved (``smollm2-135m``, an absolute path, or a hub id).
        module: the transformers model in eval mode, gradients off.
        tokenizer: its tokenizer.
        architecture: names of its parts.
        fingerprint: identity of architecture and weights.
        dtype: computation type of ``module``.
        device: where ``module`` lives.
        bos: token id that must begin every sequence, or None where the model was trained without one.
        stop_tokens: ids that end a reply.
        derived: what was made from the model and is asked for again, such as text sampled from it; by its own key.
    """

    name: str
    source: str
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    fingerprint: Fingerprint
    dtype: torch.dtype
    device: torch.device
    bos: int | None
    stop_tokens: tuple[int, ...]
    derived: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def submodule(self, path: str) -> nn.Module:
        return self.module.get_submodule(path)

    def linear_module(self, linear_id: str) -> nn.Linear:
        """Return the ``nn.Linear`` of a linear id."""
        return self.module.get_submodule(self.architecture.linear(linear_id).path)  # type: ignore[return-value]

    def block(self, index: int) -> nn.Module:
        return self.module.get_submodule(f"{self.architecture.blocks_path}.{index}")

    @property
    def n_parameters(self) -> int:
        """Parameters of the model, a tied output layer counted once."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense model on disk, which is bf16: two per parameter."""
        return 2 * self.n_parameters
