"""Replies side by side: nothing lost, differences found."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.view.panels import side_by_side
from workbench.view.texts import Generation, Span, differences, marked_html, pieces


def decode_bytes(tokens: Sequence[int]) -> str:
    """One token per byte, as byte-level tokenizers decode: broken characters become U+FFFD."""
    return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text: str) -> None:
    found = pieces(decode_bytes, list(text.encode("utf-8")))
    assert "".join(found) == text
    assert all(found)


@given(st.binary(max_size=12))
def test_broken_bytes_are_still_shown_whole(raw: bytes) -> None:
    assert "".join(pieces(decode_bytes, list(raw))) == decode_bytes(list(raw))


def test_a_character_of_several_tokens_is_one_piece() -> None:
    assert pieces(decode_bytes, list("aé日".encode())) == ("a", "é", "日")


@given(st.lists(st.sampled_from("abc"), max_size=20), st.lists(st.sampled_from("abc"), max_size=20))
def test_spans_hold_both_texts_and_mark_only_what_differs(left: list[str], right: list[str]) -> None:
    a, b = differences(left, right)
    assert "".join(s.text for s in a) == "".join(left)
    assert "".join(s.text for s in b) == "".join(right)
    assert "".join(s.text for s in a if not s.differs) == "".join(s.text for s in b if not s.differs)
    if left == right:
        assert not any(s.differs for s in (*a, *b))


def test_marks_escape() -> None:
    assert marked_html([Span("<i>", False), Span("&", True)]) == "&lt;i&gt;<mark>&amp;</mark>"


def test_same_until_counts_shared_pieces() -> None:
    assert Generation("p", ("a", "b", "c"), ("a", "b", "x")).same_until == 2
    assert Generation("p", ("a",), ("a", "b")).same_until == 1


@pytest.mark.parametrize("reply", [(), ("\n", "  \n")])
def test_an_empty_reply_is_said(reply: tuple[str, ...]) -> None:
    shown = side_by_side((Generation("p", ("Hello",), reply),))
    assert shown.count("(nothing that can be seen)") == 1
    assert "Hello" in shown
