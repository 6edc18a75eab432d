"""The loop's two long halves as a sitting needs them: look at a model, then try a recipe. No threads, no UI.

Sizes are small on purpose: this is for sitting in front of. Every number comes with how much it rests on, and
``workbench measure`` gives the same numbers with enough windows and pairs for a claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from workbench.analysis.profile import Profile
from workbench.apply.compress import compress
from workbench.apply.recipe import Budget, Recipe
from workbench.formats.compressed import CompressedModel
from workbench.measure import Measurement, measure
from workbench.models import LoadedModel
from workbench.operate.runs import record_measurement
from workbench.operate.sensitivity import SensitivityOptions, chosen_prompts
from workbench.operate.sensitivity import look as look_at
from workbench.operate.solving import recipe_from_profile, trade_off
from workbench.progress import Job
from workbench.store import Store
from workbench.view.demo import Measuring, side_by_side
from workbench.view.texts import Generation


@dataclass(frozen=True)
class Settings(Measuring):
    """How much is looked at and measured in one sitting.

    Attributes:
        looking: prompts, widths, group size, calibration windows.
        output_bits: of embedding and output layer.
    """

    looking: SensitivityOptions = field(default_factory=lambda: SensitivityOptions(n_prompts=2, new_tokens=40))
    output_bits: int = 8
    n_windows: int = 8
    pairs: int = 10


@dataclass(frozen=True)
class Look:
    """What was seen of a model.

    Attributes:
        steps: profile of ``DecodingSteps`` over the prompts and the model's own replies.
        units: profile of kind ``unit-sensitivity``: one row per unit and width.
        damage: its column that budgets are solved for.
        trade_off: effective bits against predicted damage (``operate.solving.trade_off``).
    """

    steps: Profile
    units: Profile
    damage: str
    trade_off: pd.DataFrame

    @property
    def score_tokens(self) -> int:
        """Tokens of text behind the units' scores."""
        return int(self.units.provenance.parameters["score_tokens"])

    def possible_bits(self, pinned: Mapping[str, int]) -> tuple[float, float]:
        """Smallest and largest effective bits that the widths allow with these pins."""
        table = self.units.table
        fixed = table["unit"].map(dict(pinned))
        stored = table[fixed.isna() | (fixed == table["bits"])].groupby("unit", observed=True)["stored_bits"]
        weights = float(table.drop_duplicates("unit")["n_weights"].sum())
        return float(stored.min().sum()) / weights, float(stored.max().sum()) / weights


@dataclass(frozen=True)
class Trial:
    """One recipe, applied and measured against dense.

    Attributes:
        recipe: what was done.
        folder: the compressed model.
        generations: replies side by side, greedy, in the model's chat template.
        found: what was measured.
        run: its number in the store.
    """

    recipe: Recipe
    folder: Path
    generations: tuple[Generation, ...]
    found: Measurement
    run: int

    @property
    def point(self) -> pd.DataFrame:
        """Where the measurement lies in the trade-off: ``effective_bits``, ``kl_mean``, ``kl_low``, ``kl_high``."""
        kl = self.found.quality.kl_mean
        bits = self.found.sizes.effective_bits
        return pd.DataFrame({"effective_bits": [bits], "kl_mean": kl.value, "kl_low": kl.low, "kl_high": kl.high})


def look(model: LoadedModel, settings: Settings, store: Store, job: Job) -> Look:
    """Look at every decoding step of the prompts' replies, score every unit, and solve for several budgets."""
    seen = look_at(model, settings.looking, store, job)
    job.stage("solve for several budgets", 1)
    curve = trade_off(seen.units, damage=seen.damage)
    job.advance()
    return Look(seen.steps, seen.units, seen.damage, curve)


def solve(seen: Look, bits: float, pinned: Mapping[str, int], settings: Settings) -> Recipe:
    """The recipe with the least predicted damage at so many effective bits.

    Raises:
        RecipeError: no choice of widths meets the budget.
    """
    return recipe_from_profile(
        seen.units,
        Budget(average_bits=bits),
        pinned=pinned,
        damage=seen.damage,
        output_bits=settings.output_bits,
        seed=settings.looking.seed,
    )


def try_recipe(model: LoadedModel, recipe: Recipe, folder: Path, settings: Settings, store: Store, job: Job) -> Trial:
    """Compress into ``folder``, read it back, generate beside dense, and measure. What is on disk is what is measured.

    Args:
        model: dense.
        recipe: what to do.
        folder: a new folder, or one that holds a compressed model, which is replaced.
        settings: how much.
        store: where the run is recorded.
        job: progress and cancel.
    """
    compress(model, recipe, job=job).save(folder, overwrite=True)
    compressed = CompressedModel.load(folder)
    looking = settings.looking
    generations = side_by_side(model, compressed, chosen_prompts(looking), looking.new_tokens, job)
    del compressed  # measuring opens it by itself
    found = measure(folder, model, seed=looking.seed, job=job, **settings.arguments)
    number = record_measurement(store, "measure", found, name=f"notebook, {found.sizes.effective_bits:.2f} bits")
    return Trial(recipe, folder, generations, found, number)
