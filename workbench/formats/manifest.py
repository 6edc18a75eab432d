"""``compressed.json``: what a compressed model says about itself, and the checks on reading it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workbench.errors import IntegrityError, ModelError

FORMAT = "compression-workbench"
MAJOR, MINOR = 1, 0  # a reader takes any minor version of its own major version

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)  # a later minor version may add fields


class Identity(_Part):
    """``Fingerprint`` as JSON."""

    architecture: Sha256
    weights: Sha256


class Base(_Part):
    """The model that a compressed model was made from, and what was settled when it was loaded.

    Attributes:
        name: short name for tables.
        source: where it was loaded from.
        fingerprint: identity of its architecture and weights.
        bos: token id that begins every sequence, or None.
        stop_tokens: ids that end a reply.
    """

    name: str
    source: str
    fingerprint: Identity
    bos: Annotated[int, Field(ge=0)] | None = None
    stop_tokens: list[Annotated[int, Field(ge=0)]] = []


class FileRecord(_Part):
    """Size in bytes and SHA-256 of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class EncodingRecord(_Part):
    """Kind and metadata of one encoding; the kind's own class checks the metadata."""

    kind: str
    meta: dict[str, Any]


class Manifest(_Part):
    """Content of ``compressed.json``. ``sha256`` is the model's identity; ``files`` has all files but ``fit.json``."""

    format: Literal["compression-workbench"] = "compression-workbench"
    schema_version: str = f"{MAJOR}.{MINOR}"
    sha256: Sha256
    recipe: dict[str, Any]
    base: Base
    linears: dict[str, EncodingRecord]
    embedding: EncodingRecord
    output: EncodingRecord | None = None
    files: dict[str, FileRecord]

    def sealed(self) -> dict[str, Any]:
        """Return the JSON form with ``manifest_sha256``, the checksum of everything else in it."""
        values = self.model_dump(mode="json")
        return values | {"manifest_sha256": digest(values)}


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON form of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise ``IntegrityError`` naming the file."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged and not JSON ({error}): compress the model again.") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} is damaged: it does not hold a JSON object. Compress the model again.")
    return value


def read(path: Path) -> Manifest:
    """Read and check ``compressed.json``.

    Raises:
        ModelError: another format, or a major version that this reader does not know.
        IntegrityError: damaged, changed by hand, or with values out of range.
    """
    values = read_json(path)
    version = str(values.get("schema_version"))
    if values.get("format") != FORMAT or version.split(".")[0] != str(MAJOR):
        raise ModelError(
            f"{path} is of format '{values.get('format')}' version '{version}'; this version reads '{FORMAT}' "
            f"{MAJOR}.x: install a matching version of compression-workbench, or compress the model again."
        )
    recorded = values.pop("manifest_sha256", None)
    if recorded != digest(values):
        raise IntegrityError(
            f"{path} does not match its checksum: it was changed or damaged. Compress the model again."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path}: '{where}' is not valid: {first['msg']}. Compress the model again.") from error
