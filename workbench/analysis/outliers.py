"""Which channels of which inputs are far larger than the others, on which text, at which steps, and what they carry.

* ``ChannelStatistics``: every input channel of every unit, streamed over texts and ranges of steps.
* ``MassiveActivations``: the largest single values, with their tokens (Sun et al. 2024, arXiv 2402.17762).
* ``InputSurface``: one unit's input, tokens x channels.
* ``weight_channels``, ``salience``, ``overlap``, ``power_of_two_groups``: what follows from them.

What a channel or a value does to the output is measured in ``workbench.analysis.interventions``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.analysis.common import model_provenance
from workbench.analysis.profile import TextRecord
from workbench.capture import ChannelMoments, capture_text
from workbench.errors import InputError
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job
from workbench.runtime.reference import ReferenceEngine

QUANTILES = (0.5, 0.9, 0.99, 0.999)
# The first token is a range of its own: it is what every later token attends to, and holds most massive activations.
FIRST_STEPS = (0, 1, 64)
_TOP = 8  # values kept of every text, site and window
Texts = Mapping[str, Sequence[Sequence[int]]]


def _checked(texts: Texts) -> dict[str, list[list[int]]]:
    found = {name: [list(window) for window in windows] for name, windows in texts.items()}
    empty = [name for name, windows in found.items() if not any(windows)]
    if not found or empty:
        raise InputError(f"No windows were given{f' of {empty[0]}' if empty else ''}: give at least one of each text.")
    return found


class ChannelStatistics:
    """Statistics of every input channel of every unit, by text and by range of steps.

    The table has one row per text, range of steps, unit and channel: ``text``, ``first_step`` (of the range),
    ``block``, ``unit``, ``channel``, ``n_tokens``, ``absmax``, ``min``, ``max``, ``mean``, ``mean_abs``,
    ``mean_square``, ``kurtosis`` (fourth central moment over the squared variance: 3 for a normal distribution; NaN
    for a constant) and ``q50``, ``q90``, ``q99``, ``q999``, quantiles of the magnitude to 9 %.

    Args:
        model: the dense model.
        texts: token windows by the name of their text.
        first_steps: where ranges of steps begin, ascending from 0.
        records: of the texts, for the record.
        seed: what windows were drawn with, for the record.
    """

    def __init__(
        self,
        model: LoadedModel,
        texts: Texts,
        *,
        first_steps: Sequence[int] = FIRST_STEPS,
        records: Sequence[TextRecord] = (),
        seed: int = 0,
    ) -> None:
        self._model, self._texts = model, _checked(texts)
        self._first = tuple(first_steps)
        if not self._first or self._first[0] != 0 or list(self._first) != sorted(set(self._first)):
            raise InputError(f"Ranges of steps begin at {list(self._first)}: they must ascend from 0.")
        self.provenance = _provenance("channel-statistics", model, self._texts, records, seed, first=list(self._first))

    @property
    def parts(self) -> Sequence[str]:
        return list(self._texts)

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one text's rows."""
        units = {unit.linears[0].id: unit for unit in self._model.architecture.units}
        moments = ChannelMoments(list(units), self._first)
        _see(self._model, self._texts[part], [moments], job)
        frames = []
        for first in self._first:
            for site, unit in units.items():
                columns = moments.found(site, first, QUANTILES)
                if columns is not None:
                    n = len(columns["absmax"])
                    named = {"text": part, "first_step": first, "block": unit.block, "unit": unit.id}
                    frames.append(pd.DataFrame(named | {"channel": np.arange(n, dtype=np.int32)} | columns))
        return pd.concat(frames, ignore_index=True)


class MassiveActivations:
    """The largest values of every site: where they are, and how far beyond the others of their token.

    Sites are the residual entering each block (``blocks.<i>``) and the input of each unit (its id). The table has
    ``text``, ``window``, ``step``, ``token``, ``site``, ``block``, ``channel``, ``value``, ``median`` (of the
    magnitudes at that token) and ``ratio`` of the two; the largest few of every window and site are kept. Sun et al.
    call a value massive above 100 and above 1000 times the median.

    Args: as ``ChannelStatistics``.
    """

    def __init__(
        self, model: LoadedModel, texts: Texts, *, records: Sequence[TextRecord] = (), seed: int = 0, top: int = _TOP
    ) -> None:
        self._model, self._texts, self._top = model, _checked(texts), top
        self.provenance = _provenance("massive-activations", model, self._texts, records, seed, top=top)

    @property
    def parts(self) -> Sequence[str]:
        return list(self._texts)

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one text's rows."""
        largest = _Largest({u.linears[0].id: u for u in self._model.architecture.units}, self._top)
        windows = self._texts[part]
        _see(self._model, windows, [largest], job, begin=largest.begin)
        table = pd.DataFrame(largest.rows, columns=["window", "step", "site", "block", "channel", "value", "median"])
        table["token"] = [windows[row[0]][row[1]] for row in largest.rows]
        table["ratio"] = table["value"].abs() / table["median"].replace(0, np.nan)
        table.insert(0, "text", part)
        return table


