"""Quality that a bench has measured is kept, candidate by candidate, so that an interrupted one goes on where it was.

What is kept is the table of windows of one candidate on one text, or of its answers to questions, as a profile. Its key
holds everything that the numbers depend on, the workbench's own code and kernels included: after any change of them all
is measured anew. Timings are never kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from workbench.analysis.profile import Profile, Provenance, library_versions
from workbench.measure.quality import QualityResult, compare_many, summed_up
from workbench.measure.tasks import TaskResult, answered, multiple_choice
from workbench.progress import Job

if TYPE_CHECKING:
    import pandas as pd

    from workbench.corpus import Question, TextRecord, Window
    from workbench.runtime.base import Engine

_FACT = "fact."  # prefix of the columns that hold what an engine told of itself
_ABOUT_ALL = ("kl_median", "kl_p999", "measured_at")  # columns alike in every row


class Shelf(Protocol):
    """Where profiles are kept between runs; the store's is ``operate.jobs.ProfileShelf``."""

    def find(self, provenance: Provenance) -> Profile | None: ...

    def keep(self, profile: Profile) -> None: ...


@runtime_checkable
class Telling(Protocol):
    """An engine that tells more about its run than log-probabilities."""

    def facts(self) -> Mapping[str, float]:
        """What it did on the text that it was measured on, such as the bits that it read."""
        ...


def compare_kept(
    shelf: Shelf | None,
    dense: Engine,
    candidates: Sequence[Engine],
    windows: Sequence[Window],
    *,
    about: Sequence[Any],
    text: TextRecord | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    given: int = 1,
    job: Job | None = None,
) -> list[QualityResult]:
    """``compare_many``, of those candidates that no earlier run has measured on these windows.

    Args:
        shelf: where results are kept; None measures all and keeps nothing.
        dense, candidates, windows, text, decode, given, job: see ``compare_many``.
        about: of each candidate, what its predictions depend on beside the bytes of its model, its engine and plan:
            policy, computation type, what is replayed. JSON values, arrays and dataclasses.

    Returns:
        As ``compare_many``; ``measured_at`` and ``facts`` say which are from earlier runs and what engines told.
    """
    pairs = zip(candidates, about, strict=True)
    keys = [_provenance(dense, one, windows, text, told, decode, given) for one, told in pairs]
    known = [None if shelf is None else shelf.find(key) for key in keys]
    missing = [index for index, profile in enumerate(known) if profile is None]
    engines = [candidates[index] for index in missing]
    fresh = []
    if missing:
        fresh = compare_many(dense, engines, windows, text=text, decode=decode, given=given, job=job)
    found = dict(zip(missing, fresh, strict=True))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for index, engine in zip(missing, engines, strict=True):
        if isinstance(engine, Telling):
            found[index] = replace(found[index], facts=dict(engine.facts()))
        if shelf is not None:
            shelf.keep(_profile(found[index], keys[index], now))
    for index, profile in enumerate(known):
        if profile is not None:
            found[index] = _result(profile, dense, candidates[index], text)
    return [found[index] for index in range(len(candidates))]


def answer_kept(
    shelf: Shelf | None, engine: Engine, questions: Sequence[Question], *, about: Any, job: Job | None = None
) -> TaskResult:
    """``multiple_choice``, unless an earlier run has asked this engine the same questions.

    Args:
        shelf, about: see ``compare_kept``.
        engine: that answers.
        questions: asked.
        job: advanced by question.

    Returns:
        As ``multiple_choice``; ``measured_at`` and ``facts`` say whether it is from an earlier run and what the engine
        told.
    """
    asked = [[one.id, one.language, one.question, list(one.choices), one.answer] for one in questions]
    key = _about_model(
        engine,
        "answers",
        {"questions": digest(asked), "candidate": _ran_by(engine), "about": digest(about), "code": code_sha256()},
    )
    known = None if shelf is None else shelf.find(key)
    if known is None:
        found = multiple_choice(engine, questions, job=job)
        if isinstance(engine, Telling):
            found = replace(found, facts=dict(engine.facts()))
        if shelf is not None:
            columns: dict[str, Any] = {_FACT + name: value for name, value in found.facts.items()}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            shelf.keep(Profile(found.table.assign(**columns, measured_at=now), key))
        return found
    table, facts = _without_facts(known.table)
    result = answered(table.drop(columns=["measured_at"]))
    return replace(result, facts=facts, measured_at=str(table["measured_at"].iloc[0]))


