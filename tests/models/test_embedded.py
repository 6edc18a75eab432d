"""The embedded default: the real file, settled as its authors released it."""

from __future__ import annotations

import subprocess
import sys

import torch

from workbench.models.tokenizer import load_tokenizer, save_tokenizer


def test_it_is_the_model_it_says(embedded_model):
    parts = embedded_model.architecture
    shape = (parts.n_blocks, parts.hidden_size, parts.n_heads, parts.n_kv_heads, parts.n_neurons, parts.vocab_size)
    assert shape == (30, 576, 9, 3, 1536, 49152)
    assert parts.tied_embeddings
    assert embedded_model.n_parameters == 134_515_008
    assert embedded_model.bos is None
    assert embedded_model.stop_tokens == (0, 2)


def test_it_answers_a_chat_prompt_and_stops(embedded_model):
    ids = torch.tensor([embedded_model.encode_chat("What is the capital of France?")])
    with torch.no_grad():
        reply = embedded_model.module.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=list(embedded_model.stop_tokens)
        )[0, ids.shape[1] :].tolist()
    assert "Paris" in embedded_model.decode(reply)
    assert reply[-1] in embedded_model.stop_tokens


def test_its_tokenizer_keeps_digits_apart_and_survives_storing(embedded_model, tmp_path):
    text = "In 2024,  12 of 345\n\n日本語で <|im_start|> def f(x):\n    return x"
    ids = embedded_model.encode(text)
    assert embedded_model.decode(ids, skip_special_tokens=False) == text
    pieces = [embedded_model.decode([i]) for i in ids]
    assert all(piece.strip() in "0123456789" for piece in pieces if any(c.isdigit() for c in piece))
    save_tokenizer(embedded_model.tokenizer, tmp_path)
    assert load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


def test_importing_models_needs_no_torch():
    code = "import sys, workbench.models, workbench.corpus; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
