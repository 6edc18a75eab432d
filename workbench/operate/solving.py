"""From a profile of unit damages to a recipe: the solver's answer with its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import pandas as pd

from workbench.analysis.profile import Profile
from workbench.apply.recipe import Budget, DamageSource, Identity, Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.solver import pareto, solve
from workbench.errors import RecipeError, suggest

COLUMNS = ("kl", "fisher", "gradient")  # best first


def damage_column(profile: Profile, named: str | None = None) -> Literal["kl", "fisher", "gradient"]:
    """The column to solve for: the named one, else measured KL before Fisher before gradient.

    Raises:
        RecipeError: no such column.
    """
    there = [column for column in COLUMNS if column in profile.table]
    if not there:
        raise RecipeError(
            f"This profile ({profile.kind}) has no damages by unit: give one that `analyze sensitivity --out` wrote."
        )
    if named is not None and named not in there:
        raise RecipeError(f"The profile has no damage '{named}', only {', '.join(there)}." + suggest(named, there))
    return cast(Literal["kl", "fisher", "gradient"], named or there[0])


def recipe_from_profile(
    profile: Profile,
    budget: Budget,
    *,
    pinned: Mapping[str, int] | None = None,
    damage: str | None = None,
    output_bits: int = 8,
    seed: int = 0,
) -> Recipe:
    """Solve a profile of kind ``unit-sensitivity`` for a budget.

    Args:
        profile: of ``operate.sensitivity.look_at_units``.
        budget: average effective bits or bytes of the blocks' linears.
        pinned: widths that the user fixes, by unit.
        damage: column to minimise; None for the best there is.
        output_bits: of embedding and output layer.
        seed: of the recipe.

    Raises:
        RecipeError: an impossible budget, an unknown unit or column.
    """
    column = damage_column(profile, damage)
    parameters: dict[str, Any] = profile.provenance.parameters
    source = DamageSource(column=column, profile=profile.provenance.key, text=profile.provenance.text)
    solution = solve(solver_table(profile, column), budget, pinned, source=source)
    method = RtnConfig(
        unit_bits=solution.unit_bits,
        group_size=parameters["group_size"],
        symmetric=parameters["symmetric"],
        output_bits=output_bits,
    )
    return Recipe(
        model=profile.provenance.model,
        fingerprint=Identity(
            architecture=profile.provenance.architecture_sha256, weights=profile.provenance.weights_sha256
        ),
        seed=seed,
        methods=(method,),
        solution=solution,
    )


def solver_table(profile: Profile, column: str) -> pd.DataFrame:
    """The profile's table in the columns that the solver takes, with ``column`` as the damage."""
    table = profile.table.rename(columns={column: "damage"})
    return table[["unit", "bits", "damage", "stored_bits", "n_weights"]]


def trade_off(profile: Profile, *, damage: str | None = None, points: int = 12) -> pd.DataFrame:
    """Effective bits against predicted damage: the solved mix at ``points`` budgets, and each width everywhere.

    Returns columns ``effective_bits``, ``damage``, ``kind`` (``solved`` | ``uniform``).
    """
    table = solver_table(profile, damage_column(profile, damage))
    solved = pareto(table, points).rename(columns={"achieved_bits": "effective_bits"})
    same = table.groupby("bits")[["damage", "stored_bits", "n_weights"]].sum()
    uniform = pd.DataFrame({"effective_bits": same["stored_bits"] / same["n_weights"], "damage": same["damage"]})
    return pd.concat(
        [solved[["effective_bits", "damage"]].assign(kind="solved"), uniform.assign(kind="uniform")],
        ignore_index=True,
    )
