"""Widths chosen per token, looked at step by step: the estimate that decides, the error it stands for, the choice.

Every step between two widths of a unit (3 to 4 bits, 4 to 5 ...) has an error, ``||dW x||``: how much the unit's output
changes where the wider width is read. A decision cannot afford that product, so it compares an estimate with a
threshold. ``PrecisionSteps`` measures both on the very inputs that the mixed widths lead to.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.analysis.profile import Provenance, TextRecord, library_versions
from workbench.analysis.sensitivity import StepSequence
from workbench.capture import capture_text
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.formats.selectors import Selectors, share_above
from workbench.models.base import Architecture
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.base import Engine
from workbench.runtime.plan import ProjectionLevels
from workbench.runtime.precision import Rule, error_thresholds, gain_thresholds, precision_plan
from workbench.runtime.reference import ReferenceEngine


def require_selectors(compressed: CompressedModel) -> Selectors:
    """Return a model's selectors.

    Raises:
        InputError: it has none.
    """
    if compressed.selectors is None:
        raise InputError(
            "This model cannot choose widths per token: compress it with the methods 'nested' and 'dynamic-precision'."
        )
    return compressed.selectors


class PrecisionSteps:
    """Estimate, exact error and chosen width of every unit at every step, while widths move with every token.

    The table has one row per sequence, step, unit and step between widths: ``sequence``, ``step`` (position of the
    token), ``phase`` (``prompt`` or ``reply``), ``token`` (id), ``block``, ``unit``, ``low`` and ``high`` (bits; the
    same where a unit has one width), ``norm`` (of the unit's input), ``estimate`` and ``error`` (of reading ``low``
    instead of ``high``), and ``bits`` (what the unit read at that token).

    Under the rule ``gain`` the estimate is the norm, brought to the scale of the error on calibration text; under
    ``error`` it is DP-LLM's: a regression on the norm, or a projection.

    Args:
        compressed: nested codes and selectors.
        sequences: what to look at.
        target: average bits.
        rule: ``gain`` or ``error``.
        text: where the sequences come from, for the record.
        seed: what they were drawn with, for the record.

    Raises:
        InputError: no sequences, a model without selectors, an impossible target.
    """

    def __init__(
        self,
        compressed: CompressedModel,
        sequences: Sequence[StepSequence],
        target: float,
        *,
        rule: Rule = "gain",
        text: TextRecord | None = None,
        seed: int = 0,
    ) -> None:
        if not sequences:
            raise InputError("No sequences were given to look at: give at least one prompt or text.")
        self._compressed, self._sequences, self._rule = compressed, tuple(sequences), rule
        self._selectors = require_selectors(compressed)
        self._engine: Engine | None = None
        self._plan = precision_plan(compressed.architecture, self._selectors, target, rule)
        self.provenance = Provenance(
            kind="precision-steps",
            model=compressed.base.name,
            architecture_sha256=compressed.base.fingerprint.architecture,
            weights_sha256=compressed.sha256,
            text=text,
            seed=seed,
            parameters={
                "target": target,
                "rule": rule,
                "sequences": [{"tokens": list(s.tokens), "prompt_length": s.prompt_length} for s in sequences],
            },
            versions=library_versions(),
        )

    @property
    def parts(self) -> Sequence[str]:
        return [f"sequence-{i}" for i in range(len(self._sequences))]

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one sequence's rows."""
        index = int(part.rsplit("-", 1)[1])
        sequence = self._sequences[index]
        if self._engine is None:
            self._engine = open_engine(self._compressed, engine="reference", plan=self._plan)
        assert isinstance(self._engine, ReferenceEngine)
        seen = _Choices(self._compressed.architecture, self._selectors, self._engine, self._rule, job)
        capture_text(self._engine, sequence.tokens, [seen], prompt_length=sequence.prompt_length)
        if part == self.parts[-1]:
            self._engine.close()
            self._engine = None
        table = pd.concat(seen.frames, ignore_index=True)
        steps = table["step"].to_numpy()
        phase = np.where(steps < sequence.prompt_length, "prompt", "reply")
        table.insert(0, "sequence", np.int32(index))
        table.insert(2, "phase", pd.Series(phase, dtype=pd.CategoricalDtype(["prompt", "reply"])))
        table.insert(3, "token", np.array(sequence.tokens)[steps])
        return table


