"""lm-evaluation-harness: the adapter against the real base class, and a clear line where it is not installed."""

from __future__ import annotations

import builtins
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from workbench.errors import EngineError, InputError
from workbench.measure.harness import harness_model, results_table, run_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'compression-workbench[bench]'",
)


def instance(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_without_the_harness_one_line_says_how_to_get_it(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(f"No module named '{name}'")
        return plain_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EngineError, match=r"pip install 'compression-workbench\[bench\]'"):
        harness_model(fake.FakeEngine(fake.random_logits(0)))


def test_results_become_rows_of_numbers() -> None:
    found = results_table(
        {
            "results": {
                "arc": {
                    "alias": "arc",
                    "acc,none": 0.5,
                    "acc_stderr,none": 0.1,
                    "ppl,none": 2.0,
                    "ppl_stderr,none": "N/A",
                }
            },
            "n-samples": {"arc": {"original": 9, "effective": 4}},
            "n-shot": {"arc": 5},
        }
    )
    assert list(found["metric"]) == ["acc", "ppl"]
    assert found["stderr"][0] == 0.1
    assert np.isnan(found["stderr"][1])
    assert list(found["n"]) == [4, 4]


@needs_harness
def test_loglikelihood_is_the_sum_over_the_continuation(fake: ModuleType) -> None:
    from lm_eval.api.model import LM

    engine = fake.FakeEngine(fake.random_logits(0, scale=4), chunks=[3, 1])
    lm = harness_model(engine)
    assert isinstance(lm, LM)
    context, continuation = "A question?", " answer"
    tokens = list((context + continuation).encode())
    scores = engine.score(tokens)[len(context) - 1 :]
    rows = np.concatenate([rows for _, rows in engine.log_probabilities(tokens)])[len(context) - 1 : -1]
    found = lm.loglikelihood([instance("loglikelihood", context, continuation)], disable_tqdm=True)
    assert found[0][0] == pytest.approx(float(scores.sum()), rel=1e-5)
    assert found[0][1] == bool((rows.argmax(axis=1) == tokens[len(context) :]).all())


@needs_harness
def test_greedy_is_said_only_of_what_greedy_decoding_gives(fake: ModuleType) -> None:
    row = np.zeros(256)
    row[ord("b")] = 5.0
    lm = harness_model(fake.FakeEngine(lambda tokens, position: row))
    requests = [instance("loglikelihood", "x", text) for text in ("bb", "ba")]
    assert [greedy for _, greedy in lm.loglikelihood(requests, disable_tqdm=True)] == [True, False]


@needs_harness
def test_rolling_predicts_each_token_once_beyond_the_context(fake: ModuleType) -> None:
    engine = fake.FakeEngine(fake.random_logits(0), context_length=40, model=fake.byte_model(bos=1))
    text = "abcdefghij" * 11
    found = harness_model(engine).loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    # The fake predicts from the last token alone, so windows cannot change the sum.
    whole = fake.FakeEngine(fake.random_logits(0), context_length=512).score([1, *text.encode()])
    assert found[0] == pytest.approx(float(whole.sum()), rel=1e-5)


@needs_harness
def test_generation_stops_before_the_stop_string_and_at_the_limit(fake: ModuleType) -> None:
    text = b"one two three four "

    def next_byte(tokens: list[int], position: int) -> np.ndarray:
        row = np.zeros(256)
        row[text[position % len(text)]] = 9.0
        return row

    engine = fake.FakeEngine(next_byte)
    lm = harness_model(engine)
    requests = [
        instance("generate_until", "x", {"until": ["three", "zzz"], "max_gen_toks": 50}),
        instance("generate_until", "x", {"until": "zzz", "max_gen_toks": 6}),
    ]
    assert lm.generate_until(requests) == ["one two ", "one tw"]


@needs_harness
def test_a_local_task_runs_end_to_end(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"question": f"Say {i}", "choices": ["b", "c"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "local.yaml").write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    row = np.zeros(256)
    row[ord("b")] = 5.0
    lm = harness_model(fake.FakeEngine(lambda tokens, position: row))
    found = lm_eval.simple_evaluate(
        lm, tasks=["local_choice"], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=10
    )
    table = results_table(found).set_index("metric")
    assert table.loc["acc", "value"] == 0.5
    assert table.loc["acc", "n"] == 6


@needs_harness
def test_unknown_tasks_and_missing_data_are_one_line(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake.FakeEngine(fake.random_logits(0))
    with pytest.raises(InputError, match=r"no task 'hellaswagg'.*Did you mean 'hellaswag'"):
        run_tasks(engine, ["hellaswagg"])
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(EngineError, match="The data of hellaswag could not be had") as caught:
        run_tasks(engine, ["hellaswag"], limit=2)
    assert "\n" not in str(caught.value)
