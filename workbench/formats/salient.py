"""Group codes with some input channels kept in bf16: AWQ's first experiment, as something that runs.

The codes of the kept channels are stored too, so that codes stay in whole groups; what is computed with is

    W = dequantized codes, with columns ``channels`` replaced by ``columns``.

Hardware likes this little, which is why AWQ scales instead: no kernel of the cpu engine mixes the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

from workbench.errors import IntegrityError
from workbench.formats.encodings import Encoding, Groups, Tensors, meta_shape, meta_value, register_encoding, take


@register_encoding
class Salient(Encoding):
    """Group codes and bf16 columns."""

    kind = "salient"
    engines = ("reference",)

    def __init__(self, base: Groups, channels: torch.Tensor, columns: torch.Tensor) -> None:
        """
        Args:
            base: all weights in group codes, (out, in).
            channels: kept input channels, int32 (k,), ascending.
            columns: their weights, bf16 (out, k).
        """
        self.base = base
        self.channels = channels
        self.columns = columns
        self.shape = base.shape
        self.bits = base.bits

    @classmethod
    def of(cls, base: Groups, weight: torch.Tensor, channels: torch.Tensor) -> Self:
        """Keep ``channels`` (k,) of a matrix (out, in) beside its codes."""
        channels = channels.sort().values.to(torch.int32)
        return cls(base, channels, weight[:, channels.long()].to(torch.bfloat16).contiguous())

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.base.tensors() | {"channels": self.channels, "columns": self.columns}

    def meta(self) -> dict[str, Any]:
        return self.base.meta() | {"kept": len(self.channels)}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Tensors) -> Self:
        out, width = meta_shape(meta)
        kept = meta_value(meta, "kept", int, lambda k: 0 <= k <= width)
        names = ("channels", "columns")
        parts = take(
            {name: tensor for name, tensor in tensors.items() if name in names},
            {"channels": (torch.int32, (kept,)), "columns": (torch.bfloat16, (out, kept))},
        )
        channels = parts["channels"]
        inside = bool(((channels >= 0) & (channels < width)).all())
        if not inside or bool((channels[1:] <= channels[:-1]).any()):
            raise IntegrityError("the kept channels are not ascending channels of this matrix.")
        base = Groups.from_parts(meta, {name: t for name, t in tensors.items() if name not in names})
        return cls(base, channels, parts["columns"])

    def _dequantize(self) -> torch.Tensor:
        weight = self.base.dequantize()
        weight[:, self.channels.long()] = self.columns.float()
        return weight