class _Choices:
    """A reducer: what the decider of each unit sees, what it chooses, and the exact errors."""

    def __init__(
        self, architecture: Architecture, selectors: Selectors, engine: ReferenceEngine, rule: Rule, job: Job
    ) -> None:
        self._selectors, self._engine, self._rule, self._job = selectors, engine, rule, job
        self._units = {unit.linears[0].id: (index, unit) for index, unit in enumerate(architecture.units)}
        self._deciders = {decider.slot: decider for decider in engine.plan.deciders}
        self._consumers = {consumer.target: consumer for consumer in engine.plan.consumers}
        self.frames: list[pd.DataFrame] = []

    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        index, unit = self._units.get(site, (-1, None))
        if unit is None:
            return
        taps = rows.float().cpu().numpy()
        positions = np.arange(start, start + len(rows))
        consumer = self._consumers[unit.id]
        program = self._deciders[consumer.slot].program
        bits = consumer.bits(program(taps, positions))
        norms = np.sqrt(np.square(taps, dtype=np.float64).sum(axis=1)).astype(np.float32)
        widths = [int(width) for width in self._selectors.widths]
        pairs = list(itertools.pairwise(consumer.widths)) or [(consumer.widths[0], consumer.widths[0])]
        for low, high in pairs:
            error = torch.cat(
                [rows @ (self._engine.weight(x.id, high) - self._engine.weight(x.id, low)).T for x in unit.linears], 1
            ).norm(dim=1)
            step = min(widths.index(low), len(widths) - 2)
            self.frames.append(
                pd.DataFrame(
                    {
                        "step": positions.astype(np.int32),
                        "block": np.int16(unit.block),
                        "unit": unit.id,
                        "low": np.int8(low),
                        "high": np.int8(high),
                        "norm": norms,
                        "estimate": self._estimate(program, index, step, norms, taps),
                        "error": error.float().cpu().numpy(),
                        "bits": bits.astype(np.int8),
                    }
                )
            )
        self._job.within((index + 1) / len(self._units))

    def _estimate(self, program: Any, unit: int, step: int, norms: np.ndarray, taps: np.ndarray) -> np.ndarray:
        if self._rule == "gain":
            return norms * np.float32(error_scale(self._selectors, unit, step))
        if isinstance(program, ProjectionLevels):
            return program.score(taps)
        slope, intercept, _ = self._selectors.regression[unit, step]
        return slope * norms + intercept


def error_scale(selectors: Selectors, unit: int, step: int) -> float:
    """Error over norm on calibration text, both as root mean squares: what the rule ``gain`` takes errors to be."""
    errors = selectors.errors[unit, step].astype(np.float64)
    power = float(selectors.power[unit])
    return float(np.sqrt(np.square(errors).mean() / power)) if power > 0 else 0.0


def thresholds(architecture: Architecture, selectors: Selectors, target: float, rule: Rule = "gain") -> pd.DataFrame:
    """Thresholds for a target, on the scale of ``estimate``: ``unit``, ``low``, ``high``, ``threshold``, ``share``.

    ``share`` is that of calibration tokens whose estimate exceeds the threshold, which therefore read ``high`` or
    wider; a threshold of infinity is never exceeded, one of minus infinity always. Steps that a unit does not decide
    about are left out.

    Raises:
        InputError: a target outside the widths.
        EngineError: the rule ``error`` where nothing was learnt.
    """
    widths = [int(width) for width in selectors.widths]
    rows: list[tuple[str, int, int, float, float]] = []
    if rule == "gain":
        given = gain_thresholds(architecture, selectors, target)
        for index, unit in enumerate(architecture.units):
            shares = share_above(selectors.norms[index], np.array(given[unit.id]))
            for step, (cut, share) in enumerate(zip(given[unit.id], shares, strict=True)):
                scaled = cut * error_scale(selectors, index, step)
                rows.append((unit.id, widths[step], widths[step + 1], scaled, float(share)))
    else:
        cuts = error_thresholds(architecture, selectors, target)
        plan = precision_plan(architecture, selectors, target, "error")
        pairs = {consumer.target: consumer.widths for consumer in plan.consumers}
        for index, unit in enumerate(architecture.units):
            if len(pairs[unit.id]) == 2:
                low, high = pairs[unit.id]
                cut = cuts[unit.id]
                share = float(share_above(selectors.errors[index, widths.index(low)], np.array([cut]))[0])
                rows.append((unit.id, low, high, cut, share if np.isfinite(cut) else float(cut < 0)))
    return pd.DataFrame(rows, columns=["unit", "low", "high", "threshold", "share"])


def policy_thresholds(
    architecture: Architecture, selectors: Selectors, cuts: pd.DataFrame
) -> dict[str, tuple[float, ...]]:
    """Thresholds of the rule ``gain`` on the norm, as a policy takes them, from those on the scale of the estimate.

    Later steps of a unit are taken only after earlier ones: a threshold below that of the step before is raised to it.

    Args:
        architecture: of the model.
        selectors: its statistics.
        cuts: ``unit``, ``low`` and ``threshold``, as ``thresholds`` gives them.
    """
    widths = [int(width) for width in selectors.widths]
    by_unit = dict(tuple(cuts.sort_values("low").groupby("unit", sort=False)))
    found: dict[str, tuple[float, ...]] = {}
    for index, unit in enumerate(architecture.units):
        if unit.id not in by_unit:
            found[unit.id] = ()
            continue
        rows = by_unit[unit.id]
        scales = [max(error_scale(selectors, index, widths.index(int(low))), 1e-30) for low in rows["low"]]
        found[unit.id] = tuple(np.maximum.accumulate(rows["threshold"].to_numpy(np.float64) / scales).tolist())
    return found


