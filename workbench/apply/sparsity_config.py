"""The config of predicted sparsity; what it does is in ``apply.masks``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from workbench.apply.config import MethodConfig, Stage, Whole
from workbench.apply.configs import (
    BATCH,
    FEWEST_TOKENS,
    LONG_CONTEXT,
    SAMPLED,
    fewest_tokens,
    sampled_length,
    window_length,
)
from workbench.errors import RecipeError

Criterion = Literal["plainact", "fisher", "grad_norm", "magnitude", "preactivation", "weighted"]
Share = Annotated[float, Field(gt=0, lt=1)]


def _shares(given: tuple[float, ...]) -> tuple[float, ...]:
    if not given or list(given) != sorted(set(given)):
        raise ValueError(
            f"they must ascend, with none twice and at least one; nearest is {sorted(set(given)) or [0.5]}"
        )
    return given


def _criteria(given: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(given)) < len(given):
        raise ValueError(f"each once; nearest is {list(dict.fromkeys(given))}")
    return given


class PredictedSparsityConfig(MethodConfig):
    """Learn to predict which heads and neurons matter little; goes after the method that stores the weights.

    Attributes:
        criterion: what is predicted (``analysis.sparsity``).
        predictor: ``unified``, one at the beginning for all later blocks (ShadowLLM); ``per-layer``, one in every
            block (as DejaVu's, but without looking ahead).
        tap: what the unified predictor reads: the ``residual`` that leaves its last whole block, or, as ShadowLLM does,
            the ``attention_output`` of block 0, which knows less of the token itself and predicts worse.
        whole_blocks: the first blocks that nothing is left out of; beside block 0 only for ``residual`` and
            ``per-layer``.
        width: of the hidden layer.
        scope: when is decided: at every ``token``, ``every`` n tokens, once per ``reply``.
        n: of ``every``.
        span: of ``reply``: tokens after the prompt that the decision is trained for.
        prefix: tokens at the beginning of a text that stay whole.
        allocation: of the masks, where none is asked for (``runtime.masks``). None: ``joint`` where it is tuned, else
            ``hybrid``.
        epochs: of the regression, at most.
        decisions_per_text: deciding tokens that are looked at in each text.
        tune_steps: of tuning through the model; 0 for none.
        tune_sparsities: shares of the weights that it is tuned at, in turn.
        aggregates: criteria whose means are stored, beside the one that is predicted, for masks without a predictor.
        calibration_tokens: of text sampled from the model; never the text that the codes were fitted on.
    """

    method: Literal["predicted-sparsity"] = "predicted-sparsity"
    stage: ClassVar[Stage] = "sparsity"
    version: ClassVar[int] = 4
    criterion: Criterion = "plainact"
    predictor: Literal["unified", "per-layer"] = "unified"
    tap: Literal["attention_output", "residual"] = "residual"
    whole_blocks: Annotated[Whole, Field(ge=1)] = 1
    width: Annotated[Whole, Field(ge=1)] = 64
    scope: Literal["token", "every", "reply"] = "token"
    n: Annotated[Whole, Field(ge=1)] = 8
    span: Annotated[Whole, Field(ge=1)] = 32
    prefix: Annotated[Whole, Field(ge=0)] = 64
    allocation: Literal["local", "global", "hybrid", "joint"] | None = None
    epochs: Annotated[Whole, Field(ge=1)] = 20
    decisions_per_text: Annotated[Whole, Field(ge=1)] = 64
    tune_steps: Annotated[Whole, Field(ge=0)] = 0
    tune_sparsities: Annotated[tuple[Share, ...], AfterValidator(_shares)] = (0.3, 0.5)
    aggregates: Annotated[tuple[Criterion, ...], AfterValidator(_criteria)] = ("magnitude",)
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 13824

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that holds a decision and all that it governs."""
        if self.scope == "reply":
            return max(self.prefix, 1) + self.span
        n = self.n if self.scope == "every" else 1
        return -(-self.prefix // n) * n + n

    def check_text(self, context: int) -> None:
        """Refuse what cannot hold one decision, before anything is sampled for it.

        Args:
            context: of the model, tokens.

        Raises:
            RecipeError: too few calibration tokens, or a prefix that no text of this context goes beyond.
        """
        longest = window_length(sampled_length(BATCH * SAMPLED, context))
        if longest < self.shortest:
            self._refuse("prefix", self.prefix, f"the longest texts here have {longest}")
        found = window_length(sampled_length(self.calibration_tokens, context))
        if found < self.shortest:
            fewest = fewest_tokens(self.shortest)
            why = f"these give texts of {found}; it must be at least {fewest}, or the prefix shorter"
            self._refuse("calibration_tokens", self.calibration_tokens, why)

    def _refuse(self, field: str, value: int, why: str) -> None:
        governs = "its reply" if self.scope == "reply" else "what it governs"
        raise RecipeError(
            f"Method '{self.method}': {field} = {value} is not possible: a decision after the first {self.prefix} "
            f"tokens, with {governs}, takes a text of {self.shortest}, and {why}."
        )

    @model_validator(mode="after")
    def _holds_a_decision(self) -> Self:
        self.check_text(LONG_CONTEXT)
        return self
