"""Quality: agreement with plain formulas, zero against itself, paired comparisons, and bad logits named."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from workbench.errors import Cancelled, EngineError, InputError
from workbench.measure.divergence import token_quality
from workbench.measure.quality import compare_candidates, compare_many, compare_quality
from workbench.progress import Job


def make_windows(count: int, length: int = 20, vocab_size: int = 256) -> list[Any]:
    rng = np.random.default_rng(5)
    return [
        SimpleNamespace(
            tokens=rng.integers(1, vocab_size, size=length).tolist(),
            document=f"doc-{i}",
            domain=("law", "science")[i % 2],
            language=("en", "ja")[i % 3 == 0],
        )
        for i in range(count)
    ]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), scale=st.floats(0.1, 20))
def test_token_quality_agrees_with_the_formulas_in_double_precision(seed: int, rows: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    p, q = (log_softmax(scale * rng.normal(size=(rows, 50)), axis=1) for _ in range(2))
    targets = rng.integers(0, 50, size=rows)
    found = token_quality(p.astype(np.float32), q.astype(np.float32), targets)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.nll_dense, -p[np.arange(rows), targets], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.nll_candidate, -q[np.arange(rows), targets], rtol=1e-5, atol=1e-5)
    assert (found.kl >= -1e-12).all()


def test_a_small_divergence_survives_float32_logits_that_do_not_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 50_000))
    moved = logits + 1e-3 * rng.normal(size=logits.shape)
    p, q = log_softmax(logits, axis=1), log_softmax(moved, axis=1)
    truth = (np.exp(p) * (p - q)).sum(axis=1)  # about 5e-7
    shifted = (q + 3e-6).astype(np.float32)  # an engine's rounding: a distribution that sums to 1.000003
    found = token_quality(p.astype(np.float32), shifted, np.zeros(8, dtype=int))
    np.testing.assert_allclose(found.kl, truth, rtol=0.02)


def test_tokens_that_both_rule_out_add_nothing() -> None:
    p = np.log(np.array([[0.5, 0.5, 0.0]], dtype=np.float32), where=[[True, True, False]], out=np.full((1, 3), -np.inf))
    q = np.log(np.array([[0.25, 0.75, 1.0]], dtype=np.float32))
    q[0, 2] = -np.inf
    found = token_quality(p.astype(np.float32), q, np.array([0]))
    assert found.kl[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


def test_an_engine_against_itself_differs_in_nothing(fake: ModuleType) -> None:
    engine = fake.FakeEngine(fake.random_logits(0))
    found = compare_quality(engine, engine, make_windows(6))
    assert found.kl_mean.value == found.kl_p999 == found.delta_nll.value == 0
    assert found.top1_agreement == 1
    assert found.perplexity_dense == found.perplexity_candidate
    assert found.n_tokens == 6 * 19
    assert "6 windows" in found.note


def test_engines_may_cut_their_chunks_differently(fake: ModuleType) -> None:
    dense, logits = fake.FakeEngine(fake.random_logits(0)), fake.random_logits(1)
    windows = make_windows(3, length=200)
    plain = compare_quality(dense, fake.FakeEngine(logits), windows)
    cut = compare_quality(dense, fake.FakeEngine(logits, chunks=[1, 7, 100]), windows)
    np.testing.assert_allclose(plain.windows["kl"], cut.windows["kl"])
    assert plain.top1_agreement == cut.top1_agreement


def test_one_dense_pass_serves_several_candidates(fake: ModuleType) -> None:
    dense, windows = fake.FakeEngine(fake.random_logits(0)), make_windows(3)
    candidates = [fake.FakeEngine(fake.random_logits(seed)) for seed in (1, 2)]
    together = compare_many(dense, candidates, windows)
    for candidate, found in zip(candidates, together, strict=True):
        assert found.windows.equals(compare_quality(dense, candidate, windows).windows)


def test_groups_add_up_and_the_worst_window_comes_first(fake: ModuleType) -> None:
    dense = fake.FakeEngine(fake.random_logits(0))
    table = fake.random_logits(0)

    def worse_after_the_tenth(tokens: list[int], position: int) -> np.ndarray:
        return table(tokens, position) * (0.2 if tokens[0] == marked else 0.99)

    windows = make_windows(9)
    marked = windows[4].tokens[0]
    found = compare_quality(
        dense, fake.FakeEngine(worse_after_the_tenth), windows, decode=lambda ids: f"text of {ids[0]}"
    )
    for by in ("domain", "language"):
        part = found.by_group[found.by_group["by"] == by]
        assert part["n_tokens"].sum() == found.n_tokens
        total = (part["kl_mean"] * part["n_tokens"]).sum() / found.n_tokens
        assert total == pytest.approx(found.kl_mean.value)
    worst = found.worst_windows
    assert len(worst) == 5
    assert worst["window"][0] == 4
    assert worst["excerpt"][0] == f"text of {marked}"
    assert worst["kl_mean"].is_monotonic_decreasing


def test_comparison_of_candidates_is_paired_and_antisymmetric(fake: ModuleType) -> None:
    base = fake.random_logits(0)
    noise = [fake.random_logits(seed) for seed in (1, 2)]

    def candidate(which: int, amount: float) -> Any:
        return fake.FakeEngine(lambda t, p: base(t, p) + amount * noise[which](t, p))

    dense, windows = fake.FakeEngine(base), make_windows(40)
    good, bad = (compare_quality(dense, candidate(i, a), windows) for i, a in ((0, 0.3), (1, 0.6)))
    forth, back = compare_candidates(good, bad), compare_candidates(bad, good)
    assert (forth.kl_verdict, back.kl_verdict) == ("better", "worse")
    assert forth.kl.value == pytest.approx(-back.kl.value)
    assert forth.kl.value == pytest.approx(good.kl_mean.value - bad.kl_mean.value)
    assert compare_candidates(good, good).kl_verdict == "as good"
    assert good.note == ""


def test_results_on_other_windows_are_not_compared(fake: ModuleType) -> None:
    engine = fake.FakeEngine(fake.random_logits(0))
    a, b = (compare_quality(engine, engine, make_windows(3, length=n)) for n in (10, 11))
    with pytest.raises(InputError, match="different windows"):
        compare_candidates(a, b)


def test_nan_logits_name_the_model_the_window_and_the_position(fake: ModuleType) -> None:
    table = fake.random_logits(0)
    windows = make_windows(3)
    broken = windows[1].tokens

    def logits(tokens: list[int], position: int) -> np.ndarray:
        return table(tokens, position) * (math.nan if tokens[:1] == broken[:1] and position == 7 else 1.0)

    dense = fake.FakeEngine(table)
    with pytest.raises(EngineError, match=r"candidate's logits.*window 1 \(doc-1\), position 7"):
        compare_quality(dense, fake.FakeEngine(logits), windows)
    with pytest.raises(EngineError, match=r"dense model's logits.*window 1"):
        compare_quality(fake.FakeEngine(logits), dense, windows)


def test_refusals(fake: ModuleType) -> None:
    engine = fake.FakeEngine(fake.random_logits(0))
    with pytest.raises(InputError, match="No windows"):
        compare_quality(engine, engine, [])
    with pytest.raises(InputError, match="at least 2"):
        compare_quality(engine, engine, make_windows(1, length=1))
    with pytest.raises(EngineError, match="predicts 256 tokens and the candidate 100"):
        compare_quality(engine, fake.FakeEngine(fake.random_logits(0, 100), vocab_size=100), make_windows(1))


@pytest.mark.parametrize("given_tokens", [2, 7, 130, 149])
def test_predictions_of_given_tokens_do_not_count(fake: ModuleType, given_tokens: int) -> None:
    dense, candidate = (fake.FakeEngine(fake.random_logits(seed)) for seed in (0, 1))
    windows = make_windows(3, length=150)
    found = compare_many(dense, [candidate], windows, given=given_tokens)[0]
    for window, nll in zip(windows, found.windows["nll_candidate"], strict=True):
        rows = np.concatenate([rows for _, rows in candidate.log_probabilities(window.tokens)])
        at = np.arange(given_tokens - 1, 149)
        assert nll == pytest.approx(-rows[at, np.array(window.tokens)[at + 1]].sum(), rel=1e-5)
    assert found.n_tokens == 3 * (150 - given_tokens)
    with pytest.raises(InputError, match="at least 151"):
        compare_many(dense, [candidate], windows, given=150)
    with pytest.raises(InputError, match="1 or more"):
        compare_many(dense, [candidate], windows, given=0)


def test_cancel_takes_effect_between_windows(fake: ModuleType) -> None:
    engine = fake.FakeEngine(fake.random_logits(0))
    job = Job(lambda state: job.cancel() if state.done == 2 else None)
    with pytest.raises(Cancelled):
        compare_quality(engine, engine, make_windows(50), job=job)
    assert job.state.done == 2


def test_json_holds_the_keys_that_reports_read(fake: ModuleType) -> None:
    engine = fake.FakeEngine(fake.random_logits(0))
    found = compare_quality(engine, engine, make_windows(2)).to_json()
    assert {"perplexity", "delta_nll_low", "delta_nll_high", "kl_mean", "kl_p999", "top1_agreement"} <= set(found)
