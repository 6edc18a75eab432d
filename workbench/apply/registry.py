"""Which handler carries out which method: config class to handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from workbench.apply.config import MethodConfig
from workbench.apply.draft import Draft
from workbench.errors import RecipeError, suggest
from workbench.progress import Job


class Method(Protocol):
    """A handler: ``fit`` learns from the model and texts, ``apply`` writes encodings from what was learned."""

    def fit(self, draft: Draft, config: Any, *, seed: int, job: Job) -> Any: ...

    def apply(self, draft: Draft, config: Any, fitted: Any, *, job: Job) -> None: ...


_METHODS: dict[type[MethodConfig], Method] = {}


def register(config: type[MethodConfig]) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: instances of ``config`` are carried out by the decorated handler."""

    def note(handler: type[Method]) -> type[Method]:
        _METHODS[config] = handler()
        return handler

    return note


def handler(config: MethodConfig) -> Method:
    """Return the handler of a config, or raise ``RecipeError`` naming the nearest method."""
    if type(config) not in _METHODS:
        names = [known.model_fields["method"].default for known in _METHODS]
        raise RecipeError(
            f"Unknown method '{config.method}'; allowed are {', '.join(names)}.{suggest(config.method, names)}"
        )
    return _METHODS[type(config)]
