"""Turn a GGUF file into an ordinary transformers model and tokenizer.

Transformers dequantizes the tensors; what it leaves open or gets only nearly right is settled here from the file's
own metadata: how text is split before byte-pair merging, the beginning token, and a config without traces of GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import ModelError
from workbench.models.build import assign, empty_module, plain_config
from workbench.models.gguf_header import ArraySize, GgufHeader, read_header

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Mistral writes itself as 'llama'. OPT has never had a GGUF form.
ARCHITECTURES = ("gemma3", "llama", "phi3", "qwen2", "qwen3")

# How byte-level vocabularies were trained to split text, by GGUF's name for it ('tokenizer.ggml.pre').
# Sources: the pre_tokenizer of each model's tokenizer.json; llama.cpp, src/llama-vocab.cpp.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % ""}
_BYTE_LEVEL = ("gpt-2", "smollm")


def check_gguf(path: Path) -> GgufHeader:
    """Read the header and refuse what would load wrongly or not at all.

    Raises:
        ModelError: a damaged file, an unsupported architecture, an unknown text splitting, or scaled rotary positions.
    """
    header = read_header(path)
    name = header.architecture
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{path} holds a '{name}' model. GGUF files of these architectures are read: {', '.join(ARCHITECTURES)}."
        )
    metadata = header.metadata
    known = (*_BYTE_LEVEL, *_SPLITS)
    if metadata.get("tokenizer.ggml.model") == "gpt2" and _splitting(metadata) not in known:
        raise ModelError(
            f"{path} splits text by the rule '{_splitting(metadata)}'; known are {', '.join(known)}. "
            "Load the model's safetensors release instead."
        )
    if not isinstance(metadata.get("tokenizer.ggml.tokens"), ArraySize):
        raise ModelError(f"{path} holds no vocabulary: it is a part of a model. Give the file with the whole model.")
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.startswith("rope_f") for tensor in header.tensors):
        raise ModelError(
            f"{path} scales its rotary positions ({scaling}), which its GGUF form does not carry over faithfully. Load "
            "the model's safetensors release instead."
        )
    return header


def _splitting(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("tokenizer.ggml.pre", "unnamed"))


def load_gguf(path: Path, header: GgufHeader, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the module (CPU, ``dtype``, eval mode) and tokenizer of a GGUF file that ``check_gguf`` has passed.

    Raises:
        ModelError: transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be read as a {header.architecture} model: {error}") from error
    settle_tokenizer(tokenizer, header)
    # Transformers marks what it read from GGUF as quantized, which forbids saving it: build it anew, plain.
    config = {key: _decimal(value) for key, value in plain_config(loaded).items()}
    state = {name: tensor.to(dtype) for name, tensor in loaded.state_dict().items()}
    return assign(empty_module(config), state), tokenizer


def _decimal(value: Any) -> Any:
    """Undo the widening of an fp32 metadata value: 9.999999747378752e-06 was written as 1e-05."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def settle_tokenizer(tokenizer: PreTrainedTokenizerBase, header: GgufHeader) -> None:
    """Make the tokenizer split text and begin sequences as the model was trained to."""
    from tokenizers import processors

    metadata = header.metadata
    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        backend.pre_tokenizer = _pre_tokenizer(_splitting(metadata))
    if _begins_with_bos(metadata) and tokenizer.bos_token is not None:
        begin = str(tokenizer.bos_token)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    tokenizer.model_max_length = int(metadata[f"{header.architecture}.context_length"])


def _begins_with_bos(metadata: Mapping[str, Any]) -> bool:
    """What the file says, else llama.cpp's rule: SentencePiece vocabularies and Llama 3 begin with the token."""
    implied = metadata.get("tokenizer.ggml.model") == "llama" or _splitting(metadata) == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", implied))


def _pre_tokenizer(name: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if name in _SPLITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level
