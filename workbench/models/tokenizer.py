"""A tokenizer as files beside a stored model: written so that equal tokenizers give equal bytes, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``TOKENIZER_FILES`` into an existing folder: the same tokenizer gives the same bytes on every machine.

    Raises:
        ModelError: a tokenizer without a ``tokenizers`` backend (implemented in Python alone).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast form and cannot be stored: load the model with a tokenizer.json."
        )
    settings: dict[str, Any] = {name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS}
    settings = {name: str(token) for name, token in settings.items() if token is not None}
    settings["clean_up_tokenization_spaces"] = False
    settings["model_max_length"] = tokenizer.model_max_length
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(folder / "tokenizer.json", backend.to_str(pretty=False))
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    template = _chat_template(tokenizer)
    if template is not None:
        _write(folder / "chat_template.jinja", template)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read what ``save_tokenizer`` wrote.

    Raises:
        ModelError: missing or damaged files.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    for name in TOKENIZER_FILES[:2]:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}: the stored model is incomplete. Make it again.")
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        backend = Tokenizer.from_str((folder / "tokenizer.json").read_text("utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        raise ModelError(f"The tokenizer in {folder} is damaged: {_one_line(error)}") from error
    settings.pop("tokenizer_class", None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    template = folder / "chat_template.jinja"
    if template.is_file():
        # Bytes, not text mode: a template's line ends are part of what the model was trained on.
        tokenizer.chat_template = template.read_bytes().decode("utf-8")
    return tokenizer


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
