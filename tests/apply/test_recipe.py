"""Recipes: what is wrong is said in one line with the way out, and identity follows content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.apply.bnb import BnbInt8Config, BnbNf4Config
from workbench.apply.config import MethodConfig
from workbench.apply.recipe import Budget, Recipe
from workbench.apply.registry import handler
from workbench.apply.rtn import RtnConfig
from workbench.errors import InputError, RecipeError, StoreError
from workbench.models import LoadedModel

HASH = "0" * 64


def values(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "methods": [{"method": "rtn"}], **changes}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (values(sede=1), ["unknown field 'sede'", "allowed are", "Did you mean 'seed'"]),
        (values(seed=-1), ["seed = -1", "at least 0"]),
        (values(seed="x"), ["seed = 'x'", "whole number"]),
        (values(schema_version=2), ["schema_version = 2", "1"]),
        (values(fingerprint={"architecture": "x", "weights": HASH}), ["architecture = 'x'"]),
        ({"methods": [{"method": "rtn"}]}, ["'model' is missing"]),
        (values(methods=[]), ["methods is empty"]),
        (values(methods=[{"bits": 4}]), ["methods[0]", "does not say which 'method'"]),
        (values(methods=[{"method": "rtnn"}]), ["unknown method 'rtnn'", "bnb-nf4", "Did you mean 'rtn'"]),
        (values(methods=[{"method": "rtn", "bits": 7.5}]), ["bits = 7.5", "whole number"]),
        (values(methods=[{"method": "rtn", "bits": True}]), ["bits = True", "whole number"]),
        (values(methods=[{"method": "rtn", "bits": 1}]), ["bits = 1", "2 to 8", "16", "nearest is 2"]),
        (values(methods=[{"method": "rtn", "bits": 11}]), ["bits = 11", "nearest is 8"]),
        (values(methods=[{"method": "rtn", "bits": 15}]), ["nearest is 16"]),
        (values(methods=[{"method": "rtn", "group_size": 0}]), ["group_size = 0", "at least 1", "nearest is 1"]),
        (values(methods=[{"method": "rtn", "symmetric": "yes"}]), ["symmetric = 'yes'"]),
        (
            values(methods=[{"method": "rtn", "unit_bits": {"blocks.0.qkv": 9}}]),
            ["unit_bits['blocks.0.qkv'] = 9", "nearest is 8"],
        ),
        (values(methods=[{"method": "rtn", "groupsize": 64}]), ["'rtn'", "Did you mean 'group_size'"]),
        (values(methods=[{"method": "bnb-nf4", "block_size": 60}]), ["block_size = 60", "nearest is 64"]),
        (values(methods=[{"method": "bnb-int8", "threshold": -1}]), ["threshold = -1", "at least 0"]),
        (
            values(methods=[{"method": "rtn"}, {"method": "bnb-nf4"}]),
            ["methods[0] 'rtn'", "methods[1] 'bnb-nf4'", "keep one"],
        ),
        (values(seed=-1, sede=2), ["(And 1 more.)"]),
        (
            {("method" if name == "methods" else name): value for name, value in values().items()},
            ["unknown field 'method'", "Did you mean 'methods'", "(And 1 more.)"],
        ),
    ],
)
def test_one_line_names_field_value_and_what_is_allowed(given: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.model_validate(given)
    message = str(error.value)
    assert "\n" not in message
    for part in says:
        assert part in message
    with pytest.raises(RecipeError):
        Recipe(**given)


def test_whole_numbers_of_other_libraries_are_taken() -> None:
    config = RtnConfig(bits=np.int64(5), unit_bits={"blocks.0.o": np.int32(3)})
    assert config.model_dump(mode="json")["unit_bits"] == {"blocks.0.o": 3}
    assert type(config.bits) is int


def test_identity_follows_content_and_not_layout(tmp_path: Path) -> None:
    recipe = Recipe(model="m", methods=(RtnConfig(unit_bits={"blocks.0.o": 3, "blocks.0.qkv": 5}),))
    turned = Recipe(model="m", methods=(RtnConfig(unit_bits={"blocks.0.qkv": 5, "blocks.0.o": 3}),))
    assert recipe.sha256 == turned.sha256
    assert recipe.model_copy(update={"seed": 1}).sha256 != recipe.sha256
    path = recipe.save(tmp_path / "new" / "recipe.json")
    assert Recipe.load(path) == recipe
    assert Recipe.load(path).sha256 == recipe.sha256
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert Recipe.load(path).sha256 == recipe.sha256
    assert [p.name for p in path.parent.iterdir()] == ["recipe.json"]


def test_defaults_may_be_left_out() -> None:
    assert Recipe.model_validate(values()).sha256 == Recipe(model="m", methods=(RtnConfig(),)).sha256


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff{}", '"rtn"', "[" * 100_000])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.json is not"):
        Recipe.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot read"):
        Recipe.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="Cannot read"):
        Recipe.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Cannot write"):
        Recipe(model="m", methods=(RtnConfig(),)).save(tmp_path / "file" / "r.json")


def test_a_recipe_is_for_its_model(tiny_model: LoadedModel, make_model: Any) -> None:
    recipe = Recipe.for_model(tiny_model, RtnConfig())
    recipe.check_model(tiny_model)
    tuned = make_model("llama", seed=1)
    with pytest.raises(RecipeError, match="other weights"):
        recipe.check_model(tuned)
    recipe.check_model(tuned, allow_other_weights=True)
    with pytest.raises(RecipeError, match="another architecture"):
        recipe.check_model(make_model("opt"), allow_other_weights=True)
    Recipe(model="any", methods=(RtnConfig(),)).check_model(tuned)


def test_every_method_of_a_recipe_has_a_handler() -> None:
    for config in (RtnConfig(), BnbNf4Config(), BnbInt8Config()):
        assert handler(config) is handler(config)

    class Unregistered(MethodConfig):
        method: str = "rtm"

    with pytest.raises(RecipeError, match="Did you mean 'rtn'"):
        handler(Unregistered())


@pytest.mark.parametrize("given", [{}, {"average_bits": 4.0, "bytes": 100}, {"average_bits": 0}, {"bytes": -1}])
def test_a_budget_is_one_positive_number(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="Budget"):
        Budget(**given)
    assert (Budget(bytes=5).kind, Budget(average_bits=4.5).kind) == ("bytes", "average_bits")
