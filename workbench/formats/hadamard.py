"""Random Hadamard rotations: what spreads outlier channels over all channels (QuaRot, Ashkboos et al. 2024, section 3).

``x -> H D x / sqrt(n)`` with random signs D and a Hadamard matrix H (entries +-1, orthogonal rows). H is a Kronecker
product of small ones: of order 2, and of order q + 1 or 2 (q + 1) after Paley, which give 12, 20, 28 and 36. An input
whose width is no such product is rotated in blocks of the largest power of two that divides it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from workbench.formats.paley import factors_of, hadamard


@dataclass(frozen=True)
class Rotation:
    """A rotation of inputs, in blocks of ``prod(factors)`` channels.

    Attributes:
        signs: float32 (in,), +-1.
        factors: orders of the small Hadamard matrices, slowest axis first.
    """

    signs: torch.Tensor
    factors: tuple[int, ...]

    @classmethod
    def random(cls, width: int, seed: int) -> Rotation:
        """Random signs, and the largest block that fits."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        return cls(signs, factors_of(width))

    @property
    def block(self) -> int:
        """Channels of a block."""
        return math.prod(self.factors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate rows (n, in), float32."""
        rows = (x * self.signs).reshape(-1, *self.factors)
        for axis, order in enumerate(self.factors, start=1):
            matrix = torch.from_numpy(hadamard(order)).to(x.device, rows.dtype)
            rows = torch.tensordot(rows, matrix, dims=([axis], [1])).movedim(-1, axis)
        return rows.reshape(x.shape) * (1.0 / math.sqrt(self.block))

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate back."""
        rows = x.reshape(-1, *self.factors)
        for axis, order in enumerate(self.factors, start=1):
            matrix = torch.from_numpy(hadamard(order)).to(x.device, rows.dtype)
            rows = torch.tensordot(rows, matrix, dims=([axis], [0])).movedim(-1, axis)
        return rows.reshape(x.shape) * (1.0 / math.sqrt(self.block)) * self.signs

    def to(self, device: torch.device) -> Rotation:
        """The same on another device."""
        return replace(self, signs=self.signs.to(device))
