"""Rebuild a model from a plain config and named tensors, without initialising weights that are about to be replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import ModelError
from workbench.models.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Where a config came from, how it was stored, and which version wrote it: nothing that the computation depends on.
_LOCAL_FIELDS = (
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_model_name_or_path",
    "auto_map",
    "dtype",
    "gguf_file",
    "name_or_path",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token")


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the transformers config of ``model`` as JSON values, free of paths, versions and storage formats."""
    config = json.loads(json.dumps(model.config.to_dict()))
    plain = {key: value for key, value in config.items() if key not in _LOCAL_FIELDS}
    plain["architectures"] = [type(model).__name__]
    return dict(sorted(plain.items()))


def config_from_dict(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the transformers config object of a plain config.

    Raises:
        ModelError: an unsupported model type, or values that its config class refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "model_type"}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"Architecture '{model_type}' is not supported. Supported: {', '.join(sorted(FAMILIES))}.")
    try:
        return AutoConfig.for_model(model_type, **values)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"The config of this {model_type} model is not valid: {_one_line(error)}") from error


def empty_module(config: Mapping[str, Any]) -> PreTrainedModel:
    """Build the module that a plain config describes, in eval mode, its parameters on the meta device.

    Buffers that are computed and never stored (rotary frequencies, embedding scales) are real and right. Fill the
    parameters with ``assign``.

    Raises:
        ModelError: an unsupported model type, or a config that its class refuses.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    built = config_from_dict(config)
    with init_empty_weights(include_buffers=False):
        module = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
    module.requires_grad_(False)
    return module.eval()


def assign(module: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Put named tensors into ``module`` without copying them, and tie what the config ties.

    Args:
        module: as built by ``empty_module``.
        tensors: by state-dict name. A tied output layer may be left out. Shapes must match; dtypes are kept.

    Returns:
        ``module`` itself.

    Raises:
        ModelError: names or shapes that do not fit.
    """
    expected = module.state_dict()
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise ModelError(f"The weights hold '{unknown[0]}', which the architecture does not have.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"'{name}' has shape {list(tensor.shape)}; the architecture says {list(expected[name].shape)}."
            )
    module.load_state_dict(dict(tensors), strict=False, assign=True)
    module.tie_weights()
    missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"The weights lack '{missing[0]}' and {len(missing) - 1} other tensors of the architecture.")
    module.requires_grad_(False)
    return module


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
