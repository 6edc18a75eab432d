"""Rebuilding a model from config and tensors, and a tokenizer from its files, changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from workbench.errors import ModelError
from workbench.models.build import assign, empty_module, plain_config
from workbench.models.tokenizer import load_tokenizer, save_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt"]
TEXT = "Hello 2024  12 worlds\n\n日本語 <|im_start|>x"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rebuilt_module_computes_the_same(make_model, family):
    model = make_model(family)
    config = json.loads(json.dumps(plain_config(model.module)))
    rebuilt = assign(empty_module(config), dict(model.module.state_dict()))
    assert not any(t.is_meta for t in (*rebuilt.parameters(), *rebuilt.buffers()))
    assert not any(p.requires_grad for p in rebuilt.parameters())
    ids = torch.tensor([model.encode("some text to be read " * 4)])
    with torch.no_grad():
        assert torch.equal(rebuilt(ids).logits, model.module(ids).logits)
    assert plain_config(rebuilt) == config


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_a_tied_output_layer_may_be_left_out_and_stays_tied(make_model, family):
    model = make_model(family)
    state = {
        k: v.clone() for k, v in model.module.state_dict().items() if k != model.architecture.output_path + ".weight"
    }
    rebuilt = assign(empty_module(plain_config(model.module)), state)
    assert rebuilt.get_output_embeddings().weight is rebuilt.get_input_embeddings().weight


def test_an_empty_module_allocates_no_weights(tiny_model):
    module = empty_module(plain_config(tiny_model.module))
    assert all(p.is_meta for p in module.parameters())


def test_a_plain_config_has_no_trace_of_this_machine(tiny_model, tmp_path):
    tiny_model.module.save_pretrained(tmp_path)
    text = json.dumps(plain_config(tiny_model.module))
    assert str(tmp_path) not in text
    for key in ("transformers_version", "_name_or_path", "dtype", "quantization_config"):
        assert f'"{key}"' not in text


def test_tensors_that_do_not_fit_are_named(tiny_model):
    config = plain_config(tiny_model.module)
    state = dict(tiny_model.module.state_dict())
    with pytest.raises(ModelError, match="'extra', which the architecture does not have"):
        assign(empty_module(config), {**state, "extra": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"'model.norm.weight' has shape \[3\]"):
        assign(empty_module(config), {**state, "model.norm.weight": torch.zeros(3)})
    del state["model.norm.weight"]
    with pytest.raises(ModelError, match=r"lack 'model.norm.weight'"):
        assign(empty_module(config), state)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ModelError, match="'bert' is not supported"):
        empty_module({"model_type": "bert"})
    with pytest.raises(ModelError, match="is not valid"):
        empty_module({"model_type": "llama", "hidden_size": "wide"})


@pytest.mark.parametrize("options", [{}, {"add_bos": False}, {"chat": False}])
def test_a_stored_tokenizer_is_the_same_tokenizer(make_model, tmp_path, options):
    tokenizer = make_model(**options).tokenizer
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    save_tokenizer(tokenizer, tmp_path / "once")
    read = load_tokenizer(tmp_path / "once")
    for special in (True, False):
        ids = tokenizer(TEXT, add_special_tokens=special)["input_ids"]
        assert read(TEXT, add_special_tokens=special)["input_ids"] == ids
        assert read.decode(ids, skip_special_tokens=special) == tokenizer.decode(ids, skip_special_tokens=special)
    assert read.chat_template == tokenizer.chat_template
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    save_tokenizer(read, tmp_path / "twice")
    files = sorted(p.name for p in (tmp_path / "once").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "twice").iterdir())
    for name in files:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_damaged_tokenizer_is_an_error_with_its_folder(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    save_tokenizer(tiny_model.tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(ModelError, match="is damaged"):
        load_tokenizer(tmp_path)
