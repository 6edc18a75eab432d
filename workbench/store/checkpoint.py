"""Finished parts of an analysis, a fit or a training that has not ended yet, so that an interrupted one resumes.

A part is one file (a table as Parquet, or bytes in a format of the caller's) whose name holds the SHA-256 of its bytes:
one rename makes it both present and verifiable, and two processes that compute the same part write the same name.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import StoreError
from workbench.store import files

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_ATTEMPTS = 3  # the folder may be discarded by another process between making it and using it


class PartMissing(StoreError):
    """A part was asked for that is not there: never written, damaged, or discarded by another process."""


class Checkpoint:
    """Parts of one analysis or fit. Made by ``Store.checkpoint``; nothing is on disk before the first ``write``.

    Args:
        home: the store's folder.
        key: what the result depends on, all of it.
    """

    def __init__(self, home: Path, key: str) -> None:
        self._home = home
        self._key = files.check_name("Checkpoint key", key)
        self._folder = home / "checkpoints" / key

    def has(self, part: str) -> bool:
        """Whether the part is there and undamaged. A damaged part is set aside."""
        return self.read_bytes(part) is not None

    def read(self, part: str) -> pd.DataFrame:
        """Return the part's table as it was written, with a fresh index.

        Raises:
            PartMissing: no such part.
        """
        import pyarrow.parquet as pq

        content = self.read_bytes(part)
        if content is None:
            raise PartMissing(f"Part '{part}' of {self._key[:12]} is not in the store: compute it again.")
        return pq.read_table(io.BytesIO(content)).to_pandas()

    def write(self, part: str, table: pd.DataFrame) -> None:
        """Keep a table as a finished part; see ``write_bytes``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), buffer, compression="zstd")
        self.write_bytes(part, buffer.getvalue(), ".parquet")

    def write_bytes(self, part: str, content: bytes, ending: str = ".safetensors") -> None:
        """Keep a finished part.

        Args:
            part: its name, any text.
            content: what ``read_bytes`` will return.
            ending: of the file's name, for people.

        Raises:
            StoreError: the disk refuses. Nothing is left behind.
        """
        target = self._folder / f"{_prefix(part)}{hashlib.sha256(content).hexdigest()}{ending}"
        with files.scratch(self._home) as temporary, files.disk_errors(f"Writing part '{part}' to {self._home}"):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    files.publish(temporary, target)
                    break
                except FileNotFoundError:
                    if attempt == _ATTEMPTS:
                        raise

    def drop(self, part: str) -> None:
        """Remove one part, which a later one has replaced; nothing happens where it is not there."""
        for path in self._folder.glob(f"{_prefix(part)}*"):
            with files.disk_errors(f"Removing part '{part}' from {self._home}"):
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove all parts."""
        with files.scratch(self._home) as temporary, files.disk_errors(f"Removing {self._folder}"):
            try:
                os.replace(self._folder, temporary)
            except FileNotFoundError:
                return

    def __len__(self) -> int:
        """How many parts are kept; whether they are undamaged is seen when they are read."""
        return len(list(self._folder.glob("*")))

    def problems(self) -> list[str]:
        """Return one line for each damaged part."""
        return [
            f"Part {path.name} of checkpoint {self._key} does not match its checksum."
            for path in sorted(self._folder.glob("*"))
            if _digest(path) != files.sha256_of(path)
        ]

    def read_bytes(self, part: str) -> bytes | None:
        """Return a part's bytes as they were written, or None where it is not there. A damaged one is set aside."""
        for path in sorted(self._folder.glob(f"{_prefix(part)}*")):
            try:
                with files.disk_errors(f"Reading part '{part}'"):
                    content = path.read_bytes()
            except FileNotFoundError:
                continue
            if hashlib.sha256(content).hexdigest() == _digest(path):
                return content
            with files.disk_errors(f"Setting the damaged {path} aside"):
                files.set_aside(self._home, path)
            log.warning("Stored part '%s' does not match its checksum: set aside, will be computed again.", part)
        return None


def _prefix(part: str) -> str:
    """Part names are free text: their hash is the file's name."""
    return hashlib.sha256(part.encode()).hexdigest()[:32] + "-"


def _digest(path: Path) -> str:
    return path.stem.partition("-")[2]
