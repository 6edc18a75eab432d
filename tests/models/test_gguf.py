"""GGUF: every architecture comes back as it was written, transformers agrees, and damage is found at once."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import ModelError
from workbench.models import load
from workbench.models.gguf_header import read_header
from workbench.models.gguf_model import _BLOCK, _BLOCK_OF, _TOP, split_rotary_pairs

ARCHITECTURES = {"gemma3_text": "gemma3", "llama": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3"}


def join_rotary_pairs(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """What converters to GGUF do to the q and k of a Llama."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model, path: Path, *, changes: dict | None = None, skip: str = "", splitting: str = "gpt-2") -> Path:
    """Write a tiny model as converters do. ``changes`` replace metadata values (None leaves one out)."""
    config, arch = model.module.config, ARCHITECTURES[model.architecture.model_type]
    parts = model.architecture
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": parts.n_blocks,
        "context_length": parts.context_length,
        "embedding_length": parts.hidden_size,
        "feed_forward_length": parts.n_neurons,
        "attention.head_count": parts.n_heads,
        "attention.head_count_kv": parts.n_kv_heads,
        "attention.key_length": parts.head_dim,
        "rope.dimension_count": parts.head_dim,
        "vocab_size": parts.vocab_size,
        "attention.sliding_window": getattr(config, "sliding_window", None) or 0,
    }
    for key, value in (values | (changes or {})).items():
        if isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_float32(f"{arch}.rope.freq_base", rope.get("full_attention", rope)["rope_theta"])
    vocabulary = sorted(model.tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(model.tokenizer.all_special_tokens) | {"<|im_end|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(True)
    writer.add_chat_template(model.tokenizer.chat_template)
    inside = {
        v: k for k, v in (_BLOCK | dict(_BLOCK_OF.get(arch, {}))).items() if (_BLOCK_OF.get(arch, {}).get(k, v) == v)
    }
    top = {v: k for k, v in _TOP.items()}
    for name, tensor in model.module.state_dict().items():
        if name == skip or (name == "lm_head.weight" and parts.tied_embeddings):
            continue
        stem, _, suffix = name.rpartition(".")
        array = tensor.numpy()
        if arch == "gemma3" and "norm" in name:
            array = array + 1
        if arch == "llama" and "q_proj" in name:
            array = join_rotary_pairs(array, parts.n_heads)
        if arch == "llama" and "k_proj" in name:
            array = join_rotary_pairs(array, parts.n_kv_heads)
        if stem.startswith("model.layers."):
            block, _, rest = stem.removeprefix("model.layers.").partition(".")
            stored = f"blk.{block}.{inside[rest]}.{suffix}"
        else:
            stored = f"{top[stem]}.{suffix}"
        writer.add_tensor(stored, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_file(make_model, tmp_path_factory) -> Path:
    return write_gguf(make_model("llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_model_comes_back_as_it_was_written(make_model, tmp_path, family):
    original = make_model(family)
    with torch.no_grad():
        for path in original.architecture.norms.values():
            original.submodule(path).weight.uniform_(-0.5, 0.5)
    model = load(write_gguf(original, tmp_path / "m.gguf"))
    text = "Rotary positions, norms and 123 numbers. " * 3  # longer than Gemma's local window
    assert model.encode(text) == original.encode(text)
    assert model.encode_chat("hi") == original.encode_chat("hi")
    assert (model.bos, model.stop_tokens) == (original.bos, original.stop_tokens)
    ids = torch.tensor([model.encode(text)])
    with torch.no_grad():
        torch.testing.assert_close(model.module(ids).logits, original.module(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.architecture == original.architecture
    assert model.fingerprint.architecture == original.fingerprint.architecture


def test_rotary_pairs_come_back_in_order():
    rows = np.arange(24 * 5).reshape(24, 5)
    assert (split_rotary_pairs(join_rotary_pairs(rows, 3), 3) == rows).all()


def test_transformers_reads_the_same_weights(tiny_file):
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny_file.parent, gguf_file=tiny_file.name, dtype=torch.float32)
    ours = load(tiny_file).module.state_dict()
    theirs = other.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(path, match):
    begin = time.monotonic()
    with pytest.raises(ModelError, match=match) as caught:
        load(path)
    assert time.monotonic() - begin < 5
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(tiny_file, tmp_path_factory, share):
    content = tiny_file.read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(content[: int(share * (len(content) - 32))])  # the last 32 bytes may be padding
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        read_header(path)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_changed_header_is_read_or_refused_but_never_crashes(tiny_file, tmp_path_factory, at, value):
    content = bytearray(tiny_file.read_bytes())
    content[at] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelError:
        return
    assert all(t.begin >= 0 and t.begin + t.n_bytes <= len(content) for t in header.tensors.values())


def test_the_embedded_file_cut_short_is_refused_within_seconds(tmp_path):
    from workbench.models.loading import _embedded

    path = tmp_path / "cut.gguf"
    with _embedded().path.open("rb") as source:
        path.write_bytes(source.read(5_000_000))
    refused(path, r"tensor '.*' ends at byte .* but the file has 5,000,000 bytes")


def test_other_bytes_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4" + b"\0" * 100)
    refused(tmp_path / "x.gguf", "does not begin with 'GGUF'")
    (tmp_path / "y.gguf").write_bytes(b"")
    refused(tmp_path / "y.gguf", "it has 0 bytes")
    (tmp_path / "z.gguf").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + b"\0" * 100)
    refused(tmp_path / "z.gguf", "is GGUF version 9")


def test_what_would_load_wrongly_is_refused(make_model, tmp_path):
    model = make_model("llama")
    path = tmp_path / "m.gguf"
    refused(write_gguf(model, path, splitting="tekken"), "splits text by the rule 'tekken'")
    refused(write_gguf(model, path, changes={"rope.scaling.type": "yarn"}), "scales its rotary positions")
    refused(write_gguf(model, path, changes={"block_count": None}), "'llama.block_count' is missing")
    refused(write_gguf(model, path, changes={"block_count": 2}), r"'model\.layers\.2\..*' *, which the architecture")
    refused(write_gguf(model, path, changes={"feed_forward_length": 95}), "the architecture says")
    refused(write_gguf(model, path, skip="model.norm.weight"), r"lack 'model\.norm\.weight'")


def test_an_unsupported_architecture_lists_what_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", "holds a 'mamba' model.*gemma3, llama, phi3, qwen2, qwen3")
