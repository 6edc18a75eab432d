"""Tune a mask predictor through the model itself: masks that cost the least divergence, not the best scores.

The dense model is frozen and run with the masks that the predictor chooses; the divergence of its predictions from the
dense ones at the tokens after the prefix is the loss. While tuning, masks are drawn: a unit is kept with a probability
that rises with its score about the threshold, so that the loss has a slope. One threshold on the scores of all units
leaves out the wanted share of weights, so the shares of blocks, and of heads and neurons, are learnt too: what moves a
score moves the threshold, and that counts in the slope, or all scores would just rise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from workbench.analysis.divergence import half_products, log_probabilities
from workbench.analysis.masking import MaskKind, masking
from workbench.apply.mask_examples import Span
from workbench.apply.mask_net import MaskNet
from workbench.apply.mask_training import part_weights
from workbench.errors import RecipeError
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime.plan import Tap

# Most that a step moves a sum of products of a matrix, and a mean, in standard deviations of all scores. Adam moves
# every number alike, so the rate of a matrix is this over the number of its columns.
_RATE, _MEAN_RATE = 0.05, 0.03
_WIDTH = 0.3  # of the slope of the probability that a unit is kept, in the same unit
_FOLLOW = 0.3  # how far the threshold goes towards that of the latest texts
_ROWS, _TOKENS = 256, 64  # positions whose predictions are held at once; whose scores a threshold is read from


class _Gate(torch.autograd.Function):
    """1 with the probability p = sigmoid(above / width), and backwards the slope of its expectation, to second order.

    The loss with a unit less that without it is (g(0) + g(1)) / 2 up to third order, g its derivative by the mask. Of
    the two only that at the drawn value is known, so it counts one over twice the probability of having been drawn
    (ReinMax, Liu et al. 2023, arXiv 2304.08612). The derivative at the drawn value alone would be zero for what is kept
    of a model that fits (divergence has its least there), and twice what is due for what is left out: units would be
    exchanged for ever.
    """

    @staticmethod
    def forward(ctx: Any, above: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        mask = above + _WIDTH * noise > 0
        ctx.save_for_backward(above, mask)
        return mask.to(above.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        above, mask = ctx.saved_tensors
        p = torch.sigmoid(above / _WIDTH)
        return gradient * torch.where(mask, 1 - p, p) / (2 * _WIDTH), None


class MaskedRun:
    """The model with the masks that a net chooses, at a threshold for every group.

    Args:
        model: hooked while it runs.
        net: on the model's device.
        span: when is decided.
        limits: float32 (groups,), thresholds; or one for all.
        floors: by group, how many of it are kept at least; None for none.
        drawn: draw masks, and keep what ``backward`` needs.
    """

    def __init__(
        self,
        model: LoadedModel,
        net: MaskNet,
        span: Span,
        limits: torch.Tensor,
        floors: Sequence[int] | None = None,
        drawn: torch.Generator | None = None,
    ) -> None:
        self._model, self._net, self._span, self._limits, self._floors = model, net, span, limits, floors
        self._drawn = drawn
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[tuple[int, MaskKind], torch.Tensor] = {}
        self.scores: dict[int, torch.Tensor] = {}  # of each part at a few tokens, without gradients
        self._kept: list[torch.Tensor] = []

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Final states of ids (texts, tokens), (texts, tokens, hidden)."""
        self._masks, self.scores, self._kept = {}, {}, []
        spec = self._net.spec
        by_tap: dict[Tap, list[int]] = {}
        for index, part in enumerate(spec.parts):
            by_tap.setdefault(part.tap, []).append(index)
        deciding = self._span.deciding(ids.shape[1]).to(ids.device)
        decided = torch.unique(deciding[deciding >= 0])
        place = torch.searchsorted(decided, deciding.clamp(min=0)).clamp(max=len(decided) - 1)

        def see(tap: Tap, x: torch.Tensor) -> None:
            x = x.reshape(*ids.shape, -1)[:, decided]
            for index in by_tap[tap]:
                self._choose(index, x.detach(), deciding, place)

        def mask_of(block: int, kind: MaskKind) -> torch.Tensor | None:
            return self._masks.pop((block, kind), None)

        # A draw changes far more than products in bf16 do; masks that are not drawn are the engines'.
        half = nullcontext() if self._drawn is None else half_products(self._model)
        with masking(self._model, spec.taps, see, mask_of), half:
            return self._model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def _choose(self, index: int, taps: torch.Tensor, deciding: torch.Tensor, place: torch.Tensor) -> None:
        spec, part = self._net.spec, self._net.spec.parts[index]
        with torch.autocast(taps.device.type, enabled=False):  # engines round hidden activations alone
            scores = self._net.parts[index](taps)
        if self._drawn is not None:
            apart = scores.detach().requires_grad_(True)
            self._held[index] = (scores, apart)
            scores = apart
            noise = torch.rand(scores.shape, generator=self._drawn, device=scores.device).logit(1e-6)
        flat = scores.detach().flatten(0, 1)
        few = torch.linspace(0, len(flat) - 1, min(_TOKENS, len(flat)), device=flat.device).long()
        self.scores[index] = flat[few] + (_WIDTH * noise.flatten(0, 1)[few] if self._drawn is not None else 0)
        weights = part_weights(self._net, index).to(flat.device)
        whole = (deciding < 0)[:, None]
        groups = spec.blocks_of(part)
        # Split, not sliced: the gradient of a slice is as large as the whole.
        by_group = scores.split([end - begin for _, begin, end in groups], dim=-1)
        for number, ((group, begin, end), found) in enumerate(zip(groups, by_group, strict=True), start=part.begin):
            limit = self._limits[number] if self._limits.dim() else self._limits
            above = found - limit
            mask = (above > 0).float() if self._drawn is None else _Gate.apply(above, noise[..., begin:end])
            if self._floors is not None and self._floors[number]:
                best = above.detach().topk(self._floors[number], dim=-1).indices
                mask = mask.scatter(-1, best, 1.0)
            self._kept.append((mask.detach().mean(dim=(0, 1)) * weights[begin:end]).sum())
            self._masks[group.block, group.kind] = torch.where(whole, 1.0, mask[:, place])

    @property
    def kept(self) -> float:
        """Share of the weights of the net's units that the decisions of the latest run kept."""
        return float(torch.stack(self._kept).sum())

    def backward(self) -> None:
        """Give the net's parameters the gradients that the model has left at the scores.

        The threshold keeps the sum of w p, w the weights, so it moves by w p' / sum(w p') with each score, p' the slope
        of p; and the loss falls with the threshold by what it rises with all scores together.
        """
        slopes = {}
        for index, (_, apart) in self._held.items():
            p = torch.sigmoid((apart.detach() - self._limits) / _WIDTH)
            slopes[index] = p * (1 - p) * part_weights(self._net, index).to(p.device)
        total = sum(apart.grad.sum() for _, apart in self._held.values() if apart.grad is not None)
        whole = sum(slope.sum() for slope in slopes.values())
        for index, (scores, apart) in self._held.items():
            if apart.grad is not None:
                scores.backward(apart.grad - slopes[index] * (total / whole))
        self._held = {}


