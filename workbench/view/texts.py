"""Generated texts beside each other, with the places marked where they differ."""

from __future__ import annotations

import difflib
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What a decoder writes for bytes that do not yet make a character.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Generation:
    """Replies of two models to one prompt, as pieces of text, one per token (or per few that make a character)."""

    prompt: str
    dense: tuple[str, ...]
    compressed: tuple[str, ...]

    @property
    def same_until(self) -> int:
        """How many pieces the two replies share from their beginning."""
        for i, (a, b) in enumerate(zip(self.dense, self.compressed, strict=False)):
            if a != b:
                return i
        return min(len(self.dense), len(self.compressed))


@dataclass(frozen=True)
class Span:
    """A run of text; ``differs`` where the other side has something else there."""

    text: str
    differs: bool


def pieces(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> tuple[str, ...]:
    """Cut decoded text into what each token added; joining the pieces gives ``decode(tokens)``.

    Tokens that hold only part of a character are joined with those that complete it.

    Args:
        decode: token ids to text, such as ``LoadedModel.decode``.
        tokens: ids.
    """
    found: list[str] = []
    done = ""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        if (text.endswith(_INCOMPLETE) and end < len(tokens)) or not text.startswith(done):
            continue
        if len(text) > len(done):
            found.append(text[len(done) :])
            done = text
    whole = decode(tokens) if tokens else ""
    if whole != done:
        return (whole,)
    return tuple(found)


def differences(left: Sequence[str], right: Sequence[str]) -> tuple[list[Span], list[Span]]:
    """Both sides as spans, neighbouring pieces of one kind joined.

    Args:
        left: pieces of one text.
        right: pieces of the other.
    """
    matcher = difflib.SequenceMatcher(a=left, b=right, autojunk=False)
    spans: tuple[list[Span], list[Span]] = ([], [])
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        for side, words in zip(spans, (left[a0:a1], right[b0:b1]), strict=True):
            if words:
                side.append(Span("".join(words), kind != "equal"))
    return spans


def marked_html(spans: Sequence[Span]) -> str:
    """Escaped HTML with ``<mark>`` around what differs. Line breaks are kept by the style sheet, not by tags."""
    return "".join(f"<mark>{html.escape(s.text)}</mark>" if s.differs else html.escape(s.text) for s in spans)
