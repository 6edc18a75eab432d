"""The config of dynamic precision; what it does is in ``apply.precision``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from workbench.apply.config import MethodConfig, Stage, Whole
from workbench.apply.configs import FEWEST_TOKENS, NestedConfig
from workbench.errors import RecipeError


def _targets(given: tuple[float, ...]) -> tuple[float, ...]:
    if list(given) != sorted(set(given)):
        raise ValueError(f"they must ascend, with none twice; nearest is {sorted(set(given))}")
    return given


class PrecisionConfig(MethodConfig):
    """Measure what is needed to choose the widths of nested codes per token; goes after ``nested``.

    Attributes:
        memory_bits: average of the units' widest widths; codes beyond them are dropped. None keeps all.
        targets: average bits to learn precisions for (DP-LLM's second phase); targets between them are interpolated.
            Empty learns none: the rule ``gain`` needs none.
        learning_steps: per target.
        projection_rows: k of the estimators of errors.
        calibration_tokens: of text sampled from the model; never the text that the codes were fitted on.
    """

    method: Literal["dynamic-precision"] = "dynamic-precision"
    stage: ClassVar[Stage] = "precision"
    memory_bits: Annotated[float, Field(gt=0)] | None = None
    targets: Annotated[tuple[float, ...], AfterValidator(_targets)] = (3.25, 4.0, 4.75)
    learning_steps: Annotated[Whole, Field(ge=1)] = 24
    projection_rows: Annotated[Whole, Field(ge=1)] = 16
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 8192


def check_widths(config: MethodConfig, stored: MethodConfig) -> None:
    """Refuse what the widths of the method that stores the weights cannot give, before anything is fitted.

    Args:
        config: of dynamic precision.
        stored: the config of the method before it.

    Raises:
        RecipeError: weights that are not nested, or of one width; memory or a target beyond the widths.
    """
    if not isinstance(config, PrecisionConfig):
        return
    if not isinstance(stored, NestedConfig):
        raise RecipeError(
            f"Recipe: '{config.method}' chooses among the widths that 'nested' stores, and '{stored.method}' stores "
            "none that it can choose among: put 'nested' before it."
        )
    widths = stored.widths
    if len(widths) < 2:
        raise RecipeError(
            f"Recipe: '{config.method}' chooses among widths, and 'nested' stores {widths[0]} bits alone: give its "
            "'widths' two or more, such as [3, 4, 5, 6]."
        )
    narrowest, widest = widths[0], widths[-1]
    if config.memory_bits is not None and config.memory_bits < narrowest:
        raise RecipeError(
            f"Recipe: memory_bits = {config.memory_bits:g} of '{config.method}' is not possible; 'nested' stores "
            f"{narrowest} bits or more; nearest is {narrowest}."
        )
    highest = min(config.memory_bits or widest, widest)
    for target in config.targets:
        if not narrowest < target < highest:
            raise RecipeError(
                f"Recipe: targets of '{config.method}' has {target:g}, which is not possible; give targets "
                f"between {narrowest} and {highest:g} bits, both left out, or [] to learn none."
            )
