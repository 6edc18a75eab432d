"""Group-wise integer codes: the grid that every fixed-width weight format of the workbench shares.

A row of a weight matrix is cut into groups of ``group_size`` input channels (the last group may be shorter). Each
group has one fp16 scale and, unless symmetric, one integer zero point of ``bits`` bits. The pure functions here are
the definition; engines must agree with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.errors import RecipeError
from workbench.formats.limits import MAX_BITS as MAX_BITS
from workbench.formats.limits import MIN_BITS as MIN_BITS

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
        """Bits on disk: codes, scales and zero points."""
        out, width = self.codes.shape
        return stored_bits(out, width, self.bits, self.group_size, self.zeros is None)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take when packed without gaps."""
    return (count * bits + 7) // 8


def stored_bits(out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool) -> int:
    """Bits on disk of one matrix: packed codes and zero points (rows padded to whole bytes), and fp16 scales."""
    groups = -(-in_features // min(group_size, in_features))
    row = packed_bytes(in_features, bits) * 8 + groups * SCALE_BITS
    if not symmetric:
        row += packed_bytes(groups, bits) * 8
    return out_features * row


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
    low, high = group_ranges(weight, group_size)
    scales, zeros = range_grid(low, high, bits, symmetric)
    return nearest_codes(weight, scales, zeros, bits, group_size)


def group_ranges(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest weight of every group of a matrix (out, in), float32 (out, n_groups) each.

    Raises:
        RecipeError: a weight is not finite.
    """
    groups = _grouped(weight.float(), min(group_size, weight.shape[1]))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise RecipeError("A weight is NaN or infinite: the model is damaged and cannot be quantized.")
    return low, high


def range_grid(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the grid that spans ranges, as it is stored: scales float16, and zero points uint8 (None if symmetric).

    Args:
        low, high: float32 (out, n_groups).
        bits: 2 to 8.
        symmetric: leave the zero points out.

    Raises:
        RecipeError: a range overflows fp16 scales.
    """
    top = 2**bits - 1
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (bits - 1) - 1)
    else:
        low = low.clamp(max=0)
        scale = (high.clamp(min=0) - low) / top
    if bool((scale > _FP16_MAX).any()):
        raise RecipeError("A weight is too large for an fp16 scale: this model cannot be stored in group codes.")
    stored = scale.clamp(min=_FP16_TINY).half()
    return stored, None if symmetric else (-low / stored.float()).round_().clamp_(0, top).to(torch.uint8)


def nearest_codes(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group_size: int
) -> GroupCodes:
    """Round a matrix (out, in) to the nearest points of a given grid; arguments as in ``GroupCodes``."""
    out, width = weight.shape
    group_size = min(group_size, width)
    scale = scales.float().unsqueeze(2)
    zero = 2 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(2)
    codes = (_grouped(weight.float(), group_size) / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    codes = codes.to(torch.uint8).view(out, -1)[:, :width].contiguous()
    return GroupCodes(codes, scales, zeros, bits, group_size)


def dequantize(codes: GroupCodes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weights that the codes stand for, ``(code - zero) * scale``, shape (out, in)."""
    out, width = codes.codes.shape
    groups = _grouped(codes.codes.float(), codes.group_size)
    zeros = 2 ** (codes.bits - 1) if codes.zeros is None else codes.zeros.float().unsqueeze(2)
    groups = (groups - zeros) * codes.scales.float().unsqueeze(2)
    return groups.view(out, -1)[:, :width].to(dtype)


def rounded(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group_size: int
) -> torch.Tensor:
    """``dequantize(nearest_codes(...))``, the same to the bit, for searches that try many grids and keep no codes."""
    out, width = weight.shape
    scale = scales.float().unsqueeze(2)
    zero = 2 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(2)
    codes = (_grouped(weight.float(), min(group_size, width)) / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).view(out, -1)[:, :width]


_RUN = 8  # codes packed at a time: 8 codes of b bits are exactly b bytes, and fit one int64 for b <= 7


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes (rows, n) into a little-endian bit stream per row, uint8 (rows, ceil(n * bits / 8)).

    Bit ``j`` of code ``i`` is bit ``(i * bits + j) % 8`` of byte ``(i * bits + j) // 8``.
    Bits past the last code are 0.
    """
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous()
    runs = torch.nn.functional.pad(codes, (0, -n % _RUN)).view(rows, -1, _RUN)
    words = torch.zeros(runs.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(_RUN):
        words |= runs[:, :, i].long() << (i * bits)
    stream = torch.stack([((words >> (8 * byte)) & 0xFF).to(torch.uint8) for byte in range(bits)], dim=2)
    return stream.view(rows, -1)[:, : packed_bytes(n, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Undo ``pack``: uint8 (rows, ceil(n * bits / 8)) to uint8 codes (rows, n)."""
    if bits == 8:
        return packed[:, :n].contiguous()
    rows, width = packed.shape
    runs = torch.nn.functional.pad(packed, (0, -width % bits)).view(rows, -1, bits)
    words = torch.zeros(runs.shape[:2], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= runs[:, :, byte].long() << (8 * byte)
    top = 2**bits - 1
    codes = torch.stack([((words >> (i * bits)) & top).to(torch.uint8) for i in range(_RUN)], dim=2)
    return codes.view(rows, -1)[:, :n].contiguous()
