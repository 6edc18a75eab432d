"""Cut documents into token windows of one length, the unit in which text is measured."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.corpus.base import Corpus
from workbench.errors import CorpusError

if TYPE_CHECKING:
    from workbench.models import LoadedModel


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document, the model's beginning token in front where it has one."""

    tokens: tuple[int, ...]
    document: str
    domain: str
    language: str


def windows(
    corpus: Corpus, model: LoadedModel, length: int, *, limit: int | None = None, seed: int = 0
) -> list[Window]:
    """Cut a corpus into windows of exactly ``length`` tokens, the beginning token counted.

    Windows follow one another without overlap, never cross documents, and the short tail of a document is dropped.

    Args:
        corpus: the text.
        model: whose tokenizer and beginning token are used.
        length: tokens per window, from 2 to the model's context length.
        limit: at most so many windows, drawn evenly over (domain, language) and spread evenly inside each.
        seed: moves which windows a ``limit`` draws.

    Returns:
        At least one window, in the order of the corpus.

    Raises:
        CorpusError: an impossible length or limit, or a text too short for one window.
    """
    context = model.architecture.context_length
    if not 2 <= length <= context:
        raise CorpusError(f"Windows of {length} tokens are not possible: {model.name} takes 2 to {context:,}.")
    if limit is not None and limit < 1:
        raise CorpusError(f"A limit of {limit} windows is not possible: ask for at least 1.")
    first = [] if model.bos is None else [model.bos]
    step = length - len(first)
    found: list[Window] = []
    longest = 0
    for document in corpus.documents:
        ids = model.encode(document.text, bos=False)
        longest = max(longest, len(ids))
        for begin in range(0, len(ids) - step + 1, step):
            tokens = (*first, *ids[begin : begin + step])
            found.append(Window(tokens, document.name, document.domain, document.language))
    if not found:
        raise CorpusError(
            f"'{corpus.name}' ({corpus.split}) is too short: its longest document has {longest:,} tokens and one "
            f"window needs {step:,}. Give a longer text or ask for shorter windows."
        )
    return found if limit is None else draw_evenly(found, limit, seed)


def draw_evenly(found: list[Window], limit: int, seed: int) -> list[Window]:
    """Draw ``limit`` windows (or all), as even over (domain, language) as the text allows, in their given order."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, window in enumerate(found):
        groups[window.domain, window.language].append(index)
    generator = np.random.default_rng(seed)
    names = [sorted(groups)[i] for i in generator.permutation(len(groups))]
    quota = dict.fromkeys(names, 0)
    left = min(limit, len(found))
    while left:
        for name in names:
            if left and quota[name] < len(groups[name]):
                quota[name] += 1
                left -= 1
    chosen: list[int] = []
    for name in names:
        members, count = groups[name], quota[name]
        shift = generator.random()
        # One window from each of ``count`` equal stretches of the group, all at the same place of their stretch.
        chosen += [members[int((k + shift) * len(members) / count)] for k in range(count)]
    return [found[i] for i in sorted(chosen)]
