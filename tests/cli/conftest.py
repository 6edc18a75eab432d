"""What tests of the command line share: a tiny model, a store of their own, and commands run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.cli import main
from workbench.models import LoadedModel
from workbench.models.tokenizer import save_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., LoadedModel]) -> Path:
    """A tiny Llama as a safetensors folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = make_model("llama")
    model.module.save_pretrained(folder)
    save_tokenizer(model.tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


class Outcome:
    """What one command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def line(self) -> str:
        """The error, which must be one line without a traceback; stages of progress end in dots."""
        lines = [line for line in self.err.splitlines() if line.strip() and not line.endswith(" ...")]
        assert "Traceback" not in self.err
        assert len(lines) == 1, self.err
        assert lines[0].startswith("Error: ")
        return lines[0]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def workbench(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run
