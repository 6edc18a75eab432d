"""Plain sentences on what was seen: does the input tell what matters, and is a mask that never changes as good?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.analysis.profile import Profile
from workbench.measure.quality import ENOUGH_WINDOWS
from workbench.measure.statistics import Interval, block_bootstrap
from workbench.view.sparsity_controller import SparsityState
from workbench.view.sparsity_loop import Look

# Of a rank correlation: its square is the share of the ranks' variance that is told, a hundredth and less than a
# thousandth, which no mask could use.
_MUCH, _SOME = 0.1, 0.03


def verdicts(state: SparsityState) -> tuple[str, ...]:
    """What can be said after the analysis; nothing where no heads and neurons are masked."""
    seen = state.look
    if seen is None or seen.quality is None:
        return ()
    found = information(seen.quality)
    said = [_information_said(seen.quality, found), static_said(seen)]
    if len(seen.to_static):
        said.append(_so(seen.to_static, any(one.low > _SOME for one in found.values())))
    return tuple(one for one in said if one)


def _so(to_static: pd.DataFrame, informed: bool) -> str:
    better = to_static["high"] < 0
    if better.all():
        return "So masks that follow the token are worth having here."
    if better.any():
        return "So whether masks that follow the token are worth having depends here on how much is left out."
    if informed:
        return (
            "So a static mask does as well here or better, though the input carries information: what lacks is a "
            "better predictor. docs/notes/sparsity.md has one that was tuned through the model (tune_steps)."
        )
    return "So a static mask does as well here or better, and this predictor finds nothing in the input that it lacks."


def information(quality: Profile) -> dict[str, Interval]:
    """Rank correlation of predicted with true scores after each unit's mean is taken off, by kind, over windows."""
    found = {}
    for kind in ("heads", "neurons"):
        rows = quality.table[(quality.table["kind"] == kind) & quality.table["spearman_demeaned"].notna()]
        by = rows.groupby("sequence")["spearman_demeaned"]
        if len(rows):
            found[kind] = block_bootstrap(by.sum().to_numpy(), by.size().to_numpy())
    return found


def _information_said(quality: Profile, found: dict[str, Interval]) -> str:
    decisions = len(quality.table[["sequence", "step"]].drop_duplicates())
    parts = [f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f}) over {kind}" for kind, one in found.items()]
    if not parts:
        return ""
    if all(one.low > _MUCH for one in found.values()):
        so = "the input carries information that no static mask has"
    elif any(one.low > _SOME for one in found.values()):
        so = "the input carries some information that no static mask has"
    else:
        so = "this predictor finds nothing in the input that a static mask does not know"
    text = f" of {quality.provenance.text.name}" if quality.provenance.text is not None else ""
    return (
        f"Once each unit's mean is taken off, predicted scores follow the true ones by a rank correlation of "
        f"{' and '.join(parts)} ({decisions} decisions in {quality.table['sequence'].nunique()} windows{text}): {so}."
    )


def static_said(seen: Look) -> str:
    """Predicted masks against the best static one, at each sparsity of the curves."""
    if not len(seen.to_static):
        return ""
    parts = [f"at {row.sparsity:.0%} the {_word(row)} ({_nats(row)})" for row in seen.to_static.itertuples()]
    few = "" if seen.n_windows >= ENOUGH_WINDOWS else f", too few for a claim (at least {ENOUGH_WINDOWS} windows)"
    return (
        "Against the static mask that costs least, KL of the predicted mask more than of that one, in nats a token on "
        f"{seen.n_tokens} tokens in {seen.n_windows} windows of sampled text{few}: {'; '.join(parts)}."
    )


def _word(row: object) -> str:
    low, high = (float(getattr(row, end)) for end in ("low", "high"))
    if not np.isfinite([low, high]).all():
        return "difference has no interval"
    if high < 0:
        return "predicted mask is better"
    return "static mask is better" if low > 0 else "static mask is as good"


def _nats(row: object) -> str:
    value, low, high, rival = (getattr(row, name) for name in ("value", "low", "high", "rival"))
    return f"by {rival}: {value:+.3f}, {low:+.3f} to {high:+.3f}"
