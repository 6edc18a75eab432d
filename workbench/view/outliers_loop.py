"""What a sitting with outliers looks at, and what it predicts of a pick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from workbench.analysis.interventions import Intervention, Interventions
from workbench.analysis.outliers import (
    ChannelStatistics,
    InputSurface,
    MassiveActivations,
    pooled,
    power_of_two_groups,
    salience,
    weight_channels,
)
from workbench.analysis.profile import Profile
from workbench.apply.awq_predict import WEIGHTS, KnownInputs, PredictedUnit, predict_unit
from workbench.apply.tender_predict import GroupErrors
from workbench.corpus import TextRecord, open_text, windows
from workbench.models import LoadedModel
from workbench.operate.jobs import analyze
from workbench.progress import Job
from workbench.store import Store
from workbench.view.outliers_picks import Method, OutlierSettings, Protection, Rounding

_FIRST = 0  # the range of steps that holds the first token alone


@dataclass(frozen=True)
class Look:
    """What was seen of a model.

    Attributes:
        statistics: profile of ``ChannelStatistics``.
        massive: profile of ``MassiveActivations``.
        weights: table of ``weight_channels``.
        texts: windows of tokens, by the name of their text.
        groups: profile of ``GroupErrors``, where groups are picked.
    """

    statistics: Profile
    massive: Profile
    weights: pd.DataFrame
    texts: dict[str, list[tuple[int, ...]]]
    groups: Profile | None

    @cached_property
    def _by_unit(self) -> dict[str, pd.DataFrame]:
        return {str(unit): rows for unit, rows in self.statistics.table.groupby("unit", observed=True)}

    @cached_property
    def first_steps(self) -> list[int]:
        """Where ranges of steps begin."""
        return sorted(int(first) for first in self.statistics.table["first_step"].unique())

    def channels(self, unit: str, first_step: int | None = None) -> pd.DataFrame:
        """One row per input channel of a unit, all texts together, most salient first.

        Args:
            unit: id.
            first_step: of the range of steps; None for all.

        Returns:
            Columns of ``pooled``, ``q99`` (the largest of all texts and ranges: quantiles cannot be pooled), ``norm``
            and ``weight_absmax`` of what multiplies the channel, and ``rank`` by mean magnitude.
        """
        rows = self._by_unit[unit]
        if first_step is not None:
            rows = rows[rows["first_step"] == first_step]
        quantile = rows.groupby("channel")["q99"].max().rename("q99")
        weights = self.weights[self.weights["unit"] == unit].rename(columns={"absmax": "weight_absmax"})
        found = pooled(rows).merge(quantile, on="channel")
        return salience(found.merge(weights[["channel", "norm", "weight_absmax"]], on="channel"))

    def inputs(self, unit: str) -> KnownInputs:
        """What predictions know of a unit's inputs: all steps but the first, which speaks for no other token."""
        rows = self._by_unit[unit]
        later = [first for first in self.first_steps if first != _FIRST] or [_FIRST]
        table = pooled(rows, later).sort_values("channel")
        square, magnitude = (
            torch.from_numpy(table[name].to_numpy("float32", copy=True)) for name in ("mean_square", "mean_abs")
        )
        return KnownInputs(square, magnitude)

    def said(self) -> str:
        """How much was looked at."""
        parts = [f"{len(found)} windows of {name}" for name, found in self.texts.items()]
        n_tokens = sum(len(window) for found in self.texts.values() for window in found)
        return f"{n_tokens} tokens: {', '.join(parts)}"


def look(model: LoadedModel, method: Method, settings: OutlierSettings, store: Store, job: Job) -> Look:
    """Look at every input channel of every unit, at the largest values, and at groups where these are picked."""
    texts, records = _texts(model, settings)
    seed = settings.seed
    statistics = analyze(store, ChannelStatistics(model, texts, records=records, seed=seed), job).profile
    massive = analyze(store, MassiveActivations(model, texts, records=records, seed=seed), job).profile
    groups = None
    if method == "tender":
        every = [window for found in texts.values() for window in found]
        groups = analyze(store, GroupErrors(model, every, texts=records, seed=seed), job).profile
    return Look(statistics, massive, weight_channels(model), texts, groups)


def _texts(model: LoadedModel, settings: OutlierSettings) -> tuple[dict[str, list[tuple[int, ...]]], list[TextRecord]]:
    texts, records = {}, []
    for name in settings.texts:
        corpus = open_text(name, "calibration", model=model, seed=settings.seed)
        found = windows(corpus, model, settings.look_length, limit=settings.look_windows, seed=settings.seed)
        texts[corpus.name] = [window.tokens for window in found]
        records.append(corpus.record(sum(len(window.tokens) for window in found)))
    return texts, records


