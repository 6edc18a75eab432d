"""Widths chosen per token, looked at: the analysis against the engine that decides, and statistics against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.analysis.precision import PrecisionSteps, autocorrelation, token_excess
from workbench.analysis.precision_thresholds import expected_average, policy_thresholds, thresholds
from workbench.analysis.profile import run
from workbench.analysis.sensitivity import StepSequence
from workbench.apply.compress import compress
from workbench.apply.nested import NestedConfig
from workbench.apply.precision_config import PrecisionConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.models import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.precision import WidthReader, cuts_of, expected_bits, gain_thresholds, precision_plan

NESTED = NestedConfig(widths=(2, 3, 5), group_size=16, fit="rounded")
PRECISION = PrecisionConfig(targets=(2.5, 4.0), learning_steps=3, projection_rows=4, calibration_tokens=1024)
SEQUENCES = [StepSequence(tuple(np.random.default_rng(5).integers(0, 256, n).tolist()), 7) for n in (30, 19)]


@pytest.fixture(scope="module")
def made(make_model: Callable[..., LoadedModel]) -> CompressedModel:
    model = make_model()
    return compress(model, Recipe.for_model(model, NESTED, PRECISION))


@pytest.mark.parametrize("rule", ["gain", "error"])
def test_widths_and_estimates_are_those_of_the_engine(made: CompressedModel, rule: str) -> None:
    assert made.selectors is not None
    target = 3.3
    table = run(PrecisionSteps(made, SEQUENCES, target, rule=rule)).table  # type: ignore[arg-type]
    assert set(table.unit) == {unit.id for unit in made.architecture.units}
    plan = precision_plan(made.architecture, made.selectors, target, rule)  # type: ignore[arg-type]
    engine = open_engine(made, engine="reference", plan=plan)
    cuts = thresholds(made.architecture, made.selectors, target, rule)  # type: ignore[arg-type]
    for index, wanted in enumerate(SEQUENCES):
        sequence = engine.start()
        engine.prefill(sequence, list(wanted.tokens))
        here = table[table.sequence == index]
        assert here.groupby("step", observed=True)["token"].first().tolist() == list(wanted.tokens)
        assert (here[here.step < 7].phase == "prompt").all()
        assert (here[here.step >= 7].phase == "reply").all()
        for consumer in plan.consumers:
            rows = here[here.unit == consumer.target].drop_duplicates("step").sort_values("step")
            decided = [step.decisions[consumer.slot] for step in sequence.trace]
            assert rows.bits.tolist() == consumer.bits(np.array(decided)).tolist()
    # The widths follow from comparing estimates with thresholds, the first token aside where the rule favours it.
    joined = table.merge(cuts, on=["unit", "low", "high"], how="inner", suffixes=("", "_cut"))
    np.testing.assert_array_equal(joined.threshold, joined.threshold_cut.astype(np.float32))
    later = joined[joined.step > 0]
    near = np.abs(later.estimate / later.threshold - 1) < 1e-3
    exceeded = later.estimate > later.threshold
    assert ((later.bits >= later.high) == exceeded)[~near].all()
    assert 0.05 < exceeded.mean() < 0.95
    engine.close()


def test_errors_are_exact(made: CompressedModel) -> None:
    assert made.selectors is not None
    table = run(PrecisionSteps(made, SEQUENCES[:1], 3.0)).table
    plan = precision_plan(made.architecture, made.selectors, 3.0)
    engine = open_engine(made, engine="reference", plan=plan)
    seen: dict[str, torch.Tensor] = {}
    engine.set_tap(lambda site, start, rows: seen.__setitem__(site, rows.double().clone()))  # type: ignore[attr-defined]
    engine.hidden_states(list(SEQUENCES[0].tokens), prompt_length=7)  # type: ignore[attr-defined]
    for unit in made.architecture.units[2:6]:
        x = seen[unit.linears[0].id]
        for low, high in ((2, 3), (3, 5)):
            change = torch.cat(
                [
                    made.linears[linear.id].dequantize(high).double() - made.linears[linear.id].dequantize(low).double()
                    for linear in unit.linears
                ]
            )
            rows = table[(table.unit == unit.id) & (table.low == low)].sort_values("step")
            np.testing.assert_allclose(rows.error, (x @ change.T).norm(dim=1), rtol=1e-4)
            np.testing.assert_allclose(rows.norm, x.norm(dim=1), rtol=1e-5)
    engine.close()


@pytest.mark.parametrize("rule", ["gain", "error"])
def test_policies_hold_the_thresholds_of_the_plan(made: CompressedModel, rule: str) -> None:
    assert made.selectors is not None
    cuts = thresholds(made.architecture, made.selectors, 3.3, rule)  # type: ignore[arg-type]
    policy = policy_thresholds(made.architecture, made.selectors, cuts, rule)  # type: ignore[arg-type]
    plan = precision_plan(made.architecture, made.selectors, 3.3, rule)  # type: ignore[arg-type]
    decided = {d.slot: d.program.thresholds for d in plan.deciders if hasattr(d.program, "thresholds")}
    of_plan = {slot: given for slot, given in decided.items() if given != (0,)}
    assert policy.keys() >= {slot for slot, given in of_plan.items() if given}
    for slot, given in policy.items():
        np.testing.assert_allclose(given, decided[slot], rtol=1e-5)


@pytest.mark.parametrize("rule", ["gain", "error"])
def test_expected_shares_give_the_target(made: CompressedModel, rule: str) -> None:
    assert made.selectors is not None
    for target in (2.6, 3.0, 3.9):
        table = thresholds(made.architecture, made.selectors, target, rule)  # type: ignore[arg-type]
        assert table["share"].between(0, 1).all()
        average = expected_average(made.architecture, made.selectors, table)
        # The norms of a random model lie so close together that a threshold passes many of them at once.
        assert average == pytest.approx(target, abs=0.1)
        if rule == "gain":
            cuts = cuts_of(
                made.architecture, made.selectors, gain_thresholds(made.architecture, made.selectors, target)
            )
            assert average == pytest.approx(expected_bits(made.architecture, made.selectors, cuts))


def test_autocorrelation_of_known_series() -> None:
    random = np.random.default_rng(0)
    noise = random.standard_normal(4000)
    slow = np.zeros(4000)
    for i in range(1, 4000):
        slow[i] = 0.8 * slow[i - 1] + noise[i]
    frames = [
        pd.DataFrame({"sequence": 0, "step": range(4000), "unit": name, "low": 3, "estimate": np.exp(values)})
        for name, values in (("slow", slow), ("noise", noise))
    ]
    found = autocorrelation(pd.concat(frames), 3, longest=3).set_index(["unit", "lag"])
    for lag in (1, 2, 3):
        assert found.correlation["slow", lag] == pytest.approx(0.8**lag, abs=0.08)
        assert abs(found.correlation["noise", lag]) < 0.06
        assert found.n_pairs["slow", lag] == 3999 - lag  # the first token is left out
    bits = pd.concat(frames).assign(bits=np.tile(np.repeat([3, 4], 20), 200))
    constant = autocorrelation(bits.assign(bits=3), 3, "bits")
    assert constant.empty  # what never changes has no correlation
    assert autocorrelation(bits, 3, "bits", longest=1).correlation.iloc[0] == pytest.approx(0.9, abs=0.01)
    with pytest.raises(InputError, match="4 bits"):
        autocorrelation(pd.concat(frames), 4)


def test_tokens_that_raise_the_width(made: CompressedModel) -> None:
    table = run(PrecisionSteps(made, SEQUENCES, 3.0)).table
    found = token_excess(table, made.architecture)
    assert found["count"].sum() == sum(len(s.tokens) for s in SEQUENCES)
    assert (found["excess"].to_numpy() * found["count"].to_numpy()).sum() == pytest.approx(0, abs=1e-6)
    assert found["excess"].is_monotonic_decreasing
    assert (np.log(found["error"]) * found["count"]).sum() == pytest.approx(0, abs=1e-3)
    plan = precision_plan(made.architecture, made.selectors, 3.0)  # type: ignore[arg-type]
    engine = open_engine(made, engine="reference", plan=plan)
    reader = WidthReader(made.architecture, plan)
    read: dict[int, list[float]] = {}
    for wanted in SEQUENCES:
        sequence = engine.start()
        engine.prefill(sequence, list(wanted.tokens))
        for token, bits in zip(wanted.tokens, reader(sequence.trace), strict=True):
            read.setdefault(token, []).append(bits)
    engine.close()
    for row in found.itertuples():
        assert row.bits == pytest.approx(np.mean(read[row.token]), abs=1e-6)
    assert len(token_excess(table, made.architecture, seen=2)) == sum(len(bits) > 1 for bits in read.values())


def test_models_that_do_not_choose_are_refused(tiny_model: LoadedModel, made: CompressedModel) -> None:
    plain = compress(tiny_model, Recipe.for_model(tiny_model, RtnConfig(bits=4, group_size=16)))
    with pytest.raises(InputError, match="dynamic-precision"):
        PrecisionSteps(plain, SEQUENCES, 3.0)
    with pytest.raises(InputError, match="at least one"):
        PrecisionSteps(made, [], 3.0)
    with pytest.raises(InputError, match="not possible"):
        PrecisionSteps(made, SEQUENCES, 9.0)
