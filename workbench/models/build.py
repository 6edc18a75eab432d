"""Rebuild a model from a plain config and named tensors, without initialising weights that are about to be replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import ModelError
from workbench.models.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