def see_surface(
    model: LoadedModel, seen: Look, unit: str, settings: OutlierSettings, store: Store, job: Job
) -> Profile:
    """The input of a unit at every token of the first window, as far as it is shown."""
    first = next(iter(seen.texts.values()))[0]
    return analyze(store, InputSurface(model, first[: settings.surface_tokens], unit), job).profile


def predict(
    model: LoadedModel, seen: Look, unit: str, protection: Protection, *, weights: int = WEIGHTS
) -> PredictedUnit:
    """What a protection is expected to do to one unit.

    Raises:
        RecipeError: it is not possible.
    """
    tokens = OutlierSettings().calibration_tokens  # nothing is fitted here
    awq, kept = protection.awq(tokens), protection.salient(tokens)
    return predict_unit(model, model.architecture.unit(unit), seen.inputs(unit), awq, kept, weights=weights)


def predict_all(
    model: LoadedModel, seen: Look, protection: Protection, dropped: Callable[[], bool], job: Job
) -> pd.DataFrame | None:
    """What a protection is expected to do to every unit: ``block``, ``unit``, ``error``, ``rounded``, ``alpha``.

    Fewer weights of each are rounded than for the one that is looked at.

    Args:
        model: dense.
        seen: of it.
        protection: that is predicted.
        dropped: asked between units; once it says so, nobody wants the answer, and None is returned.
        job: progress and cancel.
    """
    rows = []
    units = model.architecture.units
    job.stage("predict every unit", len(units))
    for unit in units:
        if dropped():
            return None
        found = predict(model, seen, unit.id, protection, weights=WEIGHTS // 4)
        rows.append((unit.block, unit.id, found.error, found.rounded, found.alpha))
        job.advance()
    return pd.DataFrame(rows, columns=["block", "unit", "error", "rounded", "alpha"])


def predicted_groups(groups: pd.DataFrame, rounding: Rounding) -> pd.DataFrame:
    """Rows of ``GroupErrors`` that a rounding takes, one per unit, with ``error`` and ``plain`` (without groups)."""
    table = groups.assign(error=groups["activation_error"] + groups["weight_error"])
    table = table[table["bits"] == rounding.bits]
    plain = table[(table["scales"] == "token") & (table["groups"] == 1)].set_index("unit")["error"]
    own = table[table["scales"] == rounding.scales]
    own = own[own["chosen"]] if rounding.groups is None else own[own["groups"] == rounding.groups]
    return own.assign(plain=own["unit"].map(plain)).reset_index(drop=True)


def group_factors(seen: Look, unit: str, rounding: Rounding, groups: int) -> np.ndarray:
    """Scale of each input channel's group over that of the largest, float64 (in,): 1, 1/2, 1/4 and so on.

    Channels are grouped by their root mean square, or by their largest magnitude where scales are calibrated.
    """
    if rounding.scales == "token":
        ranges = seen.inputs(unit).square.sqrt().numpy()
    else:
        ranges = seen.channels(unit).sort_values("channel")["absmax"].to_numpy()
    return 2.0 ** -power_of_two_groups(ranges, groups)


def intervene(model: LoadedModel, seen: Look, unit: str, store: Store, job: Job) -> pd.DataFrame:
    """KL to dense with one thing set to zero: a massive activation, and channels of a unit for contrast.

    On the first window of each text.

    Returns:
        ``what``, ``site``, ``channel``, ``step`` (-1: all), ``kl`` (nats per token), ``n_tokens``.
    """
    texts = [found[0] for found in seen.texts.values()]
    # In the order of blocks: what comes before a change need not run again.
    changes = dict(sorted(_changes(seen, unit), key=lambda named: int(named[1].site.split(".")[1])))
    found = analyze(store, Interventions(model, texts, list(changes.values())), job).profile.table
    names = {(c.site, c.channel, -1 if c.step is None else c.step): what for what, c in changes.items()}
    keys = zip(found["site"], found["channel"], found["step"], strict=True)
    return found.assign(what=[names[key] for key in keys])[["what", "site", "channel", "step", "kl", "n_tokens"]]


def _changes(seen: Look, unit: str) -> Iterator[tuple[str, Intervention]]:
    values = seen.massive.table
    residual = values[values["site"].str.count(r"\.") == 1]
    top = residual.iloc[int(residual["value"].abs().to_numpy().argmax())]
    site, channel, step = str(top["site"]), int(top["channel"]), int(top["step"])
    yield "the largest value of the residual, at its token", Intervention(site, channel, step=step)
    yield "its channel, every token", Intervention(site, channel)
    channels = seen.channels(unit)
    ranked, by_weight = channels["channel"].tolist(), channels.nlargest(1, "norm")["channel"].iloc[0]
    yield "most salient channel by activation", Intervention(unit, int(ranked[0]))
    if by_weight != ranked[0]:
        yield "channel with the largest weights", Intervention(unit, int(by_weight))
    if ranked[len(ranked) // 2] not in (ranked[0], by_weight):
        yield "a middling channel", Intervention(unit, int(ranked[len(ranked) // 2]))
