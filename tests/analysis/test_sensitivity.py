"""The analyses against direct computation, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.analysis.dense_pass import divergence_of_change
from workbench.analysis.profile import Profile, run
from workbench.analysis.sensitivity import (
    DecodingSteps,
    StepSequence,
    UnitDamage,
    UnitScores,
    damage_table,
    generated,
    proxy_correlation,
    rank_linears,
    rank_units,
    teacher_forced,
)
from workbench.capture import StepNorms, capture_generation, capture_text
from workbench.errors import Cancelled, InputError, IntegrityError
from workbench.formats.codes import dequantize, quantize_groups
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime.base import Sampler
from workbench.runtime.reference import ReferenceEngine

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "opt")
TEXT = np.random.default_rng(3).integers(0, 256, 60).tolist()


@pytest.fixture(params=FAMILIES)
def any_tiny_model(request: pytest.FixtureRequest, make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model(request.param)


def rounded(model: LoadedModel, linear_id: str, bits: int) -> torch.Tensor:
    return dequantize(quantize_groups(model.linear_module(linear_id).weight.detach(), bits, 16))


def dense_log_probabilities(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.module(torch.tensor([tokens])).logits[0].double().log_softmax(1)


def test_step_errors_are_exact(any_tiny_model: LoadedModel) -> None:
    profile = run(DecodingSteps(any_tiny_model, [StepSequence(tuple(TEXT), 10)], widths=(3, 8), group_size=16))
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        any_tiny_model.linear_module(x.id).register_forward_pre_hook(
            lambda module, args, name=x.id: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for x in any_tiny_model.architecture.linears
    ]
    dense_log_probabilities(any_tiny_model, TEXT)
    for hook in hooks:
        hook.remove()
    assert len(profile.table) == 60 * len(any_tiny_model.architecture.linears) * 2
    for linear in any_tiny_model.architecture.linears[::5]:
        weight = any_tiny_model.linear_module(linear.id).weight.detach().double()
        for bits in (3, 8):
            error = (inputs[linear.id] @ (rounded(any_tiny_model, linear.id, bits).double() - weight).T).norm(dim=1)
            output = (inputs[linear.id] @ weight.T).norm(dim=1)
            rows = profile.table[(profile.table.linear == linear.id) & (profile.table.bits == bits)]
            np.testing.assert_allclose(rows.error_norm, error, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(rows.relative_error, error / output, rtol=1e-3, atol=1e-6)
            assert list(rows.phase) == ["prompt"] * 10 + ["reply"] * 50


def test_unit_damage_is_the_kl_of_a_model_with_only_that_unit_changed(any_tiny_model: LoadedModel) -> None:
    windows = [TEXT[:30], TEXT[30:]]
    profile = run(UnitDamage(any_tiny_model, windows, widths=(2, 4), group_size=16))
    dense = [dense_log_probabilities(any_tiny_model, w) for w in windows]
    for unit in any_tiny_model.architecture.units[::3]:
        originals = {x.id: any_tiny_model.linear_module(x.id).weight.data for x in unit.linears}
        for linear_id in originals:
            any_tiny_model.linear_module(linear_id).weight.data = rounded(any_tiny_model, linear_id, 2)
        changed = [dense_log_probabilities(any_tiny_model, w) for w in windows]
        for linear_id, original in originals.items():
            any_tiny_model.linear_module(linear_id).weight.data = original
        expected = torch.cat([(p.exp() * (p - q)).sum(1) for p, q in zip(dense, changed, strict=True)]).mean()
        found = profile.table.query(f"unit == '{unit.id}' and bits == 2")["kl"].item()
        assert found == pytest.approx(expected.item(), rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.5, 5.0, 300.0])
def test_divergence_keeps_its_digits_and_never_overflows(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, change = (torch.randn(20, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    change *= size
    dense, other = logits.log_softmax(1), (logits + change).log_softmax(1)
    expected = (dense.exp() * (dense - other)).sum(1)
    found = divergence_of_change(dense.float(), change.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-12)


def test_scores_are_the_gradients_products(tiny_model: LoadedModel) -> None:
    windows = [TEXT[:30], TEXT[30:]]
    table = damage_table(run(UnitScores(tiny_model, windows, widths=(3, 4), group_size=16)))
    assert not any(p.requires_grad or p.grad is not None for p in tiny_model.module.parameters())
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    for window in windows:
        tiny_model.module.requires_grad_(True)
        ids = torch.tensor([window])
        loss = torch.nn.functional.cross_entropy(tiny_model.module(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        tiny_model.module.zero_grad()
        loss.backward()
        for unit in tiny_model.architecture.units:
            for linear in unit.linears:
                weight = tiny_model.linear_module(linear.id).weight
                assert weight.grad is not None
                change = rounded(tiny_model, linear.id, 3) - weight.detach()
                first[unit.id] = first.get(unit.id, 0.0) + float((weight.grad * change).double().sum())
                second[unit.id] = second.get(unit.id, 0.0) + float((weight.grad * change).double().square().sum())
    tiny_model.module.requires_grad_(False)
    rows = table[table.bits == 3].set_index("unit")
    for unit in first:
        assert rows.loc[unit, "gradient"] == pytest.approx(abs(first[unit]) / 58, rel=1e-3, abs=1e-6)
        assert rows.loc[unit, "fisher"] == pytest.approx(0.5 * second[unit] / 58, rel=1e-3)


def test_damage_falls_as_bits_rise_and_proxies_rank_alike(tiny_model: LoadedModel) -> None:
    windows = [TEXT]
    damage = run(UnitDamage(tiny_model, windows, group_size=16))
    table = damage_table(
        run(UnitScores(tiny_model, [TEXT[i : i + 15] for i in (0, 15, 30, 45)], group_size=16)), damage
    )
    mean = table.groupby("bits")["kl"].mean()
    assert (mean.diff().dropna() < 0).all()
    correlation = proxy_correlation(table)
    assert list(correlation.bits) == [2, 3, 4, 5, 6, 8]
    assert (correlation.fisher > 0.3).all()
    ranked = rank_units(table, 3, "kl")
    assert ranked.kl.is_monotonic_decreasing
    assert ranked.share.sum() == pytest.approx(1)
    with pytest.raises(InputError, match="no 7 bits"):
        rank_units(table, 7, "kl")
    with pytest.raises(InputError, match="cover"):
        damage_table(run(UnitScores(tiny_model, windows, widths=(3,))), damage)


def test_parts_in_any_order_and_session_give_the_same_rows(tiny_model: LoadedModel) -> None:
    analysis = UnitDamage(tiny_model, [TEXT], widths=(3,), group_size=16)
    forward = {p: analysis.compute(p, Job()) for p in analysis.parts}
    again = UnitDamage(tiny_model, [TEXT], widths=(3,), group_size=16)
    for part in reversed(again.parts):
        pd.testing.assert_frame_equal(again.compute(part, Job()), forward[part])


def cancelling_job() -> Job:
    """A job that cancels itself as soon as some of its work is done."""
    job = Job(lambda state: job.cancel() if state.done > 0.3 else None)
    return job


def test_cancel_leaves_the_model_as_it_was(tiny_model: LoadedModel) -> None:
    before = {k: v.clone() for k, v in tiny_model.module.state_dict().items()}
    for make in (
        lambda: DecodingSteps(tiny_model, teacher_forced([TEXT])),
        lambda: UnitDamage(tiny_model, [TEXT]),
        lambda: UnitScores(tiny_model, [TEXT]),
    ):
        job = cancelling_job()
        with pytest.raises(Cancelled, match="resume"):
            run(make(), job)
    assert all(torch.equal(before[k], v) for k, v in tiny_model.module.state_dict().items())
    assert not any(p.requires_grad for p in tiny_model.module.parameters())
    assert not any(m._forward_pre_hooks for m in tiny_model.module.modules())


def test_replies_seen_live_equal_replies_seen_at_once(tiny_model: LoadedModel) -> None:
    """Capturing each decoding step and feeding prompt and reply in one pass give the same activations."""
    engine = ReferenceEngine(tiny_model)
    for sampler in (Sampler(), Sampler(temperature=1.0)):
        live = StepNorms()
        reply = capture_generation(engine, TEXT[:8], 12, [live], sampler=sampler, seed=5)
        (sequence,) = generated(engine, [TEXT[:8]], 12, sampler=sampler, seed=5)
        assert sequence == StepSequence((*TEXT[:8], *reply), 8)
        whole = StepNorms()
        capture_text(engine, sequence.tokens[:-1], [whole])
        keys = ["site", "step"]
        joined = live.table().merge(whole.table(), on=keys, validate="1:1")
        assert len(joined) == len(whole.table()) == len(live.table())
        np.testing.assert_allclose(joined.norm_x, joined.norm_y, rtol=1e-3)


def test_profiles_keep_table_and_provenance(tiny_model: LoadedModel, tmp_path: Path) -> None:
    profile = run(DecodingSteps(tiny_model, teacher_forced([TEXT[:20], TEXT[20:]]), widths=(4,), group_size=16))
    path = tmp_path / "steps.parquet"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded.provenance == profile.provenance
    pd.testing.assert_frame_equal(loaded.table, profile.table)
    ranked = rank_linears(loaded, 4)
    assert ranked["mean"].is_monotonic_decreasing
    assert set(ranked.linear) == {x.id for x in tiny_model.architecture.linears}
    row = ranked.iloc[0]
    steps = loaded.table[loaded.table.linear == row.linear]
    assert row["max"] == steps.relative_error.max()
    assert row.worst_step in set(steps.step[steps.relative_error == row["max"]])

    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match="again"):
        Profile.load(path)
    with pytest.raises(InputError, match="No profile"):
        Profile.load(tmp_path / "none.parquet")


def test_impossible_widths_and_empty_input(tiny_model: LoadedModel) -> None:
    with pytest.raises(InputError, match="2 to 8"):
        DecodingSteps(tiny_model, teacher_forced([TEXT]), widths=(1, 4))
    with pytest.raises(InputError, match="at least one"):
        UnitDamage(tiny_model, [])
    with pytest.raises(InputError, match="at least one"):
        DecodingSteps(tiny_model, [])
