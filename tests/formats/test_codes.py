"""Group codes: packing is lossless, rounding is bounded, and what is counted is what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import RecipeError
from workbench.formats.codes import (
    GroupCodes,
    dequantize,
    group_ranges,
    nearest_codes,
    pack,
    packed_bytes,
    quantize_groups,
    range_grid,
    rounded,
    stored_bits,
    unpack,
)

WIDTHS = st.integers(2, 8)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Random matrices of awkward shapes, with groups that are constant, one-sided, or contain an outlier."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, width, generator=generator) * 10 ** draw(st.floats(-3, 2))
    kind = draw(st.sampled_from(["plain", "positive", "negative", "zeros", "outlier"]))
    if kind == "positive":
        weight = weight.abs() + 1
    elif kind == "negative":
        weight = -weight.abs() - 1
    elif kind == "zeros":
        weight[:, : width // 2 + 1] = 0
    elif kind == "outlier":
        weight[0, 0] = 500.0
    return weight


def quantized(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[GroupCodes, torch.Tensor]:
    codes = quantize_groups(weight, bits, group_size, symmetric)
    return codes, dequantize(codes)


@given(bits=WIDTHS, rows=st.integers(1, 4), n=st.integers(1, 100), seed=st.integers(0, 99))
def test_packing_is_the_documented_bit_stream_and_lossless(bits: int, rows: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, n), dtype=np.uint8)
    stream = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    expected = np.packbits(stream.reshape(rows, -1), axis=1, bitorder="little")
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (rows, packed_bytes(n, bits))
    np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(unpack(packed, bits, n).numpy(), codes)


@settings(deadline=None)
@given(weight=matrices(), bits=WIDTHS, group_size=st.integers(1, 80), symmetric=st.booleans())
def test_error_stays_within_a_step(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    codes, restored = quantized(weight, bits, group_size, symmetric)
    step = codes.scales.float().repeat_interleave(codes.group_size, dim=1)[:, : weight.shape[1]]
    # Half a step of rounding; up to half a step more where the rounded zero point cuts off an end of the range; and
    # what the fp16 scale lost, 2^-11 of the range of 2^bits steps (more only for scales below fp16's normal range).
    slack = 1.0 + 2.0**bits * 2.0**-11
    normal = step > 2.0**-14
    assert ((restored - weight).abs() <= step * slack + 1e-12)[normal].all()


@settings(deadline=None)
@given(weight=matrices(), bits=WIDTHS, group_size=st.integers(1, 80), symmetric=st.booleans())
def test_zero_weights_stay_exactly_zero(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    _, restored = quantized(weight, bits, group_size, symmetric)
    assert (restored[weight == 0] == 0).all()


@settings(deadline=None)
@given(weight=matrices(), bits=WIDTHS, group_size=st.integers(1, 80), symmetric=st.booleans())
def test_counted_bits_are_the_bits_of_the_stored_tensors(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool
) -> None:
    codes = quantize_groups(weight, bits, group_size, symmetric)
    tensors = [pack(codes.codes, bits), codes.scales]
    if codes.zeros is not None:
        tensors.append(pack(codes.zeros, bits))
        assert int(codes.zeros.max()) < 2**bits
    assert int(codes.codes.max()) < 2**bits
    assert (codes.zeros is None) == symmetric
    measured = 8 * sum(t.numel() * t.element_size() for t in tensors)
    assert codes.stored_bits == measured == stored_bits(*weight.shape, bits, group_size, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_falls_with_bits_and_with_smaller_groups(symmetric: bool) -> None:
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))

    def error(bits: int, group_size: int) -> float:
        return float((quantized(weight, bits, group_size, symmetric)[1] - weight).norm())

    by_bits = [error(bits, 64) for bits in range(2, 9)]
    by_group = [error(4, group_size) for group_size in (192, 64, 16, 4)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


def test_a_group_may_be_larger_than_the_row_and_need_not_divide_it() -> None:
    weight = torch.randn(3, 50)
    assert quantize_groups(weight, 4, 1000).scales.shape == (3, 1)
    assert quantize_groups(weight, 4, 16).scales.shape == (3, 4)
    whole, first = quantize_groups(weight, 4, 16), quantize_groups(weight[:, :48], 4, 16)
    torch.testing.assert_close(dequantize(whole)[:, :48], dequantize(first), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bits", "group_size", "weight", "says"),
    [
        (1, 64, torch.ones(2, 8), "2 to 8"),
        (9, 64, torch.ones(2, 8), "2 to 8"),
        (4, 0, torch.ones(2, 8), "at least 1"),
        (4, 64, torch.tensor([[1.0, float("nan")]]), "NaN"),
        (4, 64, torch.tensor([[1.0, float("inf")]]), "infinite"),
        (4, 64, torch.tensor([[1e9, -1e9]]), "too large"),
    ],
)
def test_what_cannot_be_stored_is_refused(bits: int, group_size: int, weight: torch.Tensor, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        quantize_groups(weight, bits, group_size)


@settings(deadline=None)
@given(
    weight=matrices(),
    bits=WIDTHS,
    group_size=st.integers(1, 80),
    symmetric=st.booleans(),
    share=st.sampled_from([0.5, 1.0]),
)
def test_rounding_without_codes_gives_what_the_codes_stand_for(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, share: float
) -> None:
    low, high = group_ranges(weight, group_size)
    grid = range_grid(low * share, high * share, bits, symmetric)
    before = weight.clone()
    assert torch.equal(
        rounded(weight, *grid, bits, group_size), dequantize(nearest_codes(weight, *grid, bits, group_size))
    )
    assert torch.equal(weight, before)