def tune(
    model: LoadedModel,
    net: MaskNet,
    scale: torch.Tensor,
    windows: Sequence[Sequence[int]],
    span: Span,
    sparsities: Sequence[float],
    steps: int,
    *,
    batch: int = 1,
    seed: int = 0,
    parameters: Mapping[str, torch.nn.Parameter] | None = None,
    job: Job | None = None,
) -> list[float]:
    """Tune ``net`` in place; afterwards its scores can be compared between all groups, per weight.

    Args:
        model: the dense model; left as it was.
        net: regressed, on the model's device.
        scale: of its groups (``Regressed``): with it scores can be compared between groups.
        windows: of one length, to train on.
        span: when is decided.
        sparsities: shares of the weights of all heads and neurons of the net's blocks, one drawn a step.
        steps: of Adam.
        batch: texts a step.
        seed: of the order.
        parameters: of the net, those to tune; None for all.
        job: a stage, advanced by step.

    Returns:
        The divergence after every step, nats per token.

    Raises:
        RecipeError: outputs that are not finite.
    """
    job = job or Job()
    job.stage("tune the mask predictor through the model", steps)
    generator = torch.Generator().manual_seed(seed)
    device = net.parts[0].mean.device
    draws = torch.Generator(device=device).manual_seed(seed)
    _rescale(net, scale.to(device))
    chosen = dict(net.named_parameters() if parameters is None else parameters)
    groups = [{"params": [p], "lr": _RATE / p.shape[1] if p.dim() == 2 else _MEAN_RATE} for p in chosen.values()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    limits: dict[float, float] = {}
    order, losses = torch.empty(0, dtype=torch.long), []
    _unit_scores(model, net, span, windows[:batch])
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            if len(order) < batch:
                order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
            here, order = order[:batch], order[batch:]
            share = sparsities[int(torch.randint(len(sparsities), (1,), generator=generator))]
            ids = torch.tensor([list(windows[i]) for i in here.tolist()], device=device)
            if share not in limits:
                limits[share] = _first_limit(model, net, span, ids, share)
            optimizer.zero_grad(set_to_none=True)
            run = MaskedRun(model, net, span, torch.tensor(limits[share], device=device), drawn=draws)
            losses.append(_divergence(model, run, ids, span.prefix))
            optimizer.step()
            schedule.step()
            for key, latest in zip(limits, limits_of(net, run.scores, list(limits)), strict=True):
                limits[key] += _FOLLOW * (latest - limits[key])
            job.advance()
    return losses


def limits_of(net: MaskNet, scores: Mapping[int, torch.Tensor], shares: Sequence[float]) -> list[float]:
    """Thresholds at which each of ``shares`` of the weights is left out, of scores (tokens, units) of every part."""
    values = torch.cat([scores[index].flatten() for index in range(len(net.parts))])
    weights = torch.cat([part_weights(net, i).to(values.device).repeat(len(scores[i])) for i in range(len(net.parts))])
    order = values.argsort()
    total = weights[order].double().cumsum(0)
    asked = torch.tensor(shares, dtype=torch.float64, device=total.device) * total[-1]
    return values[order[torch.searchsorted(total, asked).clamp(max=len(order) - 1)]].tolist()


def _divergence(model: LoadedModel, run: MaskedRun, ids: torch.Tensor, prefix: int) -> float:
    """Divergence at the tokens after the prefix; its gradient is left in the net's parameters."""
    with torch.no_grad(), half_products(model):
        dense = model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, prefix:].flatten(0, 1)
    flat = run.states(ids)[:, prefix:].flatten(0, 1)
    total, gradient = 0.0, torch.zeros_like(flat)
    for begin in range(0, len(flat), _ROWS):
        rows = flat[begin : begin + _ROWS].detach().clone().requires_grad_(True)
        with torch.no_grad():
            wanted = log_probabilities(model, dense[begin : begin + _ROWS])
        found = log_probabilities(model, rows)
        loss = torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(flat)
        loss.backward()
        total += float(loss.detach())
        assert rows.grad is not None  # it was asked for
        gradient[begin : begin + _ROWS] = rows.grad
    if not torch.isfinite(torch.tensor(total)):
        raise RecipeError("The outputs under masks are not finite: load the model in float32.")
    flat.backward(gradient)
    run.backward()
    return total


