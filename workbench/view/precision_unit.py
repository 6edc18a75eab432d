"""One unit of a sitting with widths chosen per token, as ipywidgets: errors, threshold, share of wide reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.precision import require_selectors
from workbench.view import precision_panels
from workbench.view import precision_plots as plots
from workbench.view.parts import ROW, WIDE, Live, Picture, button, html, title, widgets
from workbench.view.precision_controller import PrecisionSitting, PrecisionState


class UnitPart(widgets.VBox):  # type: ignore[misc]
    """Pick a unit, and move its threshold by a slider or by dragging the line in its distribution.

    Args:
        sitting: whose state is shown.

    Attributes:
        low: narrower width of the step that is shown; None before there is one.
        menu: of units; its ``value`` is the unit that is shown.
    """

    def __init__(self, sitting: PrecisionSitting) -> None:
        self._sitting = sitting
        self._ranged: tuple[str, int] | None = None
        self.low: int | None = None
        self.menu = widgets.Dropdown(
            options=[], description="Unit", tooltip="Or click a row of the heat map", layout={"width": "260px"}
        )
        self.menu.add_class("wb-unit")
        self._threshold = widgets.FloatLogSlider(
            1.0,
            base=10,
            min=-3,
            max=3,
            step=0.01,
            continuous_update=False,
            disabled=True,
            description="Threshold",
            tooltip="Or drag the dashed line of the distribution",
            readout_format=".4g",
            layout={"width": "420px"},
        )
        self._threshold.add_class("wb-threshold")
        self._reset = button("Reset thresholds", "wb-reset", "Back to the thresholds of the target", "undo")
        self._share = html("wb-share")
        self._steps = Picture("wb-steps")
        self._distribution = Live("wb-distribution", 330, dragged=self._move)
        self._threshold.observe(lambda change: self._move(change["new"], self._threshold.step), "value")
        self._reset.on_click(lambda _: sitting.reset_thresholds())
        super().__init__(
            [
                title("One unit: its error, its threshold, its share of wide reads"),
                widgets.HBox([self.menu, self._threshold, self._reset], layout=ROW),
                self._share,
                self._steps,
                self._distribution,
            ],
            layout=WIDE,
        )

    def _move(self, threshold: float, least: float = 1e-6) -> None:
        """Move the threshold, unless the widget only shows what it is, to within ``least`` powers of ten."""
        row = self._row(self._sitting.state)
        if row is None or self.low is None or not threshold > 0:
            return
        present = float(row["threshold"])
        if not _drawn(present) or abs(np.log10(threshold / present)) > least:
            self._sitting.move_threshold(self.menu.value, self.low, float(threshold))

    def _row(self, state: PrecisionState) -> pd.Series | None:
        """The present unit's row of the thresholds."""
        if state.cuts is None:
            return None
        rows = state.cuts[(state.cuts["unit"] == self.menu.value) & (state.cuts["low"] == self.low)]
        return rows.iloc[0] if len(rows) else None

    def show(self, state: PrecisionState) -> None:
        """Threshold, share and pictures of the present unit."""
        unit, low, look, compressed = self.menu.value, self.low, state.look, state.compressed
        if look is None or low is None or unit is None or compressed is None:
            return
        table, row = look.table, self._row(state)
        decided = bool(((table["unit"] == unit) & (table["low"] == low) & (table["low"] < table["high"])).any())
        threshold = float(row["threshold"]) if row is not None and _drawn(row["threshold"]) else None
        self._share.value = precision_panels.share(state, unit, low, row, decided)
        self._reset.disabled = not state.moved
        self._threshold.disabled = threshold is None
        if threshold is not None:
            self._set_slider(threshold, unit, low)
        if not decided:
            return
        self._steps.show(plots.unit_steps(look, unit, low, threshold, now=state.choices))
        index = [one.id for one in compressed.architecture.units].index(unit)
        selectors = require_selectors(compressed)
        self._distribution.show(plots.error_distribution(look, selectors, index, unit, low, threshold))

    def _set_slider(self, threshold: float, unit: str, low: int) -> None:
        """Show a threshold; another unit's gets a range of its own, a factor of ten on both sides."""
        slider, middle = self._threshold, float(np.log10(threshold))
        # All at once: a range alone would cut off the value, which would seem to be moved by hand.
        with slider.hold_sync(), slider.hold_trait_notifications():
            if self._ranged != (unit, low) or not slider.min <= middle <= slider.max:
                slider.min, slider.max = middle - 1.0, middle + 1.0
                self._ranged = (unit, low)
            slider.value = threshold


def _drawn(threshold: Any) -> bool:
    return bool(np.isfinite(threshold) and threshold > 0)
