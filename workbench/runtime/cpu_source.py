"""Where the cpu engine finds a model's numbers: a loaded model, a compressed one in memory, or a folder on disk.

All give the same four things as numpy arrays, one matrix at a time, so that weights are never held twice as a whole.
Nothing here imports torch by itself: a stored model is read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from workbench.errors import EngineError, IntegrityError
from workbench.formats.input_cuts import PREFIX as CUTS_PREFIX
from workbench.formats.mask_predictor import PREFIX as MASKS_PREFIX
from workbench.formats.selectors import PREFIX as SELECTORS_PREFIX
from workbench.formats.stored import WEIGHTS, StoredTensors, check_folder
from workbench.models.base import Architecture, Fingerprint, TextModel
from workbench.models.families import architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from workbench.formats.compressed import CompressedModel
    from workbench.models.base import LoadedModel

# Kinds of matrices that the kernels read.
GROUP_KINDS = ("groups", "nested", "affine")
INTEGER_KINDS = ("integer",)
ROW_TENSORS = ("codes", "scales", "offset")  # of integer kinds


@dataclass(frozen=True)
class Matrix:
    """One stored matrix: its encoding's kind (or ``f32``), metadata, and tensors (bf16 as uint16 bit patterns)."""

    kind: str
    meta: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    def rows(self, first: int, last: int) -> Matrix:
        """A slice of output rows: stored tensors have one row per output, but for those that describe the inputs."""
        meta = {**self.meta, "shape": [last - first, self.meta["shape"][1]]}
        of_rows = ROW_TENSORS if self.kind in INTEGER_KINDS else tuple(self.tensors)
        return Matrix(
            self.kind, meta, {name: t[first:last] if name in of_rows else t for name, t in self.tensors.items()}
        )


class Source(Protocol):
    """A model's numbers. ``name`` of a matrix is a linear id, ``embedding`` or ``output``."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def model(self) -> TextModel: ...

    @property
    def architecture(self) -> Architecture: ...

    def matrix(self, name: str) -> Matrix: ...

    def kind(self, name: str) -> str:
        """Kind of a linear's matrix, without reading it."""
        ...

    def has_output(self) -> bool:
        """Whether the output layer is a matrix of its own."""
        ...

    def vector(self, key: str) -> np.ndarray | None:
        """A float32 parameter by its state-dict name, or None where the model has none."""
        ...

    def close(self) -> None: ...


class LoadedSource:
    """A dense model in memory: fp32 or bf16, as it was loaded."""

    def __init__(self, loaded: LoadedModel) -> None:
        from workbench.models.build import plain_config

        self._loaded = loaded
        self.config = plain_config(loaded.module)
        # Not the loaded model itself: an engine that held it would hold the weights twice.
        self.model: TextModel = StoredText(
            loaded.name,
            loaded.source,
            loaded.architecture,
            loaded.fingerprint,
            loaded.bos,
            loaded.stop_tokens,
            None,
            loaded.tokenizer,
        )

    @property
    def architecture(self) -> Architecture:
        return self._loaded.architecture

    def matrix(self, name: str) -> Matrix:
        import torch

        parts = self._loaded.architecture
        path = {"embedding": parts.embedding_path, "output": parts.output_path}.get(name)
        weight: torch.Tensor = self._loaded.submodule(path or parts.linear(name).path).weight  # type: ignore[assignment]
        weight = weight.detach().cpu().contiguous()
        meta = {"shape": list(weight.shape)}
        if weight.dtype == torch.bfloat16:
            return Matrix("dense", meta, {"weight": weight.view(torch.uint16).numpy()})
        return Matrix("f32", meta, {"weight": weight.float().numpy()})

    def kind(self, name: str) -> str:
        return "dense" if str(self._loaded.dtype) == "torch.bfloat16" else "f32"

    def has_output(self) -> bool:
        return not self._loaded.architecture.tied_embeddings

    def vector(self, key: str) -> np.ndarray | None:
        found = self._state.get(key)
        return None if found is None else np.ascontiguousarray(found.detach().float().cpu().numpy())

    @cached_property
    def _state(self) -> Mapping[str, Any]:
        return dict(self._loaded.module.named_parameters())

    def close(self) -> None:
        pass


