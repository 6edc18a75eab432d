"""Nested group codes: one stored parent that is read at any width, chosen while running."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, StrictBool

from workbench.apply.config import Bits, GroupSize, MethodConfig, Whole
from workbench.apply.draft import Draft
from workbench.apply.registry import register
from workbench.formats.codes import MAX_BITS, quantize_groups
from workbench.formats.nested import Nested
from workbench.models.base import LoadedModel
from workbench.progress import Job

_LEAST = 3  # a parent with a single width nests nothing


def _parent(value: int) -> int:
    if not _LEAST <= value <= MAX_BITS:
        raise ValueError(f"allowed are {_LEAST} to {MAX_BITS}; nearest is {min(max(value, _LEAST), MAX_BITS)}")
    return value


class NestedConfig(MethodConfig):
    """Round every linear to parent codes whose top bits are the narrower weights (``formats.nested``).

    Attributes:
        bits: width of the parent, 3 to 8; any width from 2 up to it may be read.
        group_size: input channels per scale.
        symmetric: no zero points.
        output_bits: width of the embedding and the output layer, which are not nested.
    """

    method: Literal["nested"] = "nested"
    bits: Annotated[Whole, AfterValidator(_parent)] = 8
    group_size: GroupSize = 64
    symmetric: StrictBool = False
    output_bits: Bits = 8


@register(NestedConfig)
class NestedMethod:
    """Handler of ``NestedConfig``; there is nothing to fit."""

    def fit(self, model: LoadedModel, config: NestedConfig, *, seed: int, job: Job) -> None:
        return None

    def apply(self, draft: Draft, config: NestedConfig, fitted: None, *, job: Job) -> None:
        draft.encode_linears(
            lambda _, weight: Nested.of_codes(
                quantize_groups(weight, config.bits, config.group_size, config.symmetric)
            ),
            job,
        )
        draft.encode_outputs(config.output_bits, config.group_size, config.symmetric, job)
