"""What a mask predictor can be trained on again: what it read and what it should have said, of requests that ran dense.

Only a request without masks shows what heads and neurons do that a mask would have left out, and only criteria without
gradients are known while running; ``magnitude`` is, from what goes into ``o`` and ``down``. A bounded sample of tokens
is kept, every token with the same chance. What a predictor reads holds the token itself: whoever has the model can find
out the text of every token that is kept. So nothing is kept unless it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from workbench.errors import InputError
from workbench.files import check_output_file, write_whole
from workbench.formats.mask_predictor import MaskPredictor
from workbench.models.base import Architecture
from workbench.runtime.mask_shares import predictor_groups

CAPACITY = 512  # tokens: some 50 MB of a model of 30 blocks and 1,536 neurons each
_KIND = "features of predicted masks 1"
_HIGHEST = float(np.finfo(np.float16).max)


@dataclass
class FeatureLog:
    """A sample of the tokens of dense requests to one model; m tokens of at most ``CAPACITY``.

    Attributes:
        model: identity (SHA-256) of the compressed model.
        inputs: by part float32 (m, width), what it reads.
        scores: float16 (m, units of all groups), magnitudes.
        requests: int64 (m,), the request that each token is of, counted from 0.
        counts: int64 (2,), tokens that had a chance, and requests.
    """

    model: str
    inputs: list[np.ndarray]
    scores: np.ndarray
    requests: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, model: str, predictor: MaskPredictor) -> Self:
        inputs = [np.zeros((0, part.hidden.shape[1]), np.float32) for part in predictor.parts]
        units = sum(len(part.mean) for part in predictor.parts)
        return cls(model, inputs, np.zeros((0, units), np.float16), np.zeros(0, np.int64), np.zeros(2, np.int64))

    def place(self) -> int | None:
        """Where the next token goes, None where it is not kept: all have the same chance (reservoir sampling)."""
        seen = int(self.counts[0])
        self.counts[0] += 1
        if seen < CAPACITY:
            return seen
        drawn = int(np.random.default_rng(seen).integers(seen + 1))
        return drawn if drawn < CAPACITY else None

    def put(self, place: int, inputs: list[np.ndarray], scores: np.ndarray) -> None:
        """Keep a token at a place, instead of the one that is there."""
        rows = [(kept, new) for kept, new in zip(self.inputs, inputs, strict=True)]
        if place < len(self.scores):
            for kept, new in rows:
                kept[place] = new
            self.scores[place], self.requests[place] = np.minimum(scores, _HIGHEST), self.counts[1]
            return
        self.inputs = [np.concatenate([kept, new[None].astype(np.float32)]) for kept, new in rows]
        self.scores = np.concatenate([self.scores, np.minimum(scores, _HIGHEST)[None].astype(np.float16)])
        self.requests = np.append(self.requests, self.counts[1])

    def finish(self) -> None:
        """A request has ended."""
        self.counts[1] += 1

    def save(self, path: Path | str) -> Path:
        """Write it as safetensors, whole or not at all, replacing a file that is there."""
        target = check_output_file(path)
        arrays = {f"inputs.{index}": array for index, array in enumerate(self.inputs)}
        arrays |= {"scores": self.scores, "requests": self.requests, "counts": self.counts}
        arrays |= {name: np.frombuffer(text.encode(), np.uint8) for name, text in self._said().items()}
        write_whole(target, save(arrays))
        return target

    def _said(self) -> dict[str, str]:
        return {"kind": _KIND, "model": self.model}

    @classmethod
    def load(cls, path: Path | str, model: str, predictor: MaskPredictor) -> Self:
        """Read a log of this very model.

        Raises:
            InputError: not such a file, one that contradicts itself, or one of another model.
        """
        try:
            arrays = load(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"Cannot read the features {path}: {error.strerror or error}.") from error
        except (SafetensorError, ValueError, KeyError, TypeError):
            arrays = {}
        said = {name: arrays.pop(name, np.zeros(0, np.uint8)).tobytes().decode("utf-8", "replace") for name in _SAID}
        if said["kind"] != _KIND:
            raise InputError(f"{path} holds no features of this version: name a file of 'generate --log-features'.")
        if said["model"] != model:
            raise InputError(f"{path} is of another model, and features belong to the model that wrote them.")
        wanted = cls.empty(model, predictor)
        names = [f"inputs.{index}" for index in range(len(wanted.inputs))]
        found: list[Any] = [arrays.pop(name, None) for name in (*names, "scores", "requests")]
        counts, m = arrays.pop("counts", None), 0 if found[-1] is None else len(found[-1])
        pairs = zip(found, [*wanted.inputs, wanted.scores, wanted.requests], strict=True)
        fits = all(_alike(array, like, m) for array, like in pairs) and _alike(counts, wanted.counts, 2)
        if not fits or arrays or counts is None or m > min(CAPACITY, counts[0]) or not _possible(found, counts):
            raise InputError(f"{path} contradicts itself: it was changed, so begin another.")
        return cls(model, list(found[:-2]), found[-2], found[-1], counts)


_SAID = ("kind", "model")


def _alike(array: Any, like: np.ndarray, rows: int) -> bool:
    return array is not None and array.dtype == like.dtype and array.shape == (rows, *like.shape[1:])


def _possible(found: list[Any], counts: np.ndarray) -> bool:
    *numbers, requests = found
    finite = all(np.isfinite(array).all() for array in numbers) and (numbers[-1] >= 0).all()
    return bool(finite and (counts >= 0).all() and (requests >= 0).all() and (requests < max(counts[1], 1)).all())


def why_no_features(predictor: MaskPredictor) -> str | None:
    """Why what this predictor should say is not known while running, None where it is."""
    facts = predictor.facts
    if facts["criterion"] != "magnitude":
        return (
            f"its criterion '{facts['criterion']}' is not known while running: fit one with the criterion 'magnitude'"
        )
    if facts["scope"] != "token":
        return f"it decides for the scope '{facts['scope']}', whose scores lie ahead: fit one with the scope 'token'"
    if facts.get("tuned"):
        return "it was tuned through the model, which gives its scores another meaning: fit one with tune_steps 0"
    return None


class FeatureReader:
    """A tap callback (``numpy``) for a request that runs dense, which adds a sample of its tokens to a log.

    Args:
        architecture: of the model.
        predictor: whose inputs and scores are kept.
        sites: where each of its parts reads.
        log: what tokens are added to.
    """

    def __init__(
        self, architecture: Architecture, predictor: MaskPredictor, sites: tuple[str, ...], log: FeatureLog
    ) -> None:
        self._log, self._sites, self._prefix = log, sites, int(predictor.facts["prefix"])
        self._heads, self._head_dim = architecture.n_heads, architecture.head_dim
        groups = predictor_groups(architecture, predictor)
        self._scored = {
            architecture.unit(f"blocks.{group.block}.{'o' if group.kind == 'heads' else 'down'}").linears[0].id: index
            for index, group in enumerate(groups)
        }
        self._kinds = [group.kind for group in groups]
        self._first, self._seen = -1, set[str]()  # of the running chunk: its first position, and sites that came
        self._chosen: list[tuple[int, int]] = []  # rows of the running chunk, and their places in the log
        self._inputs: dict[int, np.ndarray] = {}
        self._scores: dict[int, np.ndarray] = {}

    def __call__(self, site: str, first: int, rows: Any) -> None:
        if first != self._first or site in self._seen:  # another request may begin where the last one did
            self._begin(first, len(rows))
        self._seen.add(site)
        if not self._chosen:
            return
        at = [row for row, _ in self._chosen]
        for part, name in enumerate(self._sites):
            if name == site:
                self._inputs[part] = np.asarray(rows)[at]
        index = self._scored.get(site)
        if index is not None:
            values = np.asarray(rows, dtype=np.float32)[at]
            if self._kinds[index] == "heads":
                values = np.linalg.norm(values.reshape(len(at), self._heads, self._head_dim), axis=2)
            self._scores[index] = np.abs(values)
        if len(self._inputs) == len(self._sites) and len(self._scores) == len(self._scored):
            self._keep()

    def _begin(self, first: int, count: int) -> None:
        self._first, self._seen, self._inputs, self._scores = first, set(), {}, {}
        ahead = [row for row in range(count) if first + row >= self._prefix]
        places = [(row, self._log.place()) for row in ahead]
        # A place may be drawn twice in a chunk: the later token has it.
        self._chosen = [(row, place) for row, place in places if place is not None]

    def _keep(self) -> None:
        scores = np.concatenate([self._scores[index] for index in range(len(self._scored))], axis=1)
        for index, (_, place) in enumerate(self._chosen):
            self._log.put(place, [self._inputs[part][index] for part in range(len(self._sites))], scores[index])
        self._chosen = []
