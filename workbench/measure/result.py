"""The record of one candidate against dense: everything measured, and the bench rows it comes down to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from workbench.measure.rows import plain, row

if TYPE_CHECKING:
    from workbench.apply.recipe import Recipe
    from workbench.formats.compressed import CompressedModel
    from workbench.measure.alone import AloneResult
    from workbench.measure.latency import LatencyResult, SideLatency
    from workbench.measure.quality import QualityResult
    from workbench.measure.tasks import Flips, TaskResult
    from workbench.models.base import Architecture, LoadedModel

_DENSE_BITS = 16  # on disk


@dataclass(frozen=True)
class Sizes:
    """What is stored. ``unit_weights`` and ``output_weights`` are numbers of weights, for bits from bytes.

    Attributes:
        weight_bytes: of the whole model on disk.
        effective_bits: stored bits per weight of the blocks' linears.
        output_bits: stored bits per weight of the output layer.
    """

    weight_bytes: int
    effective_bits: float
    output_bits: float
    unit_weights: int
    output_weights: int

    @classmethod
    def of_dense(cls, model: LoadedModel) -> Sizes:
        return cls(model.dense_bytes, _DENSE_BITS, _DENSE_BITS, *_weights(model.architecture))

    @classmethod
    def of_compressed(cls, model: CompressedModel) -> Sizes:
        return cls(model.weight_bytes, model.effective_bits, model.output_bits, *_weights(model.architecture))

    @property
    def output_bytes(self) -> float:
        """Bytes of the output layer, which every decoding step reads whole."""
        return self.output_weights * self.output_bits / 8


def _weights(architecture: Architecture) -> tuple[int, int]:
    linears = sum(linear.n_weights for linear in architecture.linears)
    return linears, architecture.vocab_size * architecture.hidden_size


@dataclass(frozen=True)
class Questions:
    """Multiple-choice answers of both sides, and how they differ."""

    dense: TaskResult
    candidate: TaskResult
    flips: Flips


@dataclass(frozen=True)
class Measurement:
    """One candidate against dense, on one machine and one text.

    Attributes:
        model: short name of the dense model.
        candidate: path of the compressed model.
        recipe: that made it.
        dense_sizes, sizes: of both.
        latency: interleaved times of both.
        quality: paired differences.
        dense_alone, alone: memory and energy, each alone in a process.
        questions: answers of both, where asked for.
        fit_seconds: time of making the candidate, None where unknown.
        bandwidth: memory bandwidth with the engines' threads, bytes per second; None where it was not measured.
        environment: of this process.
        notes: what to beware of, one sentence each.
    """

    model: str
    candidate: str
    recipe: Recipe
    dense_sizes: Sizes
    sizes: Sizes
    latency: LatencyResult
    quality: QualityResult
    dense_alone: AloneResult
    alone: AloneResult
    questions: Questions | None
    fit_seconds: float | None
    bandwidth: float | None
    environment: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def recipe_sha256(self) -> str:
        return self.recipe.sha256

    def row(self) -> dict[str, Any]:
        """The candidate as a bench row."""
        quality = self.quality
        return row(
            name="workbench",
            **recipe_columns(self.recipe),
            **self._speed(self.latency.candidate, self.sizes, self.alone),
            **self._text(),
            **quality_columns(quality),
            fit_seconds=self.fit_seconds,
        )

    def dense_row(self) -> dict[str, Any]:
        """The dense model as a bench row, from the same runs."""
        return row(
            name="workbench",
            method=self.latency.baseline.activation_mode,
            variant="dense",
            bits=_DENSE_BITS,
            activation_bits=_DENSE_BITS,
            **self._speed(self.latency.baseline, self.dense_sizes, self.dense_alone),
            **self._text(),
            **dense_quality_columns(self.quality),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as strict JSON values."""
        questions = self.questions
        return plain(
            {
                "model": self.model,
                "candidate": self.candidate,
                "recipe_sha256": self.recipe_sha256,
                "recipe": self.recipe.model_dump(mode="json"),
                "rows": [self.dense_row(), self.row()],
                "dense_sizes": asdict(self.dense_sizes),
                "sizes": asdict(self.sizes),
                "latency": self.latency.to_json(),
                "quality": self.quality.to_json(),
                "dense_alone": self.dense_alone.to_json(),
                "alone": self.alone.to_json(),
                "questions": None
                if questions is None
                else {
                    "dense": questions.dense.to_json(),
                    "candidate": questions.candidate.to_json(),
                    "flips": asdict(questions.flips),
                },
                "fit_seconds": self.fit_seconds,
                "bandwidth_bytes_per_s": self.bandwidth,
                "environment": self.environment,
                "notes": list(self.notes),
            }
        )

    def _text(self) -> dict[str, Any]:
        return {"text": self.quality.text.name if self.quality.text else None, "n_tokens": self.quality.n_tokens}

    def _speed(self, side: SideLatency, sizes: Sizes, alone: AloneResult) -> dict[str, Any]:
        """Columns of speed and size. A step reads the blocks' linears and the output layer; norms weigh nothing."""
        read = side.read_bytes_per_token + sizes.output_bytes
        rate = None if self.bandwidth is None else read / (side.ms_per_token / 1000) / self.bandwidth
        return {
            "engine": side.engine,
            "activation_mode": side.activation_mode,
            "effective_bits": sizes.effective_bits,
            "read_bits": side.read_bytes_per_token * 8 / sizes.unit_weights,
            "output_bits": sizes.output_bits,
            "weight_bytes": sizes.weight_bytes,
            "decode_tokens_per_s": side.tokens_per_s,
            "prefill_tokens_per_s": side.prefill_tokens_per_s,
            "ms_per_token": side.ms_per_token,
            "ms_p95": side.p95_ms,
            "bytes_per_token": read,
            "bandwidth_share": rate,
            "peak_rss_bytes": alone.memory.peak_rss_bytes,
            "repeats": self.latency.pairs,
        }


