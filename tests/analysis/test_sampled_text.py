"""Sampled text as an analysis: sampled once, and the same text as when it is asked for directly."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.analysis import sampled_text
from workbench.analysis.sampled_text import SampledText, sampled_corpus
from workbench.corpus import open_text
from workbench.models import LoadedModel
from workbench.operate.jobs import analyze
from workbench.store import Store


def test_text_is_sampled_once(tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_text("self", "tuning", model=tiny_model, n_tokens=200, seed=3, length=20)
    with Store(tmp_path) as store:
        first = analyze(store, SampledText(tiny_model, "tuning", 200, seed=3, length=20))
        assert sampled_corpus(first.profile) == expected
        monkeypatch.setattr(sampled_text, "open_text", lambda *_, **__: pytest.fail("sampled again"))
        again = analyze(store, SampledText(tiny_model, "tuning", 200, seed=3, length=20))
        assert again.cached
        assert sampled_corpus(again.profile) == expected


def test_what_the_text_depends_on_is_in_its_key(tiny_model: LoadedModel) -> None:
    keys = {
        SampledText(tiny_model, "tuning", 200).provenance.key,
        SampledText(tiny_model, "calibration", 200).provenance.key,
        SampledText(tiny_model, "tuning", 400).provenance.key,
        SampledText(tiny_model, "tuning", 200, seed=1).provenance.key,
        SampledText(tiny_model, "tuning", 200, length=20).provenance.key,
    }
    assert len(keys) == 5
