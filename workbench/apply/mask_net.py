"""Mask predictors as torch modules: what is trained, and what of it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from workbench.formats.mask_predictor import MaskGroup, MaskPart, mask_groups
from workbench.models.base import Architecture
from workbench.runtime.plan import Tap

_EPS = 1e-12  # as in ``formats.mask_predictor``
PUBLISHED_TAP = Tap("attention_output", 0)  # ShadowLLM's


@dataclass(frozen=True)
class PartSpec:
    """What one predictor reads, and the groups [begin, end) that it decides."""

    tap: Tap
    begin: int
    end: int


@dataclass(frozen=True)
class NetSpec:
    """Parts of a predictor of the blocks from ``first_block`` on, and the groups of those blocks."""

    first_block: int
    groups: tuple[MaskGroup, ...]
    parts: tuple[PartSpec, ...]

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(dict.fromkeys(part.tap for part in self.parts))

    def offsets(self, part: PartSpec) -> list[int]:
        """Where the part's groups begin among its units, and where the last ends."""
        sizes = [group.size for group in self.groups[part.begin : part.end]]
        return [0, *np.cumsum(sizes).tolist()]

    def blocks_of(self, part: PartSpec) -> list[tuple[MaskGroup, int, int]]:
        """Each group of the part with the units [begin, end) that are its own."""
        cuts = self.offsets(part)
        return list(zip(self.groups[part.begin : part.end], cuts[:-1], cuts[1:], strict=True))


def unified_spec(architecture: Architecture, tap: Tap = PUBLISHED_TAP) -> NetSpec:
    """One predictor at one tap for all later blocks; what lies before the tap, and its own block, is whole.

    A tap of the residual entering a block decides that block too.
    """
    first = tap.block if tap.kind == "residual" else tap.block + 1
    groups = mask_groups(architecture, range(first, architecture.n_blocks))
    return NetSpec(first, groups, (PartSpec(tap, 0, len(groups)),))


def per_layer_spec(architecture: Architecture, first_block: int = 1) -> NetSpec:
    """A predictor for the heads of every block, which reads what q, k and v read, and one for its neurons, which reads
    its attention's output. (DejaVu's read the block before, to hide their time; these know more.)"""
    groups = mask_groups(architecture, range(first_block, architecture.n_blocks))
    parts = [
        PartSpec(Tap("block_input" if group.kind == "heads" else "attention_output", group.block), i, i + 1)
        for i, group in enumerate(groups)
    ]
    return NetSpec(first_block, groups, tuple(parts))


def tap_width(architecture: Architecture, tap: Tap) -> int:
    """Numbers that a tap gives per token."""
    if tap.kind == "attention_output":
        return architecture.n_heads * architecture.head_dim
    return architecture.n_neurons if tap.kind == "mlp_inner" else architecture.hidden_size


class PartNet(nn.Module):
    """``mean + rows relu(hidden x + bias)`` of x divided by its root mean square, float32.

    What comes out of the ReLU is rounded as it is while running.
    """

    def __init__(self, width: int, inner: int, units: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(inner, width, generator=generator) * (2 / width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(inner))
        self.rows = nn.Parameter(torch.zeros(units, inner))  # at first every token is predicted the mean
        self.mean = nn.Parameter(torch.zeros(units))

    def forward(self, taps: torch.Tensor) -> torch.Tensor:
        """Scores (..., units) of taps (..., width)."""
        taps = taps.float()
        taps = taps / (taps.square().mean(dim=-1, keepdim=True) + _EPS).sqrt()
        hidden = torch.relu(taps @ self.hidden.T + self.bias)
        # Masks of training are those of engines; the slope is that of what is rounded (straight through).
        return self.mean + (hidden + (_rounded(hidden.detach()) - hidden.detach())) @ self.rows.T


def _rounded(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden activations (..., H) as engines multiply them: ``formats.mask_scores.rounded``, in torch."""
    top = hidden.amax(dim=-1, keepdim=True)
    inverse = (127 / top.where(top > 0, 1)).clamp(max=torch.finfo(hidden.dtype).max)
    return (hidden * inverse).round() * (top / 127)


class MaskNet(nn.Module):
    """All parts of a predictor."""

    def __init__(self, architecture: Architecture, spec: NetSpec, inner: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        generator = torch.Generator().manual_seed(seed)
        sizes = [spec.offsets(part)[-1] for part in spec.parts]
        self.parts: Sequence[PartNet] = nn.ModuleList(  # type: ignore[assignment]
            PartNet(tap_width(architecture, part.tap), inner, size, generator)
            for part, size in zip(spec.parts, sizes, strict=True)
        )

    def rounded(self) -> tuple[MaskPart, ...]:
        """What is stored: matrices in int8 with a step for every row."""
        found = []
        for part, net in zip(self.spec.parts, self.parts, strict=True):
            hidden, hidden_steps = _int8(net.hidden)
            rows, row_steps = _int8(net.rows)
            found.append(
                MaskPart(
                    tap=part.tap.kind,
                    block=part.tap.block,
                    groups=(part.begin, part.end),
                    hidden=hidden,
                    hidden_steps=hidden_steps,
                    hidden_bias=_float32(net.bias),
                    rows=rows,
                    row_steps=row_steps,
                    mean=_float32(net.mean),
                )
            )
        return tuple(found)

    def load_rounded(self, parts: Sequence[MaskPart]) -> None:
        """Take the numbers of stored parts."""
        with torch.no_grad():
            for net, part in zip(self.parts, parts, strict=True):
                net.hidden.copy_(torch.from_numpy(part.hidden.astype(np.float32) * part.hidden_steps[:, None]))
                net.bias.copy_(torch.from_numpy(part.hidden_bias))
                net.rows.copy_(torch.from_numpy(part.rows.astype(np.float32) * part.row_steps[:, None]))
                net.mean.copy_(torch.from_numpy(part.mean))


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy().copy()


def _int8(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = _float32(matrix)
    steps = np.abs(values).max(axis=1) / 127
    codes = np.rint(values / np.where(steps > 0, steps, 1)[:, None]).astype(np.int8)
    return codes, steps.astype(np.float32)
