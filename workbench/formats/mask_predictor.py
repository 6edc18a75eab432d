"""What a model keeps beside its weights to choose heads and neurons per token: small predictors, and mean scores.

No threshold is stored: quantiles of what is predicted on held-out text turn any sparsity into thresholds
(``runtime.masks``), so that another sparsity needs no other bytes. numpy alone, for engines without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from workbench.errors import IntegrityError
from workbench.formats import mask_scores
from workbench.formats.checked import check_array
from workbench.formats.mask_statistics import MaskStatistics
from workbench.models.base import Architecture

PREFIX = "mask_predictor."
MaskKind = Literal["heads", "neurons"]
TAPS = ("residual", "block_input", "attention_output", "mlp_input")


@dataclass(frozen=True)
class MaskGroup:
    """The heads or the neurons of one block; ``weights`` are those that one of them takes along when left out."""

    block: int
    kind: MaskKind
    size: int
    weights: int


def mask_groups(architecture: Architecture, blocks: range | None = None) -> tuple[MaskGroup, ...]:
    """Groups of blocks in order: heads, then neurons. A head is its query rows and its columns of ``o``."""
    found = []
    for block in blocks if blocks is not None else range(architecture.n_blocks):
        head = 2 * architecture.head_dim * architecture.hidden_size
        neuron = (3 if architecture.gated else 2) * architecture.hidden_size
        found.append(MaskGroup(block, "heads", architecture.n_heads, head))
        found.append(MaskGroup(block, "neurons", architecture.n_neurons, neuron))
    return tuple(found)


@dataclass(frozen=True)
class MaskPart:
    """One predictor: ``h = relu(hidden (tap / rms(tap)) + bias)``, ``score = mean + rows h``.

    h is rounded before it is multiplied: ``mask_scores`` defines it.

    Attributes:
        tap: kind of what it reads, one of ``TAPS``.
        block: where it reads it.
        groups: first and last + 1 of the groups that it decides.
        hidden: int8 (H, width), with ``hidden_steps`` float32 (H,); ``hidden_bias`` float32 (H,).
        rows: int8 (units, H), with ``row_steps`` float32 (units,).
        mean: float32 (units,).
    """

    tap: str
    block: int
    groups: tuple[int, int]
    hidden: np.ndarray
    hidden_steps: np.ndarray
    hidden_bias: np.ndarray
    rows: np.ndarray
    row_steps: np.ndarray
    mean: np.ndarray

    @property
    def bytes(self) -> int:
        """Read at every decision."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def scores(self, taps: np.ndarray) -> np.ndarray:
        """Predicted scores float32 (n, units) of taps (n, width)."""
        return self.scores_of(self.hidden_of(taps))

    def hidden_of(self, taps: np.ndarray) -> np.ndarray:
        """Hidden activations float32 (n, H) of taps (n, width)."""
        return mask_scores.hidden_of(self, taps)

    def scores_of(self, hidden: np.ndarray) -> np.ndarray:
        """Predicted scores float32 (n, units) of hidden activations (n, H)."""
        return mask_scores.scores_of(self, hidden)


