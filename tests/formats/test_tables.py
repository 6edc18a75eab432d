"""Codes into tables: what is stored is what is read back, at every width, and nothing that does not fit is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import EngineError, IntegrityError
from workbench.formats.codes import packed_bytes
from workbench.formats.encodings import from_parts
from workbench.formats.tables import NestedTables, TableCodes

WIDTHS = st.sets(st.integers(2, 8), min_size=1).map(lambda widths: tuple(sorted(widths)))


def random_codes(out: int = 6, width: int = 37, widths: tuple[int, ...] = (3, 4, 6), seed: int = 0) -> TableCodes:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** widths[-1], (out, width), generator=generator).to(torch.uint8)
    return TableCodes(codes, {bits: torch.randn(out, 2**bits, generator=generator).half() for bits in widths})


@settings(deadline=None)
@given(out=st.integers(1, 20), width=st.integers(1, 70), widths=WIDTHS, seed=st.integers(0, 99))
def test_disk_and_back_is_exact(out: int, width: int, widths: tuple[int, ...], seed: int) -> None:
    codes = random_codes(out, width, widths, seed)
    stored = NestedTables.of(codes)
    again = from_parts("nested-tables", stored.meta(), stored.tensors())
    assert isinstance(again, NestedTables)
    assert again.widths == codes.widths == widths
    assert again.bits == widths[-1]
    assert torch.equal(again.codes.codes, codes.codes)
    for bits in widths:
        assert torch.equal(again.dequantize(bits), codes.dequantize(bits))
    assert torch.equal(again.dequantize(), codes.dequantize(widths[-1]))


def test_a_weight_is_the_entry_that_its_top_bits_name() -> None:
    codes = random_codes()
    for bits in codes.widths:
        found = codes.dequantize(bits)
        assert found.dtype == torch.float32
        for row, column in ((0, 0), (5, 36), (3, 20)):
            top = int(codes.codes[row, column]) >> (6 - bits)
            assert found[row, column] == codes.tables[bits][row, top]


def test_reading_a_width_touches_its_planes_and_its_table() -> None:
    stored = NestedTables.of(random_codes(out=6, width=37))
    for bits in (3, 4, 6):
        assert stored.read_bits(bits) == 6 * (8 * packed_bytes(37, bits) + 16 * 2**bits)
    assert stored.read_bits() == stored.read_bits(6)
    assert stored.stored_bits == 6 * (8 * packed_bytes(37, 6) + 16 * (8 + 16 + 64))
    for ask in (stored.read_bits, stored.dequantize):
        with pytest.raises(EngineError, match="3, 4, 6 bits, 5 were asked for"):
            ask(5)


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": [3, 4]},
        {"widths": [3, 4, 5, 6]},
        {"widths": [3, 6, 4]},
        {"widths": [3, 4, 9]},
        {"widths": [1, 4, 6]},
        {"widths": [3, 4, 6, 6]},
        {"widths": [3, 4, 6.0]},
        {"widths": [3, 4, True]},
        {"widths": []},
        {"widths": "346"},
        {"shape": [6, 38 + 8]},
        {"shape": [5, 37]},
        {"shape": [6]},
        {"shape": [-6, 37]},
        {"shape": [6.0, 37]},
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_refused(changes: dict[str, Any]) -> None:
    stored = NestedTables.of(random_codes())
    with pytest.raises(IntegrityError):
        from_parts(stored.kind, {**stored.meta(), **changes}, stored.tensors())


def test_every_field_and_tensor_is_needed_as_it_is() -> None:
    stored = NestedTables.of(random_codes())
    for field in stored.meta():
        with pytest.raises(IntegrityError):
            from_parts(stored.kind, {k: v for k, v in stored.meta().items() if k != field}, stored.tensors())
    for part, tensor in stored.tensors().items():
        rest = {k: v for k, v in stored.tensors().items() if k != part}
        for damaged in (rest, rest | {part: tensor[:-1]}, rest | {part: tensor[:, :-1]}, rest | {part: tensor.float()}):
            with pytest.raises(IntegrityError):
                from_parts(stored.kind, stored.meta(), damaged)
    with pytest.raises(IntegrityError):
        from_parts(stored.kind, stored.meta(), stored.tensors() | {"table_5": stored.tables[4]})
