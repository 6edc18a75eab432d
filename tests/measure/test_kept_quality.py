"""Quality that was measured is read back exactly, measured again when anything it depends on changes, and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.apply.compress import compress
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.corpus import windows
from workbench.corpus.base import Corpus, Document
from workbench.errors import Cancelled
from workbench.measure import kept_quality
from workbench.measure.bench import BenchContext
from workbench.measure.benches import precision_targets
from workbench.measure.benches.precision_targets import Targets, evaluate
from workbench.measure.kept_quality import compare_kept, digest
from workbench.models import LoadedModel
from workbench.operate.jobs import ProfileShelf
from workbench.progress import Job, JobState
from workbench.runtime import open_engine
from workbench.runtime.plan import Plan, Policy, width_plan
from workbench.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened


def some_windows(count: int = 5, seed: int = 5) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        SimpleNamespace(
            tokens=rng.integers(1, 256, size=20).tolist(),
            document=f"doc-{i}",
            domain=("law", "science")[i % 2],
            language=("en", "ja")[i % 3 == 0],
        )
        for i in range(count)
    ]


def engines(fake: ModuleType, count: int) -> list[Any]:
    return [fake.FakeEngine(fake.random_logits(seed)) for seed in range(count)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates each call of ``compare_many`` measures."""
    calls: list[int] = []
    compare_many = kept_quality.compare_many

    def counting(dense: Any, candidates: Any, *args: Any, **kwargs: Any) -> Any:
        found = compare_many(dense, candidates, *args, **kwargs)
        calls.append(len(candidates))
        return found

    monkeypatch.setattr(kept_quality, "compare_many", counting)
    return calls


def test_what_was_measured_reads_back_exactly(fake: ModuleType, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    dense, *candidates = engines(fake, 4)
    shelf, text, about = ProfileShelf(store), some_windows(), ["a", "b", "c"]
    first = compare_kept(shelf, dense, candidates[:2], text, about=about[:2], decode=dense.model.decode)
    again = compare_kept(shelf, dense, candidates, text, about=about, decode=dense.model.decode)
    assert calls == [2, 1]
    assert [quality.measured_at is None for quality in [*first, *again]] == [True, True, False, False, True]
    for before, after in zip(first, again, strict=False):
        pd.testing.assert_frame_equal(before.windows, after.windows)
        assert before.to_json() | {"measured_at": None} == after.to_json() | {"measured_at": None}
    (fresh,) = compare_kept(
        ProfileShelf(store, fresh=True), dense, candidates[:1], text, about=["a"], decode=dense.model.decode
    )
    assert calls == [2, 1, 1]
    assert fresh.measured_at is None


def test_everything_that_it_depends_on_measures_anew(
    fake: ModuleType, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    dense, one = engines(fake, 2)
    shelf = ProfileShelf(store)

    def measured(text: list[Any] | None = None, about: Any = 3, decode: Any = None, shelf: Any = shelf) -> bool:
        compare_kept(shelf, dense, [one], text or some_windows(), about=[about], decode=decode)
        return calls.pop() == 1 if calls else False

    assert measured()
    assert not measured()
    assert measured(shelf=None)
    assert measured(text=some_windows(seed=6))
    assert measured(text=some_windows(4))
    assert measured(about=Policy({"width": 3.0}))
    assert measured(about=Policy(thresholds={"unit": (1.0, 2.0)}))
    assert measured(decode=dense.model.decode)
    one.activation_mode = "int8"
    assert measured()
    one.model = SimpleNamespace(**{**vars(one.model), "fingerprint": SimpleNamespace(architecture="", weights="other")})
    assert measured()
    monkeypatch.setattr(kept_quality, "code_sha256", lambda: "another version")
    assert measured()
    assert not measured()


def test_digests_tell_plans_and_policies_apart(tiny_model: LoadedModel) -> None:
    arch = tiny_model.architecture
    plans = [Plan(), width_plan(arch, (3, 4), 3), width_plan(arch, (3, 5), 3), width_plan(arch, (3, 4), 4)]
    values = [*plans, Policy({"a": 1.0}), Policy({"a": np.array([1.0])}), {"a": [1, 2]}, {"a": [1, 3]}, "1", 1, None]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(width_plan(arch, (3, 4), 3)) == digest(plans[1])
    assert digest({"a": 1, "b": (2, None)}) == digest({"b": [2, None], "a": 1})
    with pytest.raises(TypeError, match="cannot tell one object"):
        digest([object()])


def test_an_interrupted_bench_goes_on_after_what_it_measured(
    make_model: Callable[..., LoadedModel], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    nested = NestedConfig(widths=(3, 4, 5, 6), group_size=16, fit="rounded")
    dynamic = PrecisionConfig(targets=(3.25, 4.75), learning_steps=1, projection_rows=4, calibration_tokens=1024)
    made = compress(model, Recipe.for_model(model, nested, dynamic))
    corpus = Corpus("mine", "evaluation", (Document("a", "The quick brown fox jumps. " * 40, "x", "en"),))
    text = windows(corpus, model, 48)[:4]
    record = corpus.record(4 * 48)
    monkeypatch.setattr(precision_targets, "_AT_ONCE", 2)
    dense = open_engine(model, threads=1, activation_mode="fp32")

    def rows(shelf: ProfileShelf | None, job: Job) -> list[tuple[Any, ...]]:
        """Measure all that is chosen per token at the quick targets, six candidates in three groups."""
        context = BenchContext("tiny", None, 1, True, shelf=shelf, job=job)
        targets = Targets(model, made, context)
        try:
            candidates = targets.dynamic()
            found = evaluate(dense, candidates, text, record, context)
            return [
                (c.method, c.target, c.read_bits, c.realised_bits, q.perplexity_candidate, q.kl_p999)
                for c, q in zip(candidates, found, strict=True)
            ]
        finally:
            targets.close()

    stages = []

    def stop_in_third(state: JobState) -> None:
        if state.stage == "quality":
            stages.append(state.done)
            if stages.count(0) == 3 and state.done == 1:
                job.cancel()

    job = Job(stop_in_third)
    expected = rows(None, Job())
    calls = counted(monkeypatch)
    with pytest.raises(Cancelled):
        rows(ProfileShelf(store), job)
    assert calls == [2, 2]
    assert rows(ProfileShelf(store), Job()) == expected
    assert calls == [2, 2, 2]
