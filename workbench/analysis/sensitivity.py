"""Which linears suffer when they are stored in fewer bits, and when: the error of every decoding step.

``DecodingSteps`` gives, for every linear, step and width, the relative output error ``||x dW^T|| / ||x W^T||``, exact.
What the errors do to the model's output is measured unit by unit in ``workbench.analysis.damage``, whose names are
offered here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.analysis.common import WIDTHS, check_widths, model_provenance
from workbench.analysis.damage import UnitDamage, UnitScores, damage_table, proxy_correlation, rank_units, unit_scores
from workbench.analysis.profile import Profile, TextRecord
from workbench.capture import capture_text
from workbench.errors import InputError
from workbench.formats.codes import dequantize, quantize_groups
from workbench.models.base import Architecture, LoadedModel
from workbench.progress import Job
from workbench.runtime.reference import ReferenceEngine

__all__ = [
    "WIDTHS",
    "DecodingSteps",
    "StepSequence",
    "UnitDamage",
    "UnitScores",
    "damage_table",
    "generated",
    "proxy_correlation",
    "rank_linears",
    "rank_units",
    "teacher_forced",
    "unit_scores",
]


@dataclass(frozen=True)
class StepSequence:
    """A text whose steps are looked at. ``tokens[prompt_length:]`` is the reply; a plain text has a prompt of one."""

    tokens: tuple[int, ...]
    prompt_length: int = 1


class OutputErrors:
    """A reducer: per linear, step and width the norm of the output error of rounding, one number each.

    ``dW = W - Q(W)`` is made when a linear is reached and dropped when it is left, so that no second copy of the model
    is ever held.
    """

    def __init__(
        self,
        model: LoadedModel,
        steps: int,
        widths: Sequence[int],
        group_size: int,
        symmetric: bool,
        job: Job | None = None,
    ) -> None:
        self._model = model
        self._job = job or Job()
        self._widths = tuple(widths)
        self._group_size = group_size
        self._symmetric = symmetric
        self._row = {linear.id: i for i, linear in enumerate(model.architecture.linears)}
        self.output_norms = np.zeros((len(self._row), steps), dtype=np.float32)
        self.error_norms = np.zeros((len(self._row), len(self._widths), steps), dtype=np.float32)

    @torch.inference_mode()
    def update(self, site: str, start: int, rows: torch.Tensor) -> None:
        index = self._row.get(site)
        if index is None:  # a block's residual
            return
        weight = self._model.linear_module(site).weight.float()
        rows = rows.float()
        steps = slice(start, start + len(rows))
        self.output_norms[index, steps] = torch.linalg.vector_norm(rows @ weight.T, dim=1).cpu().numpy()
        for i, bits in enumerate(self._widths):
            codes = quantize_groups(weight, bits, self._group_size, self._symmetric)
            error = dequantize(codes).sub_(weight)
            self.error_norms[index, i, steps] = torch.linalg.vector_norm(rows @ error.T, dim=1).cpu().numpy()
        self._job.within((index + 1) / len(self._row))


class DecodingSteps:
    """Relative output error of every linear at every decoding step and width, exact.

    Each sequence is fed at once: attention is causal, so one forward pass shows what every step of decoding would
    have seen. The table has one row per sequence, step, linear and width, with columns ``sequence``, ``step`` (position
    of the token), ``phase`` (``prompt`` or ``reply``), ``block``, ``unit``, ``linear``, ``bits``, ``relative_error``
    (``||x dW^T|| / ||x W^T||``, bias left out), ``error_norm`` and ``output_norm``.

    Args:
        model: the dense model.
        sequences: what to look at.
        widths: bits, each 2 to 8.
        group_size: input channels per scale.
        symmetric: rounding without zero points.
        text: where the sequences come from, for the record.
        seed: what they were drawn with, for the record.
    """

    def __init__(
        self,
        model: LoadedModel,
        sequences: Sequence[StepSequence],
        *,
        widths: Sequence[int] = WIDTHS,
        group_size: int = 64,
        symmetric: bool = False,
        text: TextRecord | None = None,
        seed: int = 0,
    ) -> None:
        if not sequences:
            raise InputError("No sequences were given to look at: give at least one prompt or text.")
        self._model = model
        self._sequences = tuple(sequences)
        self._widths = check_widths(widths)
        self._group_size = group_size
        self._symmetric = symmetric
        self.provenance = model_provenance(
            "decoding-steps",
            model,
            text,
            seed,
            {
                "widths": list(self._widths),
                "group_size": group_size,
                "symmetric": symmetric,
                "sequences": [{"tokens": list(s.tokens), "prompt_length": s.prompt_length} for s in sequences],
            },
        )

    @property
    def parts(self) -> Sequence[str]:
        return [f"sequence-{i}" for i in range(len(self._sequences))]

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one sequence's rows."""
        index = int(part.rsplit("-", 1)[1])
        sequence = self._sequences[index]
        steps = len(sequence.tokens)
        errors = OutputErrors(self._model, steps, self._widths, self._group_size, self._symmetric, job)
        engine = ReferenceEngine(self._model)
        try:
            capture_text(engine, sequence.tokens, [errors], prompt_length=sequence.prompt_length)
        finally:
            engine.close()
        return _step_table(self._model.architecture, index, sequence, self._widths, errors)


