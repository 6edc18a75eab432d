"""Self-sampled text: deterministic, apart by split, long enough for windows, cancellable."""

from __future__ import annotations

import pytest
import torch

from workbench.corpus import open_text, require_disjoint, windows
from workbench.errors import Cancelled, CorpusError
from workbench.progress import Job


def sample(model, split="calibration", **options):
    return open_text("self", split, **{"model": model, "n_tokens": 200, "length": 20} | options)


def test_the_same_seed_gives_the_same_text_whatever_the_global_generator(tiny_model):
    first = sample(tiny_model)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = sample(tiny_model)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())
    assert sample(tiny_model, seed=1).sha256 != first.sha256


def test_splits_and_documents_differ(tiny_model):
    calibration, evaluation = sample(tiny_model), sample(tiny_model, "evaluation")
    require_disjoint(calibration.record(1), evaluation)
    assert len({d.sha256 for d in calibration.documents}) == len(calibration.documents) == 16


@pytest.mark.parametrize("options", [{"chat": True}, {"chat": False}, {"chat": False, "add_bos": False}])
def test_documents_are_text_of_the_length_asked_for(make_model, options):
    model = make_model(**options)
    special = set(model.tokenizer.all_special_tokens)
    for document in sample(model).documents:
        assert not any(token in document.text for token in special)
        assert document.text
    found = windows(sample(make_model("qwen2", **options), length=200), model, 16)
    assert all(len(w.tokens) == 16 for w in found)


def test_cancel_takes_effect_between_two_tokens(tiny_model):
    seen = []

    def listener(state):
        seen.append(state.done)
        if state.done == 5:
            job.cancel()

    job = Job(listener)
    with pytest.raises(Cancelled):
        sample(tiny_model, job=job)
    assert max(seen) == 5


def test_progress_ends_at_its_total(tiny_model):
    job = Job()
    sample(tiny_model, job=job)
    assert job.state.done == job.state.total > 0


def test_impossible_amounts_are_refused(tiny_model):
    with pytest.raises(CorpusError, match="at least 1"):
        sample(tiny_model, n_tokens=0)
