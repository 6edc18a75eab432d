"""Quality of a candidate against dense: paired per token, with intervals over windows.

Both engines read the same windows in lockstep, a chunk of positions at a time, so that the logits of a whole window
are never held. Per token and window only sums stay; every interval and every comparison comes from them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import EngineError, InputError
from workbench.measure.divergence import DenseTokens, TokenQuality
from workbench.measure.statistics import Interval, Verdict, block_bootstrap, verdict
from workbench.progress import Job

if TYPE_CHECKING:
    from workbench.corpus import TextRecord, Window
    from workbench.models.base import Fingerprint
    from workbench.runtime.base import Engine

ENOUGH_WINDOWS = 40
_WORST = 5
_EXCERPT_CHARACTERS = 160
_CHUNK = 128  # positions held at once, of both engines


@dataclass(frozen=True)
class QualityResult:
    """What a compression costs, per token, on one text.

    Attributes:
        windows: one row per window: ``window``, ``document``, ``domain``, ``language``, ``tokens_sha256``,
            ``n_tokens`` (predicted), and sums over them: ``nll_dense``, ``nll_candidate``, ``kl``, ``agree``; and
            ``excerpt`` where a decoder was given.
        delta_nll: mean difference candidate - dense in nats per token, with its interval over windows.
        kl_mean, kl_median, kl_p999: KL(dense || candidate) in nats per token.
        top1_agreement: share of positions with the same most probable token.
        by_group: one row per domain and per language: ``by``, ``group`` and the same measures.
        dense, candidate: fingerprints of the two models.
        text: which text was used, where the caller said so.
        note: what to beware of, or an empty string.
        facts: what else the candidate told of itself while it ran.
        measured_at: when (UTC, ISO 8601), where it was measured in an earlier run; None for now.
    """

    windows: pd.DataFrame
    delta_nll: Interval
    kl_mean: Interval
    kl_median: float
    kl_p999: float
    top1_agreement: float
    by_group: pd.DataFrame
    dense: Fingerprint
    candidate: Fingerprint
    text: TextRecord | None
    seed: int
    note: str
    facts: Mapping[str, float] = field(default_factory=dict)
    measured_at: str | None = None

    @property
    def n_windows(self) -> int:
        return len(self.windows)

    @property
    def n_tokens(self) -> int:
        """Predicted tokens."""
        return int(self.windows["n_tokens"].sum())

    @property
    def perplexity_dense(self) -> float:
        return math.exp(self.windows["nll_dense"].sum() / self.n_tokens)

    @property
    def perplexity_candidate(self) -> float:
        return math.exp(self.windows["nll_candidate"].sum() / self.n_tokens)

    @property
    def worst_windows(self) -> pd.DataFrame:
        """The windows with the highest mean KL, worst first, with ``kl_mean`` and ``delta_nll`` per token."""
        table = self.windows.assign(
            kl_mean=self.windows["kl"] / self.windows["n_tokens"],
            delta_nll=(self.windows["nll_candidate"] - self.windows["nll_dense"]) / self.windows["n_tokens"],
        )
        columns = ["window", "document", "domain", "language", "n_tokens", "kl_mean", "delta_nll"]
        if "excerpt" in table:
            columns.append("excerpt")
        return table.nlargest(_WORST, "kl_mean")[columns].reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Everything but the table of windows, as JSON values."""
        return {
            "n_tokens": self.n_tokens,
            "n_windows": self.n_windows,
            "perplexity_dense": self.perplexity_dense,
            "perplexity": self.perplexity_candidate,
            "delta_nll": self.delta_nll.value,
            "delta_nll_low": self.delta_nll.low,
            "delta_nll_high": self.delta_nll.high,
            "kl_mean": self.kl_mean.value,
            "kl_mean_low": self.kl_mean.low,
            "kl_mean_high": self.kl_mean.high,
            "kl_median": self.kl_median,
            "kl_p999": self.kl_p999,
            "top1_agreement": self.top1_agreement,
            "by_group": self.by_group.to_dict(orient="records"),
            "worst_windows": self.worst_windows.to_dict(orient="records"),
            "text": self.text.model_dump(mode="json") if self.text is not None else None,
            "dense_weights_sha256": self.dense.weights,
            "candidate_weights_sha256": self.candidate.weights,
            "seed": self.seed,
            "note": self.note,
            "measured_at": self.measured_at,
        }


@dataclass(frozen=True)
class Comparison:
    """Candidate a minus candidate b on the same windows, nats per token; negative means that a is better."""

    delta_nll: Interval
    kl: Interval
    n_windows: int

    @property
    def delta_nll_verdict(self) -> Verdict:
        return verdict(self.delta_nll)

    @property
    def kl_verdict(self) -> Verdict:
        return verdict(self.kl)


