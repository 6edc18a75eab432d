"""Widths chosen per token, looked at step by step: the estimate that decides, the error it stands for, the choice.

Every step between two widths of a unit (3 to 4 bits, 4 to 5 ...) has an error, ``||dW x||``: how much the unit's output
changes where the wider width is read. A decision cannot afford that product, so it compares an estimate with a
threshold. ``PrecisionSteps`` measures both on the very inputs that the mixed widths lead to.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from workbench.analysis.precision_thresholds import average_bits, error_scale, thresholds
from workbench.analysis.profile import Provenance, TextRecord, library_versions
from workbench.analysis.sensitivity import StepSequence
from workbench.capture import capture_text
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.formats.selectors import Selectors
from workbench.models.base import Architecture
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.base import Engine
from workbench.runtime.plan import ProjectionLevels
from workbench.runtime.precision import Rule, estimated_by_norm, precision_plan
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
    instead of ``high``), ``threshold`` (that the estimate is compared with; infinite or NaN where nothing is decided),
    and ``bits`` (what the unit read at that token). One pass over each sequence gives all of it.

    Under the rule ``gain`` the estimate is the norm, brought to the scale of the error on calibration text; under
    ``error`` it is DP-LLM's: a regression on the norm, or a projection where R^2 is below 0.9 and one was stored.

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
        cuts = thresholds(compressed.architecture, self._selectors, target, rule)
        self._cuts = dict(zip(zip(cuts["unit"], cuts["low"], strict=True), cuts["threshold"], strict=True))
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
        seen = _Choices(self._compressed.architecture, self._selectors, self._engine, self._rule, self._cuts, job)
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
        self,
        architecture: Architecture,
        selectors: Selectors,
        engine: ReferenceEngine,
        rule: Rule,
        cuts: Mapping[tuple[str, int], float],
        job: Job,
    ) -> None:
        self._selectors, self._engine, self._rule, self._cuts, self._job = selectors, engine, rule, cuts, job
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
        bits = consumer.bits(self._deciders[consumer.slot].program(taps, positions))
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
                        "estimate": self._estimate(index, step, norms, taps),
                        "error": error.float().cpu().numpy(),
                        "threshold": np.float32(self._cuts.get((unit.id, low), np.nan)),
                        "bits": bits.astype(np.int8),
                    }
                )
            )
        self._job.within((index + 1) / len(self._units))

    def _estimate(self, unit: int, step: int, norms: np.ndarray, taps: np.ndarray) -> np.ndarray:
        if self._rule == "gain":
            return norms * np.float32(error_scale(self._selectors, unit, step))
        projection = self._selectors.projections.get((unit, step))
        if projection is not None and not estimated_by_norm(self._selectors, unit, step):
            return ProjectionLevels((), matrix=projection[0], steps=projection[1]).score(taps)
        slope, intercept, _ = self._selectors.regression[unit, step]
        return slope * norms + intercept


def autocorrelation(table: pd.DataFrame, low: int, column: str = "estimate", longest: int = 32) -> pd.DataFrame:
    """Correlation of a unit's value at a step with its value some steps later: does one token tell of the next?

    Values but ``bits`` are taken as logarithms, so that a few huge ones do not decide, and without the first token of
    each sequence; the correlation is over all sequences, around each unit's mean. A unit whose value never changes has
    none.

    Args:
        table: of ``PrecisionSteps``.
        low: which step between widths.
        column: ``estimate``, ``error``, ``norm`` or ``bits``.
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
            one.sort_values("step")[column].to_numpy(np.float64) for _, one in values.groupby("sequence", sort=False)
        ]
        if column != "bits":
            series = [np.log(np.maximum(one, 1e-30)) for one in series]
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
        ``token`` (id), ``count``, ``bits`` (average read at that token), ``excess`` and ``error``: the exact error of
        the narrowest step over that unit's own mean, both geometric, over all units.
    """
    keys = ["sequence", "step"]
    one = table.sort_values("low", kind="stable").drop_duplicates([*keys, "unit"])
    logs = pd.Series(np.log(np.maximum(one["error"].to_numpy(np.float64), 1e-30)), one.index)
    steps = pd.DataFrame(
        {
            "token": one.groupby(keys)["token"].first(),
            "bits": average_bits(one, architecture),
            "log_error": (logs - logs.groupby(one["unit"], observed=True).transform("mean"))
            .groupby([one[key] for key in keys])
            .mean(),
        }
    )
    found = steps.groupby("token").agg(count=("bits", "size"), bits=("bits", "mean"), error=("log_error", "mean"))
    found = found.assign(excess=found["bits"] - float(steps["bits"].mean()), error=np.exp(found["error"]))
    found = found[found["count"] >= seen].reset_index()
    found = found.sort_values(["excess", "token"], ascending=[False, True])
    return found[["token", "count", "bits", "excess", "error"]].reset_index(drop=True)
