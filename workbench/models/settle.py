"""Make a ``LoadedModel`` of a module and a tokenizer, settling what quietly ruins numbers.

A missing beginning token moves Gemma's perplexity by orders of magnitude, and a missing stop token makes a chat model
talk to itself: both are decided here, once, and stored in the ``LoadedModel``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from workbench.errors import ModelError
from workbench.models.base import Fingerprint, LoadedModel
from workbench.models.families import architecture
from workbench.models.fingerprint import fingerprint as fingerprint_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Families trained with a beginning token on every sequence, whatever the tokenizer's settings say.
_ALWAYS_BOS = frozenset({"gemma3"})

# Ends of a turn in the chat formats of the supported families; generation configs often name only the end of text.
_END_OF_TURN = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
)


def beginning_token(tokenizer: PreTrainedTokenizerBase, family: str) -> int | None:
    """Return the id that must begin every sequence: what the tokenizer itself puts first, if that is special.

    Raises:
        ModelError: the family needs a beginning token and the tokenizer has none.
    """
    if family in _ALWAYS_BOS:
        if tokenizer.bos_token_id is None:
            raise ModelError(
                f"A {family} model needs a beginning-of-sequence token, and this tokenizer has none: add 'bos_token' "
                "to tokenizer_config.json."
            )
        return int(tokenizer.bos_token_id)
    first = list(tokenizer("", add_special_tokens=True)["input_ids"])[:1]
    special = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    # OPT begins with the token that also ends a text, so the set holds ids by role and not by position.
    return int(first[0]) if first and first[0] in special else None


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def stop_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return all ids that end a reply, ascending: end tokens of the configs and tokenizer, and known ends of a turn."""
    found = set(_ids(module.config.eos_token_id)) | set(_ids(tokenizer.eos_token_id))
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        found |= set(_ids(generation.eos_token_id))
    special = tokenizer.get_added_vocab()
    found |= {special[text] for text in _END_OF_TURN if text in special}
    return tuple(sorted(i for i in found if 0 <= i < module.config.vocab_size))


def wrap(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    source: str,
    *,
    fingerprint: Fingerprint | None = None,
) -> LoadedModel:
    """Make a ``LoadedModel`` of a causal language model in memory. The module is put in eval mode, gradients off.

    Args:
        module: a transformers causal language model of a supported family, on one device, in one float dtype.
        tokenizer: its tokenizer.
        name: short name for tables.
        source: where it came from, for records.
        fingerprint: its identity where that is known from its files; otherwise its weights are hashed.

    Raises:
        ModelError: unsupported architecture, or a tokenizer that does not fit the model.
    """
    parts = architecture(module.config)
    if len(tokenizer) > parts.vocab_size:
        raise ModelError(
            f"The tokenizer knows {len(tokenizer)} tokens but the model embeds {parts.vocab_size}: they do not belong "
            "together."
        )
    module.eval()
    module.requires_grad_(False)
    embedding = cast("nn.Embedding", module.get_submodule(parts.embedding_path))
    return LoadedModel(
        name=name,
        source=source,
        module=module,
        tokenizer=tokenizer,
        architecture=parts,
        fingerprint=fingerprint or fingerprint_of(module),
        dtype=embedding.weight.dtype,
        device=embedding.weight.device,
        bos=beginning_token(tokenizer, parts.family),
        stop_tokens=stop_tokens(module, tokenizer),
    )