@dataclass(frozen=True)
class MaskPredictor:
    """Predictors of the scores of all heads and neurons of the blocks from ``first_block`` on.

    G groups (``mask_groups`` of those blocks), K quantiles, N units of all groups in order.

    Attributes:
        facts: how it was made, JSON values: ``criterion``, ``predictor`` ("unified" or "per-layer"), ``scope``, ``n``,
            ``prefix`` (tokens that are kept whole) and whatever else is told.
        first_block: the blocks before it are whole.
        parts: predictors, whose groups follow one another.
        scale: float32 (G,): predicted scores times this can be compared between groups.
        quantiles: float32 (G, K) of predicted scores over units and tokens of held-out text, at (k + 1/2) / K.
        aggregates: by criterion float32 (N,), mean scores over calibration text, for masks without a predictor.
        statistics: of the text it was made on; None of models made before they were kept.
    """

    facts: Mapping[str, Any]
    first_block: int
    parts: tuple[MaskPart, ...]
    scale: np.ndarray
    quantiles: np.ndarray
    aggregates: Mapping[str, np.ndarray]
    statistics: MaskStatistics | None = None

    @property
    def bytes(self) -> int:
        """Read at every decision, by all parts."""
        return sum(part.bytes for part in self.parts)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by name on disk."""
        said = {"facts": dict(self.facts), "first_block": self.first_block}
        said["parts"] = [[part.tap, part.block, *part.groups] for part in self.parts]
        found = {"said": np.frombuffer(json.dumps(said, sort_keys=True).encode(), dtype=np.uint8).copy()}
        found |= {"scale": self.scale, "quantiles": self.quantiles}
        for index, part in enumerate(self.parts):
            found |= {f"{name}.{index}": getattr(part, name) for name in _ARRAYS}
        found |= {f"aggregates.{name}": array for name, array in self.aggregates.items()}
        found |= self.statistics.arrays() if self.statistics is not None else {}
        return {PREFIX + name: array for name, array in found.items()}

    @property
    def stored_bits(self) -> int:
        return 8 * sum(array.nbytes for array in self.arrays().values())

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], architecture: Architecture) -> Self:
        """Check and take apart what ``arrays`` gave.

        Raises:
            IntegrityError: something is missing, too much, of another type or shape, or not finite.
        """
        left = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
        facts, first_block, places = _said(left.pop("said", None), architecture)
        groups = mask_groups(architecture, range(first_block, architecture.n_blocks))
        units = sum(group.size for group in groups)
        count = left["quantiles"].shape[-1] if "quantiles" in left and left["quantiles"].ndim else 0
        if count < 2:
            raise IntegrityError("The mask predictor has no quantiles: compress the model again.")
        quantiles = _array(left, "quantiles", np.float32, (len(groups), count))
        if (np.diff(quantiles, axis=1) < 0).any():
            raise IntegrityError("The mask predictor's quantiles do not ascend: compress the model again.")
        scale = _array(left, "scale", np.float32, (len(groups),))
        if (scale <= 0).any():
            raise IntegrityError("The mask predictor's scales are not positive: compress the model again.")
        parts = tuple(_part(left, index, place, groups, architecture) for index, place in enumerate(places))
        names = [name for name in left if name.startswith("aggregates.")]
        aggregates = {name.removeprefix("aggregates."): _array(left, name, np.float32, (units,)) for name in names}
        sizes = [(part.hidden.shape[1], part.hidden.shape[0]) for part in parts]
        statistics = MaskStatistics.taken_from(left, len(groups), sizes)
        if left:
            raise IntegrityError(
                f"The mask predictor has an unknown part '{sorted(left)[0]}': compress the model again."
            )
        return cls(facts, first_block, parts, scale, quantiles, aggregates, statistics)


_ARRAYS = ("hidden", "hidden_steps", "hidden_bias", "rows", "row_steps", "mean")


def _said(raw: np.ndarray | None, architecture: Architecture) -> tuple[dict[str, Any], int, list[tuple[Any, ...]]]:
    """Facts, first block and places of the parts, checked against the architecture."""
    damaged = IntegrityError("What the mask predictor says of itself is damaged: compress the model again.")
    if raw is None or raw.dtype != np.uint8 or raw.ndim != 1:
        raise damaged
    try:
        said = json.loads(raw.tobytes())
        facts, first_block = dict(said["facts"]), said["first_block"]
        places = [(str(tap), block, begin, end) for tap, block, begin, end in said["parts"]]
        known = {"criterion": str, "predictor": str, "scope": str, "n": int, "prefix": int}
        if any(type(facts[name]) is not kind for name, kind in known.items()):
            raise damaged
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged from error
    numbers = [first_block, *(number for place in places for number in place[1:])]
    if any(type(number) is not int for number in numbers) or not 0 <= first_block < architecture.n_blocks:
        raise damaged
    if facts["scope"] not in ("token", "every", "reply") or facts["n"] < 1 or facts["prefix"] < 0:
        raise damaged
    end_before = 0
    for tap, block, begin, end in places:
        if tap not in TAPS or not 0 <= block < architecture.n_blocks or begin != end_before or end <= begin:
            raise damaged
        end_before = end
    if end_before != 2 * (architecture.n_blocks - first_block):
        raise damaged
    return facts, first_block, places


def _part(
    left: dict[str, np.ndarray],
    index: int,
    place: tuple[Any, ...],
    groups: tuple[MaskGroup, ...],
    architecture: Architecture,
) -> MaskPart:
    tap, block, begin, end = place
    width = architecture.hidden_size
    if tap == "attention_output":
        width = architecture.n_heads * architecture.head_dim
    units = sum(group.size for group in groups[begin:end])
    bias = left.get(f"hidden_bias.{index}")
    inner = bias.size if bias is not None else 0
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "hidden": (np.int8, (inner, width)),
        "hidden_steps": (np.float32, (inner,)),
        "hidden_bias": (np.float32, (inner,)),
        "rows": (np.int8, (units, inner)),
        "row_steps": (np.float32, (units,)),
        "mean": (np.float32, (units,)),
    }
    found = {name: _array(left, f"{name}.{index}", *expected) for name, expected in shapes.items()}
    return MaskPart(tap, block, (begin, end), **found)


def _array(left: dict[str, np.ndarray], name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    array = left.pop(name, None)
    if array is None:
        raise IntegrityError(f"The mask predictor lacks '{name}': compress the model again.")
    check_array(f"The mask predictor's {name}", array, dtype, shape)
    return array
