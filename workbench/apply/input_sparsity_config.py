"""The config of input sparsity; what it does is in ``apply.input_sparsity``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from workbench.apply.config import MethodConfig, Stage, Whole
from workbench.apply.configs import FEWEST_TOKENS, SHORTEST, BnbInt8Config, IntegerConfig, TenderConfig
from workbench.errors import RecipeError

MOST = 0.85  # of the inputs: units that bear more than the average go up to 0.9, and there must be some
_TABLE, _LEARNT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (0.4,)


def _targets(given: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if given is None:
        return None
    if not given:
        raise ValueError("at least one share is needed, such as 0.4")
    nearest = tuple(sorted({min(max(share, 0.05), MOST) for share in given}))
    if nearest != tuple(given):
        raise ValueError(f"shares are 0.05 to {MOST} and ascend, with none twice; nearest is {list(nearest)}")
    return given


def _blocks(given: tuple[int, ...]) -> tuple[int, ...]:
    if list(given) != sorted(set(given)) or (given and given[0] < 0):
        raise ValueError("blocks are numbered from 0 and ascend, with none twice")
    return given


class InputSparsityConfig(MethodConfig):
    """Find out which inputs of every unit may be left out while running; goes after the method that stores the weights.

    Attributes:
        criterion: an input x_i is left out where |x_i| f_i is small. f is 1 for ``magnitude`` (TEAL), the norm of the
            weights' column for ``weighted`` (WINA), and learnt by gradient for ``learnt``.
        allocation: how a share of all weights is split over units: the same share everywhere (``uniform``), block by
            block by the error of the block's output (``greedy``, TEAL), or over all units by the divergence that each
            causes alone (``solved``). ``learnt`` starts from it.
        targets: shares of all weights to be left out that tables are made for; those between them are interpolated.
            With ``learnt`` these are learnt for, in turn: each more makes the steps for the others fewer. None for
            0.1, 0.2 .. 0.7, or 0.4 alone where they are learnt.
        first: tokens at the beginning of a text that are kept whole.
        protected: blocks that are kept whole.
        calibration_tokens: of text sampled from the model; never the text that the weights were fitted on.
        allocation_tokens: how many of them ``greedy`` and ``solved`` look at, at least.
        teacher: what ``learnt`` is fitted to: the outputs of the stored weights without sparsity (``compressed``), so
            that nothing but sparsity is borne better, or those of the model before it was compressed (``dense``), so
            that rounding is made up for as well: a fit that weights without sparsity could have had too.
        learning_steps: at most; the fit ends earlier once held-out text says that it does not help.
        learning_tokens: of a step, at least.
    """

    method: Literal["input-sparsity"] = "input-sparsity"
    stage: ClassVar[Stage] = "sparsity"
    version: ClassVar[int] = 2
    criterion: Literal["magnitude", "weighted", "learnt"] = "magnitude"
    allocation: Literal["uniform", "greedy", "solved"] = "solved"
    targets: Annotated[tuple[float, ...] | None, AfterValidator(_targets)] = None
    first: Annotated[Whole, Field(ge=1, le=4)] = 1
    protected: Annotated[tuple[Whole, ...], AfterValidator(_blocks)] = ()
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 13824
    allocation_tokens: Annotated[Whole, Field(ge=SHORTEST)] = 2048
    teacher: Literal["compressed", "dense"] = "compressed"
    learning_steps: Annotated[Whole, Field(ge=1)] = 60
    learning_tokens: Annotated[Whole, Field(ge=SHORTEST)] = 2048

    @property
    def goals(self) -> tuple[float, ...]:
        """The targets, also where none were given."""
        return self.targets or (_LEARNT if self.criterion == "learnt" else _TABLE)


def check_sparse(config: MethodConfig, stored: MethodConfig) -> None:
    """Refuse weights whose inputs cannot be left out one by one, before anything is fitted.

    Raises:
        RecipeError: weights that are stored together with a way to round their inputs.
    """
    if isinstance(config, InputSparsityConfig) and isinstance(stored, TenderConfig | IntegerConfig | BnbInt8Config):
        raise RecipeError(
            f"Recipe: '{config.method}' leaves out inputs by their size, and '{stored.method}' rounds them to integers "
            "first: use a method that stores weights alone, such as 'rtn'."
        )
