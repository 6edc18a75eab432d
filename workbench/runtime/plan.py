"""The plan: which decisions are taken while decoding, from what, and what they change.

A *decider* reads a tap of the forward pass, runs a small program and writes a slot, with a scope. A *consumer* reads
a slot and changes what the engine computes. Dynamic precision, contextual sparsity, input thresholds and routing are
all plans; engines know nothing else. Arrays are numpy, so that engines without torch can read a plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import numpy as np

from workbench.errors import EngineError, suggest
from workbench.models.base import Architecture
from workbench.runtime.mask_programs import ConstantMask as ConstantMask
from workbench.runtime.mask_programs import PredictedMask as PredictedMask
from workbench.runtime.mask_programs import Threshold as Threshold

TapKind = Literal["residual", "block_input", "attention_output", "mlp_input", "mlp_inner"]
ConsumerKind = Literal["width", "heads", "neurons", "input_threshold", "path"]

# Values of a ``path`` slot.
PATH_FULL, PATH_SKIP_ATTENTION, PATH_SKIP_MLP, PATH_SKIP_BLOCK = 0, 1, 2, 3


@dataclass(frozen=True)
class Tap:
    """A place in the forward pass, read once per token.

    ``residual``: the residual stream entering block ``block`` (before its norm), (hidden,).
    ``block_input``: the same after the block's input norm, what q, k and v read, (hidden,).
    ``attention_output``: the concatenated head outputs, what ``o`` reads, (heads * head_dim,).
    ``mlp_input``: what gate and up read, (hidden,).
    ``mlp_inner``: the neurons after activation and gate, what ``down`` reads, (neurons,).
    """

    kind: TapKind
    block: int


@dataclass(frozen=True)
class Scope:
    """When a decision is taken.

    ``reply``: once, at the last token of the prompt; in force from the next token on. The prompt itself runs with
    the slot's default. ``every``: at positions 0, n, 2n ... of the sequence, held until the next. ``token``: always.
    For ``every`` and ``token`` the decision is in force at the deciding token itself, for what lies after the tap.
    """

    kind: Literal["reply", "every", "token"]
    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise EngineError(f"A scope of every {self.n} tokens is not possible: n must be at least 1.")


class Program(Protocol):
    """A small causal function of one token's tap.

    ``size`` is 1 for a scalar slot, else the length of the mask it writes: zeros and ones, 1 = computed.
    ``multiply_adds`` and ``bytes`` are its cost per decision.
    """

    @property
    def size(self) -> int: ...

    @property
    def multiply_adds(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    def __call__(self, taps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Map taps (n, width) float32 at sequence positions (n,) int64 to values (n,) float32 or masks (n, size) uint8.

        Row i of the result depends on row i of the arguments alone.
        """
        ...


