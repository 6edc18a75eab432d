"""How much each attention head and each MLP neuron matters at each token, by several criteria.

With A_h the output of a query head before ``o``, a_n a neuron after activation and gate (what ``down`` reads), L the
loss of the text and one token t:

* ``plainact``: |<A_h, dL/dA_h>|, |a_n dL/da_n|: what leaving it out changes L by, to first order (ShadowLLM, Akhauri et
  al. 2024, arXiv 2406.16635, in its form for activations).
* ``fisher``: the square of that.
* ``grad_norm``: ||dL/dA_h||, |dL/da_n|.
* ``magnitude``: ||A_h||, |a_n|, after the activation.
* ``preactivation``: the published baseline's: a neuron's value *before* the activation (the output of ``fc1``, of
  ``gate`` where the MLP is gated), whose size does not tell a neuron that a ReLU closes from one that it opens;
  for heads as ``magnitude``.
* ``weighted``: the norm of what it writes: ||W_o[:, h] A_h||, |a_n| ||W_down[:, n]|| (WINA, 2505.19427).

L is the negative log-likelihood of the text itself, or of tokens drawn from the model's own predictions. Gradients at a
token contain what *later* tokens make of it. So the first three are targets to train on, means over a text, and
oracles; nothing may decide by them while a text is being written. Units are query heads: heads that share keys
and values are apart, and keys and values are written whatever is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from workbench.analysis.common import model_provenance
from workbench.analysis.divergence import half_products, log_probabilities
from workbench.analysis.masking import MaskKind
from workbench.analysis.profile import Profile, TextRecord
from workbench.errors import InputError, suggest
from workbench.models.base import LoadedModel
from workbench.progress import Job

Loss = Literal["text", "own"]
# sink(block, kind, {criterion: float32 (texts, tokens, heads or neurons)}), called once a block and kind.
Sink = Callable[[int, MaskKind, Mapping[str, torch.Tensor]], None]

CRITERIA = ("plainact", "fisher", "grad_norm", "magnitude", "preactivation", "weighted")
BY_GRADIENT = frozenset(CRITERIA[:3])
_ROWS = 128  # positions whose predictions are held at once: as many numbers as the vocabulary has, each


def score_units(
    model: LoadedModel,
    ids: torch.Tensor,
    criteria: Sequence[str],
    sink: Sink,
    *,
    loss: Loss = "text",
    half: bool = False,
    seed: int = 0,
) -> None:
    """Give every unit's criteria at every token to ``sink``, one block and kind at a time.

    What is held beside the pass's own activations is one block's scores, and predictions of a few positions.

    Args:
        model: the dense model; left as it was, also after an error.
        ids: (texts, tokens), texts of one length.
        criteria: of ``CRITERIA``.
        sink: takes the scores; blocks come in any order.
        loss: of the ``text``, or of tokens drawn from the model's ``own`` predictions.
        half: products in bf16 where this processor has them.
        seed: of the drawing.

    Raises:
        InputError: an unknown criterion, texts of one token, an output that is not finite.
    """
    check_criteria(criteria)
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise InputError(f"Scores need texts of two tokens or more, got {tuple(ids.shape)} (texts, tokens).")
    watch = _Watch(model, tuple(criteria), tuple(ids.shape), sink)
    ids = ids.to(model.device)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            watch.install()
            with half_products(model) if half else nullcontext():
                states = model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state
            if watch.needs_gradient:
                states.backward(_loss_gradient(model, states.detach(), ids, loss, seed))
        finally:
            watch.remove()


def check_criteria(criteria: Sequence[str]) -> None:
    """Raise ``InputError`` where one is unknown, or none is given."""
    for given in criteria:
        if given not in CRITERIA:
            raise InputError(
                f"Unknown criterion '{given}'; allowed are {', '.join(CRITERIA)}." + suggest(given, CRITERIA)
            )
    if not criteria:
        raise InputError(f"No criterion was given; allowed are {', '.join(CRITERIA)}.")


def _loss_gradient(model: LoadedModel, states: torch.Tensor, ids: torch.Tensor, loss: Loss, seed: int) -> torch.Tensor:
    """Gradient of the summed loss by the final states (texts, tokens, hidden), a few positions at a time."""
    gradient = torch.zeros_like(states)
    flat, out = states[:, :-1].reshape(-1, states.shape[-1]), []
    targets = ids[:, 1:].reshape(-1)
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    for begin in range(0, len(flat), _ROWS):
        rows = flat[begin : begin + _ROWS].clone().requires_grad_(True)
        found = log_probabilities(model, rows)
        if not bool(found.isfinite().all()):
            raise InputError(f"The outputs of {model.name} are not finite, so nothing can be scored by its loss.")
        wanted = targets[begin : begin + len(rows)]
        if loss == "own":
            wanted = torch.multinomial(found.detach().exp(), 1, generator=generator)[:, 0]
        (-found.gather(1, wanted[:, None]).sum()).backward()
        assert rows.grad is not None  # it was asked for
        out.append(rows.grad)
    gradient[:, :-1] = torch.cat(out).view(*gradient[:, :-1].shape)
    return gradient


class _Watch:
    """Hooks that turn what enters ``o`` and ``down``, and its gradient, into scores."""

    def __init__(self, model: LoadedModel, criteria: tuple[str, ...], shape: tuple[int, ...], sink: Sink) -> None:
        self._model, self._criteria, self._shape, self._sink = model, criteria, shape, sink
        self.needs_gradient = bool(BY_GRADIENT & set(criteria))
        self._before: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def install(self) -> None:
        model, parts = self._model, self._model.architecture
        if self.needs_gradient:  # no parameter has one: all gradients flow through the embedded tokens
            embedding = model.module.get_input_embeddings()
            self._hooks.append(embedding.register_forward_hook(lambda _, args, out: out.requires_grad_(True)))
        for block in range(parts.n_blocks):
            if "preactivation" in self._criteria:
                first = parts.unit(f"blocks.{block}.gate_up").linears[0]
                self._hooks.append(model.linear_module(first.id).register_forward_hook(self._see_before(block)))
            for kind, unit in (("heads", "o"), ("neurons", "down")):
                linear = parts.unit(f"blocks.{block}.{unit}").linears[0]
                self._hooks.append(
                    model.linear_module(linear.id).register_forward_pre_hook(self._see(block, kind, linear.id))
                )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_before(self, block: int) -> Callable:
        neurons = self._model.architecture.n_neurons

        def hook(module: Any, args: tuple, output: torch.Tensor) -> None:  # a fused gate_up has the gate first
            self._before[block] = output.detach()[..., :neurons]

        return hook

    def _see(self, block: int, kind: Any, linear: str) -> Callable:
        def hook(module: Any, args: tuple) -> tuple:
            x = args[0]
            with torch.no_grad():
                found = self._from_values(block, kind, linear, x.detach())
            if not self.needs_gradient:
                self._sink(block, kind, found)
                return args
            kept = x.detach()

            def backward(gradient: torch.Tensor) -> None:
                with torch.no_grad():
                    self._sink(block, kind, found | self._from_gradient(kind, kept, gradient))

            x.register_hook(backward)
            return args

        return hook

    def _by_unit(self, kind: MaskKind, x: torch.Tensor) -> torch.Tensor:
        """(texts, tokens, units, values of a unit) float32."""
        units = self._model.architecture.n_heads if kind == "heads" else self._model.architecture.n_neurons
        return x.float().reshape(*self._shape, units, -1)

    def _from_values(self, block: int, kind: MaskKind, linear: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        wanted = set(self._criteria) - BY_GRADIENT
        if not wanted:
            return {}
        values, found = self._by_unit(kind, x), {}
        size = values.norm(dim=-1)
        if "magnitude" in wanted:
            found["magnitude"] = size
        if "preactivation" in wanted:
            before = self._before.pop(block) if kind == "neurons" else None
            found["preactivation"] = size if before is None else before.float().abs().reshape(size.shape)
        if "weighted" in wanted:
            found["weighted"] = self._written(kind, linear, values)
        return found

    def _written(self, kind: MaskKind, linear: str, values: torch.Tensor) -> torch.Tensor:
        weight = self._model.linear_module(linear).weight.detach().float()
        if kind == "neurons":
            return values[..., 0].abs() * weight.norm(dim=0)
        by_head = weight.reshape(weight.shape[0], values.shape[2], -1)
        grams = torch.einsum("ohi,ohj->hij", by_head, by_head)  # ||W A||^2 = A' (W' W) A, without W A of every head
        return torch.einsum("bthi,hij,bthj->bth", values, grams, values).clamp(min=0).sqrt()

    def _from_gradient(self, kind: MaskKind, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        values, slopes, found = self._by_unit(kind, x), self._by_unit(kind, gradient), {}
        change = (values * slopes).sum(dim=-1)
        for name, score in (
            ("plainact", change.abs()),
            ("fisher", change.square()),
            ("grad_norm", slopes.norm(dim=-1)),
        ):
            if name in self._criteria:
                found[name] = score
        return found


class UnitCriteria:
    """Criteria of every head and neuron, one row per sequence, block, kind and unit: their means over its tokens.

    Columns: ``sequence``, ``block``, ``kind`` (``heads``, ``neurons``), ``unit``, ``n_tokens``, and one per criterion.
    With ``steps`` there is a row per token instead, and the column ``step``: as many rows as tokens times units, so
    name few blocks.

    Args:
        model: the dense model.
        windows: token windows; each is a part.
        criteria: of ``CRITERIA``.
        first: tokens before this position are left out of the table (they still are context).
        steps: a row per token.
        blocks: which are in the table; None for all.
        loss: as of ``score_units``.
        text: where the windows come from, for the record.
        seed: of what is drawn.
    """

    def __init__(
        self,
        model: LoadedModel,
        windows: Sequence[Sequence[int]],
        *,
        criteria: Sequence[str] = CRITERIA,
        first: int = 0,
        steps: bool = False,
        blocks: Sequence[int] | None = None,
        loss: Loss = "text",
        text: TextRecord | None = None,
        seed: int = 0,
    ) -> None:
        check_criteria(criteria)
        if not windows or any(len(window) <= max(first, 1) for window in windows):
            raise InputError(f"Scores need windows, each of more than {max(first, 1)} tokens: give longer ones.")
        every = range(model.architecture.n_blocks)
        self._blocks = tuple(every if blocks is None else blocks)
        if not set(self._blocks) <= set(every):
            raise InputError(f"Blocks {list(self._blocks)} are not all there: this model has 0 to {every[-1]}.")
        self._model, self._windows, self._criteria = model, [list(w) for w in windows], tuple(criteria)
        self._first, self._steps, self._loss = first, steps, loss
        parameters = {
            "windows": self._windows,
            "criteria": list(criteria),
            "first": first,
            "steps": steps,
            "blocks": list(self._blocks),
            "loss": loss,
        }
        self.provenance = model_provenance("unit-criteria", model, text, seed, parameters)

    @property
    def parts(self) -> Sequence[str]:
        return [f"sequence-{i}" for i in range(len(self._windows))]

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one sequence's rows."""
        index = int(part.rsplit("-", 1)[1])
        frames: dict[tuple[int, str], pd.DataFrame] = {}

        def sink(block: int, kind: MaskKind, scores: Mapping[str, torch.Tensor]) -> None:
            if block in self._blocks:
                frames[block, kind] = self._frame(index, block, kind, scores)
            job.check()

        ids = torch.tensor([self._windows[index]])
        score_units(self._model, ids, self._criteria, sink, loss=self._loss, seed=self.provenance.seed + index)
        return pd.concat([frames[key] for key in sorted(frames)], ignore_index=True)

    def _frame(self, index: int, block: int, kind: str, scores: Mapping[str, torch.Tensor]) -> pd.DataFrame:
        rows = {name: scores[name][0, self._first :].cpu().numpy() for name in self._criteria}
        tokens, units = next(iter(rows.values())).shape
        unit = np.arange(units, dtype=np.int32)
        named: dict[str, Any] = {"sequence": np.int32(index), "block": np.int16(block), "kind": kind}
        if self._steps:
            step = np.repeat(np.arange(self._first, self._first + tokens, dtype=np.int32), units)
            columns = {name: score.ravel() for name, score in rows.items()}
            return pd.DataFrame(named | {"step": step, "unit": np.tile(unit, tokens)} | columns)
        means = {name: score.mean(axis=0, dtype=np.float64) for name, score in rows.items()}
        return pd.DataFrame(named | {"unit": unit, "n_tokens": np.int32(tokens)} | means)


def pooled_criteria(profile: Profile) -> pd.DataFrame:
    """Means over all tokens of all sequences: one row per block, kind and unit."""
    table = profile.table
    names = [name for name in CRITERIA if name in table]
    if "n_tokens" not in table:
        raise InputError("These scores are of single steps: pool those made without 'steps'.")
    weighted = table[["block", "kind", "unit", "n_tokens"]].join(table[names].mul(table["n_tokens"], axis=0))
    found = weighted.groupby(["block", "kind", "unit"], observed=True, sort=True).sum().reset_index()
    found[names] = found[names].div(found["n_tokens"], axis=0)
    return found
