"""Group-wise integer codes: the grid that every fixed-width weight format of the workbench shares.

A row of a weight matrix is cut into groups of ``group_size`` input channels (the last group may be shorter). Each
group has one fp16 scale and, unless symmetric, one integer zero point of ``bits`` bits. The pure functions here are
the definition; engines must agree with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.errors import RecipeError

MIN_BITS, MAX_BITS = 2, 8
SCALE_BITS = 16  # scales are stored as fp16
_FP16_TINY = 2.0**-24  # smallest positive fp16: a scale is never zero
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class GroupCodes:
    """Low-bit weights of one matrix.

    Attributes:
        codes: uint8, shape (out, in), values in [0, 2**bits).
        scales: float16, shape (out, n_groups).
        zeros: uint8, shape (out, n_groups), or None where symmetric (the zero point is then 2**(bits-1)).
        bits: width of a code.
        group_size: input channels per scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int

    @property
    def stored_bits(self) -> int:
        """Bits on disk: packed codes (rows padded to whole bytes), scales and packed zero points."""
        out, width = self.codes.shape
        groups = self.scales.shape[1]
        total = out * packed_bytes(width, self.bits) * 8 + out * groups * SCALE_BITS
        if self.zeros is not None:
            total += out * packed_bytes(groups, self.bits) * 8
        return total


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take when packed without gaps."""
    return (count * bits + 7) // 8


def group_overhead_bits(in_features: int, bits: int, group_size: int, symmetric: bool) -> float:
    """Stored bits per weight of one row at ``bits``: codes, scales and zero points together."""
    groups = -(-in_features // group_size)
    row = packed_bytes(in_features, bits) * 8 + groups * SCALE_BITS
    if not symmetric:
        row += packed_bytes(groups, bits) * 8
    return row / in_features


def _grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Cut rows into groups, shape (out, n_groups, group_size); a short last group is padded with its last value."""
    out, width = weight.shape
    pad = -width % group_size
    if pad:
        weight = torch.cat([weight, weight[:, -1:].expand(out, pad)], dim=1)
    return weight.view(out, -1, group_size)


def quantize_groups(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool = False) -> GroupCodes:
    """Round a matrix to the nearest point of its min-max grid.

    Asymmetric: ``scale = (max - min) / (2^bits - 1)`` with zero inside [min, max], ``zero = round(-min / scale)``,
    ``code = clamp(round(w / scale) + zero)``. Symmetric: ``scale = max|w| / (2^(bits-1) - 1)``, ``zero = 2^(bits-1)``.
    Codes are chosen with the scale as stored (fp16), so that dequantizing gives what was optimised.

    Args:
        weight: any float dtype, shape (out, in), finite.
        bits: 2 to 8.
        group_size: at least 1; need not divide ``in``.
        symmetric: leave the zero points out.

    Returns:
        ``GroupCodes`` on the weight's device.

    Raises:
        RecipeError: bits or group size out of range, or a weight that is not finite or overflows fp16 scales.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise RecipeError(f"bits={bits} is not possible: group codes have {MIN_BITS} to {MAX_BITS} bits.")
    if group_size < 1:
        raise RecipeError(f"group_size={group_size} is not possible: it must be at least 1.")
    out, width = weight.shape
    group_size = min(group_size, width)
    groups = _grouped(weight.float(), group_size)
    low = groups.amin(dim=2)
    high = groups.amax(dim=2)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise RecipeError("A weight is NaN or infinite: the model is damaged and cannot be quantized.")
    top = 2**bits - 1
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (bits - 1) - 1)
    else:
        low = low.clamp(max=0)
        scale = (high.clamp(min=0) - low) / top
    if bool((scale > _FP16_MAX).any()):
        raise RecipeError("A weight is too large for an fp16 scale: this model cannot be stored in group codes.")
    stored = scale.clamp(min=_FP16_TINY).half()
    scale = stored.float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round_().clamp_(0, top)
    codes = (groups / scale.unsqueeze(2)).round_().add_(zero.unsqueeze(2)).clamp_(0, top)
    codes = codes.to(torch.uint8).view(out, -1)[:, :width].contiguous()
    return GroupCodes(codes, stored, None if symmetric else zero.to(torch.uint8), bits, group_size)


def dequantize(codes: GroupCodes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weights that the codes stand for, ``(code - zero) * scale``, shape (out, in)."""
    out, width = codes.codes.shape
    groups = _grouped(codes.codes.float(), codes.group_size)
    if codes.zeros is None:
        groups = groups - 2 ** (codes.bits - 1)
    else:
        groups = groups - codes.zeros.float().unsqueeze(2)
    groups = groups * codes.scales.float().unsqueeze(2)
    return groups.view(out, -1)[:, :width].to(dtype)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes (rows, n) into a little-endian bit stream per row, uint8 (rows, ceil(n * bits / 8)).

    Bit ``j`` of code ``i`` is bit ``(i * bits + j) % 8`` of byte ``(i * bits + j) // 8``.
    """
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous()
    shifts = torch.arange(bits, dtype=torch.uint8)
    stream = ((codes.unsqueeze(2) >> shifts) & 1).view(rows, n * bits)
    pad = -stream.shape[1] % 8
    if pad:
        stream = torch.nn.functional.pad(stream, (0, pad))
    weights = (1 << torch.arange(8, dtype=torch.int32)).to(torch.int32)
    return (stream.view(rows, -1, 8).to(torch.int32) * weights).sum(dim=2).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Undo ``pack``: uint8 (rows, bytes) to uint8 codes (rows, n)."""
    if bits == 8:
        return packed[:, :n].contiguous()
    rows = packed.shape[0]
    shifts = torch.arange(8, dtype=torch.uint8)
    stream = ((packed.unsqueeze(2) >> shifts) & 1).view(rows, -1)[:, : n * bits].view(rows, n, bits)
    weights = (1 << torch.arange(bits, dtype=torch.int32)).to(torch.int32)
    return (stream.to(torch.int32) * weights).sum(dim=2).to(torch.uint8)