@dataclass(frozen=True)
class _Levels(ABC):
    """A score of the tap becomes a value: ``values[n]`` where n of the ascending ``thresholds`` lie below the score.

    ``values`` are 0, 1, 2 ... where none are given. At the ``first`` positions of a sequence, whose keys and values
    every later token attends to, the value is the last, whatever the score.
    """

    thresholds: tuple[float, ...]
    values: tuple[float, ...] = ()
    first: int = 0
    size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if list(self.thresholds) != sorted(self.thresholds):
            raise EngineError(f"Thresholds of levels must ascend, got {list(self.thresholds)}.")
        if self.values and len(self.values) != len(self.thresholds) + 1:
            raise EngineError(f"{len(self.thresholds)} thresholds need one value more, got {len(self.values)}.")

    @property
    def level_values(self) -> tuple[float, ...]:
        """The value of each level, lowest first."""
        return self.values or tuple(float(n) for n in range(len(self.thresholds) + 1))

    @property
    def bytes(self) -> int:
        return 4 * len(self.thresholds)

    @property
    def multiply_adds(self) -> int:
        return 0

    @abstractmethod
    def score(self, taps: np.ndarray) -> np.ndarray:
        """Scores (n,) float32 of taps (n, width)."""

    def __call__(self, taps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        cuts = np.asarray(self.thresholds, np.float32)
        level = np.where(positions < self.first, len(cuts), np.searchsorted(cuts, self.score(taps), side="left"))
        return np.asarray(self.level_values, np.float32)[level]


@dataclass(frozen=True)
class NormLevels(_Levels):
    """Levels of the Euclidean norm of the tap."""

    def score(self, taps: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(taps, dtype=np.float64).sum(axis=1)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ProjectionLevels(_Levels):
    """Levels of the norm of ``steps * matrix @ tap``.

    A random projection keeps norms (Johnson and Lindenstrauss): with ``matrix`` = A dW it estimates ``||dW tap||`` from
    few rows. ``matrix`` is int8 (k, width), ``steps`` float32 (k,), the step of each row.
    """

    matrix: np.ndarray
    steps: np.ndarray

    @property
    def multiply_adds(self) -> int:
        return int(self.matrix.size)

    @property
    def bytes(self) -> int:
        return super().bytes + int(self.matrix.nbytes + self.steps.nbytes)

    def score(self, taps: np.ndarray) -> np.ndarray:
        projected = (taps.astype(np.float32) @ self.matrix.T.astype(np.float32)) * self.steps
        return np.sqrt(np.square(projected).sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class LinearLevels(_Levels):
    """Levels of ``weights @ tap + bias``; ``weights`` is float32 (width,).

    With ``rms`` the tap is first divided by its root mean square.
    """

    weights: np.ndarray
    bias: float
    rms: bool = True

    @property
    def multiply_adds(self) -> int:
        return int(self.weights.size)

    @property
    def bytes(self) -> int:
        return super().bytes + int(self.weights.nbytes) + 4

    def score(self, taps: np.ndarray) -> np.ndarray:
        taps = taps.astype(np.float32)
        scores = taps @ self.weights
        if self.rms:
            scores = scores / np.sqrt(np.square(taps).mean(axis=1) + np.float32(1e-12))
        return scores + np.float32(self.bias)


@dataclass(frozen=True)
class ProjectionMask:
    """A mask of the ``keep`` largest entries of ``taps @ matrix.T``; ties go to the lower index.

    ``matrix`` is float32 (size, width).
    """

    matrix: np.ndarray
    keep: int

    @property
    def size(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def multiply_adds(self) -> int:
        return int(self.matrix.size)

    @property
    def bytes(self) -> int:
        return int(self.matrix.nbytes)

    def __call__(self, taps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        scores = taps.astype(np.float64) @ self.matrix.T.astype(np.float64)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.keep]
        mask = np.zeros(scores.shape, dtype=np.uint8)
        np.put_along_axis(mask, order, 1, axis=1)
        return mask


@dataclass(frozen=True)
class PositionTable:
    """The value of the last entry whose position is not after the token's, for schedules that ignore the tap.

    ``positions`` ascends and starts at 0; ``values`` has the same length.
    """

    positions: tuple[int, ...]
    values: tuple[float, ...]
    size: int = 1
    multiply_adds: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        if not self.positions or self.positions[0] != 0 or list(self.positions) != sorted(set(self.positions)):
            raise EngineError(f"Positions of a table must ascend from 0, got {list(self.positions)}.")
        if len(self.positions) != len(self.values):
            raise EngineError(f"A table needs one value per position: {len(self.positions)} and {len(self.values)}.")

    def __call__(self, taps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        index = np.searchsorted(np.asarray(self.positions), positions, side="right") - 1
        return np.asarray(self.values, dtype=np.float32)[index]


@dataclass(frozen=True)
class Decider:
    """Writes ``slot`` from ``tap`` by ``program`` at ``scope``; ``default`` holds until the first decision."""

    slot: str
    tap: Tap
    program: Program
    scope: Scope
    default: float = 0.0


@dataclass(frozen=True)
class Consumer:
    """Reads ``slot`` and changes what is computed.

    ``width``: target a unit; the slot holds the bits to read it at, one of ``widths``. With ``levels`` the slot holds
    an index into them instead, so that one slot moves many units, each along its own widths.
    ``heads`` / ``neurons``: target ``blocks.<i>``; the slot holds a mask of query heads / MLP neurons, 1 = computed,
    from entry ``offset`` on, so that one slot may serve many blocks. Keys and values are always written.
    ``input_threshold``: target a unit; inputs x with ``|x| * factors`` at most the slot's value are left out.
    ``factors`` is float32 (in,), and 1 where it is not given.
    ``expected``, of heads, neurons and inputs: the share of them that is expected to be computed, where that is
    known. Engines lay out weights for it when they are opened, and a policy that moves the share later leaves them so.
    ``path``: target ``blocks.<i>``; the slot holds one of ``PATH_*``. Keys and values are still written.
    """

    slot: str
    kind: ConsumerKind
    target: str
    widths: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    offset: int = 0
    expected: float | None = None
    factors: np.ndarray | None = field(default=None, compare=False)

    def bits(self, values: np.ndarray) -> np.ndarray:
        """Bits int64 (n,) that slot values (n,) ask a width consumer for; -1 where there is no such level."""
        values = np.rint(values).astype(np.int64)
        if not self.levels:
            return values
        inside = (values >= 0) & (values < len(self.levels))
        return np.where(inside, np.asarray(self.levels)[np.clip(values, 0, len(self.levels) - 1)], -1)


@dataclass(frozen=True)
class InputTransform:
    """A linear map on the input of a linear: ``scale`` (multiply), ``order`` (permute) or ``rotation`` (x @ R).

    ``array`` is float32 (in,), int64 (in,) or float32 (in, in). The stored weights already contain the inverse.
    """

    kind: Literal["scale", "order", "rotation"]
    array: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Deciders, consumers and input transforms (linear id to an ordered list) of one compressed model."""

    deciders: tuple[Decider, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    transforms: Mapping[str, Sequence[InputTransform]] = field(default_factory=dict)

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(d.slot for d in self.deciders)

    def decider(self, slot: str) -> Decider:
        for decider in self.deciders:
            if decider.slot == slot:
                return decider
        raise EngineError(f"The plan has no slot '{slot}'." + suggest(slot, self.slots))

    def check(self, architecture: Architecture | None = None) -> None:
        """Raise ``EngineError`` where the plan contradicts itself: unknown slots, or a decision taken too late.

        With an architecture also where masks, factors and predictors do not fit it.
        """
        if len(set(self.slots)) != len(self.slots):
            raise EngineError("Two deciders of the plan write the same slot.")
        for consumer in self.consumers:
            decider = self.decider(consumer.slot)
            if decider.scope.kind != "reply" and _order_of_use(consumer) < _order_of_tap(decider.tap):
                raise EngineError(
                    f"Slot '{consumer.slot}' is decided in block {decider.tap.block} ({decider.tap.kind}) but used "
                    f"earlier, by {consumer.kind} of {consumer.target}: read an earlier tap, or use scope 'reply'."
                )
            if consumer.kind == "width" and not consumer.widths:
                raise EngineError(f"The width consumer of {consumer.target} lists no widths.")
            if not set(consumer.levels) <= set(consumer.widths):
                raise EngineError(
                    f"The levels {list(consumer.levels)} of {consumer.target} are not all among its widths "
                    f"{list(consumer.widths)}."
                )
            if consumer.offset and consumer.kind not in ("heads", "neurons"):
                raise EngineError(
                    f"Only heads and neurons have an offset, {consumer.kind} of {consumer.target} has one."
                )
            if consumer.expected is not None and not 0 <= consumer.expected <= 1:
                raise EngineError(f"The expected share of {consumer.target} must be 0 to 1, got {consumer.expected}.")
            if consumer.factors is not None and consumer.kind != "input_threshold":
                raise EngineError(f"Only input_threshold takes factors, {consumer.kind} of {consumer.target} has them.")
        for decider in self.deciders:
            if decider.program.size > 1 and decider.default not in (0, 1):
                raise EngineError(f"The default of mask '{decider.slot}' must be 0 or 1, got {decider.default}.")
        if architecture is not None:
            self._check_sizes(architecture)

    def _check_sizes(self, arch: Architecture) -> None:
        for consumer in self.consumers:
            block, _ = _order_of_use(consumer)
            if block >= arch.n_blocks:
                raise EngineError(f"A consumer targets '{consumer.target}': the model has {arch.n_blocks} blocks.")
            if consumer.kind in ("heads", "neurons"):
                size = self.decider(consumer.slot).program.size
                needed = arch.n_heads if consumer.kind == "heads" else arch.n_neurons
                if consumer.offset < 0 or consumer.offset + needed > size:
                    raise EngineError(
                        f"The {consumer.kind} of {consumer.target} are {needed} entries from {consumer.offset} on of "
                        f"slot '{consumer.slot}', which has {size}."
                    )
            if consumer.factors is not None:
                inputs = arch.unit(consumer.target).linears[0].in_features
                if consumer.factors.shape != (inputs,) or not (consumer.factors >= 0).all():
                    raise EngineError(
                        f"Factors of {consumer.target} must be {inputs} numbers of at least 0, got shape "
                        f"{consumer.factors.shape}."
                    )
        for decider in self.deciders:
            if isinstance(decider.program, PredictedMask):
                width = tap_width(arch, decider.tap)
                if decider.program.hidden.shape[1] != width:
                    raise EngineError(
                        f"The predictor of '{decider.slot}' reads {decider.program.hidden.shape[1]} values, its tap "
                        f"({decider.tap.kind}) has {width}."
                    )


def tap_width(architecture: Architecture, tap: Tap) -> int:
    """Length of a tap's vector."""
    wide = {"attention_output": architecture.n_heads * architecture.head_dim, "mlp_inner": architecture.n_neurons}
    return wide.get(tap.kind, architecture.hidden_size)


# Position inside a block at which a tap is available and a consumer acts.
_TAP_STAGE = {"residual": 0, "block_input": 1, "attention_output": 3, "mlp_input": 5, "mlp_inner": 7}
_UNIT_STAGE = {"qkv": 2, "o": 4, "gate_up": 6, "down": 8}


def _order_of_tap(tap: Tap) -> tuple[int, int]:
    return tap.block, _TAP_STAGE[tap.kind]


def _order_of_use(consumer: Consumer) -> tuple[int, int]:
    parts = consumer.target.split(".")
    if len(parts) < 2 or parts[0] != "blocks" or not parts[1].isdigit():
        raise EngineError(f"A consumer's target must be blocks.<i> or blocks.<i>.<unit>, got '{consumer.target}'.")
    stage = {"heads": 4, "neurons": 6, "path": 2}.get(consumer.kind)
    if stage is None:
        if len(parts) != 3 or parts[2] not in _UNIT_STAGE:
            raise EngineError(f"A {consumer.kind} consumer targets a unit, got '{consumer.target}'.")
        stage = _UNIT_STAGE[parts[2]]
    return int(parts[1]), stage


def width_plan(architecture: Architecture, widths: Sequence[int], bits: int) -> Plan:
    """One slot, ``width``, read by all units of nested weights: ``bits`` until a policy says another of ``widths``."""
    table = PositionTable((0,), (float(bits),))
    return Plan(
        deciders=(Decider("width", Tap("residual", 0), table, Scope("token"), default=float(bits)),),
        consumers=tuple(Consumer("width", "width", unit.id, tuple(widths)) for unit in architecture.units),
    )


@dataclass(frozen=True)
class Policy:
    """The part of a recipe that may change at run time without new bytes.

    A slot in ``values`` takes that value (a number, or a mask) instead of asking its decider, in sequences that start
    from then on. ``thresholds`` replace those of a slot's program, as many and as that program takes them (levels
    ascend), from the next token of every sequence on; a slot that is not named has the plan's.
    """

    values: Mapping[str, float | np.ndarray] = field(default_factory=dict)
    thresholds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def check(self, plan: Plan) -> None:
        """Raise ``EngineError`` where it names a slot that the plan does not have, or gives it what it cannot take."""
        for slot, value in self.values.items():
            size = plan.decider(slot).program.size
            if np.asarray(value).size not in (1, size):
                raise EngineError(f"Slot '{slot}' has {size} values, the policy gives {np.asarray(value).size}.")
            if size > 1 and not np.isin(value, (0, 1)).all():
                raise EngineError(f"Slot '{slot}' is a mask of zeros and ones, the policy gives other values.")
        for slot, given in self.thresholds.items():
            program = plan.decider(slot).program
            expected = len(getattr(program, "thresholds", ()))
            if len(given) != expected:
                raise EngineError(f"Slot '{slot}' has {expected} thresholds, the policy gives {len(given)}.")
            if expected:
                try:
                    with_thresholds(program, given)
                except EngineError as error:
                    raise EngineError(f"Slot '{slot}': {error}") from error


def with_thresholds(program: Program, thresholds: Sequence[float]) -> Program:
    """The same program with other thresholds.

    Raises:
        EngineError: the program does not take them.
    """
    given = tuple(float(t) for t in thresholds)
    return replace(program, thresholds=given)  # type: ignore[type-var, call-arg]
