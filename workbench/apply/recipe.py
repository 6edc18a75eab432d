"""The recipe: everything that decides the bytes of a compressed model, as one checked, hashable record."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator

from workbench.apply.config import MethodConfig, Strict, Whole
from workbench.apply.configs import (
    AnyPrecisionConfig,
    AwqConfig,
    BnbInt8Config,
    BnbNf4Config,
    GgufConfig,
    GptqConfig,
    IntegerConfig,
    NestedConfig,
    RtnConfig,
    SalientConfig,
    TenderConfig,
    TuneConfig,
)
from workbench.apply.input_sparsity_config import InputSparsityConfig, check_sparse
from workbench.apply.precision_config import PrecisionConfig, check_widths
from workbench.apply.sparsity_config import PredictedSparsityConfig
from workbench.corpus import TextRecord
from workbench.errors import InputError, RecipeError
from workbench.files import check_output_file, write_whole
from workbench.formats.manifest import Sha256
from workbench.models.base import Fingerprint, LoadedModel

AnyMethod = Annotated[
    RtnConfig
    | AwqConfig
    | GptqConfig
    | TuneConfig
    | SalientConfig
    | NestedConfig
    | PrecisionConfig
    | InputSparsityConfig
    | PredictedSparsityConfig
    | AnyPrecisionConfig
    | TenderConfig
    | IntegerConfig
    | GgufConfig
    | BnbNf4Config
    | BnbInt8Config,
    Field(discriminator="method"),
]
# Methods that leave group codes behind for another one to work on.
_GRIDS = tuple(m.model_fields["method"].default for m in get_args(get_args(AnyMethod)[0]) if m.grid)

# Stages of methods that leave the stored weights as they are and decide, token by token, what is read of them.
_WHILE_RUNNING = ("precision", "sparsity")


class Identity(Strict):
    """A model's ``Fingerprint`` as JSON."""

    architecture: Sha256
    weights: Sha256


class Budget(Strict):
    """What a solution may cost; exactly one of the two is given.

    Attributes:
        average_bits: effective bits: stored bits per weight over all linears of the blocks.
        bytes: bytes of all linears of the blocks on disk.
    """

    average_bits: Annotated[float, Field(gt=0)] | None = None
    bytes: Annotated[Whole, Field(gt=0)] | None = None

    def model_post_init(self, _: Any) -> None:
        if (self.average_bits is None) == (self.bytes is None):
            raise RecipeError("Budget: give either average_bits or bytes, and not both.")

    @property
    def kind(self) -> Literal["average_bits", "bytes"]:
        return "bytes" if self.average_bits is None else "average_bits"

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes" if self.average_bits is None else f"{self.average_bits:g} average bits"


class DamageSource(Strict):
    """Which measured damages a solution was made from.

    Attributes:
        column: ``kl``, ``fisher`` or ``gradient``.
        profile: key (SHA-256) of the profile they were read from.
        text: the text that it was measured on, so that no evaluation uses it again.
    """

    column: Literal["kl", "fisher", "gradient"]
    profile: Sha256
    text: TextRecord | None = None


class Solution(Strict):
    """What the solver found.

    Attributes:
        budget: what was asked for.
        achieved_bits: effective bits of the solution, at most the budget.
        achieved_bytes: bytes of the blocks' linears.
        predicted_damage: sum of the table's damages over the units.
        gap: proven bound on how far ``predicted_damage`` is from the optimum, relative; 0 is optimal.
        unit_bits: width of every unit.
        pinned: those that the user fixed.
        monotone: damages were made non-increasing in bits first.
        solver: name and version.
        damage: where the damages came from, None where they were not read from a profile.
    """

    budget: Budget
    achieved_bits: float
    achieved_bytes: int
    predicted_damage: float
    gap: float
    unit_bits: dict[str, int]
    pinned: dict[str, int] = Field(default_factory=dict)
    monotone: bool = True
    solver: str
    damage: DamageSource | None = None


def _plain_identity(value: Any) -> Any:
    return asdict(value) if isinstance(value, Fingerprint) else value


