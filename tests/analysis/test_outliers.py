"""Statistics of channels against whole tensors, and interventions against a changed model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.analysis.interventions import Intervention, Interventions
from workbench.analysis.outliers import (
    ChannelStatistics,
    InputSurface,
    MassiveActivations,
    overlap,
    pooled,
    power_of_two_groups,
    salience,
    weight_channels,
)
from workbench.analysis.profile import run
from workbench.errors import InputError
from workbench.models import LoadedModel
from workbench.runtime.reference import ReferenceEngine

RANDOM = np.random.default_rng(8)
TEXTS = {"a": [RANDOM.integers(0, 256, n).tolist() for n in (40, 23)], "b": [RANDOM.integers(0, 256, 31).tolist()]}
FAMILIES = ("llama", "gemma3_text", "phi3", "opt")


@pytest.fixture(params=FAMILIES)
def any_tiny_model(request: pytest.FixtureRequest, make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model(request.param)


def inputs_of(model: LoadedModel, windows: list[list[int]], site: str) -> list[torch.Tensor]:
    """Inputs (n, width) of a site, float64, window by window."""
    seen: list[torch.Tensor] = []
    engine = ReferenceEngine(model)
    engine.set_tap(lambda name, start, rows: seen.append(rows.double().clone()) if name == site else None)
    for window in windows:
        engine.hidden_states(window)
    engine.close()
    return seen


def test_statistics_equal_those_of_whole_tensors(any_tiny_model: LoadedModel) -> None:
    table = run(ChannelStatistics(any_tiny_model, TEXTS, first_steps=(0, 1, 10))).table
    for unit in any_tiny_model.architecture.units[:5]:
        x = inputs_of(any_tiny_model, TEXTS["a"], unit.linears[0].id)
        for first, end in ((0, 1), (1, 10), (10, None)):
            part = torch.cat([window[first:end] for window in x]).numpy()
            found = table[(table.text == "a") & (table.unit == unit.id) & (table.first_step == first)]
            assert (found.n_tokens == len(part)).all()
            assert found.channel.tolist() == list(range(part.shape[1]))
            np.testing.assert_allclose(found.absmax, np.abs(part).max(0), rtol=1e-6)
            np.testing.assert_allclose(found["min"], part.min(0), rtol=1e-6)
            np.testing.assert_allclose(found["max"], part.max(0), rtol=1e-6)
            np.testing.assert_allclose(found["mean"], part.mean(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.mean_abs, np.abs(part).mean(0), rtol=1e-5)
            np.testing.assert_allclose(found.mean_square, np.square(part).mean(0), rtol=1e-5)
            if len(part) > 10:
                kurtosis = scipy.stats.kurtosis(part, axis=0, fisher=False)
                np.testing.assert_allclose(found["kurtosis"], kurtosis, rtol=1e-2)
                for level, name in ((0.5, "q50"), (0.9, "q90"), (0.99, "q99"), (0.999, "q999")):
                    exact = np.quantile(np.abs(part), level, axis=0, method="inverted_cdf")
                    np.testing.assert_allclose(found[name], exact, rtol=0.1, atol=2**-15)


def test_statistics_of_parts_pool_to_those_of_all(tiny_model: LoadedModel) -> None:
    table = run(ChannelStatistics(tiny_model, TEXTS)).table
    together = {"all": [*TEXTS["a"], *TEXTS["b"]]}
    whole = run(ChannelStatistics(tiny_model, together, first_steps=(0,))).table
    joined = pooled(table).merge(whole, on=["unit", "channel"], validate="1:1")
    assert len(joined) == len(whole)
    for name in ("n_tokens", "absmax", "mean", "mean_abs", "mean_square"):
        np.testing.assert_allclose(joined[f"{name}_x"], joined[f"{name}_y"], rtol=1e-4, atol=1e-6)
    first = pooled(table, [0])
    assert (first.n_tokens == 3).all()
    with pytest.raises(InputError, match="no steps"):
        pooled(table, [7])


def test_constant_channels_have_no_kurtosis(tiny_model: LoadedModel) -> None:
    with torch.no_grad():
        tiny_model.submodule(tiny_model.architecture.norms["blocks.0.input"]).weight[3] = 0.0
    table = run(ChannelStatistics(tiny_model, TEXTS)).table
    row = table[(table.unit == "blocks.0.qkv") & (table.channel == 3)]
    assert row["kurtosis"].isna().all()
    assert (row.absmax == 0).all()


def test_a_large_channel_is_found_and_ranked_first(tiny_model: LoadedModel) -> None:
    with torch.no_grad():
        tiny_model.submodule(tiny_model.architecture.norms["blocks.1.input"]).weight[5] = 300.0
    table = run(ChannelStatistics(tiny_model, TEXTS)).table
    ranked = salience(table)
    top = ranked[(ranked.unit == "blocks.1.qkv") & (ranked["rank"] == 0)]
    assert set(top.channel) == {5}
    assert len(top) == len(TEXTS) * 2  # no text is as long as the third range
    shared = overlap(table, 0.02, "text")
    assert shared[shared.unit == "blocks.1.qkv"].overlap.item() == 1.0
    whole = overlap(table, 1.0, "first_step")
    assert (whole.overlap == 1).all()
    with pytest.raises(InputError, match="compares"):
        overlap(table, 0.1, "unit")
    massive = run(MassiveActivations(tiny_model, TEXTS)).table
    here = massive[massive.site == "blocks.1.qkv"]
    assert set(here.channel) == {5}
    assert (here.ratio > 10).all()


def test_massive_activations_are_the_largest_of_their_site(any_tiny_model: LoadedModel) -> None:
    table = run(MassiveActivations(any_tiny_model, TEXTS, top=3)).table
    block = any_tiny_model.architecture.n_blocks - 1
    for site, name in ((f"blocks.{block}", f"blocks.{block}"), (f"blocks.{block}.down", None)):
        linear = name or any_tiny_model.architecture.unit(site).linears[0].id
        for window, x in enumerate(inputs_of(any_tiny_model, TEXTS["a"], linear)):
            found = table[(table.text == "a") & (table.site == site) & (table.window == window)]
            expected = np.sort(x.abs().numpy().ravel())[::-1][:3]
            np.testing.assert_allclose(found.value.abs(), expected, rtol=1e-6)
            for row in found.itertuples():
                assert row.value == pytest.approx(float(x[row.step, row.channel]))
                assert row.token == TEXTS["a"][window][row.step]
                assert row.median == pytest.approx(float(x[row.step].abs().median()), rel=1e-5)


def test_surface_is_the_input(tiny_model: LoadedModel) -> None:
    table = run(InputSurface(tiny_model, TEXTS["b"][0], "blocks.1.down")).table
    (x,) = inputs_of(tiny_model, TEXTS["b"], "blocks.1.down")
    np.testing.assert_allclose(table.value.to_numpy().reshape(x.shape), x, rtol=1e-6)
    with pytest.raises(InputError, match="blocks"):
        InputSurface(tiny_model, TEXTS["b"][0], "blocks.1.dawn")


def test_weight_channels(any_tiny_model: LoadedModel) -> None:
    table = weight_channels(any_tiny_model)
    unit = any_tiny_model.architecture.units[2]
    weight = torch.cat([any_tiny_model.linear_module(x.id).weight for x in unit.linears]).detach()
    found = table[table.unit == unit.id]
    np.testing.assert_allclose(found.norm, weight.norm(dim=0), rtol=1e-5)
    np.testing.assert_allclose(found.absmax, weight.abs().amax(dim=0), rtol=1e-6)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), st.integers(1, 12))
def test_groups_hold_ranges_between_powers_of_two(ranges: list[float], n_groups: int) -> None:
    values = np.array(ranges)
    groups = power_of_two_groups(values, n_groups)
    largest = values.max()
    assert ((groups >= 0) & (groups < n_groups)).all()
    if largest > 0:
        assert groups[values.argmax()] == 0
        assert (values <= largest * 2.0**-groups * (1 + 1e-12)).all()
        inner = groups < n_groups - 1
        assert (values[inner] > largest * 2.0 ** -(groups[inner] + 1) * (1 - 1e-12)).all()


def test_groups_at_exact_powers() -> None:
    values = np.array([8.0, 4.0, 2.0, np.nextafter(4.0, 9), np.nextafter(4.0, 0), 0.0])
    assert power_of_two_groups(values, 3).tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(InputError, match="finite"):
        power_of_two_groups(np.array([np.nan]), 2)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_interventions_equal_a_changed_model(any_tiny_model: LoadedModel, how: str) -> None:
    model, windows = any_tiny_model, TEXTS["a"]
    changes = [
        Intervention("blocks.1", 2, how),
        Intervention("blocks.1.qkv", 4, how),
        Intervention("blocks.1.down", 7, how, step=3),
    ]
    table = run(Interventions(model, windows, changes)).table
    for change, row in zip(changes, table.itertuples(), strict=True):
        unit = model.architecture.unit(change.site) if change.site != "blocks.1" else None
        modules = [model.linear_module(x.id) for x in unit.linears] if unit else [model.block(1)]
        site = unit.linears[0].id if unit else change.site
        mean = float(torch.cat(inputs_of(model, windows, site))[:, change.channel].mean()) if how == "mean" else 0.0

        def changed(module, args, kwargs, change=change, mean=mean):  # type: ignore[no-untyped-def]
            x = (args[0] if args else kwargs["hidden_states"]).clone()
            steps = slice(None) if change.step is None else slice(change.step, change.step + 1)
            x[..., steps, change.channel] = mean
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        total = 0.0
        with torch.inference_mode():
            for window in windows:
                ids = torch.tensor([window])
                dense = model.module(ids).logits[0].double().log_softmax(1)
                hooks = [m.register_forward_pre_hook(changed, with_kwargs=True) for m in modules]
                other = model.module(ids).logits[0].double().log_softmax(1)
                for hook in hooks:
                    hook.remove()
                total += float((dense.exp() * (dense - other)).sum())
        assert row.n_tokens == sum(map(len, windows))
        assert row.kl == pytest.approx(total / row.n_tokens, rel=2e-3, abs=1e-8)
        assert row.step == (-1 if change.step is None else 3)


def test_impossible_requests_are_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(InputError, match="windows"):
        ChannelStatistics(tiny_model, {})
    with pytest.raises(InputError, match="of empty"):
        MassiveActivations(tiny_model, {"empty": []})
    with pytest.raises(InputError, match="ascend"):
        ChannelStatistics(tiny_model, TEXTS, first_steps=(1, 4))
    for change in (
        Intervention("blocks.0", 10**6),
        Intervention("blocks.0.o", 0, step=10**6),
        Intervention("blocks.77", 0),
    ):
        with pytest.raises(InputError):
            Interventions(tiny_model, TEXTS["a"], [change])
