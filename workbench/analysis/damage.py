"""What one unit in fewer bits does to the model's output: measured as KL, or estimated cheaply from gradients.

* ``UnitDamage``: for every unit and width the KL divergence from the dense model with only that unit changed.
* ``UnitScores``: proxies of that damage from gradients, first order and diagonal Fisher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from workbench.analysis.blocks import block_calls, run_block
from workbench.analysis.common import WIDTHS, check_widths, model_provenance
from workbench.analysis.profile import Profile, TextRecord
from workbench.errors import InputError
from workbench.formats.codes import dequantize, quantize_groups, stored_bits
from workbench.formats.nested import NestedCodes
from workbench.models.base import LoadedModel, Unit
from workbench.progress import Job

_DAMAGES = ("kl", "fisher", "gradient")


class _UnitAnalysis:
    """What the two analyses by unit share: their arguments, rounding one unit, and the storage columns."""

    kind: str

    def __init__(
        self,
        model: LoadedModel,
        windows: Sequence[Sequence[int]],
        *,
        widths: Sequence[int] = WIDTHS,
        group_size: int = 64,
        symmetric: bool = False,
        text: TextRecord | None = None,
        seed: int = 0,
        codes: Mapping[str, NestedCodes] | None = None,
    ) -> None:
        if not windows:
            raise InputError("No text windows were given to measure damage on: give at least one.")
        self._model = model
        self._windows = [list(w) for w in windows]
        self._widths = check_widths(widths)
        self._group_size = group_size
        self._symmetric = symmetric
        parameters = {
            "widths": list(self._widths),
            "group_size": group_size,
            "symmetric": symmetric,
            "windows": self._windows,
        }
        self._codes = codes
        if codes is not None:
            parameters["codes"] = {name: _digest(nested) for name, nested in codes.items()}
        self.provenance = model_provenance(self.kind, model, text, seed, parameters)

    def _stored_bits(self, unit: Unit, bits: int) -> int:
        """Bits on disk of a unit, counted on the real shapes."""
        return sum(
            stored_bits(x.out_features, x.in_features, bits, self._group_size, self._symmetric) for x in unit.linears
        )

    def _rounded(self, linear_id: str, weight: torch.Tensor, bits: int) -> torch.Tensor:
        if self._codes is not None:
            return self._codes[linear_id].dequantize(bits).to(weight.device)
        return dequantize(quantize_groups(weight, bits, self._group_size, self._symmetric))


def _digest(nested: NestedCodes) -> str:
    parts = [nested.codes, *(nested.scales[bits] for bits in nested.widths), *(nested.zeros[b] for b in nested.widths)]
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


class UnitDamage(_UnitAnalysis):
    """KL divergence, dense to compressed, in nats per token, with only one unit rounded to one width.

    Only the blocks from the unit's own on are run again; their inputs come from the dense pass, which advances through
    the blocks as the units do. The table has columns ``block``, ``unit``, ``bits``, ``kl``, ``stored_bits``,
    ``n_weights``.

    Memory: hidden states of all windows once, and the dense log-probabilities, tokens x vocabulary x 4 bytes.

    Args:
        model: the dense model.
        windows: token windows of calibration text, each no longer than the context.
        widths: bits, each 2 to 8.
        group_size: input channels per scale.
        symmetric: rounding without zero points.
        text: where the windows come from, for the record.
        seed: what they were drawn with, for the record.
        codes: by linear id, nested codes to read at each width instead of rounding.
    """

    kind = "unit-damage"

    def __init__(self, model: LoadedModel, windows: Sequence[Sequence[int]], **options: Any) -> None:
        super().__init__(model, windows, **options)
        self._pass: _DensePass | None = None

    @property
    def parts(self) -> Sequence[str]:
        return [unit.id for unit in self._model.architecture.units]

    @torch.inference_mode()
    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one unit's rows."""
        unit = self._model.architecture.unit(part)
        if self._pass is None or self._pass.block > unit.block:
            self._pass = _DensePass(self._model, self._windows)
        self._pass.advance(unit.block)
        rows = []
        originals = {x.id: self._model.linear_module(x.id).weight.data for x in unit.linears}
        for done, bits in enumerate(self._widths):
            job.within(done / len(self._widths))
            try:
                for linear_id, original in originals.items():
                    rounded = self._rounded(linear_id, original, bits).to(original.dtype)
                    self._model.linear_module(linear_id).weight.data = rounded
                kl = self._pass.kl()
            finally:
                for linear_id, original in originals.items():
                    self._model.linear_module(linear_id).weight.data = original
            stored = self._stored_bits(unit, bits)
            rows.append((unit.block, unit.id, bits, kl, stored, unit.n_weights))
        return pd.DataFrame(rows, columns=["block", "unit", "bits", "kl", "stored_bits", "n_weights"])


