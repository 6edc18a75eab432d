"""Products of codes against float64, on random shapes, for every width, layout and instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.formats.codes import GroupCodes, pack, quantize_groups
from workbench.formats.nested import NestedCodes
from workbench.formats.tables import TableCodes
from workbench.runtime.cpu_build import kernels

ISAS = kernels().isas()


def product(codes: GroupCodes, x: np.ndarray, **options: Any) -> np.ndarray:
    settings_of = {"planes": False, "widths": [], "read_bits": 0, "exact": True, "isa": "auto", "listed": None}
    settings_of |= options
    return kernels().group_product(
        pack(codes.codes, codes.bits).numpy(),
        codes.codes.shape[1],
        codes.bits,
        codes.group_size,
        None if settings_of["widths"] else codes.scales.view(torch.uint16).numpy(),
        None,
        None if codes.zeros is None or settings_of["widths"] else pack(codes.zeros, codes.bits).numpy(),
        None,
        None,
        settings_of["planes"],
        settings_of["widths"],
        x,
        settings_of["read_bits"],
        settings_of["exact"],
        settings_of["isa"],
        settings_of["listed"],
    )


def weights(codes: GroupCodes) -> np.ndarray:
    """What the codes stand for, float64."""
    values = codes.codes.numpy().astype(np.float64)
    out, width = values.shape
    group = np.arange(width) // codes.group_size
    zero = np.full((out, width), 2.0 ** (codes.bits - 1))
    if codes.zeros is not None:
        zero = codes.zeros.numpy().astype(np.float64)[:, group]
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


def case(seed: int, out: int, width: int, rows: int, bits: int, group: int, symmetric: bool) -> tuple[GroupCodes, Any]:
    generator = torch.Generator().manual_seed(seed)
    codes = quantize_groups(torch.randn(out, width, generator=generator) * 0.1, bits, group, symmetric)
    return codes, torch.randn(rows, width, generator=generator).numpy()


shapes = {
    "seed": st.integers(0, 1000),
    "out": st.integers(1, 70),
    "width": st.integers(8, 300),
    "rows": st.integers(1, 37),
    "bits": st.integers(2, 8),
    "group": st.sampled_from([8, 16, 32, 64, 100, 1000]),
    "symmetric": st.booleans(),
    "planes": st.booleans(),
}


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_fp32_activations_agree_with_float64(isa: str, planes: bool, **shape: Any) -> None:
    codes, x = case(**shape)
    expected = x.astype(np.float64) @ weights(codes).T
    found = product(codes, x, planes=planes, isa=isa)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_int8_activations_are_exact_products_of_what_they_round_to(isa: str, planes: bool, **shape: Any) -> None:
    codes, x = case(**shape)
    expected = rounded(x, codes.group_size) @ weights(codes).T
    found = product(codes, x, planes=planes, exact=False, isa=isa)
    # A value halfway between two integers may fall to either side: allow one step of one channel.
    slack = np.abs(x).max() / 127 * np.abs(weights(codes)).max()
    np.testing.assert_allclose(found, expected, atol=slack)
    assert np.median(np.abs(found - expected)) <= 1e-5 * np.abs(expected).max() + 1e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("parent", [8, 6, 3])
def test_top_planes_are_the_fewer_bits_on_a_grid_of_their_own(isa: str, exact: bool, parent: int) -> None:
    codes, x = case(3, 50, 200, 15, parent, 64, False)
    generator = torch.Generator().manual_seed(9)
    widths = range(2, parent + 1)
    scales = {b: (torch.rand(50, 4, generator=generator) * 0.1 + 0.01).half() for b in widths}
    zeros = {b: torch.randint(0, 2**b, (50, 4), generator=generator).to(torch.uint8) for b in widths}
    nested = NestedCodes(codes.codes, scales, zeros, 64)
    stored = [(b, scales[b].view(torch.uint16).numpy(), pack(zeros[b], b).numpy()) for b in widths]
    inputs = (x if exact else rounded(x, 64)).astype(np.float64)
    for bits in (*widths, 0):
        expected = inputs @ nested.dequantize(bits or parent).double().numpy().T
        found = product(codes, x, planes=True, widths=stored, read_bits=bits, exact=exact, isa=isa)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def table_product(codes: TableCodes, x: np.ndarray, read_bits: int = 0, isa: str = "auto") -> np.ndarray:
    tables = [(bits, codes.tables[bits].view(torch.uint16).numpy()) for bits in codes.widths]
    packed = pack(codes.codes, codes.bits).numpy()
    return kernels().table_product(packed, codes.codes.shape[1], codes.bits, tables, x, read_bits, isa)


def table_case(seed: int, out: int, width: int, rows: int, widths: tuple[int, ...]) -> tuple[TableCodes, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** widths[-1], (out, width), generator=generator).to(torch.uint8)
    tables = {bits: torch.randn(out, 2**bits, generator=generator).half() for bits in widths}
    return TableCodes(codes, tables), torch.randn(rows, width, generator=generator).numpy()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    out=st.integers(1, 70),
    width=st.integers(1, 300),
    rows=st.integers(1, 37),
    widths=st.sets(st.integers(2, 8), min_size=1).map(lambda widths: tuple(sorted(widths))),
    quiet=st.booleans(),
)
def test_weights_are_looked_up_in_the_table_of_their_row(
    isa: str, seed: int, out: int, width: int, rows: int, widths: tuple[int, ...], quiet: bool
) -> None:
    codes, x = table_case(seed, out, width, rows, widths)
    if quiet:
        x[:, : width // 2] = 0  # whole words of channels are left out where a row is alone
    for bits in (*widths, 0):
        weights = codes.dequantize(bits or codes.bits).double().numpy().T
        found = table_product(codes, x, bits, isa)
        # Of what is summed, for a sum that nearly cancels is as uncertain as any other.
        room = 5e-7 * (np.abs(x).astype(np.float64) @ np.abs(weights)) + 1e-6
        assert (np.abs(found - x.astype(np.float64) @ weights) <= room).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_times_tables_gives_the_same_alone_and_among_others(isa: str) -> None:
    codes, x = table_case(5, 40, 144, 21, (3, 6))
    x[::3, 32:96] = 0
    for bits in (3, 6):
        alone = np.concatenate([table_product(codes, x[i : i + 1], bits, isa) for i in range(21)])
        np.testing.assert_array_equal(table_product(codes, x, bits, isa), alone)


def test_tables_that_do_not_fit_are_refused() -> None:
    codes, x = table_case(5, 20, 64, 2, (3, 6))
    with pytest.raises(ValueError, match="no table of that width"):
        table_product(codes, x, 4)
    with pytest.raises(ValueError, match="fit"):
        table_product(codes, np.ascontiguousarray(x[:, :60]))
    with pytest.raises(ValueError, match="needs a table"):
        kernels().table_product(pack(codes.codes, 6).numpy(), 64, 6, [], x, 0, "auto")
    wrong = TableCodes(codes.codes, codes.tables | {3: codes.tables[6]})
    with pytest.raises(ValueError, match="tables do not fit"):
        table_product(wrong, x)


@pytest.mark.parametrize("exact", [True, False])
def test_a_row_gives_the_same_alone_and_among_others(exact: bool) -> None:
    codes, x = case(5, 40, 130, 21, 5, 64, False)
    together = product(codes, x, exact=exact)
    alone = np.concatenate([product(codes, x[i : i + 1], exact=exact) for i in range(21)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("exact", [True, False])
def test_a_damaged_activation_is_not_hidden(bad: float, exact: bool) -> None:
    codes, x = case(6, 20, 130, 2, 4, 64, False)
    x[1, 77] = bad
    found = product(codes, x, exact=exact)
    assert np.isfinite(found[0]).all()
    assert not np.isfinite(found[1]).any()


def test_sizes_that_do_not_fit_are_refused() -> None:
    codes, x = case(7, 20, 64, 2, 4, 32, False)
    with pytest.raises(ValueError, match="fit"):
        product(codes, np.ascontiguousarray(x[:, :60]))
    with pytest.raises(ValueError, match="instruction set"):
        product(codes, x, isa="mmx")


@pytest.mark.parametrize("isa", ISAS)
@given(**{name: values for name, values in shapes.items() if name != "planes"}, share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_listed_rows_are_those_of_the_whole_product(
    isa: str, seed: int, out: int, width: int, rows: int, bits: int, group: int, symmetric: bool, share: float
) -> None:
    """Rows side by side give what tiles give, but for the order of sums; unlisted rows are not touched."""
    codes, x = case(seed, out, width, rows, bits, group, symmetric)
    listed = np.flatnonzero(np.random.default_rng(seed).random(out) < share).tolist()
    for exact in (True, False):
        found = product(codes, x, exact=exact, isa=isa, listed=listed)
        whole = product(codes, x, exact=exact, isa=isa)
        size = np.abs(weights(codes)) @ np.abs(x.T).astype(np.float64)  # what rounding errors are a share of
        size += np.abs(codes.scales.numpy().astype(np.float64)).max() * 2**bits * np.abs(x).sum(axis=1)
        assert (np.abs(found - whole)[:, listed] <= 2e-6 * size.T[:, listed]).all()
        assert not np.delete(found, listed, axis=1).any()
        single = [product(codes, row[None], exact=exact, isa=isa, listed=listed)[0] for row in x]
        np.testing.assert_array_equal(np.stack(single), found)
