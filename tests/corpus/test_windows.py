"""Windows: one length, inside documents, evenly drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.corpus import Corpus, Document, Window, open_text, windows
from workbench.corpus.windows import draw_evenly
from workbench.errors import CorpusError


def corpus_of(*lengths: int) -> Corpus:
    documents = tuple(Document(f"d{i}", chr(97 + i) * n, f"domain{i % 3}", "en") for i, n in enumerate(lengths))
    return Corpus("letters", "evaluation", documents)


@pytest.mark.parametrize("add_bos", [True, False])
def test_windows_tile_each_document_and_begin_as_the_model_wants(make_model, add_bos):
    model = make_model(add_bos=add_bos)
    found = windows(corpus_of(100, 31, 7), model, 16)
    step = 15 if add_bos else 16
    assert Counter(w.document for w in found) == {"d0": 100 // step, "d1": 31 // step}
    for window in found:
        assert len(window.tokens) == 16
        body = window.tokens[1:] if add_bos else window.tokens
        assert (window.tokens[0] == model.bos) == add_bos
        assert set(model.decode(body)) == {chr(97 + int(window.document[1]))}


def test_windows_of_a_document_are_its_tokens_in_order(tiny_model):
    text = open_text("prose", "evaluation").documents[0]
    found = windows(Corpus("one", "evaluation", (text,)), tiny_model, 64)
    joined = [t for w in found for t in w.tokens[1:]]
    assert joined == tiny_model.encode(text.text, bos=False)[: len(joined)]


def test_too_short_says_how_much_there_is_and_is_needed(tiny_model):
    with pytest.raises(CorpusError, match=r"has 40 tokens and one window needs 63"):
        windows(corpus_of(40, 12), tiny_model, 64)


@pytest.mark.parametrize("length", [0, 1, 513])
def test_impossible_lengths_name_the_range(tiny_model, length):
    with pytest.raises(CorpusError, match="takes 2 to 512"):
        windows(corpus_of(4000), tiny_model, length)


def test_a_limit_below_one_is_refused(tiny_model):
    with pytest.raises(CorpusError, match="limit of 0"):
        windows(corpus_of(4000), tiny_model, 16, limit=0)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    limit=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
def test_a_limit_draws_evenly_without_repeats(sizes, limit, seed):
    found = [Window((i,), f"{g}", f"{g}", "en") for g, size in enumerate(sizes) for i in range(size)]
    drawn = draw_evenly(found, limit, seed)
    assert len(drawn) == min(limit, len(found))
    assert len(set(drawn)) == len(drawn)
    assert [found.index(w) for w in drawn] == sorted(found.index(w) for w in drawn)
    assert drawn == draw_evenly(found, limit, seed)
    counts = Counter(w.domain for w in drawn)
    most = max(counts.values())
    for group, size in enumerate(sizes):  # a group gives less than another only when it has no more, or by one
        assert counts[str(group)] >= min(size, most - 1)


def test_a_limit_spreads_over_domains_and_languages_of_the_prose(tiny_model):
    found = windows(open_text("prose", "evaluation"), tiny_model, 128, limit=32)
    assert set(Counter((w.domain, w.language) for w in found).values()) == {2}
