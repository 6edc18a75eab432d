"""Build the tokenizer that a GGUF file describes.

Byte-level vocabularies (Llama 3, Qwen, SmolLM) are built here from the file's tokens, merges and its name for how
text is split first, which decides the tokens of numbers and white space. SentencePiece vocabularies are left to
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ModelError
from workbench.models.gguf_header import GgufHeader

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

# How byte-level vocabularies were trained to split text, by GGUF's name for it ('tokenizer.ggml.pre').
# Sources: the pre_tokenizer of each model's tokenizer.json; llama.cpp, src/llama-vocab.cpp.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % ""}
SPLITTINGS = ("gpt-2", "llama-bpe", "qwen2", "smollm")

_CONTROL, _USER_DEFINED = 3, 4  # 'tokenizer.ggml.token_type'
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def check_tokenizer(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a vocabulary that is absent, contradicts itself, or splits text in an unknown way.

    Raises:
        ModelError: naming what is wrong.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{path} holds no vocabulary: it is a part of a model. Give the file with the whole model.")
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"The vocabulary of {path} names a token twice. Download the file again.")
    for key in _SPECIAL_TOKENS.values():
        if not 0 <= metadata.get(key, 0) < len(tokens):
            raise ModelError(f"{path} sets {key} to {metadata[key]}, but its vocabulary has {len(tokens)} tokens.")
    if _is_byte_level(metadata) and _splitting(metadata) not in SPLITTINGS:
        raise ModelError(
            f"{path} splits text by the rule '{_splitting(metadata)}'; known are {', '.join(SPLITTINGS)}. Load the "
            "model's safetensors release instead."
        )


def load_tokenizer(path: Path, header: GgufHeader) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a file that ``check_tokenizer`` has passed, with chat template and beginning token."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    metadata = header.metadata
    if _is_byte_level(metadata):
        tokenizer = _byte_level(metadata)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if _begins_with_bos(metadata) and tokenizer.bos_token is not None:
        begin = str(tokenizer.bos_token)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    tokenizer.model_max_length = int(metadata[f"{header.architecture}.context_length"])
    return tokenizer


def _is_byte_level(metadata: Mapping[str, Any]) -> bool:
    return metadata.get("tokenizer.ggml.model") == "gpt2"


def _splitting(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("tokenizer.ggml.pre", "unnamed"))


def _begins_with_bos(metadata: Mapping[str, Any]) -> bool:
    """What the file says, else llama.cpp's rule: SentencePiece vocabularies and Llama 3 begin with the token."""
    implied = metadata.get("tokenizer.ggml.model") == "llama" or _splitting(metadata) == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", implied))


def _byte_level(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.get("tokenizer.ggml.merges", [])]
    splitting = _splitting(metadata)
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=splitting == "llama-bpe",  # Llama 3 takes a whole word of the vocabulary before merging
    )
    backend = Tokenizer(bpe)
    if splitting == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(splitting)
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    special = {name: tokens[metadata[key]] for name, key in _SPECIAL_TOKENS.items() if key in metadata}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _pre_tokenizer(name: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if name in _PATTERNS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level
