"""A small model of OPT's architecture, to be trained: its tokenizer made of a text, its module with fresh weights.

In OPT the MLP's activation is a ReLU, so that most neurons of a trained model are exactly zero at any one token, and
leaving those out changes nothing (Zhang et al. 2022, "OPT"; Liu et al. 2023, "Deja Vu").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from workbench.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCABULARY = 257  # every byte, and the token that begins and ends a text


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learnt from texts; any other text can be written in it too, byte by byte.

    As in OPT one special token (``END_OF_TEXT``) both begins every sequence and ends a text.

    Args:
        texts: read once, in order.
        size: entries of the vocabulary; fewer where the texts have no more pairs that occur twice.

    Raises:
        InputError: a vocabulary that cannot hold every byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if size < MIN_VOCABULARY:
        raise InputError(
            f"A vocabulary of {size} is too small: every byte needs an entry, so give {MIN_VOCABULARY} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def new_relu_model(
    tokenizer: PreTrainedTokenizerFast, *, blocks: int, hidden: int, heads: int, context: int, seed: int
) -> PreTrainedModel:
    """Return a module of OPT's architecture with fresh weights: fp32, an MLP four times as wide, tied embeddings.

    Args:
        tokenizer: whose vocabulary is embedded, and whose end token is the model's.
        blocks: decoder blocks.
        hidden: width of the residual stream; a multiple of ``heads``.
        heads: attention heads of each block.
        context: positions, which are learnt.
        seed: of the weights; the caller's own random stream is left as it is.

    Raises:
        InputError: sizes that are not possible.
    """
    from transformers import OPTConfig, OPTForCausalLM

    if min(blocks, hidden, heads) < 1 or hidden % heads:
        raise InputError(
            f"A model of {blocks} blocks, hidden size {hidden} and {heads} heads is not possible: all must be at least "
            "1, and the hidden size a multiple of the heads."
        )
    end = tokenizer.eos_token_id
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        max_position_embeddings=context,
        activation_function="relu",
        do_layer_norm_before=True,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,  # a padding id would freeze the embedding of the token that begins every text
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config).float()
