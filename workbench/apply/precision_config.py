"""The config of dynamic precision; what it does is in ``apply.precision``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from workbench.apply.calibration import FEWEST_TOKENS
from workbench.apply.config import MethodConfig, Whole


def _targets(given: tuple[float, ...]) -> tuple[float, ...]:
    if list(given) != sorted(set(given)):
        raise ValueError(f"targets ascend, each once; nearest is {tuple(sorted(set(given)))}")
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
    stage: ClassVar[Literal["weights", "precision"]] = "precision"
    memory_bits: Annotated[float, Field(gt=0)] | None = None
    targets: Annotated[tuple[float, ...], AfterValidator(_targets)] = (3.25, 4.0, 4.75)
    learning_steps: Annotated[Whole, Field(ge=1)] = 24
    projection_rows: Annotated[Whole, Field(ge=1)] = 16
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 8192
