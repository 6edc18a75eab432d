"""The simulated array: counts that can be checked by hand, and their order."""

from __future__ import annotations

import pytest
import torch

from workbench.analysis.accelerator import SystolicArray, simulate_model, simulate_product
from workbench.apply.tender import encode
from workbench.errors import InputError
from workbench.formats.encodings import Dense
from workbench.formats.integers import InputScheme

SMALL = SystolicArray(rows=4, columns=4, vector_lanes=4)


def test_counts_by_hand() -> None:
    plain = simulate_product(8, (10, 6), 4, "nothing", array=SMALL)
    assert plain.cycles == 2 * (16 + 6)
    assert plain.operand_bytes == 8 * 16 + 2 * 4 * 16
    assert plain.result_bytes == 8 * 4 * 2
    assert simulate_product(8, (10, 6), 4, "shift", array=SMALL).cycles == plain.cycles + 2
    assert simulate_product(8, (10, 6), 4, "shift", boundaries=3, array=SMALL).cycles == plain.cycles + 6
    explicit = simulate_product(8, (10, 6), 4, "requantize", array=SMALL)
    assert explicit.cycles == plain.cycles + 2 * (6 + 2 * 4)
    assert explicit.result_bytes == plain.result_bytes + 8 * 4 * 4 * 3


def test_a_shift_costs_less_than_requantizing_and_more_than_nothing() -> None:
    linears = {
        "grouped": encode(torch.randn(96, 64), InputScheme(8, (4, 20, 40), (5, 1, 0), order=torch.randperm(64)), 8),
        "dense": Dense.of(torch.randn(96, 64)),
    }
    table = simulate_model(linears, tokens=100)
    assert set(table["linear"]) == {"grouped"}
    cost = table.set_index("between")["simulated_cycles"]
    assert cost["nothing"] < cost["shift"] < cost["requantize"]
    assert all("simulated" in column for column in table.columns[3:])


def test_bad_inputs() -> None:
    with pytest.raises(InputError, match="no linears"):
        simulate_model({"dense": Dense.of(torch.randn(4, 4))})
    with pytest.raises(InputError, match="is none"):
        simulate_product(0, (4,), 4, "shift")
    with pytest.raises(InputError, match="at least 1"):
        SystolicArray(rows=0)
