"""What all method configs share: strict fields, and validation errors that read as one line."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from workbench.errors import RecipeError, suggest
from workbench.formats.limits import DENSE_BITS, MAX_BITS, MIN_BITS

WIDTHS = (*range(MIN_BITS, MAX_BITS + 1), DENSE_BITS)

# What pydantic names by Python's types, for people who write JSON; by the beginning of its error's type.
_NEEDED = {
    "tuple": "a list",
    "list": "a list",
    "float": "a number",
    "finite_number": "a number",
    "int": "a whole number",
    "string": "a text in quotes",
    "bool": "true or false",
    "dict": 'an object, as {"name": value},',
    "mapping": 'an object, as {"name": value},',
    "model": 'an object, as {"name": value},',
}


def _whole(value: Any) -> int:
    """Accept integers of any library, and neither booleans nor numbers that merely look whole."""
    if isinstance(value, bool):
        raise ValueError("a whole number is needed")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError("a whole number is needed") from None


def _width(value: int) -> int:
    if value not in WIDTHS:
        nearest = min(WIDTHS, key=lambda width: (abs(width - value), width))
        raise ValueError(f"allowed are {MIN_BITS} to {MAX_BITS}, and {DENSE_BITS} for dense; nearest is {nearest}")
    return value


def _widths(given: tuple[int, ...]) -> tuple[int, ...]:
    nearest = tuple(sorted({min(max(bits, MIN_BITS), MAX_BITS) for bits in given}))
    if nearest != given:
        raise ValueError(f"widths are {MIN_BITS} to {MAX_BITS} and ascend, with none twice; nearest is {list(nearest)}")
    if not given:
        raise ValueError("at least one width is needed")
    return given


Whole = Annotated[int, BeforeValidator(_whole)]
Bits = Annotated[Whole, AfterValidator(_width)]
Widths = Annotated[tuple[Whole, ...], AfterValidator(_widths)]  # of one parent, for running at any of them
Stage = Literal["weights", "codes", "precision", "sparsity"]
GroupSize = Annotated[Whole, Field(ge=1)]


class Strict(BaseModel):
    """A frozen record without unknown fields whose validation errors are one-line ``RecipeError``s."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, data: Any, handler: Any) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise RecipeError(explain(error, cls)) from error


class MethodConfig(Strict):
    """Base of all method configs.

    Class attributes:
        stage: what the method decides; order and number of methods are checked by it. ``weights`` stores them,
            ``codes`` changes stored group codes, ``precision`` chooses widths of stored codes while running,
            ``sparsity`` chooses what is left out while running.
        grid: whether it stores group codes, which a method of the stage ``codes`` can work on.
        version: raised when the same config gives other bytes than before, so that what a fit of the older method has
            left behind is not taken for parts of the newer one's.
    """

    stage: ClassVar[Stage] = "weights"
    grid: ClassVar[bool] = False
    version: ClassVar[int] = 1

    method: str

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.method

    @property
    def learns(self) -> bool:
        """Whether it is fitted on text, which takes minutes; any other method takes seconds."""
        return "calibration_tokens" in type(self).model_fields


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line for a failed validation: the field, its value, what is allowed, and the nearest valid choice."""
    # A field of a wrong name also leaves one missing: its name says what happened.
    errors = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    more = f" (And {len(errors) - 1} more.)" if len(errors) > 1 else ""
    method = model.model_fields.get("method")
    where = f"Method '{method.default}'" if method is not None else model.__name__
    return f"{where}: {_sentence(errors[0], model)}{more}"


def _sentence(error: ErrorDetails, model: type[BaseModel]) -> str:
    field, kind, context = _path(error["loc"]), error["type"], error.get("ctx", {})
    value = _short(error.get("input"))
    if kind == "extra_forbidden":
        given = str(error["loc"][-1])
        return f"unknown field '{given}'; allowed are {_names(model.model_fields)}.{suggest(given, model.model_fields)}"
    if kind == "missing":
        return f"the field '{field}' is missing."
    if kind == "union_tag_not_found":
        return f"{field} does not say which 'method' it is."
    if kind == "union_tag_invalid":
        allowed = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
        given = str(context["tag"])
        return f"{field}: unknown method '{given}'; allowed are {_names(allowed)}.{suggest(given, allowed)}"
    if kind == "literal_error":
        allowed = [choice.strip().strip("'") for choice in str(context["expected"]).replace(" or ", ",").split(",")]
        return f"{field} = {value} is not possible; allowed: {context['expected']}.{suggest(value, allowed)}"
    if kind == "greater_than_equal":
        return f"{field} = {value} is not possible; it must be at least {context['ge']}; nearest is {context['ge']}."
    if kind == "greater_than":
        return f"{field} = {value} is not possible; it must be more than {context['gt']:g}."
    if kind == "value_error":
        return f"{field} = {value} is not possible; {context['error']}.".replace(" = {}", "")
    for beginning, needed in _NEEDED.items():
        if kind.startswith(beginning):
            return f"{field} = {value} is not possible; {needed} is needed."
    return f"{field} = {value} is not possible: {error['msg'][0].lower()}{error['msg'][1:]}."


def _path(location: Iterable[int | str]) -> str:
    """``("unit_bits", "blocks.0.o")`` to ``unit_bits['blocks.0.o']``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif path:
            path += f"['{part}']" if "." in part else f".{part}"
        else:
            path = part
    return path or "the value"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
