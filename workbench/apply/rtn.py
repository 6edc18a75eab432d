"""Round to nearest: group codes of any width per unit, with nothing to fit."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, StrictBool

from workbench.apply.config import Bits, GroupSize, MethodConfig
from workbench.apply.draft import Draft, check_ids, encode
from workbench.apply.registry import register
from workbench.models.base import Architecture
from workbench.progress import Job


class GridConfig(MethodConfig):
    """What methods share that store group codes.

    Attributes:
        bits: width of every unit that ``unit_bits`` does not name: 2 to 8, or 16 to leave it dense (bf16).
        unit_bits: other widths, by unit id or linear id. A linear's beats its unit's.
        group_size: input channels per scale; at least 1, larger than a row means one group per row.
        symmetric: no zero points.
        output_bits: width of the embedding and the output layer.
    """

    grid: ClassVar[bool] = True

    bits: Bits = 4
    unit_bits: dict[str, Bits] = Field(default_factory=dict)
    group_size: GroupSize = 64
    symmetric: StrictBool = False
    output_bits: Bits = 8


class RtnConfig(GridConfig):
    """Round every matrix to the nearest group codes (``formats.codes.quantize_groups``). Attributes: ``GridConfig``."""

    method: Literal["rtn"] = "rtn"


def linear_bits(config: GridConfig, architecture: Architecture) -> dict[str, int]:
    """Return the width of every linear.

    Raises:
        RecipeError: ``unit_bits`` names what the model does not have.
    """
    check_ids(architecture, config.unit_bits, "unit_bits")
    return {
        linear.id: config.unit_bits.get(linear.id, config.unit_bits.get(linear.unit, config.bits))
        for linear in architecture.linears
    }


@register(RtnConfig)
class Rtn:
    """Handler of ``RtnConfig``; what it fits is the width of every linear."""

    def fit(self, draft: Draft, config: RtnConfig, *, seed: int, job: Job) -> dict[str, int]:
        return linear_bits(config, draft.model.architecture)

    def apply(self, draft: Draft, config: RtnConfig, fitted: dict[str, int], *, job: Job) -> None:
        draft.encode_linears(
            lambda linear, weight: encode(weight, fitted[linear.id], config.group_size, config.symmetric), job
        )
        draft.encode_outputs(config.output_bits, config.group_size, config.symmetric, job)