def _step_table(
    arch: Architecture, index: int, sequence: StepSequence, widths: Sequence[int], errors: OutputErrors
) -> pd.DataFrame:
    steps = len(sequence.tokens)
    n_linears, n_widths = len(arch.linears), len(widths)
    output = errors.output_norms.T  # steps, linears
    error = errors.error_norms.transpose(2, 0, 1)  # steps, linears, widths
    spread = np.broadcast_to(output[:, :, None], error.shape)
    relative = np.divide(error, spread, out=np.full(error.shape, np.nan, np.float32), where=spread > 0)
    replies = (np.arange(steps) >= sequence.prompt_length).astype(np.int8)
    units = [u.id for u in arch.units]
    unit_of = np.array([units.index(x.unit) for x in arch.linears], dtype=np.int16)

    def per_linear(values: np.ndarray) -> np.ndarray:
        return np.tile(np.repeat(values, n_widths), steps)

    def named(codes: Any, names: list[str]) -> Any:
        return pd.Categorical.from_codes(codes, categories=pd.Index(names))

    return pd.DataFrame(
        {
            "sequence": np.full(error.size, index, dtype=np.int32),
            "step": np.repeat(np.arange(steps, dtype=np.int32), n_linears * n_widths),
            "phase": named(np.repeat(replies, n_linears * n_widths), ["prompt", "reply"]),
            "block": per_linear(np.array([x.block for x in arch.linears], dtype=np.int16)),
            "unit": named(per_linear(unit_of), units),
            "linear": named(per_linear(np.arange(n_linears)), [x.id for x in arch.linears]),
            "bits": np.tile(np.array(widths, dtype=np.int8), steps * n_linears),
            "relative_error": relative.ravel(),
            "error_norm": error.ravel(),
            "output_norm": spread.ravel(),
        }
    )


def rank_linears(steps: Profile, bits: int, phase: str | None = None) -> pd.DataFrame:
    """Linears by mean relative error over decoding steps at one width, worst first.

    Columns ``rank``, ``linear``, ``unit``, ``block``, ``mean``, ``median``, ``p95``, ``max``, ``worst_step`` and
    ``variation`` (standard deviation over mean: how much the error moves from step to step).
    """
    table = steps.table
    part = table[table["bits"] == bits]
    if phase is not None:
        part = part[part["phase"] == phase]
    if part.empty:
        raise InputError(f"The profile has no steps at {bits} bits{f' in phase {phase}' if phase else ''}.")
    grouped = part.groupby(["linear", "unit", "block"], observed=True)["relative_error"]
    ranked = pd.DataFrame(
        {
            "mean": grouped.mean(),
            "median": grouped.median(),
            "p95": grouped.quantile(0.95),
            "max": grouped.max(),
            "variation": grouped.std() / grouped.mean(),
        }
    ).reset_index()
    worst = part.loc[part.groupby("linear", observed=True)["relative_error"].idxmax()].set_index("linear")["step"]
    ranked["worst_step"] = ranked["linear"].map(worst).astype(int)
    ranked = ranked.sort_values("mean", ascending=False, kind="stable").reset_index(drop=True)
    ranked.insert(0, "rank", ranked.index + 1)
    return ranked


def teacher_forced(windows: Sequence[Sequence[int]]) -> list[StepSequence]:
    """Plain texts as sequences whose every token is a step."""
    return [StepSequence(tuple(w)) for w in windows]


def generated(
    engine: ReferenceEngine, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
) -> Iterator[StepSequence]:
    """Yield each prompt with the engine's own reply; ``options`` as for ``Engine.generate``, and ``seed``."""
    seed = options.pop("seed", 0)
    for i, prompt in enumerate(prompts):
        reply = engine.generate(engine.start(seed=seed + i), prompt, new_tokens, **options)
        yield StepSequence((*prompt, *reply), len(prompt))
