"""bitsandbytes as a rival: NF4 and int8 weights that its own kernels run, on the reference engine only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StrictBool

from workbench.apply.config import Bits, MethodConfig, Whole
from workbench.apply.draft import Draft
from workbench.apply.registry import register
from workbench.formats.bnb import BLOCK_SIZES, Int8, Nf4, bitsandbytes, check_nf4_blocks
from workbench.progress import Job

_OUTPUT_GROUP = 64  # of the embedding and the output layer, which bitsandbytes itself leaves dense


def _block_size(value: int) -> int:
    if value not in BLOCK_SIZES:
        nearest = min(BLOCK_SIZES, key=lambda size: abs(size - value))
        raise ValueError(f"allowed are {', '.join(map(str, BLOCK_SIZES))}; nearest is {nearest}")
    return value


class BnbNf4Config(MethodConfig):
    """4-bit NormalFloat codes of bitsandbytes for all linears of the blocks.

    Attributes:
        block_size: weights per scale; must divide the rows of every linear.
        double_quant: store the scales in 8 bits.
        output_bits: width of the embedding and the output layer in group codes; 16 leaves them as bitsandbytes does.
    """

    method: Literal["bnb-nf4"] = "bnb-nf4"
    block_size: Annotated[Whole, AfterValidator(_block_size)] = 64
    double_quant: StrictBool = False
    output_bits: Bits = 8


class BnbInt8Config(MethodConfig):
    """int8 weights and activations of bitsandbytes (LLM.int8()) for all linears of the blocks.

    Attributes:
        threshold: input channels that hold an activation beyond it are multiplied in full precision; 0 for none. The
            library's own default is 6. It looks for them in all tokens of one call at once, so with a threshold above
            0 a later token can change the output of an earlier one; that is why it is off here.
        output_bits: as for ``BnbNf4Config``.
    """

    method: Literal["bnb-int8"] = "bnb-int8"
    threshold: Annotated[float, Field(ge=0)] = 0.0
    output_bits: Bits = 8


@register(BnbNf4Config)
class BnbNf4:
    """Handler of ``BnbNf4Config``; there is nothing to fit."""

    def fit(self, draft: Draft, config: BnbNf4Config, *, seed: int, job: Job) -> None:
        model = draft.model
        bitsandbytes()  # a missing library, or a shape that it cannot run, is said before any work
        for width in {linear.in_features for linear in model.architecture.linears}:
            check_nf4_blocks(width, config.block_size)

    def apply(self, draft: Draft, config: BnbNf4Config, fitted: None, *, job: Job) -> None:
        draft.encode_linears(lambda _, weight: Nf4.of(weight, config.block_size, config.double_quant), job)
        draft.encode_outputs(config.output_bits, _OUTPUT_GROUP, False, job)


@register(BnbInt8Config)
class BnbInt8:
    """Handler of ``BnbInt8Config``; there is nothing to fit."""

    def fit(self, draft: Draft, config: BnbInt8Config, *, seed: int, job: Job) -> None:
        bitsandbytes()

    def apply(self, draft: Draft, config: BnbInt8Config, fitted: None, *, job: Job) -> None:
        draft.encode_linears(lambda _, weight: Int8.of(weight, config.threshold), job)
        draft.encode_outputs(config.output_bits, _OUTPUT_GROUP, False, job)
