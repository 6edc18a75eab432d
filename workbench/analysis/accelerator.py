"""Matrix products on a systolic array, *simulated*: what Tender's shifter saves where hardware has it.

A model of counts and not of a chip. An output-stationary array of R x C processing elements multiplies (M, K) by
(K, N) in tiles of R x C outputs. Each tile streams its K channels, one to a cycle, through elements that are filled and
drained diagonally: ``K + R + C - 2`` cycles. Channels come in groups whose scales differ, and between two of them an
element either shifts its sum by one bit in place (Tender, Lee et al. 2024, section 5), or the sums leave the array as
integers, are scaled in floating point by a vector unit, and are added up outside (explicit requantization).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from workbench.errors import InputError
from workbench.formats.encodings import Encoding
from workbench.formats.integer import Integer

Between = Literal["nothing", "shift", "requantize"]
BETWEEN: tuple[Between, ...] = ("nothing", "shift", "requantize")
_SUM_BYTES, _OUTPUT_BYTES = 4, 2  # of an integer sum, of an output (fp16)


@dataclass(frozen=True)
class SystolicArray:
    """The hardware, as far as it is modelled. All values may be changed.

    Attributes:
        rows, columns: processing elements.
        shift_cycles: that a shift of all sums holds the stream up for.
        vector_lanes: sums that leave the array, are scaled and added in one cycle.
        clock_hz: cycles per second.
    """

    rows: int = 64
    columns: int = 64
    shift_cycles: int = 1
    vector_lanes: int = 64
    clock_hz: float = 1e9

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.vector_lanes) < 1 or self.shift_cycles < 0 or not self.clock_hz > 0:
            raise InputError(f"{self}: sizes are at least 1, cycles at least 0, and the clock runs.")


@dataclass(frozen=True)
class SimulatedCost:
    """Counts of one product.

    Attributes:
        cycles: of the array, the vector unit's included where the array waits for it.
        operand_bytes: inputs and weights streamed from the buffer, once per tile that needs them.
        result_bytes: outputs, and sums that go out and come back between groups.
    """

    cycles: int
    operand_bytes: int
    result_bytes: int


def simulate_product(
    tokens: int,
    channels: tuple[int, ...],
    outputs: int,
    between: Between,
    *,
    boundaries: int | None = None,
    activation_bits: int = 8,
    weight_bits: int = 8,
    array: SystolicArray | None = None,
) -> SimulatedCost:
    """Count the cycles and bytes of one product.

    Args:
        tokens: M.
        channels: of each group that has any; they sum to K.
        outputs: N.
        between: what happens between groups. ``nothing`` is a product without groups.
        boundaries: bits that the sum is shifted by in all (groups without channels shift too); one less than the
            groups where it is None.
        activation_bits, weight_bits: of the operands.
        array: the hardware.

    Raises:
        InputError: a size below 1.
    """
    array = array or SystolicArray()
    if min(tokens, outputs, *channels) < 1:
        raise InputError(f"A product of {tokens} tokens, groups {list(channels)} and {outputs} outputs is none.")
    groups, inputs = len(channels), sum(channels)
    tiles_down, tiles_across = math.ceil(tokens / array.rows), math.ceil(outputs / array.columns)
    diagonal = array.rows + array.columns - 2
    per_tile = inputs + diagonal
    result_bytes = tokens * outputs * _OUTPUT_BYTES
    if between == "shift":
        per_tile += array.shift_cycles * (groups - 1 if boundaries is None else boundaries)
    elif between == "requantize":
        # Every group is a product of its own: filled, drained, and its sums taken out before the next may begin.
        per_tile += (groups - 1) * diagonal + groups * math.ceil(array.rows * array.columns / array.vector_lanes)
        result_bytes += tokens * outputs * _SUM_BYTES * (2 * groups - 1)  # each out, all but the first read again
    operand_bits = tokens * inputs * activation_bits * tiles_across + outputs * inputs * weight_bits * tiles_down
    return SimulatedCost(tiles_down * tiles_across * per_tile, math.ceil(operand_bits / 8), result_bytes)


def simulate_model(
    linears: Mapping[str, Encoding], tokens: int = 512, array: SystolicArray | None = None
) -> pd.DataFrame:
    """Simulate all linears of a compressed model with the groups that it has.

    Args:
        linears: encodings by linear id, those of a ``CompressedModel``; others than integer ones are left out.
        tokens: rows of the inputs, as in a prefill.
        array: the hardware.

    Returns:
        One row per linear and way between groups: ``linear``, ``between``, ``groups``, ``simulated_cycles``,
        ``simulated_operand_bytes``, ``simulated_result_bytes``, ``simulated_seconds``, and ``simulated_slowdown``
        against the same product without groups.

    Raises:
        InputError: no integer linears.
    """
    array = array or SystolicArray()
    rows = []
    for name, encoding in linears.items():
        if not isinstance(encoding, Integer):
            continue
        scheme = encoding.scheme
        costs = {
            between: simulate_product(
                tokens,
                scheme.channels,
                encoding.shape[0],
                between,
                boundaries=scheme.powers[0],
                activation_bits=scheme.bits,
                weight_bits=encoding.bits,
                array=array,
            )
            for between in BETWEEN
        }
        for between, cost in costs.items():
            rows.append(
                {
                    "linear": name,
                    "between": between,
                    "groups": len(scheme.channels),
                    "simulated_cycles": cost.cycles,
                    "simulated_operand_bytes": cost.operand_bytes,
                    "simulated_result_bytes": cost.result_bytes,
                    "simulated_seconds": cost.cycles / array.clock_hz,
                    "simulated_slowdown": cost.cycles / costs["nothing"].cycles,
                }
            )
    if not rows:
        raise InputError("This model has no linears with integer inputs: compress it with the method 'tender'.")
    return pd.DataFrame(rows)
