"""The figures of a report, each with its caption and table: what was seen, what was picked, what was measured."""

from __future__ import annotations

import pandas as pd

from workbench.analysis.sensitivity import rank_linears, rank_units
from workbench.apply.recipe import Recipe
from workbench.measure import Measurement
from workbench.operate.sensitivity import Sensitivity
from workbench.operate.solving import trade_off
from workbench.view.plots import (
    bits_table,
    damage_by_unit,
    latency_comparison,
    latency_table,
    pareto,
    ranked_bars,
    step_heatmap,
)
from workbench.view.report import ReportFigure

SHOWN_BITS = 4  # the width that pictures of sensitivity are for, where it was looked at


def looked_figures(seen: Sensitivity) -> list[ReportFigure]:
    """Sensitivity: the heat map over decoding steps, the ranked linears and the ranked units."""
    widths = sorted(seen.steps.table["bits"].unique().tolist())
    bits = SHOWN_BITS if SHOWN_BITS in widths else widths[len(widths) // 2]
    linears = rank_linears(seen.steps, bits)
    units = rank_units(seen.units.table, bits, seen.damage)
    steps = len(seen.steps.table[["sequence", "step"]].drop_duplicates())
    return [
        ReportFigure(
            step_heatmap(seen.steps, bits),
            f"Relative output error of every linear at {bits} bits, at each of {steps} steps: the norm of what "
            "rounding changes in the output, over the norm of the output. Exact, on the tokens shown.",
        ),
        ReportFigure(
            ranked_bars(linears, note=f"{bits} bits, mean over {steps} steps"),
            f"Linears by mean relative output error at {bits} bits.",
            linears,
        ),
        ReportFigure(
            ranked_bars(units, note=f"{bits} bits"),
            f"Units by damage to the model's output at {bits} bits ({_DAMAGES[seen.damage]}).",
            units,
        ),
    ]


_DAMAGES = {
    "kl": "KL divergence from dense with only that unit changed, measured",
    "fisher": "an estimate of the KL divergence, from squared gradients",
}


def picked_figures(seen: Sensitivity, recipe: Recipe, found: Measurement | None = None) -> list[ReportFigure]:
    """The choice: bits of every unit, and where it lies between bits and damage."""
    solution = recipe.solution
    if solution is None:
        return []
    curve = trade_off(seen.units, damage=solution.damage.column if solution.damage is not None else None)
    measured = None
    if found is not None:
        kl = found.quality.kl_mean
        measured = pd.DataFrame(
            [(found.sizes.effective_bits, kl.value, kl.low, kl.high, "this model, measured")],
            columns=["effective_bits", "kl_mean", "kl_low", "kl_high", "name"],
        )
    chosen = {"effective_bits": solution.achieved_bits, "damage": solution.predicted_damage}
    bits = {unit: float(width) for unit, width in solution.unit_bits.items()}
    return [
        ReportFigure(
            damage_by_unit(seen.units.table, bits, pinned=tuple(solution.pinned)),
            f"Bits of each unit, solved for {solution.budget}: {solution.achieved_bits:.4f} effective bits achieved.",
            bits_table(bits).reset_index(),
        ),
        ReportFigure(
            pareto(curve, chosen, measured, note="predicted damages are estimates and assume that units add up"),
            "Effective bits against damage: predicted for solved and for uniform bits, and as measured.",
            curve,
        ),
    ]


def measured_figures(found: Measurement) -> list[ReportFigure]:
    """Speed of both sides."""
    return [
        ReportFigure(
            latency_comparison(found.latency),
            "Time per token of dense and compressed, interleaved in one process on the same engine.",
            latency_table(found.latency),
        )
    ]
