"""Self-sampled text: deterministic, apart by split, long enough for windows, cancellable."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from workbench.corpus import device_batches, open_text, require_disjoint, windows
from workbench.corpus.device_batches import batch_size, sample_on_device
from workbench.errors import Cancelled, CorpusError
from workbench.progress import Job
from workbench.runtime import open_engine


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


# --- in large batches, as on a GPU ------------------------------------------------------------------------------------

STARTS = [[257], [5, 6, 7], [257, 9]] * 3


def in_batches(model, length=12, seed=0, barred=(256,), starts=STARTS, job=None):
    return sample_on_device(model, starts, length, barred, lambda at: seed + at, job or Job())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_documents_in_batches_go_on_from_their_starts(make_model, monkeypatch, family):
    model = make_model(family)
    found = in_batches(model)
    assert [len(row) for row in found] == [len(start) + 12 for start in STARTS]
    assert all(row[: len(start)] == start for row, start in zip(found, STARTS, strict=True))
    assert not any(256 in row for row in found)
    assert in_batches(model) == found
    assert in_batches(model, seed=1) != found
    monkeypatch.setattr(device_batches, "_MOST_DOCUMENTS", 2)
    job = Job()
    small = in_batches(model, job=job)
    assert len(small) == len(STARTS)
    assert small[0] != small[6]  # batches have random streams of their own
    assert job.state.done == job.state.total > 12 * 4


def test_documents_in_batches_follow_the_models_own_distribution(make_model):
    model = make_model()
    barred = [256, *range(258, 320)]
    drawn = np.array([row[2] for row in in_batches(model, length=1, starts=[[257, 65]] * 4000, barred=barred)])
    engine = open_engine(model, engine="reference")
    logits = engine.prefill(engine.start(), [257, 65]).astype(np.float64)
    engine.close()
    logits[barred] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    counted = np.bincount(drawn, minlength=len(p))
    assert not counted[barred].any()
    likely = p > 0.01
    assert likely.any()
    error = np.sqrt(p[likely] * (1 - p[likely]) / len(drawn))
    assert (np.abs(counted[likely] / len(drawn) - p[likely]) < 5 * error).all()


def test_a_later_token_follows_from_all_that_its_document_has(make_model, monkeypatch):
    """Where the likeliest token is always drawn, documents of any start are the engine's greedy replies."""
    model = make_model()
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda noise, **_: noise.fill_(1.0))
    found = in_batches(model, barred=())
    engine = open_engine(model, engine="reference")
    for start, row in zip(STARTS[:3], found[:3], strict=True):
        assert row == start + engine.generate(engine.start(), start, 12)
    engine.close()


def test_batches_are_as_large_as_their_cache_allows(make_model, monkeypatch):
    model = make_model()
    assert batch_size(model, 500) == 64
    each = 2 * 3 * 2 * 12 * 500 * 4  # keys and values, blocks, heads, width of a head, positions, bytes
    monkeypatch.setattr(device_batches, "_CACHE_BYTES", 5 * each + 1)
    assert batch_size(model, 500) == 5
    assert batch_size(model, 500_000) == 1


def test_batches_refuse_what_is_not_finite_and_can_be_cancelled(make_model):
    model = make_model()
    job = Job()
    job.cancel()
    with pytest.raises(Cancelled):
        in_batches(model, job=job)
    with torch.no_grad():
        next(model.module.parameters()).fill_(torch.nan)
    with pytest.raises(CorpusError, match="not finite"):
        in_batches(model)


def test_a_model_on_another_device_is_sampled_there(make_model, monkeypatch):
    model = make_model()
    here = open_text("self", "tuning", model=model, n_tokens=200, length=20)
    seen = []

    def sampled(model, starts, length, barred, seed_of, job):
        seen.append((len(starts), seed_of(0) != seed_of(1), 256 in barred))
        return [[*start, *range(40, 40 + length)] for start in starts]

    monkeypatch.setattr(device_batches, "sample_on_device", sampled)
    moved = dataclasses.replace(model, device=torch.device("cuda"))
    there = open_text("self", "tuning", model=moved, n_tokens=200, length=20)
    assert seen == [(16, True, True)]
    assert [d.name for d in there.documents] == [d.name for d in here.documents]