class InputSurface:
    """The input of one unit, every token and channel: ``step``, ``token``, ``channel``, ``value``.

    Args:
        model: the dense model.
        tokens: one text.
        unit: id.
    """

    parts = ("text",)

    def __init__(self, model: LoadedModel, tokens: Sequence[int], unit: str) -> None:
        self._model, self._tokens = model, list(_checked({"the text": [tokens]})["the text"][0])
        self._unit = model.architecture.unit(unit)
        self.provenance = model_provenance("input-surface", model, None, 0, {"tokens": self._tokens, "unit": unit})

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        kept = _Kept(self._unit.linears[0].id)
        _see(self._model, [self._tokens], [kept], job)
        steps, channels = kept.rows.shape
        return pd.DataFrame(
            {
                "step": np.repeat(np.arange(steps, dtype=np.int32), channels),
                "token": np.repeat(self._tokens, channels),
                "channel": np.tile(np.arange(channels, dtype=np.int32), steps),
                "value": kept.rows.ravel(),
            }
        )


def weight_channels(model: LoadedModel) -> pd.DataFrame:
    """What weights multiply each input channel of each unit: ``block``, ``unit``, ``channel``, ``absmax``, ``norm``.

    ``norm`` is Euclidean, over the outputs of all linears of the unit.
    """
    frames = []
    for unit in model.architecture.units:
        weight = torch.cat([model.linear_module(linear.id).weight.detach().float() for linear in unit.linears])
        frames.append(
            pd.DataFrame(
                {
                    "block": unit.block,
                    "unit": unit.id,
                    "channel": np.arange(weight.shape[1], dtype=np.int32),
                    "absmax": weight.abs().amax(dim=0).cpu().numpy(),
                    "norm": weight.norm(dim=0).cpu().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def pooled(statistics: pd.DataFrame, first_steps: Sequence[int] | None = None) -> pd.DataFrame:
    """Statistics over all texts and the given ranges of steps, one row per unit and channel.

    Quantiles and kurtosis cannot be pooled and are left out.
    """
    part = statistics if first_steps is None else statistics[statistics["first_step"].isin(list(first_steps))]
    if part.empty:
        raise InputError(f"The statistics have no steps that begin at {list(first_steps or ())}.")
    part = part[["block", "unit", "channel", "n_tokens", "absmax", "min", "max"]].join(
        part[["mean", "mean_abs", "mean_square"]].mul(part["n_tokens"], axis=0)
    )
    extremes = {"n_tokens": "sum", "absmax": "max", "min": "min", "max": "max"}
    sums = dict.fromkeys(("mean", "mean_abs", "mean_square"), "sum")
    found = part.groupby(["block", "unit", "channel"], observed=True, sort=False).agg(extremes | sums).reset_index()
    for name in sums:
        found[name] /= found["n_tokens"]
    return found


def salience(statistics: pd.DataFrame, by: str = "mean_abs") -> pd.DataFrame:
    """Channels of every text, range of steps and unit, most salient first: adds ``rank`` (from 0) by a column.

    AWQ (Lin et al. 2024, arXiv 2306.00978, section 3.1) ranks by the mean magnitude.
    """
    keys = [key for key in ("text", "first_step", "unit") if key in statistics]
    rank = statistics.groupby(keys, observed=True)[by].rank(method="first", ascending=False).astype(int) - 1
    return statistics.assign(rank=rank).sort_values([*keys, "rank"], kind="stable").reset_index(drop=True)


def overlap(statistics: pd.DataFrame, share: float, over: str, by: str = "mean_abs") -> pd.DataFrame:
    """How far the top ``share`` of channels is the same between texts or between ranges of steps, by unit.

    Args:
        statistics: table of ``ChannelStatistics``.
        share: of the channels of a unit, above 0, at least one channel.
        over: ``text`` or ``first_step``; the other is pooled.
        by: column that ranks.

    Returns:
        ``block``, ``unit``, ``a``, ``b``, ``n_top``, ``overlap`` (the share of the top of one that is in the top of the
        other; ``share`` by chance).
    """
    if over not in ("text", "first_step") or not 0 < share <= 1:
        raise InputError(f"overlap compares 'text' or 'first_step' at a share of 0 to 1, got '{over}' and {share:g}.")
    tops: dict[Any, dict[str, frozenset[int]]] = {}
    blocks = dict(zip(statistics["unit"], statistics["block"], strict=True))
    for value, part in statistics.groupby(over, observed=True):
        tops[value] = {}
        for unit, rows in pooled(part).groupby("unit", observed=True, sort=False):
            n = max(1, round(share * len(rows)))
            tops[value][str(unit)] = frozenset(rows.nlargest(n, by)["channel"])
    names = list(tops)
    found = [
        (blocks[unit], unit, a, b, len(top), len(top & tops[b][unit]) / len(top))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for unit, top in tops[a].items()
    ]
    return pd.DataFrame(found, columns=["block", "unit", "a", "b", "n_top", "overlap"])


def power_of_two_groups(ranges: np.ndarray, n_groups: int) -> np.ndarray:
    """Group of each channel, 0 for the largest: group g holds ranges in (T / 2**(g + 1), T / 2**g], T the largest.

    The last group holds all that are smaller (Tender, Lee et al. 2024, arXiv 2406.12930, section 3).

    Args:
        ranges: float (C,), largest magnitude of each channel.
        n_groups: G, at least 1.

    Returns:
        int64 (C,).
    """
    if n_groups < 1 or not np.isfinite(ranges).all() or not len(ranges):
        raise InputError(f"Groups need finite ranges and at least one group, got {n_groups}.")
    largest = float(ranges.max())
    if largest <= 0:
        return np.full(len(ranges), n_groups - 1)
    small = np.maximum(np.asarray(ranges, dtype=np.float64), largest * 2.0**-n_groups)
    # frexp is exact where a logarithm of a power of two may not be: x = m * 2**e, m in [0.5, 1).
    exponent = np.frexp(largest / small)[1].astype(np.int64)
    return np.minimum(exponent - 1, n_groups - 1)


def _provenance(
    kind: str, model: LoadedModel, texts: Texts, records: Sequence[TextRecord], seed: int, **parameters: Any
) -> Any:
    parameters |= {"texts": texts, "records": [record.model_dump(mode="json") for record in records]}
    return model_provenance(kind, model, None, seed, parameters)


def _see(
    model: LoadedModel, windows: Sequence[Sequence[int]], reducers: list[Any], job: Job, begin: Any = None
) -> None:
    engine = ReferenceEngine(model)
    try:
        for done, window in enumerate(windows):
            if begin is not None:
                begin(done)
            capture_text(engine, window, reducers)
            job.within((done + 1) / len(windows))
    finally:
        engine.close()


class _Largest:
    """A reducer: the largest values of every site and window."""

    def __init__(self, units: Mapping[str, Unit], top: int) -> None:
        self._units, self._top, self._window = units, top, 0
        self.rows: list[tuple[int, int, str, int, int, float, float]] = []

    def begin(self, window: int) -> None:
        self._window = window

    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        unit = self._units.get(site)
        if unit is None and site.count(".") != 1:
            return  # a later linear of a unit: the same input
        name, block = (unit.id, unit.block) if unit is not None else (site, int(site.split(".")[1]))
        rows = rows.float()
        magnitude = rows.abs()
        places = magnitude.flatten().topk(min(self._top, magnitude.numel())).indices
        for place in places.tolist():
            step, channel = divmod(place, rows.shape[1])
            median = float(magnitude[step].median())
            value = float(rows[step, channel])
            self.rows.append((self._window, start + step, name, block, channel, value, median))


class _Kept:
    """A reducer that keeps one site whole."""

    def __init__(self, site: str) -> None:
        self._site, self._parts = site, list[np.ndarray]()

    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        if site == self._site:
            self._parts.append(rows.float().cpu().numpy().copy())

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate(self._parts)
