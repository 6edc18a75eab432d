"""What the tests of the measures share: the fake engine, and a tiny model on disk, dense and compressed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from workbench.apply.compress import compress
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.models import LoadedModel, load


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module ``fake_engine``: ``FakeEngine``, ``byte_model``, ``random_logits``."""
    spec = importlib.util.spec_from_file_location("fake_engine", Path(__file__).with_name("fake_engine.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_folder(make_model: Callable[..., LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model on disk, as a user has one."""
    model, folder = make_model("llama"), tmp_path_factory.mktemp("dense")
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compressed_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model at 3 bits."""
    model = load(str(model_folder))
    recipe = Recipe.for_model(model, RtnConfig(bits=3, group_size=16))
    return compress(model, recipe).save(tmp_path_factory.mktemp("compressed") / "model")