class Recipe(Strict):
    """What to do to which model.

    Attributes:
        schema_version: of this record.
        model: name or source of the model, for people.
        fingerprint: of the model that it was written for; None in a recipe written by hand for any model.
        seed: of everything random.
        methods: what to do, in order.
        solution: the solver's record, where it wrote this recipe.
    """

    schema_version: Literal[1] = 1
    model: str
    fingerprint: Annotated[Identity | None, BeforeValidator(_plain_identity)] = None
    seed: Annotated[Whole, Field(ge=0)] = 0
    methods: tuple[AnyMethod, ...]
    solution: Solution | None = None

    @field_validator("methods")
    @classmethod
    def _order(cls, methods: tuple[MethodConfig, ...]) -> tuple[MethodConfig, ...]:
        for i, method in enumerate(methods):
            if method.stage == "codes" and (i == 0 or not methods[i - 1].grid):
                found = f"after '{methods[i - 1].method}'" if i else "first"
                raise RecipeError(
                    f"Recipe: methods[{i}] '{method.method}' works on stored group codes and stands {found}; it goes "
                    f"right after one of {', '.join(_GRIDS)}."
                )
        weights = [i for i, method in enumerate(methods) if method.stage == "weights"]
        after = [i for i, method in enumerate(methods) if method.stage in _WHILE_RUNNING]
        if not methods:
            raise RecipeError("Recipe: methods is empty; name one method that stores the weights, such as 'rtn'.")
        if not weights:
            means = "'nested', which stores several widths" if methods[0].stage == "precision" else "one, such as 'rtn'"
            raise RecipeError(
                f"Recipe: methods has '{methods[0].method}' and no method that stores the weights it decides on: put "
                f"{means}, before it."
            )
        if len(weights) > 1:
            i, j = weights[:2]
            raise RecipeError(
                f"Recipe: methods[{i}] '{methods[i].method}' and methods[{j}] '{methods[j].method}' both store the "
                "weights of all units, and a unit has one format: keep one of them."
            )
        for i, j in itertools.combinations(after, 2):
            if methods[i].method == methods[j].method:
                raise RecipeError(
                    f"Recipe: '{methods[i].method}' is there twice, as methods[{i}] and methods[{j}]: keep one of them."
                )
            if methods[i].stage == methods[j].stage == "sparsity":
                raise RecipeError(
                    f"Recipe: methods[{i}] '{methods[i].method}' and methods[{j}] '{methods[j].method}' both decide "
                    "what is left out, and a model runs under one of them: keep one."
                )
            if methods[i].stage != methods[j].stage:
                raise RecipeError(
                    f"Recipe: methods[{i}] '{methods[i].method}' and methods[{j}] '{methods[j].method}' decide on "
                    "widths and on what is left out, each as if the other did not: keep one of them."
                )
        stored = methods[weights[0]]
        for i in after:
            if i < weights[0]:
                raise RecipeError(
                    f"Recipe: methods[{i}] '{methods[i].method}' comes before methods[{weights[0]}] '{stored.method}', "
                    "whose weights it decides on: put it after that."
                )
            check_widths(methods[i], stored)
            check_sparse(methods[i], stored)
        return methods

    @classmethod
    def for_model(
        cls, model: LoadedModel, *methods: MethodConfig, seed: int = 0, solution: Solution | None = None
    ) -> Self:
        """Return a recipe for exactly this model."""
        return cls.model_validate(
            {
                "model": model.name,
                "fingerprint": model.fingerprint,
                "seed": seed,
                "methods": methods,
                "solution": solution,
            }
        )

    @property
    def label(self) -> str:
        """What tables call it: the method, or those that make up the codes together (``awq+gptq``)."""
        last = self.methods[-1]
        if last.stage != "codes":
            return last.label
        named = [m.label for m in self.methods if m.stage not in _WHILE_RUNNING]
        return "+".join(named if named[0] != "rtn" else named[1:])  # plain rounding is what the others correct

    @property
    def learns(self) -> bool:
        """Whether anything is fitted on text."""
        return any(method.learns for method in self.methods)

    def up_to(self, index: int) -> Self:
        """Return the recipe of the methods up to the one at an index, that one included."""
        return self.model_copy(update={"methods": self.methods[: index + 1]})

    def without_last(self) -> Self:
        """Return the recipe of everything but the last method."""
        return self.up_to(len(self.methods) - 2)

    def canonical(self) -> str:
        """The JSON form that identity is taken of: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def sha256(self) -> str:
        """Identity (hex) of the recipe."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def check_model(self, model: LoadedModel, *, allow_other_weights: bool = False) -> None:
        """Raise ``RecipeError`` where this recipe was written for another model.

        Args:
            model: the model to be compressed.
            allow_other_weights: accept other weights of the same architecture, such as a fine-tune.
        """
        if self.fingerprint is None:
            return
        if self.fingerprint.architecture != model.fingerprint.architecture:
            raise RecipeError(
                f"The recipe was written for {self.model}, and {model.name} has another architecture: write a recipe "
                "for it."
            )
        if self.fingerprint.weights != model.fingerprint.weights and not allow_other_weights:
            raise RecipeError(
                f"The recipe was written for {self.model}, and {model.name} has the same architecture but other "
                "weights: allow other weights to use it knowingly, or write a recipe for it."
            )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a recipe from a JSON file.

        Raises:
            InputError: no such file, or not readable.
            RecipeError: not JSON, or not a recipe; the message names field, value and what is allowed.
        """
        try:
            values = json.loads(Path(path).read_bytes().decode("utf-8"))
        except OSError as error:
            raise InputError(f"Cannot read the recipe {path}: {error.strerror or error}.") from error
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path} is not JSON: {error}.") from error
        if not isinstance(values, Mapping):
            raise RecipeError(f"{path} is not a recipe: it must hold a JSON object with 'model' and 'methods'.")
        return cls.model_validate(values)

    def save(self, path: Path | str) -> Path:
        """Write the recipe as JSON, whole or not at all, replacing a file that is there. Returns the path."""
        target = check_output_file(path)
        write_whole(target, json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n")
        return target