def compare_quality(
    dense: Engine,
    candidate: Engine,
    windows: Sequence[Window],
    *,
    text: TextRecord | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    seed: int = 0,
    job: Job | None = None,
) -> QualityResult:
    """Compare two engines token by token on the same windows.

    The first token of a window is given, all others are predicted from what precedes them in the window.

    Args:
        dense: the reference of KL and of every difference.
        candidate: what is judged.
        windows: token windows; at least 40 for a claim.
        text: which text the windows are of, for the record.
        decode: token ids to text, for excerpts of the worst windows.
        seed: of the bootstrap.
        job: advances by one per window.

    Raises:
        InputError: no windows, or one of fewer than 2 tokens.
        EngineError: engines of different vocabularies, or a NaN in the logits (names the window).
    """
    return compare_many(dense, [candidate], windows, text=text, decode=decode, seed=seed, job=job)[0]


def compare_many(
    dense: Engine,
    candidates: Sequence[Engine],
    windows: Sequence[Window],
    *,
    text: TextRecord | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    given: int = 1,
    seed: int = 0,
    job: Job | None = None,
) -> list[QualityResult]:
    """Compare several candidates with one dense pass over the windows; otherwise as ``compare_quality``.

    ``given`` is how many tokens of each window are given: predictions of those do not count.
    """
    if not windows:
        raise InputError("No windows to measure quality on: give a longer text or a smaller window length.")
    if given < 1:
        raise InputError(f"{given} tokens of a window cannot be given: the first always is, so give 1 or more.")
    for candidate in candidates:
        if dense.vocab_size != candidate.vocab_size:
            raise EngineError(
                f"Dense predicts {dense.vocab_size} tokens and the candidate {candidate.vocab_size}: compare a "
                "compressed model with the dense model it was made from."
            )
    job = job or Job()
    job.stage("quality", len(windows))
    rows: list[list[dict[str, Any]]] = [[] for _ in candidates]
    divergences: list[list[np.ndarray]] = [[] for _ in candidates]
    for index, window in enumerate(windows):
        found = _compare_window(dense, candidates, window, f"window {index} ({window.document})", given, job)
        for side, tokens in enumerate(found):
            divergences[side].append(tokens.kl)
            rows[side].append(_window_row(index, window, tokens, decode))
        job.advance()
    results = []
    for side, candidate in enumerate(candidates):
        divergence = np.concatenate(divergences[side])
        median, p999 = float(np.median(divergence)), float(np.quantile(divergence, 0.999))
        results.append(summed_up(pd.DataFrame(rows[side]), median, p999, dense, candidate, text, seed))
    return results


def summed_up(
    table: pd.DataFrame,
    kl_median: float,
    kl_p999: float,
    dense: Engine,
    candidate: Engine,
    text: TextRecord | None,
    seed: int,
) -> QualityResult:
    """Return the result that follows from a candidate's windows and two quantiles of its KL over tokens."""
    few = f"{len(table)} windows: too few for a claim (at least {ENOUGH_WINDOWS})."
    return QualityResult(
        windows=table,
        delta_nll=_delta_nll(table, seed),
        kl_mean=_mean(table, "kl", seed),
        kl_median=kl_median,
        kl_p999=kl_p999,
        top1_agreement=float(table["agree"].sum() / table["n_tokens"].sum()),
        by_group=_by_group(table, seed),
        dense=dense.model.fingerprint,
        candidate=candidate.model.fingerprint,
        text=text,
        seed=seed,
        note=few if len(table) < ENOUGH_WINDOWS else "",
    )


def compare_candidates(a: QualityResult, b: QualityResult, *, seed: int = 0) -> Comparison:
    """Compare two candidates by their paired differences on the same windows: a minus b.

    Raises:
        InputError: the results are not of the same windows and the same dense model.
    """
    if a.dense.weights != b.dense.weights:
        raise InputError("These two results are against different dense models: measure both against the same one.")
    if list(a.windows["tokens_sha256"]) != list(b.windows["tokens_sha256"]):
        raise InputError(
            f"These two results are on different windows ({a.n_windows} and {b.n_windows}): measure both candidates on "
            "the same text, window length and number of windows."
        )
    counts = a.windows["n_tokens"].to_numpy()
    # Both differences against the same dense: its own likelihood cancels.
    delta = (a.windows["nll_candidate"] - b.windows["nll_candidate"]).to_numpy()
    divergence = (a.windows["kl"] - b.windows["kl"]).to_numpy()
    return Comparison(
        delta_nll=block_bootstrap(delta, counts, seed=seed),
        kl=block_bootstrap(divergence, counts, seed=seed),
        n_windows=a.n_windows,
    )


