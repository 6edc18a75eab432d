"""Finished parts of a fit that has not ended yet, so that an interrupted one goes on where it stopped.

A method asks for a part before it computes it and hands it over when it is finished. Where parts are kept is decided by
whoever asked for the fit (``operate.fits``: the store); without a place nothing is kept and everything is computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import load, save

from workbench.formats.encodings import Encoding, from_parts

_FACTS = "facts"  # name of the tensor that holds what is no tensor, as the bytes of JSON


class Place(Protocol):
    """Where the parts of one method of one recipe are kept; ``store.Checkpoint`` is one."""

    def read_bytes(self, part: str) -> bytes | None:
        """Return a part, verified, or None where it is not there."""
        ...

    def write_bytes(self, part: str, content: bytes) -> None:
        """Keep a part, whole or not at all."""
        ...


@dataclass(frozen=True)
class Part:
    """One finished part: tensors by name, on the CPU, and JSON values."""

    tensors: dict[str, torch.Tensor]
    facts: Any


class Parts:
    """The parts of one method's fit. A part depends on nothing but the fit's inputs and its own name.

    Attributes:
        earlier_s: seconds that the fit had taken when the parts that were found were kept, in earlier runs.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.earlier_s = 0.0
        self._place = place
        self._started = time.perf_counter()

    def find(self, name: str) -> Part | None:
        """Return a part that an earlier, interrupted fit has finished."""
        content = None if self._place is None else self._place.read_bytes(name)
        if content is None:
            return None
        tensors = load(content)
        facts = json.loads(tensors.pop(_FACTS).numpy().tobytes())
        self.earlier_s = max(self.earlier_s, facts["elapsed_s"])
        return Part(tensors, facts["of_part"])

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Any = None) -> None:
        """Keep a finished part.

        Args:
            name: of the part, unlike all others of this fit.
            tensors: by name, of any shape and dtype.
            facts: JSON values.

        Raises:
            StoreError: the disk refuses.
        """
        if self._place is None:
            return
        elapsed = self.earlier_s + time.perf_counter() - self._started
        said = json.dumps({"elapsed_s": elapsed, "of_part": facts}).encode()
        # Copies: the file refuses tensors that share memory, as the rows of one matrix do.
        stored = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
        stored[_FACTS] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        self._place.write_bytes(name, save(stored))

    def once(self, name: str, compute: Callable[[], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a part, computed and kept unless they are there."""
        found = self.find(name)
        if found is not None:
            return found.tensors
        made = compute()
        self.keep(name, made)
        return made

    def encodings(self, name: str) -> dict[str, Encoding] | None:
        """Return a part that ``keep_encodings`` kept: encodings by linear id."""
        found = self.find(name)
        if found is None:
            return None
        tensors: dict[str, dict[str, torch.Tensor]] = {linear: {} for linear in found.facts}
        for key, tensor in found.tensors.items():
            linear, _, part = key.rpartition(".")
            tensors[linear][part] = tensor
        return {linear: from_parts(kind, meta, tensors[linear]) for linear, (kind, meta) in found.facts.items()}

    def keep_encodings(self, name: str, encodings: Mapping[str, Encoding]) -> None:
        """Keep encodings by linear id as one part."""
        tensors = {f"{linear}.{part}": t for linear, one in encodings.items() for part, t in one.tensors().items()}
        self.keep(name, tensors, {linear: [one.kind, one.meta()] for linear, one in encodings.items()})
