"""How well predicted scores tell the true ones: by rank, and by what a mask would keep.

Most of a correlation over all units is that some units matter more than others on any text, which a static mask knows
too. So every correlation is given twice: of the scores, and of what is left of either side when each unit's mean over
the texts is taken off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from workbench.analysis.common import model_provenance
from workbench.analysis.masking import MaskKind, masking
from workbench.analysis.profile import TextRecord
from workbench.analysis.sparsity import score_units
from workbench.errors import InputError
from workbench.formats.mask_predictor import MaskPredictor, mask_groups
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime.plan import Tap

_MOST_KEPT = 1 << 26  # scores, float32, that are kept from the means to the comparison: 256 MiB


class PredictorQuality:
    """Agreement of predicted with true scores at every decision of held-out texts.

    The table has one row per sequence, deciding position, block and kind: ``sequence``, ``step``, ``block``, ``kind``,
    ``spearman`` (rank correlation over the group's units), ``spearman_demeaned`` (each unit's mean taken off first: its
    mean over the other sequences, of the true scores and of the predicted ones), ``recall`` (of the units that a mask
    of the true scores keeps, the share that one of the predicted scores keeps, both keeping ``1 - sparsity`` of the
    group), ``static_recall`` (the same of the true scores' means over the other sequences) and ``chance``.

    Args:
        model: the dense model.
        predictor: of it.
        windows: token windows that it was not trained on, of one length, two at least.
        sparsity: of the masks that recall is of, the same in every group.
        text: where the windows come from, for the record.
        seed: what they were drawn with, for the record.
    """

    def __init__(
        self,
        model: LoadedModel,
        predictor: MaskPredictor,
        windows: Sequence[Sequence[int]],
        *,
        sparsity: float = 0.5,
        text: TextRecord | None = None,
        seed: int = 0,
    ) -> None:
        if len(windows) < 2 or len({len(window) for window in windows}) > 1:
            raise InputError("Quality of a predictor needs two windows or more, of one length.")
        if not 0 < sparsity < 1:
            raise InputError(f"A sparsity of {sparsity:g} is not possible: give a share between 0 and 1.")
        self._model, self._predictor, self._sparsity = model, predictor, sparsity
        self._windows = [list(window) for window in windows]
        self._groups = mask_groups(model.architecture, range(predictor.first_block, model.architecture.n_blocks))
        self._means: list[tuple[np.ndarray, ...]] | None = None
        self._scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        said = predictor.arrays()["mask_predictor.said"].tobytes().decode()
        parameters = {"windows": self._windows, "sparsity": sparsity, "predictor": said}
        parameters["sha256"] = _digest(predictor)
        self.provenance = model_provenance("predictor-quality", model, text, seed, parameters)

    @property
    def parts(self) -> Sequence[str]:
        return [f"sequence-{i}" for i in range(len(self._windows))]

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one sequence's rows."""
        index = int(part.rsplit("-", 1)[1])
        if self._means is None:  # of every text, one pass each
            self._means = [tuple(map(_mean, self._both(i, job))) for i in range(len(self._windows))]
        others, expected = (
            np.mean([means[side] for i, means in enumerate(self._means) if i != index], axis=0) for side in (0, 1)
        )
        true, predicted = self._both(index, job)
        steps = [place[0] for place in self._places()]
        frames, begin = [], 0
        for group in self._groups:
            end = begin + group.size
            frames.append(
                pd.DataFrame(
                    {"sequence": np.int32(index), "step": steps, "block": np.int16(group.block), "kind": group.kind}
                    | agreement(
                        true[:, begin:end],
                        predicted[:, begin:end],
                        others[begin:end],
                        expected[begin:end],
                        self._sparsity,
                    )
                )
            )
            begin = end
        return pd.concat(frames, ignore_index=True)

    def _both(self, index: int, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """True and predicted scores of one text, float32 (decisions, units); a few are kept for their second use."""
        if index in self._scores:
            return self._scores.pop(index)
        found = self._true(index, job), self._predicted(index)
        if 2 * found[0].size * (len(self._scores) + 1) <= _MOST_KEPT:
            self._scores[index] = found
        return found

    def _places(self) -> list[tuple[int, int, int]]:
        """Deciding positions, and the positions [begin, end) that each governs."""
        facts, length = self._predictor.facts, len(self._windows[0])
        prefix, n = int(facts["prefix"]), int(facts["n"])
        if facts["scope"] == "reply":
            found = [(max(prefix, 1) - 1, max(prefix, 1), length)]
        else:
            found = [(at, at, at + n) for at in range(-(-prefix // n) * n, length - n + 1, n)]
        if not found or found[0][1] >= length:
            raise InputError(f"Windows of {length} tokens hold no decision after the first {prefix}: give longer ones.")
        return found

    def _true(self, index: int, job: Job) -> np.ndarray:
        """True scores over what each decision governs, float32 (decisions, units)."""
        found: dict[tuple[int, str], np.ndarray] = {}
        places, criterion = self._places(), str(self._predictor.facts["criterion"])

        def sink(block: int, kind: MaskKind, scores: Mapping[str, torch.Tensor]) -> None:
            if block >= self._predictor.first_block:
                rows = scores[criterion][0]
                found[block, kind] = torch.stack([rows[a:b].mean(dim=0) for _, a, b in places]).cpu().numpy()
            job.check()

        score_units(self._model, torch.tensor([self._windows[index]]), [criterion], sink)
        return np.concatenate([found[group.block, group.kind] for group in self._groups], axis=1)

    def _predicted(self, index: int) -> np.ndarray:
        """Predicted scores at each decision, float32 (decisions, units), from the dense model's taps."""
        taps: dict[Tap, np.ndarray] = {}
        places = [place[0] for place in self._places()]

        def see(tap: Tap, x: torch.Tensor) -> None:
            taps[tap] = x.reshape(-1, x.shape[-1])[places].float().cpu().numpy()

        at: Any = [Tap(part.tap, part.block) for part in self._predictor.parts]  # type: ignore[arg-type]
        ids = torch.tensor([self._windows[index]], device=self._model.device)
        with torch.no_grad(), masking(self._model, tuple(dict.fromkeys(at)), see, lambda block, kind: None):
            self._model.module.base_model(input_ids=ids, use_cache=False)
        return np.concatenate(
            [part.scores(taps[tap]) for part, tap in zip(self._predictor.parts, at, strict=True)], axis=1
        )


def agreement(
    true: np.ndarray, predicted: np.ndarray, means: np.ndarray, expected: np.ndarray, sparsity: float
) -> dict[str, Any]:
    """Columns of ``PredictorQuality`` for one group.

    Args:
        true: (decisions, units).
        predicted: of the same shape.
        means: (units,), of the true scores, from other texts.
        expected: (units,), of the predicted ones, likewise.
        sparsity: share of the units that a mask leaves out.

    Returns:
        float64 (decisions,) by name.
    """
    keep = max(1, round((1 - sparsity) * true.shape[1]))
    wanted = _top(true, keep)
    return {
        "spearman": spearman(true, predicted),
        "spearman_demeaned": spearman(true - means, predicted - expected),
        "recall": (wanted & _top(predicted, keep)).sum(axis=1) / keep,
        "static_recall": (wanted & _top(means[None], keep)).sum(axis=1) / keep,
        "chance": np.full(len(true), keep / true.shape[1]),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of (n, units) with that of another, float64 (n,); NaN where a row is constant."""
    x, y = (rankdata(rows, axis=1) for rows in (a, b))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    spread = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.divide((x * y).sum(axis=1), spread, out=np.full(len(a), np.nan), where=spread > 0)


def _mean(scores: np.ndarray) -> np.ndarray:
    return scores.mean(axis=0, dtype=np.float64)


def _top(scores: np.ndarray, keep: int) -> np.ndarray:
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1, kind="stable")[:, :keep], True, axis=1)
    return mask


def _digest(predictor: MaskPredictor) -> str:
    found = hashlib.sha256()
    for name, array in sorted(predictor.arrays().items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