def _compare_window(
    dense: Engine, candidates: Sequence[Engine], window: Window, name: str, given: int, job: Job
) -> list[TokenQuality]:
    """Compare every candidate on one window, a chunk of positions at a time."""
    tokens = np.asarray(window.tokens, dtype=np.int64)
    if len(tokens) < given + 1:
        many = "token" if len(tokens) == 1 else "tokens"
        raise InputError(f"The {name} has {len(tokens)} {many}: a window needs at least {given + 1}.")
    pieces: list[list[TokenQuality]] = [[] for _ in candidates]
    for first, rows in _lockstep([dense, *candidates], window.tokens, name):
        job.check()
        early = max(0, given - 1 - first)  # rows that predict what is given
        if early >= len(rows[0]):
            continue
        first, (log_p, *others) = first + early, [row[early:] for row in rows]
        targets = tokens[first + 1 : first + 1 + len(log_p)]
        reference = DenseTokens(log_p[: len(targets)], targets)
        for side, log_q in enumerate(others):
            piece = reference.compare(log_q[: len(targets)])
            _require_finite(piece, first, name)
            pieces[side].append(piece)
    return [_joined(found) for found in pieces]


def _require_finite(piece: TokenQuality, first: int, name: str) -> None:
    if np.isfinite(piece.nll_dense).all() and np.isfinite(piece.kl).all():
        return
    at = first + int(np.argmin(np.isfinite(piece.nll_dense + piece.kl)))
    who = "candidate" if np.isfinite(piece.nll_dense).all() else "dense model"
    raise EngineError(
        f"The {who}'s logits are not finite in the {name}, position {at}: its weights are damaged, or its computation "
        "type overflows (try float32)."
    )


def _joined(pieces: Sequence[TokenQuality]) -> TokenQuality:
    return TokenQuality(
        *(np.concatenate([getattr(piece, one.name) for piece in pieces]) for one in fields(TokenQuality))
    )


def _lockstep(engines: Sequence[Engine], tokens: Sequence[int], name: str) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (first position, rows of each engine) of the same positions.

    An engine whose plan decides once per reply cuts its chunks where the reply begins, so they may cut differently.
    """
    sources = [engine.log_probabilities(tokens, chunk=_CHUNK) for engine in engines]
    held = [np.empty((0, engine.vocab_size), dtype=np.float32) for engine in engines]
    position = 0
    while position < len(tokens) - 1:
        for side, source in enumerate(sources):
            if len(held[side]) == 0:
                first, held[side] = next(source, (-1, held[side]))
                if first != position or len(held[side]) == 0:
                    who = f"candidate {side}" if side else "dense"
                    raise EngineError(f"The {who} engine gave no logits for position {position} of the {name}.")
        count = min(len(rows) for rows in held)
        yield position, [rows[:count] for rows in held]
        held = [rows[count:] for rows in held]
        position += count


def _window_row(
    index: int, window: Window, tokens: TokenQuality, decode: Callable[[Sequence[int]], str] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "window": index,
        "document": window.document,
        "domain": window.domain,
        "language": window.language,
        "tokens_sha256": hashlib.sha256(np.asarray(window.tokens, dtype="<i8").tobytes()).hexdigest(),
        "n_tokens": len(tokens.kl),
        "nll_dense": float(tokens.nll_dense.sum()),
        "nll_candidate": float(tokens.nll_candidate.sum()),
        "kl": float(tokens.kl.sum()),
        "agree": int(tokens.agree.sum()),
    }
    if decode is not None:
        row["excerpt"] = " ".join(decode(window.tokens).split())[:_EXCERPT_CHARACTERS]
    return row


def _delta_nll(table: pd.DataFrame, seed: int) -> Interval:
    difference = (table["nll_candidate"] - table["nll_dense"]).to_numpy()
    return block_bootstrap(difference, table["n_tokens"].to_numpy(), seed=seed)


def _mean(table: pd.DataFrame, column: str, seed: int) -> Interval:
    return block_bootstrap(table[column].to_numpy(), table["n_tokens"].to_numpy(), seed=seed)


def _by_group(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Measures per domain and per language, in order of appearance."""
    rows = []
    for by in ("domain", "language"):
        for group, part in table.groupby(by, sort=False, dropna=False):
            delta, divergence = _delta_nll(part, seed), _mean(part, "kl", seed)
            n_tokens = int(part["n_tokens"].sum())
            rows.append(
                {
                    "by": by,
                    "group": group,
                    "n_tokens": n_tokens,
                    "n_windows": len(part),
                    "perplexity_dense": math.exp(part["nll_dense"].sum() / n_tokens),
                    "perplexity": math.exp(part["nll_candidate"].sum() / n_tokens),
                    "delta_nll": delta.value,
                    "delta_nll_low": delta.low,
                    "delta_nll_high": delta.high,
                    "kl_mean": divergence.value,
                    "kl_mean_low": divergence.low,
                    "kl_mean_high": divergence.high,
                    "top1_agreement": float(part["agree"].sum() / n_tokens),
                }
            )
    return pd.DataFrame(rows)
