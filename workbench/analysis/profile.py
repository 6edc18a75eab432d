"""Profiles: what every analysis returns. A tidy table and typed provenance, saved together as one Parquet file."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from workbench.corpus import TextRecord as TextRecord
from workbench.errors import InputError, IntegrityError
from workbench.files import write_whole
from workbench.progress import Job

_METADATA_KEY = b"workbench.provenance"


class Provenance(BaseModel):
    """Everything a result depends on. Two analyses with equal provenance give equal tables.

    ``parameters`` are the analysis' own arguments (widths, group size, window length ...), JSON values only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    schema_version: int = 1
    model: str
    architecture_sha256: str
    weights_sha256: str
    text: TextRecord | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    parameters: dict[str, Any] = {}
    versions: dict[str, str] = {}

    @property
    def key(self) -> str:
        """SHA-256 (hex) of the canonical JSON form: the cache key of the result."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions that a numerical result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("compression-workbench", "torch", "transformers", "numpy"):
        found[package] = metadata.version(package)
    return found


@dataclass(frozen=True)
class Profile:
    """A tidy table and where it came from. Everything drawn is drawn from a Profile."""

    table: pd.DataFrame
    provenance: Provenance

    @property
    def kind(self) -> str:
        return self.provenance.kind

    def write(self, file: BinaryIO) -> None:
        """Write one Parquet file into an open binary file."""
        write_parts(file, iter([self.table]), self.provenance)

    def save(self, path: str | Path) -> None:
        """Write one Parquet file, replacing one that is there, whole or not at all."""
        buffer = io.BytesIO()
        self.write(buffer)
        write_whole(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile written by ``save``.

        Raises:
            InputError: no such file, or a Parquet file that is not a profile.
            IntegrityError: a damaged file.
        """
        if not Path(path).is_file():
            raise InputError(f"No profile at {path}.")
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise IntegrityError(f"{path} is damaged or not Parquet: {error}. Run the analysis again.") from error
        raw = (table.schema.metadata or {}).get(_METADATA_KEY)
        if raw is None:
            raise InputError(f"{path} is a Parquet file but not a profile of the workbench.")
        provenance = Provenance.model_validate_json(raw)
        return cls(table.replace_schema_metadata(None).to_pandas(), provenance)


class Analysis(Protocol):
    """A resumable analysis: named parts, each a table, whose concatenation in order is the profile's table.

    A part depends on nothing but the provenance and its own name, so parts may be computed in any session and the
    result of an interrupted run equals that of an uninterrupted one.
    """

    provenance: Provenance

    @property
    def parts(self) -> Sequence[str]: ...

    def compute(self, part: str, job: Job) -> pd.DataFrame: ...


def run(analysis: Analysis, job: Job | None = None) -> Profile:
    """Run an analysis in memory, part by part, without a cache."""
    job = job or Job()
    job.stage(analysis.provenance.kind, len(analysis.parts))
    tables = []
    for part in analysis.parts:
        tables.append(analysis.compute(part, job))
        job.advance()
    return Profile(pd.concat(tables, ignore_index=True), analysis.provenance)


def write_parts(path: Path | BinaryIO, tables: Iterator[pd.DataFrame], provenance: Provenance) -> None:
    """Stream tables into one Parquet file, one in memory at a time."""
    writer: pq.ParquetWriter | None = None
    try:
        for frame in tables:
            table = pa.Table.from_pandas(frame, preserve_index=False)
            if writer is None:
                schema = table.schema.with_metadata({_METADATA_KEY: provenance.model_dump_json().encode()})
                writer = pq.ParquetWriter(path, schema, compression="zstd")
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
            del frame, table  # not held while the next is made
    finally:
        if writer is not None:
            writer.close()