def quality_columns(quality: QualityResult) -> dict[str, Any]:
    """Columns of a candidate's quality."""
    return {
        "perplexity": quality.perplexity_candidate,
        "delta_nll": quality.delta_nll.value,
        "delta_nll_low": quality.delta_nll.low,
        "delta_nll_high": quality.delta_nll.high,
        "kl_mean": quality.kl_mean.value,
        "kl_p999": quality.kl_p999,
        "top1_agreement": quality.top1_agreement,
        "measured_at": quality.measured_at,
    }


def dense_quality_columns(quality: QualityResult) -> dict[str, Any]:
    """The same columns of dense itself, where every difference is zero by definition."""
    zeros = dict.fromkeys(("delta_nll", "delta_nll_low", "delta_nll_high", "kl_mean", "kl_p999"), 0.0)
    return {
        "perplexity": quality.perplexity_dense,
        **zeros,
        "top1_agreement": 1.0,
        "measured_at": quality.measured_at,
    }


def recipe_columns(recipe: Recipe) -> dict[str, Any]:
    """What a recipe asked for. ``bits`` is None where units were given different widths without a target in bits."""
    # Widths and groups are those of the method that stored the weights, where the last only chose codes anew.
    chosen = recipe.methods[0 if recipe.methods[-1].stage == "codes" else -1]
    method = chosen.model_dump()
    solution = recipe.solution
    mixed = bool(method.get("unit_bits"))
    asked = {"bnb-nf4": 4, "bnb-int8": 8}.get(method["method"], None if mixed else method.get("bits"))
    if solution is not None:
        asked = solution.budget.average_bits
    source = solution.damage if solution is not None else None
    return {
        "method": method.get("activations") or recipe.label,
        "variant": "solved" if solution is not None else ("by hand" if mixed else "uniform"),
        "bits": asked,
        "activation_bits": method.get("activation_bits", 8 if method["method"] == "bnb-int8" else _DENSE_BITS),
        "group_size": method.get("group_size", method.get("block_size")),
        "calibration": source.text.name if source is not None and source.text is not None else _calibration(recipe),
    }


def _calibration(recipe: Recipe) -> str | None:
    """The text that methods were fitted on, where they name one."""
    named = [getattr(method, "calibration", None) for method in recipe.methods]
    return next((name for name in named if name is not None), None)
