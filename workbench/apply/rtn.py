"""Round to nearest: group codes of any width per unit, with nothing to fit."""

from __future__ import annotations

from workbench.apply.configs import GridConfig as GridConfig
from workbench.apply.configs import RtnConfig as RtnConfig
from workbench.apply.draft import Draft, check_ids, encode
from workbench.apply.registry import register
from workbench.models.base import Architecture
from workbench.progress import Job


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