class CompressedSource:
    """A compressed model in memory."""

    def __init__(self, compressed: CompressedModel) -> None:
        self._compressed = compressed
        self.config = compressed.config
        self.model: TextModel = StoredText(
            compressed.base.name,
            str(compressed.folder or compressed.base.source),
            compressed.architecture,
            Fingerprint(compressed.base.fingerprint.architecture, compressed.sha256),
            compressed.base.bos,
            tuple(compressed.base.stop_tokens),
            compressed.folder,
            compressed.tokenizer,
        )

    @property
    def architecture(self) -> Architecture:
        return self._compressed.architecture

    def matrix(self, name: str) -> Matrix:
        import torch

        c = self._compressed
        encoding = {"embedding": c.embedding, "output": c.output}.get(name) or c.linears[name]
        tensors = {
            part: (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).contiguous().numpy()
            for part, t in encoding.tensors().items()
        }
        return Matrix(encoding.kind, encoding.meta(), tensors)

    def kind(self, name: str) -> str:
        return self._compressed.linears[name].kind

    def has_output(self) -> bool:
        return self._compressed.output is not None

    def vector(self, key: str) -> np.ndarray | None:
        found = self._compressed.others.get(key)
        return None if found is None else np.ascontiguousarray(found.float().numpy())

    def close(self) -> None:
        pass


class FolderSource:
    """A compressed model on disk, read without torch."""

    def __init__(self, path: Path, verify: bool = True) -> None:
        folder, self._record, self.config = check_folder(path, verify)
        self._tensors = StoredTensors(folder / WEIGHTS)
        self._parts: dict[str, list[str]] = {}
        for name in self._tensors.names():
            if not name.startswith(("others.", SELECTORS_PREFIX, CUTS_PREFIX, MASKS_PREFIX)):
                self._parts.setdefault(name.rpartition(".")[0], []).append(name)
        base = self._record.base
        self._architecture = architecture(SimpleNamespace(**self.config))  # type: ignore[arg-type]
        self.model: TextModel = StoredText(
            base.name,
            str(folder),
            self._architecture,
            Fingerprint(base.fingerprint.architecture, self._record.sha256),
            base.bos,
            tuple(base.stop_tokens),
            folder,
            None,
        )

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    def matrix(self, name: str) -> Matrix:
        record = {"embedding": self._record.embedding, "output": self._record.output}.get(
            name
        ) or self._record.linears.get(name)
        if record is None or name not in self._parts:
            raise IntegrityError(f"The stored model has no matrix '{name}': compress the model again.")
        tensors = {full.rpartition(".")[2]: self._tensors.read(full) for full in self._parts[name]}
        return Matrix(record.kind, record.meta, tensors)

    def kind(self, name: str) -> str:
        return self._record.linears[name].kind

    def has_output(self) -> bool:
        return self._record.output is not None

    def vector(self, key: str) -> np.ndarray | None:
        name = f"others.{key}"
        if name not in self._tensors:
            return None
        found = self._tensors.read(name)
        if self._tensors.is_bf16(name):
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)

    def close(self) -> None:
        self._tensors.close()


@dataclass
class StoredText(TextModel):
    """What is known of a model beside its weights; the tokenizer is loaded when a text needs it."""

    name: str
    source: str
    architecture: Architecture
    fingerprint: Fingerprint
    bos: int | None
    stop_tokens: tuple[int, ...]
    folder: Path | None
    loaded_tokenizer: PreTrainedTokenizerBase | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        if self.loaded_tokenizer is None:
            from workbench.models.tokenizer import load_tokenizer

            if self.folder is None:
                raise EngineError("This model was opened without a tokenizer: give token ids instead of text.")
            self.loaded_tokenizer = load_tokenizer(self.folder)
        return self.loaded_tokenizer
