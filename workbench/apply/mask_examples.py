"""What mask predictors are trained on: taps at deciding tokens, and the scores over the tokens that each governs.

Scores may use gradients, in which later tokens have a part: they are targets, and never inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from workbench.analysis.masking import MaskKind, masking
from workbench.analysis.sparsity import score_units
from workbench.apply.mask_net import NetSpec
from workbench.errors import CorpusError
from workbench.models.base import LoadedModel
from workbench.progress import Job
from workbench.runtime.plan import Tap

ScopeKind = Literal["token", "every", "reply"]
_STRIDE = 16  # tokens between the places at which a text is cut into prompt and reply


@dataclass(frozen=True)
class Span:
    """When is decided, and for how long.

    Attributes:
        scope: as the plan's.
        n: of ``every``: tokens from one decision to the next.
        reply: of ``reply``: how many tokens after the deciding one count.
        prefix: tokens that stay whole.
    """

    scope: ScopeKind
    n: int = 1
    reply: int = 32
    prefix: int = 64

    def places(self, length: int) -> list[tuple[int, int, int]]:
        """Deciding positions in a text of ``length`` tokens, each with the positions [begin, end) that it governs.

        Raises:
            CorpusError: the text is too short to have one.
        """
        if self.scope == "reply":
            first = max(self.prefix, 1) - 1
            found = [(at, at + 1, at + 1 + self.reply) for at in range(first, length - self.reply, _STRIDE)]
        else:
            n = self.n if self.scope == "every" else 1
            first = -(-self.prefix // n) * n
            found = [(at, at, at + n) for at in range(first, length - n + 1, n)]
        if not found:
            raise CorpusError(
                f"Texts of {length} tokens hold no decision after the first {self.prefix}: give a shorter prefix, or "
                "more calibration tokens."
            )
        return found

    def deciding(self, length: int) -> torch.Tensor:
        """For each position of a text the one whose decision is in force there, int64 (length,); -1: none yet."""
        at = torch.arange(length)
        if self.scope == "reply":
            return torch.where(at >= self.prefix, max(self.prefix, 1) - 1, -1)
        found = at // self.n * self.n if self.scope == "every" else at
        return torch.where(found >= self.prefix, found, -1)


@dataclass(frozen=True)
class Examples:
    """Examples of a predictor, in order of their texts.

    Attributes:
        texts: int64 (n,), the text that each is of.
        inputs: by tap, (n, width) of the model's type.
        targets: by group, bf16 (n, units): its criterion's mean over what the decision governs.
        means: by criterion, float64 (units of all groups,), summed over ``tokens`` tokens after the prefix.
        tokens: see ``means``.
    """

    texts: torch.Tensor
    inputs: dict[Tap, torch.Tensor]
    targets: list[torch.Tensor]
    means: dict[str, torch.Tensor]
    tokens: int

    def cpu(self) -> Examples:
        """The same, out of the memory of whatever device the model is on."""
        inputs = {tap: rows.cpu() for tap, rows in self.inputs.items()}
        return replace(self, inputs=inputs, targets=[target.cpu() for target in self.targets])


def collect(
    model: LoadedModel,
    windows: Sequence[Sequence[int]],
    spec: NetSpec,
    criterion: str,
    span: Span,
    *,
    aggregates: Sequence[str] = (),
    per_text: int | None = None,
    first_text: int = 0,
    batch: int = 1,
    seed: int = 0,
    job: Job | None = None,
) -> Examples:
    """Look at texts of one length.

    Args:
        model: the dense model, left as it is.
        windows: of one length.
        spec: the taps that are wanted, and the groups.
        criterion: of the targets.
        span: which tokens decide for which.
        aggregates: criteria whose means are wanted beside.
        per_text: deciding tokens that are drawn of each text; None takes all.
        first_text: number of the first text; draws depend on a text's number alone, so that texts may come in pieces.
        batch: texts at once.
        seed: of what is drawn.
        job: advanced by text.

    Raises:
        CorpusError: texts too short for a decision.
    """
    job = job or Job()
    parts: list[Examples] = []
    for begin in range(0, len(windows), batch):
        ids = torch.tensor([list(window) for window in windows[begin : begin + batch]], device=model.device)
        chosen = [_drawn(span, ids.shape[1], per_text, seed, first_text + begin + i) for i in range(len(ids))]
        parts.append(_of_batch(model, ids, spec, criterion, span, aggregates, chosen, first_text + begin))
        job.advance(len(ids))
    return joined(parts)


def joined(parts: Sequence[Examples]) -> Examples:
    """All examples of several collections of one kind, in order."""
    first = parts[0]
    return Examples(
        torch.cat([part.texts for part in parts]),
        {tap: torch.cat([part.inputs[tap] for part in parts]) for tap in first.inputs},
        [torch.cat([part.targets[i] for part in parts]) for i in range(len(first.targets))],
        {name: torch.stack([part.means[name] for part in parts]).sum(dim=0) for name in first.means},
        sum(part.tokens for part in parts),
    )


def _drawn(span: Span, length: int, count: int | None, seed: int, text: int) -> list[tuple[int, int, int]]:
    places = span.places(length)
    if count is None or count >= len(places):
        return places
    generator = torch.Generator().manual_seed(seed * 1_000_003 + text)
    return [places[i] for i in sorted(torch.randperm(len(places), generator=generator)[:count].tolist())]


def _of_batch(
    model: LoadedModel,
    ids: torch.Tensor,
    spec: NetSpec,
    criterion: str,
    span: Span,
    aggregates: Sequence[str],
    chosen: Sequence[list[tuple[int, int, int]]],
    first_text: int,
) -> Examples:
    texts, length = ids.shape
    taps: dict[Tap, torch.Tensor] = {}
    deciding = torch.tensor([[place[0] for place in places] for places in chosen], device=ids.device)
    governed = torch.tensor([[list(range(*place[1:])) for place in places] for places in chosen], device=ids.device)
    row = torch.arange(texts, device=ids.device)

    def see(tap: Tap, x: torch.Tensor) -> None:
        taps[tap] = x.detach().reshape(texts, length, -1)[row[:, None], deciding].flatten(0, 1)

    index = {(group.block, group.kind): i for i, group in enumerate(spec.groups)}
    targets: list[torch.Tensor] = [torch.empty(0)] * len(spec.groups)
    sums: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * len(spec.groups) for name in aggregates}

    def sink(block: int, kind: MaskKind, scores: Mapping[str, torch.Tensor]) -> None:
        group = index.get((block, kind))
        if group is None:
            return
        found = [scores[criterion][row[:, None], governed[:, :, i]] for i in range(governed.shape[2])]
        targets[group] = torch.stack(found).mean(dim=0).flatten(0, 1).to(torch.bfloat16)
        for name, kept in sums.items():
            kept[group] = scores[name][:, span.prefix :].double().sum(dim=(0, 1)).cpu()

    with masking(model, spec.taps, see, lambda block, kind: None):
        score_units(model, ids, tuple(dict.fromkeys((criterion, *aggregates))), sink, half=True)
    return Examples(
        torch.arange(first_text, first_text + texts).repeat_interleave(deciding.shape[1]),
        taps,
        targets,
        {name: torch.cat(kept) for name, kept in sums.items()},
        texts * (length - span.prefix),
    )
