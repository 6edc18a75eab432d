"""A sitting with outliers: predictions that follow what is picked, a run, and its pictures and tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.store import Store
from workbench.view import outliers_error_plots as error_plots
from workbench.view import outliers_panels
from workbench.view import outliers_plots as plots
from workbench.view.outliers_controller import PREDICTING, OutlierSitting, OutlierState
from workbench.view.outliers_loop import group_factors
from workbench.view.outliers_picks import OutlierSettings, Protection, Rounding

UNIT = "blocks.1.down"
SETTINGS = OutlierSettings(
    look_windows=2,
    look_length=80,
    surface_tokens=12,
    calibration_tokens=512,
    n_windows=2,
    window_length=24,
    pairs=1,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outliers")


def made(home: Path, folder: Path, method: str) -> OutlierSitting:
    sitting = OutlierSitting(folder, method=method, unit=UNIT, settings=SETTINGS, store=Store(home / "home"))
    sitting.analyse().result()
    sitting.wait()
    return sitting


@pytest.fixture(scope="module")
def awq(home: Path, model_folder: Path) -> Iterator[OutlierSitting]:
    sitting = made(home, model_folder, "awq")
    yield sitting
    sitting.close()


@pytest.fixture(scope="module")
def tender(home: Path, model_folder: Path) -> Iterator[OutlierSitting]:
    sitting = made(home, model_folder, "tender")
    yield sitting
    sitting.close()


@pytest.fixture
def weights(awq: OutlierSitting) -> OutlierSitting:
    awq.set_protection(**vars(Protection()))
    awq.select_unit(UNIT)
    awq.select_steps(None)
    awq.wait()
    return awq


@pytest.fixture
def groups(tender: OutlierSitting) -> OutlierSitting:
    tender.set_rounding(**vars(Rounding()))
    tender.select_unit(UNIT)
    tender.wait()
    return tender


def error(sitting: OutlierSitting) -> float:
    assert sitting.state.predicted is not None
    return sitting.state.predicted.error


def every(sitting: OutlierSitting, column: str = "error") -> float:
    table = sitting.wait().every_unit
    assert table is not None
    assert len(table) == 12
    return float(table[column].sum())


def test_finer_codes_and_more_kept_channels_cost_less(weights: OutlierSitting) -> None:
    for clip, alpha in ((False, 0.0), (True, None)):
        weights.set_protection(clip=clip, alpha=alpha, share=0.0)
        of_unit, of_all = [], []
        for bits in (2, 3, 4, 8):
            weights.set_protection(bits=bits)
            of_unit.append(error(weights))
            of_all.append(every(weights))
        assert (np.diff(of_unit) < 0).all()
        assert (np.diff(of_all) < 0).all()
    weights.set_protection(bits=3)
    for by in ("activation", "weight", "random"):
        shares = []
        for share in (0.0, 0.02, 0.1, 0.5, 1.0):
            weights.set_protection(share=share, by=by)
            shares.append(error(weights))
        assert (np.diff(shares) < 0).all()
        assert shares[-1] == pytest.approx(0, abs=1e-9)


def test_a_search_is_no_worse_than_no_scales_and_plain_is_plain(weights: OutlierSitting) -> None:
    weights.set_protection(clip=False)
    found = weights.state.predicted
    assert found is not None
    assert found.error <= found.rounded
    weights.set_protection(alpha=0.0)
    assert error(weights) == pytest.approx(found.rounded, rel=1e-5)
    assert every(weights) == pytest.approx(every(weights, "plain"), rel=1e-5)
    weights.set_protection(alpha=0.7)
    assert weights.state.predicted is not None
    assert weights.state.predicted.alpha == 0.7
    assert weights.state.scaling is not None
    assert weights.state.scaling[1].std() > 0


def test_predictions_are_of_the_squared_change_of_the_outputs(weights: OutlierSitting, model_folder: Path) -> None:
    """Against the definition, written out for plain rounding."""
    from workbench.formats.codes import dequantize, quantize_groups
    from workbench.models import load

    weights.set_protection(alpha=0.0, clip=False)
    state = weights.state
    assert state.look is not None
    weight = load(str(model_folder)).linear_module(UNIT).weight.detach()
    change = dequantize(quantize_groups(weight, 3, 64)) - weight
    square = state.look.inputs(UNIT).square
    expected = (change.square().sum(0) * square).sum() / (weight.square().sum(0) * square).sum()
    assert error(weights) == pytest.approx(float(expected), rel=1e-4)


def test_what_is_not_possible_is_one_clear_error(weights: OutlierSitting) -> None:
    before = weights.state
    weights.select_unit("blocks.1.dawn")
    assert "Unknown unit 'blocks.1.dawn'" in weights.state.error
    assert "blocks.1.down" in weights.state.error
    assert weights.state.unit == before.unit
    weights.set_protection(alpha=1.5)
    assert "alpha" in weights.state.error
    assert weights.state.protection == before.protection
    weights.set_protection(share=-0.1)
    assert "share" in weights.state.error
    weights.set_protection(bits=17)
    assert "bits" in weights.state.error
    weights.select_steps(7)
    assert "0, 1, 64" in weights.state.error
    weights.select_steps(64)
    assert weights.state.error == ""
    with pytest.raises(InputError, match="choose 'awq' or 'tender'"):
        OutlierSitting(method="gptq")  # type: ignore[arg-type]


def test_a_unit_that_is_not_there_ends_the_analysis(home: Path, model_folder: Path) -> None:
    sitting = OutlierSitting(model_folder, unit="blocks.9.qkv", settings=SETTINGS, store=Store(home / "home"))
    with pytest.raises(InputError, match="nothing to work with"):
        sitting.run()
    with pytest.raises(InputError, match="Unknown unit"):
        sitting.analyse().result()
    assert "Unknown unit" in sitting.state.error
    sitting.close()


def test_the_unit_and_its_surface_go_together(weights: OutlierSitting) -> None:
    weights.select_unit("blocks.2.qkv")
    state = weights.wait()
    assert state.current_surface is not None
    assert state.current_surface.table["channel"].nunique() == 48
    assert state.channels is not None
    assert len(state.channels) == 48
    one = weights.state.channels
    weights.select_steps(0)
    first = weights.state.channels
    assert one is not None
    assert first is not None
    assert first["n_tokens"].max() < one["n_tokens"].max()
    both = first.merge(one, on="channel", validate="1:1")
    assert (both["absmax_x"] <= both["absmax_y"]).all()


def test_a_prediction_makes_room_for_what_is_asked_for(weights: OutlierSitting) -> None:
    seen: list[str] = []
    stop = weights.subscribe(lambda state: seen.append(state.busy))
    weights.set_protection(bits=4, group_size=16)
    found = weights.intervene().result()
    stop()
    assert PREDICTING in seen
    assert every(weights) > 0  # and is taken up again
    assert not weights.state.error
    assert (found["kl"] >= 0).all()
    strong = found[found["what"].str.contains("by activation")]
    assert len(strong) == 1
    assert strong["site"].iloc[0] == UNIT


def test_a_cancelled_prediction_stays_away(weights: OutlierSitting) -> None:
    def cancel(state: OutlierState) -> None:
        if state.busy == PREDICTING and not state.cancelling:
            weights.cancel()

    stop = weights.subscribe(cancel)
    weights.set_protection(group_size=8)
    with pytest.raises(Exception, match="Cancelled"):
        weights.wait()
    stop()
    assert weights.state.busy == ""
    assert weights.state.every_unit is None
    weights.set_protection(bits=4)
    assert every(weights) > 0


def test_a_run_measures_beside_the_prediction(weights: OutlierSitting) -> None:
    trial = weights.run().result()
    table = trial.table.set_index("method")
    assert list(table.index) == ["dense", "rtn, 3 bits", "awq, 3 bits"]
    assert table.predicted["rtn, 3 bits"] == pytest.approx(every(weights, "plain"))
    assert table.predicted["awq, 3 bits"] == pytest.approx(every(weights))
    assert table.effective_bits["awq, 3 bits"] == table.effective_bits["rtn, 3 bits"]
    assert table.ratio["dense"] == 1
    low, value, high = (table[name]["awq, 3 bits"] for name in ("to_rival_low", "to_rival", "to_rival_high"))
    assert low <= value <= high
    assert weights._store.runs().iloc[0]["name"] == "notebook, awq, 3 bits"

    weights.set_protection(share=0.1, by="activation")
    kept = weights.run().result()
    assert kept.engine == "reference"  # no other mixes codes and 16-bit columns
    own = kept.table.iloc[-1]
    assert own["effective_bits"] > table.effective_bits["awq, 3 bits"]
    assert own["predicted"] < table.predicted["awq, 3 bits"]
    assert np.isnan(own["ms_per_token"])
    html = outliers_panels.measured(kept)
    assert "10 % by activation" in html
    assert "Not timed" in html


def test_more_bits_and_groups_round_inputs_better(groups: OutlierSitting) -> None:
    state = groups.state
    assert state.look is not None
    assert state.look.groups is not None
    table = state.look.groups.table
    by_bits = table.set_index(["unit", "scales", "groups", "bits"])[["activation_error", "weight_error"]].unstack(
        "bits"
    )
    by_bits = by_bits.dropna()
    assert (by_bits["activation_error"][8] < by_bits["activation_error"][4]).all()
    assert (by_bits["weight_error"][8] < by_bits["weight_error"][4]).all()
    token = table[(table["scales"] == "token") & (table["bits"] == 8)]
    one = token[token["groups"] == 1].set_index("unit")["activation_error"]
    own = token[token["chosen"]].set_index("unit")["activation_error"]
    assert len(own) == len(one) == 12
    assert (own <= one * 1.02).all()
    groups.set_rounding(groups=1)
    assert every(groups) == pytest.approx(every(groups, "plain"))
    groups.set_rounding(groups=13)
    assert "groups" in groups.state.error
    assert groups.state.rounding.groups == 1


def test_tender_is_measured_beside_integers_per_token(groups: OutlierSitting) -> None:
    groups.set_rounding(groups=3)
    trial = groups.run().result()
    assert list(trial.table["method"]) == ["dense", "integers per token, 8 bits", "tender, 8 bits"]
    compressed = groups.compress().result()
    assert compressed.recipe["methods"][0]["groups"] == 3
    assert groups.state.look is not None
    factors = group_factors(groups.state.look, UNIT, groups.state.rounding, 3)
    assert set(factors) <= {1.0, 0.5, 0.25}


def test_pictures_show_how_much_they_rest_on(weights: OutlierSitting, groups: OutlierSitting) -> None:
    for sitting in (weights, groups):
        state = sitting.state
        assert state.look is not None
        assert state.channels is not None
        said = state.look.said()
        assert said == "320 tokens: 2 windows of prose, 2 windows of pydoc"
        profile = plots.channel_profile(state.channels, UNIT, said, 3)
        assert (np.diff(profile.data[0].y) <= 0).all()
        assert said in profile.layout.title.subtitle.text
        counts = [int(note.text.rsplit(" ", 1)[1]) for note in profile.layout.annotations]
        assert sum(counts) == len(state.channels)
        scatter = plots.salience_scatter(state.channels, UNIT, said, 0.05)
        assert sum(len(trace.x) for trace in scatter.data) == len(state.channels)
        assert state.every_unit is not None
        errors = error_plots.unit_errors(state.every_unit, state.picked_name, UNIT)
        assert len(errors.data) == 9
    state = groups.state
    assert state.look is not None
    assert state.look.groups is not None
    drawn = error_plots.group_errors(state.look.groups.table, UNIT, 8, "token", "some text")
    assert drawn.data[-2].name == UNIT
    with pytest.raises(InputError, match="Nothing was predicted"):
        error_plots.group_errors(state.look.groups.table, UNIT, 3, "token", "")


def test_a_surface_is_bounded_scaled_and_escaped(weights: OutlierSitting) -> None:
    surface = weights.state.current_surface
    assert surface is not None
    n = surface.table["channel"].nunique()
    figure = plots.surface_maps(surface.table, UNIT, np.full(n, 2.0), "<b>halved</b>", lambda ids: "<i>x</i>")
    before, after = (np.asarray(trace.customdata) for trace in figure.data)
    np.testing.assert_allclose(after, before / 2, rtol=1e-6)
    text = figure.to_json()
    assert "<i>x" not in text
    assert "<b>halved" not in text
    wide = np.repeat(surface.table["value"].abs().max(), 600)
    table = surface.table[surface.table["step"] == 0].iloc[:1]
    table = table.loc[table.index.repeat(600)].assign(channel=np.arange(600), value=wide)
    pooled = plots.surface_maps(table, UNIT, np.ones(600), "as it is", str)
    assert np.asarray(pooled.data[0].z).shape == (1, 200)
    assert "each cell the largest of 3 channels" in pooled.layout.title.subtitle.text
    with pytest.raises(InputError, match="scales were given"):
        plots.surface_maps(surface.table, UNIT, np.ones(3), "", str)


def test_tables_are_escaped(weights: OutlierSitting) -> None:
    html = outliers_panels.massive(weights.state, lambda ids: "<script>alert(1)</script>")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "5.0%" in outliers_panels.overlaps(weights.state, 0.05)
    weights.intervene().result()
    assert "KL to dense" in outliers_panels.interventions(weights.state)
    weights.wait()
    assert "added up" in outliers_panels.predicted(weights.state)
