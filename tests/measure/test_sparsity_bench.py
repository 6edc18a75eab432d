"""The bench of contextual sparsity on a tiny model: who is there, and what the columns claim follows from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.sparsity_config import Criterion
from workbench.corpus import Window, questions
from workbench.errors import InputError
from workbench.measure.bench import BenchContext, run_bench
from workbench.measure.benches import (
    engine,
    sparsity,
    sparsity_batches,
    sparsity_methods,
    sparsity_quality,
    sparsity_questions,
)
from workbench.measure.sparse_plans import layout_key, sparse_plan, sparse_policy
from workbench.models import LoadedModel, load
from workbench.runtime import open_engine
from workbench.runtime.base import StepTrace

METHODS = ("random", "static", "magnitude", "oracle", "per-layer", "unified", "teal", "wina")
SPARSITIES = (0.1, 0.3)
PREFIX, SIZES = 16, (1, 3)


@pytest.fixture(scope="module")
def patched() -> Any:
    small = {"width": 16, "prefix": 8, "epochs": 3, "decisions_per_text": 24, "calibration_tokens": 1024}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsity, "_WINDOWS", (5, 48))
        patch.setattr(sparsity, "_QUICK_WINDOWS", (4, 32))
        patch.setattr(sparsity, "_SPEED", (1, 6))
        patch.setattr(sparsity, "_QUICK_SPEED", (1, 6))
        patch.setattr(sparsity_quality, "PREFIX", PREFIX)
        patch.setattr(sparsity_methods, "SPARSITIES", (*SPARSITIES, 0.7))
        patch.setattr(sparsity_methods, "QUICK_SPARSITIES", SPARSITIES)
        patch.setattr(sparsity_methods, "QUICK_MASKED", {16: SPARSITIES, 4: (0.3,)})
        patch.setattr(sparsity_methods, "ONE_SPARSITY", 0.3)
        patch.setattr(sparsity_methods, "QUICK_TIMED", {"inputs": (0.3,), "masks": (0.3,)})
        patch.setattr(sparsity_methods, "_GROUP_SIZE", 48)
        patch.setattr(sparsity_methods, "_EVERY", 4)
        few = InputSparsityConfig(calibration_tokens=1024, allocation_tokens=256)
        patch.setattr(sparsity_methods, "INPUTS", few)
        patch.setattr(sparsity_methods, "QUICK_INPUTS", few)
        learnt = sparsity_methods.LEARNT.model_copy(
            update={"calibration_tokens": 1024, "allocation_tokens": 256, "learning_steps": 4, "learning_tokens": 256}
        )
        patch.setattr(sparsity_methods, "QUICK_LEARNT", learnt)
        # Not tuned: sixty steps on the few sampled words of a random model hold no share on other text.
        short = sparsity_methods.QUICK_MASKS.model_copy(update=small | {"tune_steps": 0})
        patch.setattr(sparsity_methods, "QUICK_MASKS", short)
        full = sparsity_methods.MASKS.model_copy(update=small | {"tune_steps": 2})
        patch.setattr(sparsity_methods, "MASKS", full)
        patch.setattr(sparsity_questions, "questions", lambda: questions()[::20])
        patch.setattr(sparsity_questions, "_QUICK_EACH", 2)
        patch.setattr(engine, "PAIRS_FOR_A_CLAIM", 2)
        patch.setattr(sparsity, "SIZES", SIZES)
        patch.setattr(sparsity_batches, "PROMPT_TOKENS", 8)
        patch.setattr(sparsity, "PROMPT_TOKENS", 8)
        yield patch


@pytest.fixture(scope="module")
def every(model_folder: Path, patched: Any) -> list[dict[str, Any]]:
    return list(run_bench("sparsity", model=str(model_folder), threads=1)["rows"])


@pytest.fixture(scope="module")
def rows(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """But for those of several sequences at once, which come last."""
    return [entry for entry in every if "at once" not in entry["variant"]]


@pytest.fixture(scope="module")
def quick(model_folder: Path, patched: Any) -> list[dict[str, Any]]:
    return list(run_bench("sparsity", model=str(model_folder), text="pydoc", threads=1, quick=True)["rows"])


@pytest.fixture(scope="module")
def listed(model_folder: Path, patched: Any) -> list[sparsity_methods.Contender]:
    """What the quick bench compares, fitted once."""
    context = BenchContext(str(model_folder), None, 1, quick=True)
    return sparsity_methods.contenders(load(str(model_folder)), context)


def chosen(rows: list[dict[str, Any]], method: str, sparsity: float, bits: int = 16) -> dict[str, Any]:
    """The row of a method as it is by default, on the first text."""
    return next(r for r in rows if (r["method"], r["sparsity"], r["weight_bits"]) == (method, sparsity, bits))


def test_every_method_is_there_on_both_weights(rows: list[dict[str, Any]], quick: list[dict[str, Any]]) -> None:
    for bits in (16, 4):
        for found, asked in ((quick, SPARSITIES), (rows, (*SPARSITIES, 0.7))):
            here = {(r["method"], r["sparsity"]) for r in found if r["weight_bits"] == bits}
            masked = (0.3,) if found is quick and bits == 4 else asked
            wanted = {(m, s) for m in METHODS for s in (asked if m in ("teal", "wina") else masked)}
            if found is rows:
                wanted |= {("per-layer-published", s) for s in asked}
            assert here == {("dense", 0.0), *wanted}
    assert {r["text"] for r in quick} == {"pydoc"}
    assert {r["text"] for r in rows if not r["note"]} == {"prose", "pydoc"}
    assert len(quick) == 1 + 8 * 2 + 1 + 2 * 2 + 6  # none twice


def test_criteria_and_scopes_are_shown_at_one_sparsity(rows: list[dict[str, Any]]) -> None:
    here = [r for r in rows if r["text"] == "prose" and r["weight_bits"] == 16 and r["sparsity"] == 0.3]
    assert {r["criterion"] for r in here if r["method"] == "static"} == set(get_args(Criterion))
    scopes = [r["scope"] for r in here if r["method"] == "unified"]
    assert scopes == ["token", "token", "every 4 tokens", "reply"]
    perplexities = {r["perplexity"] for r in here if r["method"] == "unified"}
    assert len(perplexities) == 4
    free = [r for r in here if "thresholds of calibration" in r["variant"]]
    assert [r["method"] for r in free] == ["unified", "per-layer", "unified"]
    for entry in free[:2]:  # held by what was seen, they come nearer
        held = chosen(here, entry["method"], 0.3)
        assert "share held" in held["variant"]
        off = [abs(r["effective_sparsity"] - 0.3 * 19 / 21) for r in (held, entry)]
        assert off[0] < max(off[1], 0.03)


def test_methods_can_be_measured_alone(model_folder: Path, patched: Any) -> None:
    def run(*only: str) -> list[tuple[str, int]]:
        found = run_bench("sparsity", model=str(model_folder), text="pydoc", threads=1, quick=True, only=only)["rows"]
        assert {r["text"] for r in found} == {"pydoc"}
        return sorted({(r["method"], r["weight_bits"]) for r in found})

    assert run("teal") == [("dense", 4), ("dense", 16), ("teal", 4), ("teal", 16)]
    assert run("learnt") == [("dense", 4), ("dense", 16), ("learnt", 4)]
    published = "per-layer-published"
    assert run(published) == [("dense", 4), ("dense", 16), (published, 4), (published, 16)]
    with pytest.raises(InputError, match="no method 'teel'"):
        run("teel")


def test_what_is_learnt_has_a_row_for_each_teacher(model_folder: Path, patched: Any) -> None:
    found = run_bench("sparsity", model=str(model_folder), text="pydoc", threads=1, quick=True, only=("learnt",))
    here = [r for r in found["rows"] if r["method"] == "learnt"]
    assert [r["sparsity"] for r in here] == [0.4, 0.4]
    assert [r["variant"].split(" in ")[0] for r in here] == [
        "learnt from the same weights whole",
        "learnt from the dense model",
    ]
    assert here[0]["perplexity"] != here[1]["perplexity"]
    assert all(r["speed_ratio"] > 0 for r in here)


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_no_more_engines_are_open_than_memory_holds(listed: list[sparsity_methods.Contender], at_once: int) -> None:
    able = [c for c in listed if not c.note]
    parts = list(sparsity_quality._batches(able, at_once))
    assert sorted(map(id, (c for part in parts for c in part))) == sorted(map(id, able))
    assert max(len({sparsity_quality.engine_key(c) for c in part}) for part in parts) <= at_once
    timed = [c for c in able if c.timed]
    together = list(sparsity._together(timed, at_once))
    assert {id(c) for part in together for c in part} == {id(c) for c in timed}
    for part in together:
        assert len({sparsity_quality.engine_key(c) for c in part}) <= max(2, at_once)  # and the weights whole
        assert {c.bits for c in part} == {c.bits for c in part if c.method == "dense"}


def test_only_what_is_predicted_after_the_prefix_counts(quick: list[dict[str, Any]]) -> None:
    assert {r["n_tokens"] for r in quick} == {4 * (32 - PREFIX - 1)}


def test_what_a_model_is_too_small_for_is_said(rows: list[dict[str, Any]]) -> None:
    masks = [r for r in rows if r["sparsity"] == 0.7 and r["method"] not in ("teal", "wina")]
    assert masks
    assert all("not possible" in r["note"] and r["perplexity"] is None for r in masks)
    assert all(r["note"] is None and r["perplexity"] > 0 for r in rows if r not in masks)


def test_sparsity_is_what_steps_left_out(quick: list[dict[str, Any]]) -> None:
    for entry in quick:
        if entry["method"] == "dense":
            assert entry["effective_sparsity"] == 0
            continue
        asked = entry["sparsity"]
        # Masks leave keys and values whole: 2 of 21 parts of a block's weights here.
        share = 1.0 if entry["method"] in ("teal", "wina") else 0.9
        assert entry["effective_sparsity"] == pytest.approx(asked * share, abs=0.07), entry["method"]
    for method in METHODS:
        less, more = (chosen(quick, method, s)["kl_mean"] for s in SPARSITIES)
        assert less < more


def test_columns_follow_from_one_another(rows: list[dict[str, Any]], quick: list[dict[str, Any]]) -> None:
    for entry in [r for r in quick if r["method"] != "dense"]:
        whole = chosen(quick, "dense", 0.0, entry["weight_bits"])
        assert entry["ratio_to_whole"] == pytest.approx(entry["perplexity"] / whole["perplexity"], rel=1e-6)
        assert entry["ratio_to_whole_low"] <= entry["ratio_to_whole"] <= entry["ratio_to_whole_high"]
        assert entry["ratio"] == pytest.approx(np.exp(entry["delta_nll"]), rel=1e-9)
    for entry in [r for r in quick if r["method"] == "unified"]:
        others = {
            name: chosen(quick, name, entry["sparsity"], entry["weight_bits"])
            for name in ("random", "static", "per-layer")
        }
        assert entry["to_per_layer_published"] is None  # quick leaves it out
        for name, other in others.items():
            column = f"to_{name.replace('-', '_')}"
            assert entry[column] == pytest.approx(entry["kl_mean"] - other["kl_mean"], abs=1e-9)
            assert entry[f"{column}_low"] <= entry[column] <= entry[f"{column}_high"]
        assert entry["rival"] == min(others, key=lambda name: others[name]["kl_mean"])
        assert entry["to_rival"] == entry[f"to_{entry['rival'].replace('-', '_')}"]
    for entry in [r for r in rows if r["method"] == "unified" and r["sparsity"] == 0.1 and r["text"] == "prose"]:
        other = chosen(rows, "per-layer-published", 0.1, entry["weight_bits"])
        assert other["variant"].startswith("as published: ")
        assert entry["to_per_layer_published"] == pytest.approx(entry["kl_mean"] - other["kl_mean"], abs=1e-9)
    oracle, random = (chosen(rows, name, 0.3)["kl_mean"] for name in ("oracle", "random"))
    assert oracle < random


def test_several_sequences_leave_out_less_together(every: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    here = every[len(rows) :]
    assert {r["batch"] for r in rows} == {1}
    found = {(r["method"], r["weight_bits"], r["batch"]): r for r in here}
    methods = ("dense", "static", "unified", "teal", "wina")
    assert set(found) == {(m, bits, size) for m in methods for bits in (16, 4) for size in SIZES}
    assert len(here) == len(found)
    assert all(r["perplexity"] is None and r["speed_low"] <= r["speed_ratio"] <= r["speed_high"] for r in here)
    for bits in (16, 4):
        for method in methods:
            one, many = (found[method, bits, size] for size in SIZES)
            assert one["batch_sparsity"] == pytest.approx(one["effective_sparsity"])
            assert many["decode_tokens_per_s"] == pytest.approx(1000 / many["ms_per_token"])
            if method == "dense":
                assert many["batch_sparsity"] == 0
                assert many["speed_ratio"] == one["speed_ratio"] == 1
            elif method == "static":  # one mask for all tokens loses nothing
                assert (
                    many["batch_sparsity"] == pytest.approx(many["effective_sparsity"]) == pytest.approx(0.27, abs=0.02)
                )
            else:
                assert many["effective_sparsity"] > 0.1
                assert many["batch_sparsity"] <= many["effective_sparsity"]
            if method in ("teal", "wina"):
                assert many["batch_sparsity"] < 0.5 * many["effective_sparsity"]
    masked = [r["prefix"] for r in rows if r["method"] == "unified" and r["perplexity"] is not None]
    assert set(masked) == {PREFIX}


def test_both_weights_keep_one_predictor(quick: list[dict[str, Any]]) -> None:
    added = [
        chosen(quick, "unified", 0.3, bits)["weight_bytes"] - chosen(quick, "dense", 0.0, bits)["weight_bytes"]
        for bits in (16, 4)
    ]
    assert added[0] == added[1] > 0


def test_speed_is_measured_against_the_same_weights_whole(quick: list[dict[str, Any]]) -> None:
    for bits in (16, 4):
        timed = {r["method"] for r in quick if r["weight_bits"] == bits and r["ms_per_token"] is not None}
        assert timed == {"dense", "static", "per-layer", "unified", "teal", "wina"}
        whole = chosen(quick, "dense", 0.0, bits)
        assert whole["speed_ratio"] == 1.0
        for method in timed - {"dense"}:
            entry = chosen(quick, method, 0.3, bits)
            assert entry["speed_low"] <= entry["speed_ratio"] <= entry["speed_high"]
            assert 0 <= entry["decider_share"] < 1


def test_what_is_timed_is_laid_out_for_its_sparsity() -> None:
    inputs = [{"kind": "inputs", "sparsity": sparsity, "prefix": 5} for sparsity in (0.3, 0.5)]
    assert layout_key(inputs[0]) != layout_key(inputs[1])
    assert layout_key(inputs[0]) == layout_key({**inputs[0], "hold": True})  # the controller's matter alone
    masks = [{"kind": "predicted", "sparsity": sparsity} for sparsity in (0.3, 0.7, 0.8)]
    assert layout_key(masks[0]) == layout_key(masks[1]) != layout_key(masks[2])


def test_masks_are_in_force_from_the_prefix_that_timing_asks_for(listed: list[sparsity_methods.Contender]) -> None:
    prompt = list(range(40, 45))
    for contender in [c for c in listed if c.timed and c.asked is not None]:
        asked = {**contender.asked, "prefix": len(prompt)}  # type: ignore[dict-item]
        running = open_engine(contender.tables, threads=1, plan=sparse_plan(contender.tables, asked))
        running.set_policy(sparse_policy(contender.tables, asked))
        sequence = running.start()
        running.generate(sequence, prompt, 8)
        kept = [step.kept_weights for step in sequence.trace]
        whole = len(prompt) if contender.asked["kind"] != "inputs" else 1  # type: ignore[index]
        assert min(kept[:whole]) > 0.99  # inputs of exactly zero are left out anywhere
        assert np.mean(kept[len(prompt) :]) < 0.9, contender.method
        running.close()


def test_an_oracle_replays_the_masks_of_the_true_scores(
    model_folder: Path, listed: list[sparsity_methods.Contender]
) -> None:
    context = BenchContext(str(model_folder), None, 1, quick=True)
    model: LoadedModel = load(str(model_folder))
    oracle = next(c for c in listed if c.method == "oracle" and c.bits == 16 and c.sparsity == 0.3)
    truth = sparsity_quality._Truth(model)
    masks = sparsity_quality.masks_of(oracle, truth)
    assert callable(masks)
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    (slot,) = {name for step in masks(tokens) for name in step}
    given = np.stack([step[slot] for step in masks(tokens)])
    assert given[:PREFIX].all()
    assert (given[PREFIX:].mean(axis=1) < 0.8).all()
    assert len(np.unique(given[PREFIX:], axis=0)) > 1
    other = masks(tokens[::-1])
    assert any(not np.array_equal(a[slot], b[slot]) for a, b in zip(masks(tokens), other, strict=True))
    opened: dict[Any, Any] = {}
    running = sparsity_quality.engine_of(oracle, opened, context)
    trace: list[StepTrace] = []
    list(running.log_probabilities(tokens, replay=masks(tokens), trace=trace))
    seen = np.stack([np.asarray(step.decisions[slot], dtype=np.uint8) for step in trace])
    np.testing.assert_array_equal(seen, given)
    running.close()


def test_no_contender_but_the_oracle_sees_later_text(
    model_folder: Path, listed: list[sparsity_methods.Contender]
) -> None:
    context = BenchContext(str(model_folder), None, 1, quick=True)
    model = load(str(model_folder))
    truth, opened = sparsity_quality._Truth(model), dict[Any, Any]()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (40,), generator=generator).tolist()
    other = tokens[:30] + torch.randint(0, 256, (10,), generator=generator).tolist()
    for contender in [c for c in listed if c.bits == 4 and c.sparsity in (0.0, 0.3)]:
        running = sparsity_quality.engine_of(contender, opened, context)
        before, after = (  # a side each: what one holds follows from all that it has seen
            np.concatenate([r for _, r in side.log_probabilities(text)])[:30]
            for text in (tokens, other)
            for side in [sparsity_quality.Sparse(contender, running, sparsity_quality.masks_of(contender, truth))]
        )
        assert np.array_equal(before, after) == (contender.method != "oracle"), contender.method
    for running in opened.values():
        running.close()


def test_quality_is_kept_between_runs(model_folder: Path, listed: list[sparsity_methods.Contender]) -> None:
    kept: dict[str, Any] = {}

    class Memory:
        def find(self, provenance: Any) -> Any:
            return kept.get(provenance.key)

        def keep(self, profile: Any) -> None:
            kept[profile.provenance.key] = profile

    context = BenchContext(str(model_folder), None, 1, quick=True, shelf=Memory())
    model = load(str(model_folder))
    able = [c for c in listed if c.bits == 16]
    windows = [Window(tuple(range(40 + i, 80 + i)), f"d{i}", "x", "en") for i in range(3)]
    first = sparsity_quality.measure_quality(model, able, windows, None, context)  # type: ignore[arg-type]
    assert len(kept) == len(able)  # no two of them were taken for one another
    again = sparsity_quality.measure_quality(model, able, windows, None, context)  # type: ignore[arg-type]
    for one in able:
        assert again[one].measured_at is not None
        assert again[one].facts == first[one].facts
        assert again[one].kl_mean == first[one].kl_mean
    count = len(kept)
    answers = sparsity_questions.measure_answers(model, able, context)
    assert len(kept) == count + 1 + len(answers)  # the dense model's are one more
    again_answered = sparsity_questions.measure_answers(model, able, context)
    assert all(columns.pop("answers_measured_at") is not None for columns in again_answered.values())
    assert all(columns.pop("answers_measured_at") is None for columns in answers.values())
    assert again_answered == answers


def test_all_that_could_choose_while_writing_answer_questions(
    rows: list[dict[str, Any]], quick: list[dict[str, Any]]
) -> None:
    answering = set(METHODS) - {"oracle"}
    for found, sparsities, count in ((quick, (0.3,), 5), (rows, SPARSITIES, 10)):
        here = [r for r in found if r["questions"] is not None]
        wanted = {(m, s, bits) for m in answering for s in sparsities for bits in (16, 4)}
        wanted |= {("dense", 0.0, bits) for bits in (16, 4)}
        if found is rows:
            wanted |= {(m, 0.7, bits) for m in ("teal", "wina") for bits in (16, 4)}
            wanted |= {("per-layer-published", s, bits) for s in sparsities for bits in (16, 4)}
        assert {(r["method"], r["sparsity"], r["weight_bits"]) for r in here} == wanted
        assert {r["questions"] for r in here} == {count}
        assert all(r["scope"] in (None, "none", "token") for r in here)
        for entry in here:
            assert 0 <= entry["flips"] <= count
            assert entry["accuracy_low"] <= entry["accuracy"] <= entry["accuracy_high"]
            assert entry["accuracy_change_low"] <= entry["accuracy_change"] <= entry["accuracy_change_high"]
            assert abs(entry["accuracy_change"]) <= entry["flips"] / count
            whole = chosen(found, "dense", 0.0, entry["weight_bits"])
            assert (entry["flips_to_whole"] is None) == (entry["method"] == "dense")
            assert abs(entry["accuracy"] - whole["accuracy"]) <= (entry["flips_to_whole"] or 0) / count + 1e-9


def test_answers_are_given_under_masks(quick: list[dict[str, Any]]) -> None:
    for bits in (16, 4):
        assert chosen(quick, "dense", 0.0, bits)["answers_sparsity"] == 0
        for method in set(METHODS) - {"oracle"}:
            entry = chosen(quick, method, 0.3, bits)
            # The bytes of English words are unlike what a random model samples, so thresholds give other shares.
            assert 0.1 < entry["answers_sparsity"] < 0.6, method


def test_answers_are_scored_under_masks_from_the_last_token_of_the_question_on(
    model_folder: Path, listed: list[sparsity_methods.Contender]
) -> None:
    context = BenchContext(str(model_folder), None, 1, quick=True)
    generator = torch.Generator().manual_seed(2)
    tokens, begin = torch.randint(0, 256, (30,), generator=generator).tolist(), 20
    other = [*tokens[:-1], (tokens[-1] + 1) % 256]
    for contender in [c for c in listed if c.bits == 16 and c.sparsity in (0.0, 0.3) and c.method != "oracle"]:
        running = sparsity_quality.engine_of(contender, {}, context, prefix=0)
        side = sparsity_questions.Answering(running, contender)
        found = side.score(tokens, prompt_length=begin)
        assert not found[: begin - 1].any()
        assert (found[begin - 1 :] < 0).all()
        assert len(side._left) == 30 - begin  # steps that part of the answer is predicted from
        # No step knows what comes after it.
        again = sparsity_questions.Answering(running, contender)
        np.testing.assert_array_equal(found[:-1], again.score(other, prompt_length=begin)[:-1])
        running.close()
        if contender.method in ("teal", "wina"):
            continue
        # The same as the plan that leaves exactly the question's tokens but the last whole.
        plan = None
        if contender.asked is not None:
            plan = sparse_plan(contender.tables, {**contender.asked, "prefix": begin - 1})
        exact = open_engine(contender.whole, threads=1, plan=plan)
        expected = exact.score(tokens, prompt_length=begin)
        np.testing.assert_allclose(found[begin - 1 :], expected[begin - 1 :], atol=1e-5)
        exact.close()
