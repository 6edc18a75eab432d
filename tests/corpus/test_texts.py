"""Texts: disjoint splits, identities by content, and errors that say what to do."""

from __future__ import annotations

import sys
import types

import pytest

from workbench.corpus import SPLITS, open_text, require_disjoint
from workbench.corpus.texts import MAX_FILE_BYTES
from workbench.errors import CorpusError


@pytest.mark.parametrize("name", ["prose", "pydoc"])
def test_splits_share_no_document(name):
    corpora = [open_text(name, split) for split in SPLITS]
    hashes = [d.sha256 for corpus in corpora for d in corpus.documents]
    assert len(hashes) == len(set(hashes))
    for used in corpora:
        for corpus in corpora:
            if used is not corpus:
                require_disjoint(used.record(1), corpus)


@pytest.mark.parametrize("name", ["prose", "pydoc"])
def test_opening_twice_gives_the_same_text(name):
    assert open_text(name, "tuning").sha256 == open_text(name, "tuning").sha256


def test_prose_covers_every_domain_and_measures_japanese_apart_from_fitting():
    evaluation = open_text("prose", "evaluation").documents
    domains = {d.domain for d in evaluation}
    assert len(domains) == 8
    assert {(d.domain, d.language) for d in evaluation} == {(x, y) for x in domains for y in ("en", "ja")}
    total = sum(len(d.text.encode()) for split in SPLITS for d in open_text("prose", split).documents)
    assert total >= 200_000


def test_pydoc_keeps_a_part_for_each_purpose():
    sizes = [sum(len(d.text) for d in open_text("pydoc", split).documents) for split in SPLITS]
    assert min(sizes) > 0.1 * sum(sizes)


def test_measuring_on_what_was_fitted_is_refused_even_under_another_name(tmp_path):
    (tmp_path / "a.txt").write_text("the same words " * 50)
    (tmp_path / "b.txt").write_text("the same words " * 50)
    used = open_text(tmp_path / "a.txt", "calibration").record(10)
    with pytest.raises(CorpusError, match=r"'b\.txt' \(evaluation\) shares 1 of its 1 documents"):
        require_disjoint(used, open_text(tmp_path / "b.txt", "evaluation"))


def test_a_file_is_one_whole_document(tmp_path):
    (tmp_path / "notes.txt").write_bytes("\ufeffErste Zeile\r\nzweite é".encode())
    corpus = open_text(str(tmp_path / "notes.txt"), "evaluation")
    (document,) = corpus.documents
    assert document.text == "Erste Zeile\r\nzweite é"
    assert (document.domain, document.language, corpus.split) == ("notes", "unknown", "evaluation")
    assert corpus.record(7).documents == (document.sha256,)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe\x00a", "not UTF-8"), (b"ab\0cd", "zero bytes")],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        open_text(tmp_path / "x.txt", "evaluation")


def test_missing_folders_and_large_files_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="There is no text"):
        open_text(tmp_path / "absent.txt", "evaluation")
    with pytest.raises(CorpusError, match="is a folder"):
        open_text(tmp_path, "evaluation")
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(CorpusError, match="Cut a sample"):
        open_text(tmp_path / "large.txt", "evaluation")


def test_mistyped_names_are_suggested():
    with pytest.raises(CorpusError, match="Did you mean 'prose'"):
        open_text("proze", "evaluation")
    with pytest.raises(CorpusError, match="Did you mean 'calibration'"):
        open_text("prose", "calibratoin")
    with pytest.raises(CorpusError, match="give the model"):
        open_text("self", "calibration")


def test_hub_data_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="pip install 'datasets"):
        open_text("hf:some/set", "evaluation")
    with pytest.raises(CorpusError, match="write hf:<dataset>"):
        open_text("hf:", "evaluation")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package that records what was asked for."""
    calls: list[tuple] = []

    def load_dataset(path, config, *, split, streaming):
        calls.append((path, config, split, streaming))
        if path == "owner/absent":
            raise ConnectionError("no route\nto host")
        return iter([{"id": 1, "text": "words " * 20, "title": "t"}] * 1000)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_data_is_streamed_until_there_is_enough(hub, tiny_model):
    corpus = open_text("hf:owner/set:small", "calibration", model=tiny_model, n_tokens=300)
    assert hub == [("owner/set", "small", "train", True)]
    assert len(corpus.documents) == 1
    assert 300 <= len(tiny_model.encode(corpus.documents[0].text, bos=False)) < 500
    open_text("hf:owner/set:::title", "evaluation", n_tokens=1)
    assert hub[-1] == ("owner/set", None, "test", True)


def test_hub_errors_are_one_line(hub):
    with pytest.raises(CorpusError, match="could not be read from the hub: no route to host"):
        open_text("hf:owner/absent", "evaluation")
    with pytest.raises(CorpusError, match="columns of text: text, title"):
        open_text("hf:owner/set:::body", "evaluation")
