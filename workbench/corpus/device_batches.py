"""Text sampled from a model where it is, many documents at once: for devices that are idle most of the time otherwise.

All documents of a batch go forward a token at a time, from their first on, so that starts of different lengths need no
padding: while a document's start lasts its own next token is fed, and from then on the one that was drawn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache

from workbench.corpus.sampled import NOT_FINITE
from workbench.errors import CorpusError
from workbench.models.base import LoadedModel
from workbench.progress import Job

_MOST_DOCUMENTS = 64
_CACHE_BYTES = 4 << 30  # of keys and values of a batch at most, whatever is free: the text must not depend on that


def sample_on_device(
    model: LoadedModel,
    starts: Sequence[Sequence[int]],
    length: int,
    barred: Sequence[int],
    seed_of: Callable[[int], int],
    job: Job,
) -> list[list[int]]:
    """Sample a document from each start at temperature 1, from the whole distribution but the barred tokens.

    The same starts and seeds give the same text on the same device, and another on another.

    Args:
        model: runs on its own device.
        starts: of the documents, each of at least one token.
        length: tokens that are sampled for each.
        barred: tokens that are never drawn.
        seed_of: of the random stream of a batch, by its number.
        job: a stage, advanced at every token of a batch.

    Returns:
        Each start with what was sampled after it.

    Raises:
        CorpusError: logits that are not finite.
        Cancelled: by ``job``, between two tokens.
    """
    size = batch_size(model, max(map(len, starts)) + length)
    batches = [starts[begin : begin + size] for begin in range(0, len(starts), size)]
    steps = [max(map(len, batch)) - 1 + length for batch in batches]
    job.stage(f"sample text from {model.name} on {model.device}", sum(steps))
    found: list[list[int]] = []
    for number, (batch, count) in enumerate(zip(batches, steps, strict=True)):
        rows = _batch(model, batch, count, barred, seed_of(number), job)
        found += [row[: len(start) + length] for row, start in zip(rows, batch, strict=True)]
    return found


def batch_size(model: LoadedModel, positions: int) -> int:
    """Documents of so many tokens that are sampled together, 1 to 64: of what their keys and values take."""
    config = model.module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * model.architecture.n_blocks * heads * width * positions * model.dtype.itemsize
    return max(1, min(_MOST_DOCUMENTS, _CACHE_BYTES // each))


@torch.inference_mode()
def _batch(
    model: LoadedModel, starts: Sequence[Sequence[int]], steps: int, barred: Sequence[int], seed: int, job: Job
) -> list[list[int]]:
    """All documents of a batch after so many steps, one token longer than those each."""
    module, device = model.module, model.device
    generator = torch.Generator(device).manual_seed(seed)
    known = inspect.signature(module.base_model.forward).parameters  # transformers 5.2x renamed the argument
    cache = {"cache" if "cache" in known else "past_key_values": DynamicCache(config=module.config)}
    longest = max(map(len, starts))
    given = torch.tensor([[*start, *[-1] * (longest - len(start))] for start in starts], device=device)
    out = torch.tensor(list(barred), dtype=torch.long, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    tokens = [given[:, 0]]
    for step in range(steps):
        job.check()
        logits = module(input_ids=tokens[-1][:, None], use_cache=True, **cache).logits[:, -1].float()
        finite &= logits.isfinite().all()
        # The largest of p / e, with e exponential, is a draw from p, and needs no sum whose order could change.
        weights = logits.index_fill(1, out, -torch.inf).softmax(dim=1)
        drawn = (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(dim=1)
        ahead = given[:, step + 1] if step + 1 < longest else torch.full_like(drawn, -1)
        tokens.append(torch.where(ahead >= 0, ahead, drawn))
        job.advance()
    rows: list[list[int]] = torch.stack(tokens, dim=1).tolist()
    if not bool(finite):
        raise CorpusError(NOT_FINITE)
    return rows
