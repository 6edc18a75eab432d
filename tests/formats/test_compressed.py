"""The compressed model on disk: exact, deterministic, written as a whole or not at all, and never trusted blindly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.errors import InputError, IntegrityError, ModelError, StoreError, WorkbenchError
from workbench.formats import folder as folders
from workbench.formats import manifest
from workbench.formats.compressed import CompressedModel, is_compressed
from workbench.formats.folder import check_output_folder, file_sha256
from workbench.formats.rebuild import to_model
from workbench.models import LoadedModel

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt"]
TOKENS = torch.arange(40)[None] + 60


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model("qwen2")


@pytest.fixture(scope="module")
def compressed(model: LoadedModel) -> CompressedModel:
    config = RtnConfig(bits=4, unit_bits={"blocks.1.qkv": 3, "blocks.2.down": 16}, group_size=20)
    return compress(model, Recipe.for_model(model, config))


@pytest.fixture
def saved(compressed: CompressedModel, tmp_path: Path) -> Path:
    return compressed.save(tmp_path / "small")


def logits(model: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module(TOKENS).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "fit.json"}


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``compressed.json`` and make its checksum right again, as someone with bad intent would."""
    path = folder / "compressed.json"
    values = json.loads(path.read_text())
    del values["manifest_sha256"]
    change(values)
    values["manifest_sha256"] = manifest.digest(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_disk_and_back_is_exact(
    make_model: Callable[..., LoadedModel], family: str, symmetric: bool, tmp_path: Path
) -> None:
    model = make_model(family)
    made = compress(model, Recipe.for_model(model, RtnConfig(bits=3, symmetric=symmetric)))
    read = CompressedModel.load(made.save(tmp_path / "m"))
    assert read.recipe == made.recipe
    assert read.config == made.config
    assert read.base == made.base
    assert read.sha256 == made.sha256
    assert replace(read, recorded_sha256=None).sha256 == made.sha256
    assert {k: v.shape for k, v in read.tensors().items()} == {k: v.shape for k, v in made.tensors().items()}
    assert all(torch.equal(v, made.tensors()[k]) for k, v in read.tensors().items())
    assert (read.output is None) == model.architecture.tied_embeddings
    assert read.effective_bits == made.effective_bits
    first, second = to_model(made), to_model(read)
    assert torch.equal(logits(first), logits(second))
    assert second.bos == model.bos
    assert second.stop_tokens == model.stop_tokens
    assert second.encode_chat("Hello") == model.encode_chat("Hello")
    assert second.fingerprint.weights == made.sha256
    assert second.fingerprint.architecture == model.fingerprint.architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_recipe_gives_the_model_in_bf16(make_model: Callable[..., LoadedModel], family: str) -> None:
    model = make_model(family)
    rebuilt = to_model(compress(model, Recipe.for_model(model, RtnConfig(bits=16, output_bits=16))))
    for linear in model.architecture.linears:
        expected = model.linear_module(linear.id).weight.bfloat16().float()
        assert torch.equal(rebuilt.linear_module(linear.id).weight, expected)
    norms = {name: p for name, p in model.module.named_parameters() if p.dim() == 1}
    assert norms
    assert all(torch.equal(rebuilt.module.get_parameter(name), p) for name, p in norms.items())


def test_the_same_recipe_gives_the_same_bytes(model: LoadedModel, compressed: CompressedModel, tmp_path: Path) -> None:
    again = compress(model, Recipe.model_validate(compressed.recipe))
    assert again.sha256 == compressed.sha256
    assert contents(again.save(tmp_path / "b")) == contents(compressed.save(tmp_path / "a"))


def test_timings_and_names_are_no_part_of_the_identity(compressed: CompressedModel) -> None:
    base = compressed.base.model_copy(update={"name": "other", "source": "/elsewhere"})
    assert replace(compressed, fit_seconds=99.0, base=base).sha256 == compressed.sha256
    assert replace(compressed, recipe={**compressed.recipe, "seed": 5}).sha256 != compressed.sha256


def test_keys_are_readable_and_what_is_counted_is_on_disk(compressed: CompressedModel, saved: Path) -> None:
    stored = load_file(saved / "weights.safetensors")
    assert {"blocks.1.q.codes", "blocks.1.q.scales", "blocks.1.q.zeros", "embedding.codes"} <= set(stored)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == compressed.weight_bytes
    bits = sum(8 * t.numel() * t.element_size() for name, t in stored.items() if name.startswith("blocks."))
    assert compressed.effective_bits == bits / sum(linear.n_weights for linear in compressed.architecture.linears)
    assert compressed.bits_by_unit["blocks.2.down"] == 16
    assert 3 < compressed.bits_by_unit["blocks.1.qkv"] < compressed.bits_by_unit["blocks.0.qkv"]
    assert 8 < compressed.output_bits < 10
    assert compressed.engines == ("reference", "cpu", "cuda")


def test_the_time_of_the_fit_is_kept_beside(compressed: CompressedModel, saved: Path) -> None:
    assert CompressedModel.load(saved).fit_seconds == compressed.fit_seconds
    (saved / "fit.json").write_text("damaged")
    assert CompressedModel.load(saved).fit_seconds is None
    (saved / "fit.json").unlink()
    assert CompressedModel.load(saved).fit_seconds is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_rebuilt_in_the_type_asked_for(compressed: CompressedModel, dtype: str) -> None:
    rebuilt = to_model(compressed, dtype=dtype)
    assert {p.dtype for p in rebuilt.module.parameters()} == {getattr(torch, dtype)}
    assert rebuilt.dtype == getattr(torch, dtype)
    with pytest.raises(InputError, match="Did you mean 'float32'"):
        to_model(compressed, dtype="float23")


@pytest.mark.parametrize("device", ["cuda:99", "toaster", "meta:x"])
def test_a_device_that_is_not_there_is_refused(compressed: CompressedModel, device: str) -> None:
    with pytest.raises(InputError, match="choose cpu") as error:
        to_model(compressed, device=device)
    assert "\n" not in str(error.value)


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def link(path: Path) -> None:
    away = path.parent.parent / "elsewhere"
    shutil.move(path, away)
    path.symlink_to(away)


FILES = ["weights.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, lengthen, link, Path.unlink])
def test_damage_is_found_and_the_file_named(saved: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(saved / name)
    with pytest.raises(IntegrityError, match=name) as error:
        CompressedModel.load(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [flip, truncate, lambda p: p.write_text("{"), lambda p: p.write_text("[1]")])
def test_a_damaged_manifest_is_found(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved / "compressed.json")
    with pytest.raises(WorkbenchError, match=r"compressed\.json"):
        CompressedModel.load(saved)


def test_a_value_changed_by_hand_is_found(saved: Path) -> None:
    path = saved / "compressed.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(IntegrityError, match="checksum"):
        CompressedModel.load(saved)


def record(folder: Path, name: str) -> dict[str, Any]:
    return {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hostname", "sub/x.json", "..", "", "a\\b", "c:x"])
def test_no_file_outside_the_folder_is_read(saved: Path, name: str) -> None:
    (saved.parent / "secret.json").write_text("{}")
    secret = record(saved.parent, "secret.json")
    reseal(saved, lambda v: v["files"].update({name: secret}))
    with pytest.raises(IntegrityError, match="outside"):
        CompressedModel.load(saved)


def test_a_tokenizer_file_that_was_added_is_refused(make_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = make_model("llama", chat=False)
    saved = compress(model, Recipe.for_model(model, RtnConfig())).save(tmp_path / "m")
    assert CompressedModel.load(saved).tokenizer.chat_template is None
    (saved / "chat_template.jinja").write_text("{{ 'always say yes' }}")
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja is not part"):
        CompressedModel.load(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["linears"]["blocks.0.q"]["meta"].update(bits=9), "blocks.0.q"),
        (lambda v: v["linears"]["blocks.0.q"]["meta"].update(shape=[48, 47]), "blocks.0.q"),
        (lambda v: v["linears"]["blocks.0.q"].update(kind="grops"), "Did you mean 'groups'"),
        (lambda v: v["linears"].pop("blocks.0.q"), "blocks.0.q"),
        (lambda v: v["linears"].update({"blocks.9.q": v["linears"]["blocks.0.q"]}), "blocks.9.q"),
        (lambda v: v.update(output=v["embedding"]), "output"),
        (lambda v: v["base"]["fingerprint"].update(weights="x"), "weights"),
        (lambda v: v["base"].update(stop_tokens=[-1]), "stop_tokens"),
        (lambda v: v.update(linears=[]), "linears"),
        (lambda v: v["files"].pop("config.json"), "config.json"),
        (lambda v: v["files"]["config.json"].update(size=-1), "size"),
    ],
)
def test_values_out_of_range_are_refused_even_when_the_checksum_is_right(
    saved: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    reseal(saved, change)
    with pytest.raises(IntegrityError, match=says):
        CompressedModel.load(saved)


def replaced(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write other tensors and make every checksum right."""
    tensors = {name: t.clone() for name, t in load_file(folder / "weights.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "weights.safetensors")
    reseal(folder, lambda v: v["files"].update({"weights.safetensors": record(folder, "weights.safetensors")}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("blocks.0.q.codes"), "blocks.0.q"),
        (lambda t: t.update({"blocks.0.q.codes": t["blocks.0.q.codes"][1:].clone()}), "blocks.0.q"),
        (lambda t: t.update({"blocks.0.q.scales": t["blocks.0.q.scales"].float()}), "blocks.0.q"),
        (lambda t: t.update({"extra.codes": torch.zeros(1)}), "extra"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    replaced(saved, change)
    with pytest.raises(IntegrityError, match=says):
        CompressedModel.load(saved)


def test_a_missing_norm_is_found_when_the_model_is_rebuilt(saved: Path) -> None:
    replaced(saved, lambda t: t.pop("others.model.norm.weight"))
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight"):
        to_model(CompressedModel.load(saved))


@pytest.mark.parametrize(("key", "value"), [("schema_version", "2.0"), ("format", "other"), ("schema_version", None)])
def test_another_format_is_refused(saved: Path, key: str, value: Any) -> None:
    reseal(saved, lambda v: v.update({key: value}))
    with pytest.raises(ModelError, match="install a matching version"):
        CompressedModel.load(saved)


def test_a_later_minor_version_is_read(saved: Path) -> None:
    reseal(saved, lambda v: v.update(schema_version="1.7", added_later={"x": 1}))
    assert CompressedModel.load(saved).effective_bits > 3


def test_without_verification_contents_are_not_compared_but_sizes_are(saved: Path) -> None:
    path = saved / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert CompressedModel.load(saved, verify=False).effective_bits > 3
    truncate(path)
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        CompressedModel.load(saved, verify=False)


def test_a_truncated_file_with_a_matching_record_is_still_refused(saved: Path) -> None:
    truncate(saved / "weights.safetensors")
    reseal(saved, lambda v: v["files"].update({"weights.safetensors": record(saved, "weights.safetensors")}))
    with pytest.raises(IntegrityError, match=r"weights\.safetensors is damaged"):
        CompressedModel.load(saved)


def test_no_model_there(tmp_path: Path) -> None:
    assert not is_compressed(tmp_path)
    with pytest.raises(InputError, match="No compressed model"):
        CompressedModel.load(tmp_path)


# Writing


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_there_is_kept_unless_it_is_a_model_to_be_replaced(
    compressed: CompressedModel, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name, overwrite, says in [
        ("notes", True, "not a compressed model"),
        ("file", True, "is a file"),
        ("small", False, "already holds"),
    ]:
        for attempt in (compressed.save, check_output_folder):
            with pytest.raises(InputError, match=says):
                attempt(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "notes" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "keep"
    other = replace(compressed, recipe={**compressed.recipe, "seed": 7})
    other.save(saved, overwrite=True)
    assert CompressedModel.load(saved).recipe["seed"] == 7
    assert leftovers(tmp_path) == {"notes", "file", "small"}


def test_an_empty_folder_and_missing_parents_are_fine(compressed: CompressedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert check_output_folder(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    assert leftovers(tmp_path) == {"empty"}, "a check leaves nothing behind"
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert is_compressed(compressed.save(path))


@pytest.mark.parametrize("step", ["save_file", "save_tokenizer", "_rename"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_everything_as_it_was(
    compressed: CompressedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: BaseException,
    existing: bool,
) -> None:
    target = tmp_path / "out"
    if existing:
        compressed.save(target)
    before = contents(target) if existing else None

    def fail(*_: Any) -> None:
        raise failure

    where = folders if step == "_rename" else __import__("workbench.formats.compressed", fromlist=["x"])
    monkeypatch.setattr(where, step, fail)
    with pytest.raises((KeyboardInterrupt, StoreError)) as error:
        compressed.save(target, overwrite=existing)
    assert isinstance(failure, KeyboardInterrupt) or "disk is full" in str(error.value)
    assert leftovers(tmp_path) == ({"out"} if existing else set())
    assert before is None or contents(target) == before


def test_a_full_disk_is_said_before_the_work(
    compressed: CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    for attempt in (check_output_folder, compressed.save):
        with pytest.raises(StoreError, match="MB are needed"):
            attempt(tmp_path / "out")
    assert leftovers(tmp_path) == set()


def unwritable(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "file").write_text("")
    yield tmp_path / "file" / "out"
    yield tmp_path / ("x" * 300)
    if Path("/proc/self").is_dir():
        yield Path("/proc/self/out")


def test_an_unwritable_place_is_said_before_the_work(compressed: CompressedModel, tmp_path: Path) -> None:
    for path in unwritable(tmp_path):
        for attempt in (check_output_folder, compressed.save):
            with pytest.raises(StoreError, match="Cannot write") as error:
                attempt(path)
            assert "\n" not in str(error.value)
    assert leftovers(tmp_path) == {"file"}
