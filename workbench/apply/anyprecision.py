"""Any-Precision LLM: nested codes into tables per output row, fitted by importance-weighted clustering.

Park et al. 2024 (ICML), "Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs", in the form that
was published. Text is sampled from the model itself, where the paper takes 100 sequences of 512 tokens of C4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from workbench.analysis.damage import Gradients
from workbench.analysis.divergence import half_products
from workbench.apply.anyprecision_fit import fit_tables
from workbench.apply.calibration import calibration_windows, check_finite
from workbench.apply.configs import AnyPrecisionConfig as AnyPrecisionConfig
from workbench.apply.draft import Draft
from workbench.apply.registry import register
from workbench.apply.workers import side_by_side
from workbench.corpus import TextRecord
from workbench.formats.tables import NestedTables, TableCodes
from workbench.models.base import Linear, LoadedModel
from workbench.progress import Job

_OUTPUT_GROUP = 64  # input channels per scale of the embedding and the output layer


@dataclass(frozen=True)
class FittedTables:
    """What ``fit`` found.

    Attributes:
        codes: by linear id.
        text: what importance was measured on.
    """

    codes: dict[str, TableCodes]
    text: TextRecord


@register(AnyPrecisionConfig)
class AnyPrecisionMethod:
    """Handler of ``AnyPrecisionConfig``."""

    def fit(self, draft: Draft, config: AnyPrecisionConfig, *, seed: int, job: Job) -> FittedTables:
        """Choose codes of every linear; the model is left as it was.

        Raises:
            RecipeError: a weight, an output or a gradient is not finite, or a weight is too large for fp16.
            CorpusError: the model's context is too short to sample text.
            Cancelled: by ``job``, between matrices.
        """
        model = draft.model
        check_finite(model)
        tokens, text = calibration_windows(model, config.calibration_tokens, seed, job, parts=draft.parts)
        linears = model.architecture.linears
        codes: dict[str, TableCodes] = {}
        for linear in linears:
            kept = draft.parts.encodings(linear.id) or {}
            codes |= {name: one.codes for name, one in kept.items() if isinstance(one, NestedTables)}
        missing = [(index, linear) for index, linear in enumerate(linears) if linear.id not in codes]
        importance = weight_importance(model, tokens, job) if missing else {}

        def fit(index: int, linear: Linear) -> TableCodes:
            job.check()
            generator = torch.Generator().manual_seed(seed * len(linears) + index)
            made = fit_tables(draft.weight(linear.path), importance.pop(linear.id), config.widths, generator)
            draft.parts.keep_encodings(linear.id, {linear.id: NestedTables.of(made)})
            return made

        total = sum(linear.n_weights for linear in linears)
        job.stage("fit tables", total, total - sum(linear.n_weights for _, linear in missing))
        with side_by_side() as pool:
            running = [(linear, pool.submit(fit, index, linear)) for index, linear in missing]
            for linear, future in running:
                codes[linear.id] = future.result()
                job.advance(linear.n_weights)
        return FittedTables(codes, text)

    def apply(self, draft: Draft, config: AnyPrecisionConfig, fitted: FittedTables, *, job: Job) -> None:
        draft.encode_linears(lambda linear, _: NestedTables.of(fitted.codes[linear.id]), job)
        draft.encode_outputs(config.output_bits, _OUTPUT_GROUP, False, job)


def weight_importance(model: LoadedModel, windows: Sequence[Sequence[int]], job: Job) -> dict[str, torch.Tensor]:
    """Return the sum over windows of the squared gradient of the window's loss, for every weight of every linear.

    The loss is the sum of next-token cross entropies, in nats. One backward pass per window; gradients are squared and
    dropped one matrix at a time, so that beside the model there are the sums, 4 bytes a weight, and one gradient.

    Args:
        model: the dense model, left as it is.
        windows: token windows, each of at least 2 tokens and no longer than the context.
        job: a stage, advanced by window.

    Returns:
        float32 (out, in) on the CPU, by linear id; zero where the model makes no use of a linear.
    """
    linears = model.architecture.linears
    sums = {linear.id: torch.zeros(linear.out_features, linear.in_features) for linear in linears}
    job.stage("measure the importance of weights", len(windows))

    def adder(index: int, linear: Linear) -> Callable[[nn.Parameter], None]:
        def add(weight: nn.Parameter) -> None:
            job.within(1 - index / len(linears))  # gradients come in from the last block to the first
            if weight.grad is not None:
                gradient, weight.grad = weight.grad.detach().to("cpu", torch.float32), None
                sums[linear.id].addcmul_(gradient, gradient)

        return add

    with torch.inference_mode(False), Gradients(model) as arm:
        for index, linear in enumerate(linears):
            arm(linear.id, adder(index, linear))
        for window in windows:
            ids = torch.tensor([list(window)], device=model.device)
            with half_products(model):
                logits = model.module(input_ids=ids, use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()
            job.advance()
    return sums
