"""bitsandbytes as a rival: NF4 and int8 weights that its own kernels run, on the reference engine only."""

from __future__ import annotations

from workbench.apply.configs import BnbInt8Config as BnbInt8Config
from workbench.apply.configs import BnbNf4Config as BnbNf4Config
from workbench.apply.draft import Draft
from workbench.apply.registry import register
from workbench.formats.bnb import Int8, Nf4, bitsandbytes, check_nf4_blocks
from workbench.progress import Job

_OUTPUT_GROUP = 64  # of the embedding and the output layer, which bitsandbytes itself leaves dense


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
