"""Fixtures for all tests: tiny random models of the real transformers classes, and the embedded model once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as commands do: a machine that runs tests does other things too

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from workbench.models import LoadedModel, wrap

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 320  # 256 bytes, three special tokens, and room to spare as in padded real vocabularies
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "intermediate_size": 96}

TINY_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_GROUPED, head_dim=16, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16, tie_word_embeddings=False),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=32, tie_word_embeddings=True
    ),
    "phi3": lambda: Phi3Config(**_GROUPED, tie_word_embeddings=False),
    "opt": lambda: OPTConfig(**_SHAPE, ffn_dim=96, word_embed_proj_dim=48, tie_word_embeddings=True),
}


def byte_tokenizer(*, add_bos: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per UTF-8 byte, and ``<|endoftext|>``, ``<|im_start|>``, ``<|im_end|>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny(model_type: str = "llama", *, seed: int = 0, add_bos: bool = True, chat: bool = True) -> LoadedModel:
    """Return a tiny random fp32 model of a family (a key of ``TINY_CONFIGS``): 3 blocks, hidden 48, 4 heads.

    Weights are larger than a fresh initialisation's, so that its predictions are far from uniform and what a test
    changes shows in the logits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(TINY_CONFIGS[model_type](), dtype=torch.float32)
        for parameter in module.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.12)
    tokenizer = byte_tokenizer(add_bos=add_bos, chat=chat)
    return wrap(module, tokenizer, name=f"tiny-{model_type}", source=f"memory:tiny-{model_type}")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LoadedModel]:
    """``make_model("qwen3", seed=1)`` builds a fresh tiny model of any supported family."""
    return build_tiny


@pytest.fixture(scope="session")
def save_model() -> Callable[[LoadedModel, Path], Path]:
    """``save_model(model, folder)`` writes weights and tokenizer as safetensors, and returns the folder."""

    def save(model: LoadedModel, folder: Path) -> Path:
        model.module.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def tiny_model() -> LoadedModel:
    """A tiny random Llama: fp32, 4 heads on 2 key/value heads, tied embeddings, byte tokenizer, chat template."""
    return build_tiny("llama")


@pytest.fixture(scope="session")
def embedded_model() -> LoadedModel:
    """The embedded default, loaded once in fp32. Tests must leave it as they found it."""
    from workbench.models import load

    return load()