def _provenance(
    dense: Engine,
    candidate: Engine,
    windows: Sequence[Window],
    text: TextRecord | None,
    about: Any,
    decode: Any,
    given: int,
) -> Provenance:
    parameters = {
        "windows": digest([[w.document, w.domain, w.language, list(w.tokens)] for w in windows]),
        "dense": _ran_by(dense),
        "candidate": _ran_by(candidate),
        "about": digest(about),
        "excerpts": decode is not None,
        "given": given,
        "code": code_sha256(),
    }
    return _about_model(dense, "quality", parameters, text)


def _about_model(engine: Engine, kind: str, parameters: dict[str, Any], text: TextRecord | None = None) -> Provenance:
    versions = library_versions()
    with contextlib.suppress(metadata.PackageNotFoundError):  # a rival that some candidates are run by
        versions["bitsandbytes"] = metadata.version("bitsandbytes")
    return Provenance(
        kind=kind,
        model=engine.model.name,
        architecture_sha256=engine.model.fingerprint.architecture,
        weights_sha256=engine.model.fingerprint.weights,
        text=text,
        parameters=parameters,
        versions=versions,
    )


def _ran_by(engine: Engine) -> list[str]:
    weights = engine.model.fingerprint.weights
    return [engine.name, str(engine.activation_mode), str(getattr(engine, "isa", "")), weights, digest(engine.plan)]


def _profile(quality: QualityResult, provenance: Provenance, now: str) -> Profile:
    columns: dict[str, Any] = {"kl_median": quality.kl_median, "kl_p999": quality.kl_p999, "measured_at": now}
    columns |= {_FACT + name: value for name, value in quality.facts.items()}
    return Profile(quality.windows.assign(**columns), provenance)


def _result(profile: Profile, dense: Engine, candidate: Engine, text: TextRecord | None) -> QualityResult:
    table, facts = _without_facts(profile.table)
    first = table.iloc[0].to_dict()
    rows = table.drop(columns=list(_ABOUT_ALL))
    result = summed_up(rows, float(first["kl_median"]), float(first["kl_p999"]), dense, candidate, text, seed=0)
    return replace(result, facts=facts, measured_at=str(first["measured_at"]))


def _without_facts(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """A kept table, and what its engine told, which is alike in every row."""
    names = [str(name) for name in table if str(name).startswith(_FACT)]
    facts = {name.removeprefix(_FACT): float(table[name].iloc[0]) for name in names}
    return table.drop(columns=names), facts


@functools.cache
def code_sha256() -> str:
    """SHA-256 (hex) over the package's own sources and compiled kernels."""
    from workbench.errors import EngineError
    from workbench.runtime.cpu_build import kernels

    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    with contextlib.suppress(EngineError):  # it was not built
        files.append(Path(str(kernels().__file__)))  # an editable install has it elsewhere
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 (hex) of JSON values, arrays and dataclasses, nested in any way; equal values give equal digests.

    Raises:
        TypeError: something else, whose identity is not known.
    """
    found = hashlib.sha256()
    _feed(found.update, value)
    return found.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        update(f"<{type(value).__name__}>".encode())
        _feed(update, {field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, np.ndarray):
        update(f"<{value.dtype}{value.shape}>".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        update(f"<{len(value)} pairs>".encode())
        for key in sorted(value, key=repr):
            _feed(update, key)
            _feed(update, value[key])
    elif isinstance(value, list | tuple):
        update(f"<{len(value)} values>".encode())
        for entry in value:
            _feed(update, entry)
    elif value is None or isinstance(value, str | int | float | np.generic):
        update(f"{value!r};".encode())
    else:
        raise TypeError(f"cannot tell one {type(value).__name__} from another")
