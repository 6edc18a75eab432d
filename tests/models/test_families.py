"""Every family names every linear of its blocks once, at the path and with the shape that it really has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, Gemma3Config, OPTConfig

from workbench.errors import InputError, ModelError
from workbench.models import architecture
from workbench.models.base import UNIT_KINDS

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt"]


@pytest.fixture(params=FAMILIES)
def model(request, make_model):
    return make_model(request.param)


def test_every_linear_of_the_blocks_is_named_once(model):
    parts = model.architecture
    inside = {
        name
        for name, module in model.module.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(parts.blocks_path)
    }
    assert sorted(x.path for x in parts.linears) == sorted(inside)
    assert len({x.id for x in parts.linears}) == len(parts.linears)


def test_shapes_and_biases_are_those_of_the_modules(model):
    for linear in model.architecture.linears:
        module = model.linear_module(linear.id)
        assert (module.out_features, module.in_features) == (linear.out_features, linear.in_features)
        assert (module.bias is not None) == linear.bias


def test_units_partition_the_linears_of_a_block(model):
    parts = model.architecture
    assert [u.kind for u in parts.units] == list(UNIT_KINDS) * parts.n_blocks
    assert sorted(x.id for u in parts.units for x in u.linears) == sorted(x.id for x in parts.linears)
    for unit in parts.units:
        assert unit.linears
        assert all(x.unit == unit.id and x.block == unit.block for x in unit.linears)


def test_norms_embedding_and_output_resolve(model):
    parts = model.architecture
    named = set(parts.norms.values())
    assert named == {name for name, module in model.module.named_modules() if "Norm" in type(module).__name__}
    embedding = model.submodule(parts.embedding_path)
    output = model.submodule(parts.output_path)
    assert embedding.weight.shape == (parts.vocab_size, parts.hidden_size)
    assert (embedding.weight is output.weight) == parts.tied_embeddings


def test_heads_and_neurons_are_the_rows_and_columns_of_the_linears(model):
    parts = model.architecture
    block = {x.role: x for x in parts.linears if x.block == 0}
    assert block["o"].in_features == parts.n_heads * parts.head_dim
    assert block["down"].in_features == parts.n_neurons
    if "qkv" in block:
        assert block["qkv"].out_features == (parts.n_heads + 2 * parts.n_kv_heads) * parts.head_dim
    else:
        assert block["k"].out_features == parts.n_kv_heads * parts.head_dim
    assert parts.gated == (model.architecture.family != "opt")
    groups = [parts.kv_group(head) for head in range(parts.n_heads)]
    assert groups == sorted(groups)
    assert set(groups) == set(range(parts.n_kv_heads))


def test_every_linear_is_used_by_a_forward_pass(model):
    seen = set()
    handles = [
        model.linear_module(x.id).register_forward_hook(lambda *_, name=x.id: seen.add(name))
        for x in model.architecture.linears
    ]
    with torch.no_grad():
        logits = model.module(torch.tensor([model.encode("hello")])).logits
    for handle in handles:
        handle.remove()
    assert seen == {x.id for x in model.architecture.linears}
    assert torch.isfinite(logits).all()


def test_an_unsupported_architecture_lists_what_is_supported():
    with pytest.raises(ModelError, match=r"'bert' is not supported\. Supported: .*llama.*qwen3"):
        architecture(BertConfig())


def test_a_multimodal_gemma_is_refused_with_a_way_out():
    with pytest.raises(ModelError, match=r"images.*Gemma3ForCausalLM"):
        architecture(Gemma3Config())


def test_the_projected_opt_variant_is_refused():
    with pytest.raises(ModelError, match="word_embed_proj_dim=32"):
        architecture(OPTConfig(hidden_size=64, word_embed_proj_dim=32))


def test_unknown_names_suggest_the_nearest(tiny_model):
    with pytest.raises(InputError, match=r"Did you mean 'blocks.1.qkv'"):
        tiny_model.architecture.unit("blocks.1.qvk")
    with pytest.raises(InputError, match=r"Did you mean 'blocks.2.down'"):
        tiny_model.architecture.linear("blocks.2.dwon")
