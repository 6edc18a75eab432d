"""What quietly ruins numbers: beginning token, chat template, stop tokens; and fingerprints."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import ModelError
from workbench.models import wrap
from workbench.models.fingerprint import files_sha256


def test_the_beginning_token_is_what_the_tokenizer_puts_first(make_model):
    assert make_model(add_bos=True).bos == 257
    assert make_model(add_bos=False).bos is None
    assert make_model(add_bos=True).encode("ab", bos=False) == make_model(add_bos=False).encode("ab")
    assert make_model(add_bos=True).encode("ab")[0] == 257


def test_gemma_gets_its_beginning_token_even_if_the_tokenizer_forgets_it(make_model):
    model = make_model("gemma3_text", add_bos=False)
    assert model.bos == model.tokenizer.bos_token_id
    model.tokenizer.bos_token = None
    with pytest.raises(ModelError, match="needs a beginning-of-sequence token"):
        wrap(model.module, model.tokenizer, "x", "memory")


def test_stop_tokens_hold_ends_of_text_and_of_turns(make_model):
    assert make_model().stop_tokens == (256, 258)
    model = make_model()
    model.module.generation_config.eos_token_id = [5, 256]
    assert wrap(model.module, model.tokenizer, "x", "memory").stop_tokens == (5, 256, 258)


def test_chat_prompts_use_the_template_and_plain_models_the_text(make_model):
    chat = make_model()
    ids = chat.encode_chat("hi")
    assert chat.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    assert ids[:2].count(chat.bos) == 1
    plain = make_model(chat=False)
    assert plain.encode_chat("hi") == plain.encode("hi")


def test_wrapping_switches_training_off(tiny_model):
    tiny_model.module.train()
    tiny_model.module.requires_grad_(True)
    model = wrap(tiny_model.module, tiny_model.tokenizer, "x", "memory")
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))


def test_a_tokenizer_larger_than_the_embedding_is_refused(make_model):
    model = make_model()
    model.tokenizer.add_tokens([f"token{i}" for i in range(100)])
    with pytest.raises(ModelError, match="do not belong together"):
        wrap(model.module, model.tokenizer, "x", "memory")


def test_fingerprints_tell_architecture_and_weights_apart(make_model):
    a, again, tuned, other = make_model(), make_model(), make_model(seed=1), make_model("mistral")
    assert a.fingerprint == again.fingerprint
    assert a.fingerprint.architecture == tuned.fingerprint.architecture
    assert a.fingerprint.weights != tuned.fingerprint.weights
    assert a.fingerprint.architecture != other.fingerprint.architecture


def test_an_exact_change_of_dtype_keeps_the_fingerprint(make_model):
    model = make_model()
    narrow = wrap(model.module.to(torch.bfloat16), model.tokenizer, "x", "memory")
    wide = wrap(model.module.to(torch.float32), model.tokenizer, "x", "memory")
    assert narrow.fingerprint == wide.fingerprint


def test_file_hashes_do_not_depend_on_folder_or_order(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_bytes(b"1" * 3_000_000)
        (tmp_path / folder / "b").write_bytes(b"2")
    one, two = ([tmp_path / folder / name for name in "ab"] for folder in ("one", "two"))
    assert files_sha256(one) == files_sha256(reversed(two))
    (tmp_path / "two" / "b").write_bytes(b"3")
    assert files_sha256(one) != files_sha256(two)
