"""From a compressed model back to a module that transformers can run: what the reference engine needs."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from workbench.errors import InputError, IntegrityError, ModelError, suggest
from workbench.formats.compressed import CompressedModel
from workbench.models.base import Fingerprint, LoadedModel
from workbench.models.build import assign, empty_module
from workbench.models.loading import DTYPES
from workbench.models.settle import wrap


def to_model(compressed: CompressedModel, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Build a transformers module with the weights that ``compressed`` stands for.

    Weights are filled in one matrix at a time, so that beside the stored codes there is one copy of them. Encodings
    with kernels of their own (bitsandbytes) keep their codes and run those kernels.

    Args:
        compressed: the stored model.
        dtype: computation type, ``float32``, ``bfloat16`` or ``float16``.
        device: where the module will live.

    Returns:
        A ``LoadedModel`` whose weight fingerprint is the identity of the compressed model.

    Raises:
        InputError: an unknown dtype, or a device that is not there.
        EngineError: an encoding whose library is missing.
        IntegrityError: stored tensors that do not make up the architecture.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' is not possible: choose {', '.join(DTYPES)}." + suggest(dtype, DTYPES))
    kind, where = DTYPES[dtype], _usable(device)
    parts = compressed.architecture
    module = empty_module(compressed.config)
    others = {
        name: tensor.to(where, kind if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in compressed.others.items()
    }
    for linear in parts.linears:
        bias = others.pop(f"{linear.path}.bias", None)
        module.set_submodule(linear.path, compressed.linears[linear.id].module(bias, kind, where))
    others[f"{parts.embedding_path}.weight"] = compressed.embedding.dequantize().to(where, kind)
    if compressed.output is not None:
        others[f"{parts.output_path}.weight"] = compressed.output.dequantize().to(where, kind)
    try:
        assign(module, others)
    except ModelError as error:
        raise IntegrityError(f"{compressed.folder or compressed.base.name}: {error}") from error
    cast("nn.Module", module).to(where)  # buffers that are computed and never stored
    loaded = wrap(
        module,
        compressed.tokenizer,
        compressed.base.name,
        str(compressed.folder or compressed.base.source),
        fingerprint=Fingerprint(compressed.base.fingerprint.architecture, compressed.sha256),
    )
    return replace(loaded, bos=compressed.base.bos, stop_tokens=tuple(compressed.base.stop_tokens))


def _usable(device: str) -> torch.device:
    """Return the device if a tensor can live there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either, by build and by device
        reason = str(error).splitlines()[0]
        raise InputError(f"device '{device}' cannot be used ({reason}): choose cpu, or cuda where it is.") from error
