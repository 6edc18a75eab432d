"""Arguments and provenance that the analyses share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.analysis.profile import Provenance, TextRecord, library_versions
from workbench.errors import InputError
from workbench.formats.codes import MAX_BITS, MIN_BITS
from workbench.models.base import LoadedModel

WIDTHS = (2, 3, 4, 5, 6, 8)


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Return the widths ascending, or raise ``InputError`` where one is impossible."""
    wrong = [b for b in widths if not MIN_BITS <= b <= MAX_BITS]
    if wrong or not widths:
        raise InputError(f"Widths {list(widths)} are not possible: give some of {MIN_BITS} to {MAX_BITS} bits.")
    return tuple(sorted(set(widths)))


def model_provenance(
    kind: str, model: LoadedModel, text: TextRecord | None, seed: int, parameters: dict[str, Any]
) -> Provenance:
    return Provenance(
        kind=kind,
        model=model.name,
        architecture_sha256=model.fingerprint.architecture,
        weights_sha256=model.fingerprint.weights,
        text=text,
        seed=seed,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        parameters=parameters,
        versions=library_versions(),
    )
