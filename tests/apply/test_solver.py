"""The solver: equal to brute force, never over budget, pins kept, and impossible budgets explained."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.analysis.profile import TextRecord
from workbench.apply.recipe import Budget, DamageSource
from workbench.apply.solver import monotone_damage, pareto, read_choices, solve
from workbench.errors import RecipeError

WIDTHS = (2, 3, 4, 5, 6, 8)


def table(damages: dict[str, dict[int, float]], sizes: dict[str, int], overhead: float = 0.25) -> pd.DataFrame:
    rows = [
        (unit, bits, value, math.ceil(sizes[unit] * (bits + overhead)), sizes[unit])
        for unit, by_bits in damages.items()
        for bits, value in by_bits.items()
    ]
    return pd.DataFrame(rows, columns=["unit", "bits", "damage", "stored_bits", "n_weights"])


def realistic(n_blocks: int, seed: int) -> pd.DataFrame:
    """Damages as they are measured: falling fourfold with each bit, over orders of magnitude, with noise."""
    rng = np.random.default_rng(seed)
    sizes = {"qkv": 552_960, "o": 331_776, "gate_up": 1_769_472, "down": 884_736}
    units = {f"blocks.{b}.{kind}": size for b in range(n_blocks) for kind, size in sizes.items()}
    damages = {
        unit: {w: float(np.exp(rng.normal(0, 2)) * 4.0**-w * np.exp(rng.normal(0, 0.2))) for w in WIDTHS}
        for unit in units
    }
    return table(damages, units)


@st.composite
def instances(draw: st.DrawFn) -> tuple[pd.DataFrame, dict[str, int], float]:
    """A small table (damages tied, tiny, huge or out of order), pins, and a place between least and most bits."""
    n = draw(st.integers(1, 4))
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4, unique=True))
    value = st.one_of(
        st.sampled_from([0.0, 1.0, 1e-9, 1e-3]),
        st.floats(1e-9, 1e3),
        st.integers(0, 3).map(float),
    )
    sizes = {f"u{i}": draw(st.sampled_from([1, 7, 8, 64, 1000, 123_456])) for i in range(n)}
    damages = {unit: {bits: draw(value) for bits in widths} for unit in sizes}
    pinned = draw(st.dictionaries(st.sampled_from(sorted(sizes)), st.sampled_from([*widths, 16]), max_size=2))
    return table(damages, sizes), pinned, draw(st.floats(0, 1))


def brute_force(damage: pd.DataFrame, pinned: dict[str, int], limit: int) -> float:
    """Least damage of all assignments of the (monotone) table within the limit."""
    choices = read_choices(damage)
    per_unit = []
    for unit, options in choices.by_unit.items():
        known = {c.bits: (c.damage, c.stored_bits) for c in options}
        known.setdefault(16, (0.0, 16 * choices.n_weights[unit]))
        per_unit.append([known[pinned[unit]]] if unit in pinned else [known[c.bits] for c in options])
    return min(
        math.fsum(d for d, _ in assignment)
        for assignment in itertools.product(*per_unit)
        if sum(s for _, s in assignment) <= limit
    )


def stored(damage: pd.DataFrame, unit_bits: dict[str, int]) -> int:
    known = {(row.unit, row.bits): row.stored_bits for row in damage.itertuples()}
    sizes = dict(zip(damage["unit"], damage["n_weights"], strict=True))
    return sum(int(known.get((unit, bits), 16 * sizes[unit])) for unit, bits in unit_bits.items())


@settings(deadline=None, max_examples=150)
@given(instance=instances(), by_bytes=st.booleans())
def test_equal_to_brute_force_within_budget_and_pins(
    instance: tuple[pd.DataFrame, dict[str, int], float], by_bytes: bool
) -> None:
    damage, pinned, place = instance
    extremes = []
    for pick in ("idxmin", "idxmax"):
        rows = damage.loc[getattr(damage.groupby("unit")["stored_bits"], pick)()]
        extremes.append(stored(damage, {**dict(zip(rows["unit"], rows["bits"], strict=True)), **pinned}))
    limit = math.ceil((extremes[0] + place * (extremes[1] - extremes[0])) / 8) * 8
    total = int(damage.drop_duplicates("unit")["n_weights"].sum())
    budget = Budget(bytes=limit // 8) if by_bytes else Budget(average_bits=limit / total)
    found = solve(damage, budget, pinned)
    assert stored(damage, found.unit_bits) <= limit
    assert found.achieved_bits * total == pytest.approx(stored(damage, found.unit_bits), rel=1e-12)
    assert found.achieved_bytes == math.ceil(stored(damage, found.unit_bits) / 8)
    assert pinned.items() <= found.unit_bits.items()
    assert set(found.unit_bits) == set(damage["unit"])
    assert found.gap == 0
    best = brute_force(damage, pinned, limit)
    assert found.predicted_damage == pytest.approx(best, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("bits", [2.5, 3.25, 4.25, 4.5, 6.25])
def test_a_real_size_is_solved_to_optimality_within_budget(bits: float) -> None:
    damage = realistic(30, seed=1)
    found = solve(damage, Budget(average_bits=bits))
    assert bits - 0.01 < found.achieved_bits <= bits
    assert found.gap == 0
    uniform = math.floor(bits - 0.25)
    choices = read_choices(damage)
    if uniform in WIDTHS:
        same = math.fsum(c.damage for cs in choices.by_unit.values() for c in cs if c.bits == uniform)
        assert found.predicted_damage < same
    # No single exchange within the room that is left does better.
    room = bits * choices.total_weights - stored(damage, found.unit_bits)
    for unit, options in choices.by_unit.items():
        now = next(c for c in options if c.bits == found.unit_bits[unit])
        assert not any(c.damage < now.damage and c.stored_bits <= now.stored_bits + room for c in options)


def test_the_answer_does_not_depend_on_row_order_or_repetition() -> None:
    damage = realistic(6, seed=3)
    first = solve(damage, Budget(average_bits=4.0))
    assert solve(damage.sample(frac=1, random_state=1), Budget(average_bits=4.0)) == first
    assert solve(damage, Budget(average_bits=4.0)) == first


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_unit_of_damage_does_not_matter(factor: float) -> None:
    damage = realistic(6, seed=4)
    scaled = damage.assign(damage=damage["damage"] * factor)
    first, second = (solve(d, Budget(average_bits=3.7)) for d in (damage, scaled))
    assert first.unit_bits == second.unit_bits


def test_fewer_bits_are_preferred_where_more_do_no_better() -> None:
    damage = table({"a": {2: 1.0, 3: 0.5, 4: 0.5, 8: 0.5}, "b": {2: 0.0, 8: 0.0}}, {"a": 100, "b": 100})
    assert solve(damage, Budget(average_bits=16)).unit_bits == {"a": 3, "b": 2}


def test_more_budget_never_does_more_damage() -> None:
    curve = pareto(realistic(8, seed=5), points=12)
    assert (np.diff(curve["damage"]) <= 1e-12).all()
    assert (curve["achieved_bits"] <= curve["budget_bits"] + 1e-9).all()
    assert len(curve) == 12
    assert list(curve.columns) == ["budget_bits", "achieved_bits", "achieved_bytes", "damage", "gap"]
    with pytest.raises(RecipeError, match="at least 2"):
        pareto(realistic(1, seed=0), points=1)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_monotone_damage_falls_keeps_the_mean_and_is_stable(damages: list[float]) -> None:
    smooth = monotone_damage(np.array(damages))
    assert (np.diff(smooth) <= 1e-9).all()
    assert smooth.mean() == pytest.approx(np.mean(damages), abs=1e-9)
    np.testing.assert_allclose(monotone_damage(smooth), smooth, atol=1e-9)
    falling = np.sort(damages)[::-1]
    np.testing.assert_allclose(monotone_damage(falling), falling, atol=1e-12)


def test_luck_does_not_attract_the_solver_unless_asked() -> None:
    """At 2 bits unit a looks harmless by chance; its wider widths show that it is not."""
    damage = table({"a": {2: 0.0, 3: 9.0, 4: 9.0}, "b": {2: 5.0, 3: 4.0, 4: 1.0}}, {"a": 100, "b": 100})
    assert solve(damage, Budget(average_bits=3.25), monotone=False).unit_bits == {"a": 2, "b": 4}
    assert solve(damage, Budget(average_bits=3.25)).predicted_damage == pytest.approx(6 + 1)


def test_impossible_budgets_say_the_range_and_why() -> None:
    damage = realistic(2, seed=0)
    with pytest.raises(RecipeError) as error:
        solve(damage, Budget(average_bits=2.0))
    message = str(error.value)
    assert "2 average bits is impossible" in message
    assert "2.250 to 8.250 average bits" in message
    assert "2.000 bits per weight in codes and 0.250 in group scales" in message
    assert "pinned" not in message
    pinned = {"blocks.0.gate_up": 8, "blocks.1.gate_up": 16}
    with pytest.raises(RecipeError) as error:
        solve(damage, Budget(average_bits=4.0), pinned)
    assert re.search(r"2 pinned units add [4-9]\.\d+", str(error.value))
    assert "unpin" in str(error.value)
    low = solve(damage, Budget(average_bits=2.25)).achieved_bytes
    with pytest.raises(RecipeError, match=f"{low:,} to"):
        solve(damage, Budget(bytes=low - 1))
    assert solve(damage, Budget(bytes=low)).achieved_bytes == low


def test_a_budget_above_everything_gives_the_best() -> None:
    found = solve(realistic(2, seed=0), Budget(average_bits=12))
    assert found.achieved_bits <= 8.25
    assert found.gap == 0


def test_pins_that_cannot_be_kept_name_the_nearest() -> None:
    damage = realistic(1, seed=0)
    with pytest.raises(RecipeError, match=r"Did you mean 'blocks\.0\.qkv'"):
        solve(damage, Budget(average_bits=4), {"blocks.0.qvk": 4})
    with pytest.raises(RecipeError, match="nearest is 6"):
        solve(damage, Budget(average_bits=4), {"blocks.0.qkv": 7})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop(columns="stored_bits"), "lacks the column 'stored_bits'"),
        (lambda t: t.iloc[:0], "no rows"),
        (lambda t: t.assign(damage=t["damage"].where(t["bits"] != 3)), "at 3 bits is nan"),
        (lambda t: t.assign(damage=np.inf), "is inf"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "twice"),
        (lambda t: t.assign(n_weights=range(len(t))), "contradicts"),
    ],
)
def test_a_damage_table_that_is_not_complete_is_refused(change: object, says: str) -> None:
    assert callable(change)
    with pytest.raises(RecipeError, match=says):
        solve(change(realistic(1, seed=0)), Budget(average_bits=4))


def test_what_the_damage_was_read_from_is_recorded() -> None:
    text = TextRecord(name="prose", split="tuning", sha256="1" * 64, n_tokens=10)
    source = DamageSource(column="kl", profile="2" * 64, text=text)
    assert solve(realistic(2, seed=0), Budget(average_bits=4), source=source).damage == source


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS writes a debugging line to standard output on some instances, which would break JSON written there."""
    damage = realistic(30, seed=0)
    for bits in np.linspace(2.4, 6, 8):
        solve(damage, Budget(average_bits=float(bits)))
    assert capfd.readouterr() == ("", "")