def with_threshold(
    architecture: Architecture, selectors: Selectors, cuts: pd.DataFrame, unit: str, low: int, threshold: float
) -> pd.DataFrame:
    """The table of ``thresholds`` (rule ``gain``) with one threshold moved, and its share with it.

    Raises:
        InputError: a step that the table does not hold, or a threshold that is negative or NaN.
    """
    at = (cuts["unit"] == unit) & (cuts["low"] == low)
    if not at.any():
        raise InputError(f"{unit} decides nothing from {low} bits on.")
    if not threshold >= 0:
        raise InputError(f"A threshold on an error is 0 or more, got {threshold:g}.")
    index = [one.id for one in architecture.units].index(unit)
    step = [int(width) for width in selectors.widths].index(low)
    norm = threshold / max(error_scale(selectors, index, step), 1e-30)
    share = float(share_above(selectors.norms[index], np.array([norm]))[0])
    found = cuts.copy()
    found.loc[at, ["threshold", "share"]] = (threshold, share)
    return found


def expected_average(architecture: Architecture, selectors: Selectors, shares: pd.DataFrame) -> float:
    """Average bits on calibration text where units take their steps by these shares (table of ``thresholds``)."""
    sizes = {unit.id: unit.n_weights for unit in architecture.units}
    lowest = shares.groupby("unit")["low"].min()
    total = sum(sizes.values())
    bits = sum(sizes[unit] * float(lowest.get(unit, selectors.widths[0])) for unit in sizes)
    steps = shares["unit"].map(sizes) * shares["share"] * (shares["high"] - shares["low"])
    return (bits + float(steps.sum())) / total


def autocorrelation(table: pd.DataFrame, low: int, column: str = "estimate", longest: int = 32) -> pd.DataFrame:
    """Correlation of a unit's value at a step with its value some steps later: does one token tell of the next?

    Values are logarithms, so that a few huge ones do not decide, and without the first token of each sequence; the
    correlation is over all sequences, around each unit's mean.

    Args:
        table: of ``PrecisionSteps``.
        low: which step between widths.
        column: ``estimate``, ``error`` or ``norm``.
        longest: largest lag.

    Returns:
        ``unit``, ``lag`` (1 to ``longest``, as far as sequences reach), ``correlation`` and ``n_pairs``.
    """
    part = table[(table["low"] == low) & (table["step"] > 0)]
    if part.empty:
        raise InputError(f"The table holds no step from {low} bits.")
    rows = []
    for unit, values in part.groupby("unit", observed=True, sort=False):
        series = [
            np.log(np.maximum(one.sort_values("step")[column].to_numpy(np.float64), 1e-30))
            for _, one in values.groupby("sequence")
        ]
        mean = np.concatenate(series).mean()
        series = [one - mean for one in series]
        power = np.concatenate(series).var()
        for lag in range(1, longest + 1):
            products = [one[:-lag] * one[lag:] for one in series if len(one) > lag]
            if not products or power <= 0:
                break
            joined = np.concatenate(products)
            rows.append((unit, lag, float(joined.mean() / power), len(joined)))
    return pd.DataFrame(rows, columns=["unit", "lag", "correlation", "n_pairs"])


def token_excess(table: pd.DataFrame, architecture: Architecture, seen: int = 1) -> pd.DataFrame:
    """Which tokens raise the width: their average bits beyond the average of all tokens, most first.

    Args:
        table: of ``PrecisionSteps``.
        architecture: of the model, whose units weigh by their size.
        seen: fewest occurrences of a token.

    Returns:
        ``token`` (id), ``count``, ``bits`` (average read at that token) and ``excess``.
    """
    sizes = {unit.id: unit.n_weights for unit in architecture.units}
    one = table.drop_duplicates(["sequence", "step", "unit"])
    weight = one["unit"].map(sizes).astype(np.float64)
    sums = (one["bits"] * weight).groupby([one["sequence"], one["step"]]).sum() / sum(sizes.values())
    tokens = one.groupby(["sequence", "step"])["token"].first()
    frame = pd.DataFrame({"token": tokens, "bits": sums}).groupby("token")["bits"].agg(["size", "mean"])
    found = frame.reset_index().rename(columns={"size": "count", "mean": "bits"})
    found["excess"] = found["bits"] - float(sums.mean())
    found = found[found["count"] >= seen]
    return found.sort_values(["excess", "token"], ascending=[False, True]).reset_index(drop=True)