def _rescale(net: MaskNet, scale: torch.Tensor) -> None:
    """Multiply each group's scores by its scale."""
    with torch.no_grad():
        for index, part in enumerate(net.spec.parts):
            for number, (_, begin, end) in enumerate(net.spec.blocks_of(part), start=part.begin):
                net.parts[index].rows[begin:end] *= scale[number]
                net.parts[index].mean[begin:end] *= scale[number]


def _unit_scores(model: LoadedModel, net: MaskNet, span: Span, windows: Sequence[Sequence[int]]) -> None:
    """Divide all scores by one number, so that rates and slopes are in their standard deviations."""
    ids = torch.tensor([list(window) for window in windows], device=net.parts[0].mean.device)
    with torch.no_grad():
        run = MaskedRun(model, net, span, torch.tensor(-torch.inf, device=ids.device))
        run.states(ids)
        values = torch.cat([scores.flatten() for scores in run.scores.values()])
        _rescale(net, torch.full((len(net.spec.groups),), 1 / max(float(values.std()), 1e-30), device=ids.device))


def _first_limit(model: LoadedModel, net: MaskNet, span: Span, ids: torch.Tensor, share: float) -> float:
    with torch.no_grad():
        run = MaskedRun(model, net, span, torch.tensor(-torch.inf, device=ids.device))
        run.states(ids)
    return limits_of(net, run.scores, [share])[0]
