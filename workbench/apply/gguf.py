"""The codes of a GGUF file as they are: nothing is rounded again, so that engines can be compared on equal weights."""

from __future__ import annotations

import numpy as np
import torch

from workbench.apply.configs import GgufConfig as GgufConfig
from workbench.apply.draft import Draft
from workbench.apply.registry import register
from workbench.errors import RecipeError
from workbench.formats.codes import GroupCodes, pack
from workbench.formats.encodings import Dense, Encoding, Groups
from workbench.formats.ggml import Affine, SuperBlocks
from workbench.models.gguf_codes import StoredCodes, read_codes
from workbench.models.gguf_header import read_header
from workbench.models.loading import gguf_file
from workbench.progress import Job


@register(GgufConfig)
class Gguf:
    """Handler of ``GgufConfig``; what it fits is what the file holds."""

    def fit(self, draft: Draft, config: GgufConfig, *, seed: int, job: Job) -> dict[str, StoredCodes | np.ndarray]:
        model = draft.model
        path = gguf_file(model.source)
        if path is None:
            raise RecipeError(
                f"Method 'gguf': {model.name} was not loaded from a GGUF file ({model.source}) and keeps no codes: "
                "load a GGUF file, or use another method, such as rtn."
            )
        return read_codes(path, read_header(path))

    def apply(self, draft: Draft, config: GgufConfig, fitted: dict[str, StoredCodes | np.ndarray], *, job: Job) -> None:
        parts = draft.model.architecture
        for linear in parts.linears:
            draft.linears[linear.id] = encoding(fitted[f"{linear.path}.weight"])
            job.advance(linear.n_weights)
        draft.embedding = encoding(fitted[f"{parts.embedding_path}.weight"])
        if not parts.tied_embeddings:
            draft.output = encoding(fitted[f"{parts.output_path}.weight"])


def encoding(stored: StoredCodes | np.ndarray) -> Encoding:
    """Return the encoding that holds a matrix of a GGUF file without changing it."""
    if isinstance(stored, np.ndarray):
        return Dense.of(torch.from_numpy(stored))
    codes, bits, size = torch.from_numpy(stored.codes), stored.bits, stored.group_size
    width = codes.shape[1]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    if stored.super_scales is not None:
        tables = {"super_scales": stored.super_scales, "scales": stored.scales}
        if stored.minima is not None and stored.super_minima is not None:
            tables |= {"super_minima": stored.super_minima, "minima": stored.minima}
        held = {"codes": pack(codes, bits), **{name: tensor(table) for name, table in tables.items()}}
        block = width // stored.super_scales.shape[1]
        return SuperBlocks(held, width=width, bits=bits, group_size=size, block=block)
    if stored.minima is not None:
        return Affine(
            pack(codes, bits), tensor(stored.scales), tensor(stored.minima), width=width, bits=bits, group_size=size
        )
    return Groups.of_codes(GroupCodes(codes, tensor(stored.scales), None, bits, size))
