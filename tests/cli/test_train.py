"""``train-relu``: a model made from a text or a teacher, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.models import load

Command = Callable[..., Any]
SMALL = ("--steps", 4, "--blocks", 2, "--hidden", 16, "--vocabulary", 300, "--length", 32, "--threads", 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {n}: {n % 7} and {n % 5}." for n in range(400)), "utf-8")
    return path


def test_a_model_is_trained_and_written(workbench: Command, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "relu"
    done = workbench("train-relu", "--out", folder, "--text", text, *SMALL)
    assert done.code == 0, done.err
    assert "held-out tokens" in done.out
    assert "blocks.1" in done.out
    again = workbench("train-relu", "--out", tmp_path / "again", "--text", text, *SMALL, "--json")
    assert again.code == 0, again.err
    assert len(again.json["zero_neurons"]) == 2
    assert all(f"{share:.1%}" in done.out for share in again.json["zero_neurons"])
    assert f"{again.json['perplexity']:.1f}" in done.out
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    reply = workbench("generate", folder, "Line", "--new-tokens", 4, "--json")
    assert reply.code == 0, reply.err


def test_text_comes_from_the_teacher(workbench: Command, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "relu"
    done = workbench("train-relu", "--out", folder, "--teacher", tiny_folder, "--tokens", 64, *SMALL, "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == 4
    assert load(folder).architecture.activation == "relu"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--text", "nowhere.txt"), 2, "nowhere.txt"),
        (("--teacher", "nowhere"), 3, "nowhere"),
        (("--text", "TEXT", "--hidden", 30), 2, "multiple of the heads"),
        (("--text", "TEXT", "--length", 4000), 2, "new tokenizer"),
    ],
)
def test_what_is_not_possible_is_one_line(
    workbench: Command, text: Path, tmp_path: Path, words: tuple[Any, ...], code: int, said: str
) -> None:
    given = [text if word == "TEXT" else word for word in words]
    done = workbench("train-relu", "--out", tmp_path / "relu", *given)
    assert done.code == code
    assert said in done.line
    assert not (tmp_path / "relu").exists()


def test_a_folder_in_use_is_refused_at_once(workbench: Command, tiny_folder: Path) -> None:
    done = workbench("train-relu", "--out", tiny_folder, "--teacher", "nowhere")
    assert done.code == 2
    assert "empty folder" in done.line