class _DensePass:
    """The dense model's states at the input of one block, for every window, and its output probabilities."""

    def __init__(self, model: LoadedModel, windows: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._states: list[torch.Tensor] = []
        self._arguments: list[list[dict[str, Any]]] = []
        self._final: list[torch.Tensor] = []
        self._log_probabilities: list[torch.Tensor] = []
        self.block = 0
        for window in windows:
            self._record(window)

    def _record(self, window: Sequence[int]) -> None:
        """Run one window through the dense model, keeping how each block was called."""
        calls, final = block_calls(self._model, window)
        self._states.append(calls[0][0])
        self._arguments.append([inputs for _, inputs in calls])
        self._final.append(final[0])
        self._log_probabilities.append(self._head(final[0]).log_softmax(dim=1))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.module.get_output_embeddings()(hidden).float()

    def _forward(self, block: int, hidden: torch.Tensor, window: int) -> torch.Tensor:
        return run_block(self._model, block, hidden, self._arguments[window][block])

    def advance(self, block: int) -> None:
        """Move all windows' states to the input of ``block``."""
        while self.block < block:
            self._states = [self._forward(self.block, state, i) for i, state in enumerate(self._states)]
            self.block += 1

    def kl(self) -> float:
        """Mean KL over all tokens between the dense output and that of the model's present weights, nats.

        With ``p`` the dense probabilities and ``d`` the change of the logits, ``KL = log sum p exp(d) - sum p d``.
        Where the change is small this loses its digits, and ``log1p(sum p expm1(d)) - sum p d`` keeps them.
        """
        total, count = 0.0, 0
        path = self._model.architecture.norms.get("final")
        cap = getattr(self._model.module.config, "final_logit_softcapping", None)
        for i, state in enumerate(self._states):
            hidden = state
            for block in range(self.block, self._model.architecture.n_blocks):
                hidden = self._forward(block, hidden, i)
            hidden = (self._model.submodule(path)(hidden) if path else hidden)[0]
            if cap:
                change = cap * (torch.tanh(self._head(hidden) / cap) - torch.tanh(self._head(self._final[i]) / cap))
            else:
                change = self._head(hidden) - self._head(self._final[i])
            total += float(_divergence(self._log_probabilities[i], change).double().sum())
            count += len(change)
        return max(total / count, 0.0)


def _divergence(log_p: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, with ``q`` the softmax of the logits of ``p`` plus ``change``; float32 (rows,)."""
    p = log_p.exp()
    mean = (p * change).sum(dim=1)
    small = change.abs().amax(dim=1) < 1
    kl = torch.empty_like(mean)
    kl[small] = torch.log1p((p[small] * change[small].expm1()).sum(dim=1)) - mean[small]
    kl[~small] = (log_p[~small] + change[~small]).logsumexp(dim=1) - mean[~small]
    return kl


class UnitScores(_UnitAnalysis):
    """Cheap proxies of a unit's damage from one backward pass per window.

    Per window w with summed loss L_w, gradient ``g_w = dL_w/dW`` and rounding error ``dW``, the table holds ``first``
    = <g_w, dW> and ``second`` = sum of g_w^2 dW^2, with columns ``window``, ``n_tokens``, ``block``, ``unit``,
    ``bits``, ``first``, ``second``, ``stored_bits``, ``n_weights``. ``unit_scores`` sums them up:

    * ``gradient`` = |sum_w <g_w, dW>| / tokens, first order (as in LLM-MQ);
    * ``fisher`` = 1/2 sum_w sum g_w^2 dW^2 / tokens, second order with the empirical Fisher diagonal (as in HAWQ and
      SqueezeLLM), an estimate of the KL in nats per token.

    Args: as ``UnitDamage``; many short windows serve better than few long ones.
    """

    kind = "unit-scores"

    @property
    def parts(self) -> Sequence[str]:
        return [f"window-{i}" for i in range(len(self._windows))]

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one window's rows: one backward pass, each gradient used and dropped as soon as it is complete."""
        index = int(part.rsplit("-", 1)[1])
        tokens = self._windows[index]
        found: dict[tuple[str, int], tuple[float, float]] = {}
        arch = self._model.architecture
        with Gradients(self._model) as arm:
            for linear in arch.linears:
                arm(linear.id, self._scores_of(linear.id, found, job))
            ids = torch.tensor([tokens], device=self._model.device)
            logits = self._model.module(input_ids=ids, use_cache=False).logits[0, :-1].float()
            nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        rows = []
        for unit in arch.units:
            for bits in self._widths:
                first = sum(found[x.id, bits][0] for x in unit.linears)
                second = sum(found[x.id, bits][1] for x in unit.linears)
                stored = self._stored_bits(unit, bits)
                rows.append((index, len(tokens) - 1, unit.block, unit.id, bits, first, second, stored, unit.n_weights))
        columns = ["window", "n_tokens", "block", "unit", "bits", "first", "second", "stored_bits", "n_weights"]
        return pd.DataFrame(rows, columns=columns)

    def _scores_of(
        self, linear_id: str, found: dict[tuple[str, int], tuple[float, float]], job: Job
    ) -> Callable[[nn.Parameter], None]:
        def take(parameter: nn.Parameter) -> None:
            job.within(len(found) / (len(self._widths) * len(self._model.architecture.linears)))
            if parameter.grad is None:
                raise InputError(f"{linear_id} got no gradient: the model does not use it on this text.")
            gradient, parameter.grad = parameter.grad.float(), None
            weight = parameter.detach().float()
            for bits in self._widths:
                change = (self._rounded(linear_id, weight, bits) - weight).mul_(gradient)
                found[linear_id, bits] = (float(change.double().sum()), float(change.square_().double().sum()))

        return take


class Gradients:
    """Context in which chosen weights get gradients and hand them over; the model is left as it was found."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._hooks: list[Any] = []
        self._weights: list[nn.Parameter] = []

    def __enter__(self) -> Callable[[str, Callable[[nn.Parameter], None]], None]:
        self._grad_mode = torch.enable_grad()
        self._grad_mode.__enter__()
        return self._arm

    def _arm(self, linear_id: str, take: Callable[[nn.Parameter], None]) -> None:
        weight: Any = self._model.linear_module(linear_id).weight
        weight.requires_grad_(True)
        self._weights.append(weight)
        self._hooks.append(weight.register_post_accumulate_grad_hook(take))

    def __exit__(self, *error: object) -> None:
        self._grad_mode.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            weight.requires_grad_(False)
            weight.grad = None


def unit_scores(scores: Profile) -> pd.DataFrame:
    """Sum a ``UnitScores`` profile over its windows: ``block``, ``unit``, ``bits``, ``gradient``, ``fisher``, sizes."""
    keys = ["block", "unit", "bits", "stored_bits", "n_weights"]
    total = scores.table.groupby(keys, sort=False, observed=True)[["first", "second", "n_tokens"]].sum().reset_index()
    total["gradient"] = total["first"].abs() / total["n_tokens"]
    total["fisher"] = 0.5 * total["second"] / total["n_tokens"]
    return total[["block", "unit", "bits", "gradient", "fisher", "stored_bits", "n_weights"]]


def damage_table(scores: Profile, damage: Profile | None = None) -> pd.DataFrame:
    """Join proxies and, where it was measured, KL: one row per unit and width."""
    table = unit_scores(scores)
    if damage is None:
        return table
    joined = table.merge(damage.table[["unit", "bits", "kl"]], on=["unit", "bits"], how="inner", validate="1:1")
    if len(joined) != len(damage.table):
        raise InputError("The two profiles do not cover the same units and widths: run both on the same model.")
    return joined


def proxy_correlation(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman rank correlation over units of each proxy with the KL, per width: ``bits``, ``gradient``, ``fisher``."""
    rows = []
    for bits, part in table.groupby("bits"):
        ranks = part[["kl", "gradient", "fisher"]].rank()
        rows.append((bits, ranks["kl"].corr(ranks["gradient"]), ranks["kl"].corr(ranks["fisher"]), len(part)))
    return pd.DataFrame(rows, columns=["bits", "gradient", "fisher", "n_units"])


def rank_units(table: pd.DataFrame, bits: int, by: str) -> pd.DataFrame:
    """Units by damage at one width, worst first, with their share of the sum.

    Args:
        table: a damage table.
        bits: the width to look at.
        by: its column: ``kl``, ``fisher`` or ``gradient``.

    Raises:
        InputError: the table has no such width or column.
    """
    if by not in table:
        raise InputError(f"The damage table has no column '{by}'; it has {[c for c in table if c in _DAMAGES]}.")
    part = table[table["bits"] == bits]
    if part.empty:
        raise InputError(f"The damage table has no {bits} bits; it has {sorted(table['bits'].unique().tolist())}.")
    ranked = part.sort_values(by, ascending=False, kind="stable").reset_index(drop=True)
    ranked.insert(0, "rank", ranked.index + 1)
    ranked["share"] = ranked[by] / ranked[by].sum()
    return ranked
