"""Products of weights that lie input by input against float64, on random shapes, for every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.formats.codes import GroupCodes, pack, quantize_groups
from workbench.runtime.cpu_build import kernels

ISAS = kernels().isas()


def stored(codes: GroupCodes) -> tuple[Any, Any, Any]:
    zeros = None if codes.zeros is None else pack(codes.zeros, 4).numpy()
    return pack(codes.codes, 4).numpy(), codes.scales.view(torch.uint16).numpy(), zeros


def weights(codes: GroupCodes) -> np.ndarray:
    """What the codes stand for, float64."""
    values = codes.codes.numpy().astype(np.float64)
    group = np.arange(values.shape[1]) // codes.group_size
    zero = np.full(values.shape, 8.0) if codes.zeros is None else codes.zeros.numpy().astype(np.float64)[:, group]
    return (values - zero) * codes.scales.numpy().astype(np.float64)[:, group]


def rounded(x: np.ndarray, group_size: int) -> np.ndarray:
    """Activations as int8 blocks of at most 64 channels within a group stand for them, float64."""
    result = np.zeros(x.shape)
    for first in range(0, x.shape[1], group_size):
        for begin in range(first, min(first + group_size, x.shape[1]), 64):
            end = min(begin + 64, first + group_size, x.shape[1])
            scale = np.abs(x[:, begin:end]).max(axis=1, keepdims=True).astype(np.float64) / 127
            result[:, begin:end] = np.rint(x[:, begin:end] / np.where(scale > 0, scale, 1)) * scale
    return result


def inputs(seed: int, rows: int, width: int, share: float) -> np.ndarray:
    """Rows of which a share is zero, and one row that is zero as a whole."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, width)).astype(np.float32)
    x[generator.random(x.shape) < share] = 0
    x[-1] *= rows == 1
    return x


def linears(seed: int, outs: list[int], width: int, group: int, symmetric: bool) -> list[GroupCodes]:
    generator = torch.Generator().manual_seed(seed)
    return [quantize_groups(torch.randn(out, width, generator=generator) * 0.1, 4, group, symmetric) for out in outs]


shapes = {
    "seed": st.integers(0, 1000),
    "outs": st.lists(st.integers(1, 300), min_size=1, max_size=3),
    "width": st.integers(8, 300),
    "group": st.sampled_from([8, 16, 32, 64, 100, 1000]),
    "symmetric": st.booleans(),
    "share": st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    "rows": st.integers(1, 6),
    "threads": st.integers(1, 4),
}


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_int8_activations_are_exact_products_of_what_they_round_to(
    isa: str,
    seed: int,
    outs: list[int],
    width: int,
    group: int,
    symmetric: bool,
    share: float,
    rows: int,
    threads: int,
) -> None:
    codes = linears(seed, outs, width, group, symmetric)
    x = inputs(seed, rows, width, share)
    matrix = np.concatenate([weights(c) for c in codes])
    expected = rounded(x, codes[0].group_size) @ matrix.T
    parts = [stored(c) for c in codes]
    found = kernels().column_product(parts, width, codes[0].group_size, threads, False, x, False, isa)
    # A value halfway between two integers may fall to either side: allow one step of one channel.
    np.testing.assert_allclose(found, expected, atol=np.abs(x).max() / 127 * np.abs(matrix).max() + 1e-7)
    assert np.median(np.abs(found - expected)) <= 1e-5 * np.abs(expected).max() + 1e-7


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_fp32_activations_agree_with_float64(
    isa: str,
    seed: int,
    outs: list[int],
    width: int,
    group: int,
    symmetric: bool,
    share: float,
    rows: int,
    threads: int,
) -> None:
    codes = linears(seed, outs, width, group, symmetric)
    x = inputs(seed, rows, width, share)
    expected = x.astype(np.float64) @ np.concatenate([weights(c) for c in codes]).T
    parts = [stored(c) for c in codes]
    found = kernels().column_product(parts, width, codes[0].group_size, threads, False, x, True, isa)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("outs", "width"), [([50], 70), ([320, 7], 33), ([544, 64, 64], 130)])
def test_bf16_weights_agree_with_float64(isa: str, outs: list[int], width: int) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn(out, width, generator=generator).bfloat16() for out in outs]
    x = inputs(1, 5, width, 0.4)
    expected = x.astype(np.float64) @ torch.cat(rows).double().numpy().T
    bits = [r.view(torch.uint16).numpy() for r in rows]
    found = kernels().bf16_column_product(bits, width, 3, False, x, isa)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("exact", [False, True])
def test_neither_threads_nor_rows_nor_pairing_change_a_result(exact: bool) -> None:
    codes = linears(2, [200, 200], 150, 64, False)
    parts = [stored(c) for c in codes]
    x = inputs(3, 9, 150, 0.4)

    def product(rows: np.ndarray, threads: int, paired: bool) -> np.ndarray:
        return kernels().column_product(parts, 150, 64, threads, paired, rows, exact, "auto")

    expected = product(x, 1, False)
    for threads in (1, 2, 3, 5, 20):
        for paired in (False, True):
            np.testing.assert_array_equal(product(x, threads, paired), expected)
    np.testing.assert_array_equal(np.concatenate([product(row[None], 2, True) for row in x]), expected)


def test_a_nan_is_not_left_out() -> None:
    codes = linears(2, [40], 64, 64, False)
    x = inputs(3, 1, 64, 0.9)
    x[0, 5] = np.nan
    for exact in (False, True):
        found = kernels().column_product([stored(codes[0])], 64, 64, 1, False, x, exact, "auto")
        assert np.isnan(found).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    codes, scales, zeros = stored(linears(2, [40], 64, 64, False)[0])
    x = inputs(3, 1, 64, 0.0)
    for bad in [(codes[:, :-1], scales, zeros), (codes, scales[:-1], zeros), (codes, scales, zeros[:-1])]:
        with pytest.raises(ValueError, match="fit"):
            kernels().column_product(
                [tuple(np.ascontiguousarray(part) for part in bad)], 64, 64, 1, False, x, False, "auto"
            )
    with pytest.raises(ValueError, match="fit"):
        kernels().column_product([(codes, scales, zeros)], 64, 64, 1, False, x[:, :-1].copy(), False, "auto")
