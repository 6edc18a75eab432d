"""What rounding inputs in groups at powers of two is expected to do to outputs, by number of groups.

Rows x of calibration text are rounded to x' as the engine would. If the errors of different channels have nothing to
do with one another, the expected squared change of a unit's outputs is ``sum_c E[(x_c - x'_c)^2] * sum_r W_rc^2``; that
of rounding its weights, which no group changes, is ``sum_c E[x_c^2] * sum_r E_rc^2``. Both are given relative to
``sum_c E[x_c^2] * sum_r W_rc^2``, the outputs' own square with channels likewise apart. The first token of every window
is left out: what it carries speaks for no other token. Scales by chunk are those of rounding up; where the method finds
rounding down better for the text, it is not what is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from workbench.analysis.common import model_provenance
from workbench.analysis.profile import TextRecord
from workbench.apply.draft import Draft
from workbench.apply.input_ranges import InputRanges, input_ranges
from workbench.apply.tender import (
    MOST_GROUPS,
    IntegerBits,
    Scales,
    TenderConfig,
    is_centred,
    tender_scheme,
    weight_power,
)
from workbench.errors import RecipeError
from workbench.formats.codes import dequantize, quantize_groups
from workbench.formats.integers import MOST, InputScheme, round_rows
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job

BITS: tuple[IntegerBits, ...] = (8, 4)
SCALES: tuple[Scales, ...] = ("token", "chunk")
_STARTS = (0, 1)  # the first position, and all others: one chunk, for windows no longer than it
_ROWS, _WEIGHT_ROWS = 32, 128  # of inputs that are rounded; of each matrix


class GroupErrors:
    """Predicted relative errors of every unit, by bits, way of scaling and number of groups.

    The table has ``block``, ``unit``, ``bits`` (of both operands), ``scales`` (``token``, ``chunk``), ``groups`` (asked
    for; 1 by token is plain rounding of rows), ``activation_error``, ``weight_error``, ``chosen`` (the number that the
    method takes by itself), and, of the unit's inputs: ``peak``, the median over tokens of the largest magnitude over
    the root of the mean square, and ``spread``, how far tokens differ: the largest magnitude of a token near the top
    (95 %) over that of one near the bottom (5 %). Numbers of groups whose sums could leave 32 bits are left out.

    Args:
        model: the dense model.
        windows: token windows.
        texts: records of the texts that they are from.
        seed: of the rows that are rounded.
    """

    def __init__(
        self, model: LoadedModel, windows: Sequence[Sequence[int]], *, texts: Sequence[TextRecord] = (), seed: int = 0
    ) -> None:
        self._model, self._windows, self._seed = model, [list(window) for window in windows], seed
        self._ranges: dict[str, InputRanges] | None = None
        records = [text.model_dump(mode="json") for text in texts]
        parameters = {"windows": self._windows, "rows": _ROWS, "records": records}
        self.provenance = model_provenance("group-errors", model, None, seed, parameters)

    @property
    def parts(self) -> Sequence[str]:
        return [f"block {index}" for index in range(self._model.architecture.n_blocks)]

    @torch.no_grad()
    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one block's rows."""
        if self._ranges is None:
            self._ranges = input_ranges(self._model, self._windows, _STARTS, self._seed, Job(lambda _: job.check()))
        found = []
        for unit in self._model.architecture.units:
            if f"block {unit.block}" == part:
                job.check()
                found += self._unit_rows(unit, self._ranges[unit.id])
        return pd.DataFrame(found)

    def _unit_rows(self, unit: Unit, ranges: InputRanges) -> list[dict[str, Any]]:
        rows = ranges.rows[:: max(1, len(ranges.rows) // _ROWS)][:_ROWS].float()
        ranges = replace(ranges, rows=rows)
        draft = Draft(self._model)
        lengths = weight_power(draft, unit)
        power = float((rows.square().mean(0) * lengths).sum()) or 1.0
        largest = rows.abs().amax(1)
        peak = float((largest / rows.square().mean(1).sqrt().clamp(min=1e-30)).median())
        low, high = (float(v) for v in torch.quantile(largest, torch.tensor([0.05, 0.95])))
        about = {"block": unit.block, "unit": unit.id, "peak": peak, "spread": high / max(low, 1e-30)}
        found: list[dict[str, Any]] = []
        weight_errors = {bits: _weight_error(draft, unit, bits, rows) / power for bits in BITS}
        for scales in SCALES:
            config = TenderConfig(bits=4, activation_bits=4, scales=scales)  # 4 bits leave room for more groups
            centred = is_centred(config, unit)
            schemes = _by_groups(ranges, lengths, config, centred)
            for bits in BITS:
                able = [scheme for scheme in (_at(scheme, bits) for scheme in schemes) if scheme.reach(bits) <= MOST]
                asked = config.model_copy(update={"bits": bits, "activation_bits": bits})
                chosen = tender_scheme(ranges, lengths, asked, _STARTS, centred=centred)
                number = [scheme.powers for scheme in able].index(chosen.powers)  # the fewest that are this scheme
                error, before = 0.0, None
                for groups, scheme in enumerate(able, start=1):
                    if before is None or before.powers != scheme.powers:
                        error = float(((rows - restored(scheme, rows)).square().mean(0) * lengths).sum()) / power
                    before = scheme
                    found.append(
                        about
                        | {"bits": bits, "scales": scales, "groups": groups, "activation_error": error}
                        | {"weight_error": weight_errors[bits], "chosen": groups == number + 1}
                    )
        return found


def _by_groups(ranges: InputRanges, lengths: torch.Tensor, config: TenderConfig, centred: bool) -> list[InputScheme]:
    """Schemes of 1, 2 and more groups, up to where sums could overflow."""
    found: list[InputScheme] = []
    for groups in range(1, MOST_GROUPS + 1):
        asked = config.model_copy(update={"groups": groups})
        try:
            scheme = tender_scheme(ranges, lengths, asked, _STARTS, centred=centred)
        except RecipeError:  # so many could overflow, and so could more
            break
        if found and scheme.powers == found[-1].powers:  # no channel is smaller still, however many groups follow
            return found + [found[-1]] * (MOST_GROUPS + 1 - groups)
        found.append(scheme)
    return found


def _at(scheme: InputScheme, bits: int) -> InputScheme:
    """The same groups at other bits: they follow from ranges, and a step is a range over the largest code."""
    finer = (2 ** (scheme.bits - 1) - 1) / (2 ** (bits - 1) - 1)
    steps = None if scheme.steps is None else scheme.steps * finer
    return replace(scheme, bits=bits, steps=steps)


def restored(scheme: InputScheme, rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, in) after rounding, as the numbers that their codes stand for; none of them at the first position."""
    rounded = round_rows(scheme, rows, torch.ones(len(rows), dtype=torch.int64))
    values = (rounded.codes * rounded.scales).float()
    if scheme.order is not None:
        at_place = torch.empty_like(values)
        at_place[:, scheme.order] = values
        values = at_place
    values = values / scheme.place_multipliers()
    return values if scheme.bias is None else values + scheme.bias


def _weight_error(draft: Draft, unit: Unit, bits: int, rows: torch.Tensor) -> float:
    """Expected squared change of the outputs by rounding the weights, one scale per output channel."""
    square, total = rows.square().mean(0), 0.0
    for linear in unit.linears:
        full = draft.weight(linear.path)
        weight = full[:: max(1, len(full) // _WEIGHT_ROWS)]
        error = dequantize(quantize_groups(weight, bits, weight.shape[1], True)) - weight
        total += float((error.square().sum(0) * square).sum()) * len(full) / len(weight)
    return total
