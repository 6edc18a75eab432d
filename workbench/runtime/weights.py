"""Where an engine finds stored weights, and what reading them costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from workbench.errors import EngineError

if TYPE_CHECKING:
    import torch

    from workbench.formats.compressed import CompressedModel
    from workbench.models.base import LoadedModel


class WeightSource(Protocol):
    """Stored weights by width, for consumers of kind ``width`` and for counting what a step reads."""

    def weight(self, linear_id: str, bits: int) -> torch.Tensor:
        """Weights of a linear at ``bits``, float32 (out, in)."""
        ...

    def stored_bytes(self, linear_id: str, bits: int | None = None) -> float:
        """Bytes that a step reads of a linear, at ``bits`` or as stored."""
        ...


class DenseWeights:
    """The uncompressed model, which is bf16 on disk."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def weight(self, linear_id: str, bits: int) -> torch.Tensor:
        raise EngineError(f"{linear_id} is dense and has no {bits}-bit form: compress the model with nested widths.")

    def stored_bytes(self, linear_id: str, bits: int | None = None) -> float:
        return 2.0 * self._model.architecture.linear(linear_id).n_weights


class CompressedWeights:
    """A compressed model's stored linears."""

    def __init__(self, compressed: CompressedModel) -> None:
        self._compressed = compressed

    def weight(self, linear_id: str, bits: int) -> torch.Tensor:
        return self._compressed.linears[linear_id].dequantize(bits)

    def stored_bytes(self, linear_id: str, bits: int | None = None) -> float:
        return self._compressed.linears[linear_id].read_bits(bits) / 8
