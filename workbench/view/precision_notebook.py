"""Widths chosen per token as ipywidgets, for JupyterLab: one skin over a ``PrecisionSitting``.

The heat map and the distribution are ``FigureWidget``s, because they listen: to clicks on a unit, and to a threshold
that is dragged. The other pictures are plain figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from workbench.analysis.precision import autocorrelation, require_selectors, token_excess
from workbench.runtime.precision import Rule
from workbench.store import Store
from workbench.view import panels, precision_panels
from workbench.view import precision_plots as plots
from workbench.view.heatmap import StepGrid
from workbench.view.parts import WIDE, Picture, button, go, html, label, title, widgets
from workbench.view.precision_controller import PrecisionSitting, PrecisionState
from workbench.view.precision_loop import PrecisionSettings
from workbench.view.style import TEMPLATE

_ALL_SEQUENCES = -1
_SLIDER_STEPS = 400


class PrecisionWorkbench(widgets.VBox):  # type: ignore[misc]
    """See what decides the width of every unit at every step, move targets and thresholds, run, and compare.

    Args:
        model: what ``models.load`` takes, or the folder of a compressed model with selectors.
        target: average bits of codes to begin with.
        rule: ``gain``, or ``error`` for DP-LLM as published.
        settings: how the model is made, and how much is looked at and measured.
        store: where fits and analyses are kept; None opens the default store.
        start: begin the analysis at once.

    Attributes:
        sitting: state and actions, the same without widgets.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        target: float = 3.5,
        rule: Rule = "gain",
        settings: PrecisionSettings | None = None,
        store: Store | None = None,
        start: bool = True,
    ) -> None:
        self.sitting = PrecisionSitting(model, target=target, rule=rule, settings=settings, store=store)
        self._shown = PrecisionState(model="", target=0.0)
        self._make_bar()
        self._make_look()
        self._make_unit()
        self._make_tokens()
        self._make_results()
        super().__init__(
            [
                widgets.HTML(panels.STYLE + panels.heading(str(model), "Widths chosen per token in")),
                *self._bar_parts,
                *self._look_parts,
                *self._unit_parts,
                *self._token_parts,
                *self._result_parts,
            ],
            layout=WIDE,
        )
        self.add_class("wb-workbench")
        self._stop = self.sitting.subscribe(self._show)
        self._show(self.sitting.state)
        if start:
            self.sitting.analyse()

    def close(self) -> None:
        """Stop what runs, free the model, and remove the widgets."""
        self._stop()
        self.sitting.close()
        super().close()

    # Parts ---------------------------------------------------------------------------------------------------------

    def _make_bar(self) -> None:
        self._analyse = button("Analyse", "wb-analyse", "Let the model reply at this target, and look at it", "search")
        self._run = button("Run", "wb-run", "Generate and measure at this target, beside the rivals", "play", "primary")
        self._cancel = button("Cancel", "wb-cancel", "Stop at the next safe point", "stop", "warning")
        self._analyse.on_click(lambda _: self.sitting.analyse())
        self._run.on_click(lambda _: self.sitting.run())
        self._cancel.on_click(lambda _: self.sitting.cancel())
        self._progress = widgets.FloatProgress(
            0.0, min=0.0, max=1.0, description="Progress", tooltip="Share of this step", layout={"width": "320px"}
        )
        self._progress.add_class("wb-progress")
        self._remaining = label("wb-remaining")
        self._status = html("wb-status")
        self._target = widgets.FloatSlider(
            self.sitting.state.target,
            min=2.0,
            max=8.0,
            step=0.05,
            readout_format=".2f",
            continuous_update=False,
            disabled=True,
            description="Target (average bits)",
            tooltip="Average bits of codes over weights and tokens",
            style={"description_width": "initial"},
            layout={"width": "520px"},
        )
        self._target.add_class("wb-target")
        self._rule = widgets.Dropdown(
            options=[("gain: worth of a step", "gain"), ("error: DP-LLM", "error")],
            value=self.sitting.state.rule,
            description="Rule",
            tooltip="What is compared with a threshold",
            layout={"width": "280px"},
        )
        self._rule.add_class("wb-rule")
        self._expected = html("wb-expected")
        self._target.observe(self._on_target, "value")
        self._rule.observe(self._on_rule, "value")
        row = {"align_items": "center", "flex_flow": "row wrap"}
        self._bar_parts = [
            widgets.HBox([self._analyse, self._run, self._cancel, self._progress, self._remaining], layout=row),
            self._status,
            widgets.HBox([self._target, self._rule], layout=row),
            self._expected,
        ]

    def _make_look(self) -> None:
        self._value = widgets.ToggleButtons(
            options=[(name, key) for key, name in plots.SHOWN.items()],
            value="width",
            description="Map of",
            tooltip="What the heat map shows",
            style={"button_width": "auto", "description_width": "initial"},
        )
        self._value.add_class("wb-value")
        self._low = widgets.Dropdown(
            options=[], description="Step from", tooltip="The narrower of two widths", layout={"width": "190px"}
        )
        self._low.add_class("wb-low")
        self._sequence = widgets.Dropdown(
            options=[("all", _ALL_SEQUENCES)],
            description="Sequence",
            tooltip="Which prompt with its reply",
            layout={"width": "190px"},
        )
        self._sequence.add_class("wb-sequence")
        for control in (self._value, self._sequence):
            control.observe(lambda _: self._draw_map(), "value")
        self._low.observe(lambda _: self._draw_all(), "value")
        self._map = go.FigureWidget(go.Figure(layout={"template": TEMPLATE, "height": 320}))
        box = widgets.VBox([self._map], layout=WIDE)
        box.add_class("wb-heatmap")
        self._look_parts = [
            title("Look: what decides, and what is chosen, at every step"),
            widgets.HBox([self._value, self._low, self._sequence], layout={"flex_flow": "row wrap"}),
            box,
        ]

    def _make_unit(self) -> None:
        self._unit = widgets.Dropdown(
            options=[], description="Unit", tooltip="Or click a row of the heat map", layout={"width": "260px"}
        )
        self._unit.add_class("wb-unit")
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
        self._unit.observe(lambda _: self._draw_unit(), "value")
        self._threshold.observe(self._on_threshold, "value")
        self._reset.on_click(lambda _: self.sitting.reset_thresholds())
        self._steps = Picture("wb-steps")
        self._distribution = go.FigureWidget(go.Figure(layout={"template": TEMPLATE, "height": 330}))
        self._distribution.layout.on_change(self._on_drag, "shapes")
        box = widgets.VBox([self._distribution], layout=WIDE)
        box.add_class("wb-distribution")
        self._unit_parts = [
            title("One unit: its error, its threshold, its share of wide reads"),
            widgets.HBox([self._unit, self._threshold, self._reset], layout={"flex_flow": "row wrap"}),
            self._share,
            self._steps,
            box,
        ]

    def _make_tokens(self) -> None:
        self._autocorrelation = Picture("wb-autocorrelation")
        self._tokens = Picture("wb-tokens")
        self._token_parts = [
            title("Over steps and tokens"),
            self._autocorrelation,
            self._tokens,
        ]

    def _make_results(self) -> None:
        self._measured = html("wb-measured")
        self._measured.value = precision_panels.measured(None)
        self._texts = html("wb-texts")
        self._result_parts = [title("Measured"), self._measured, self._texts]

    # What the user does --------------------------------------------------------------------------------------------

    # Comparing with the state, rather than a flag that is up while showing, never loses what the user does meanwhile.

    def _on_target(self, change: dict[str, Any]) -> None:
        if abs(change["new"] - self.sitting.state.target) > self._target.step / 2:
            self.sitting.set_target(change["new"])

    def _on_rule(self, change: dict[str, Any]) -> None:
        if change["new"] != self.sitting.state.rule:
            self.sitting.set_rule(change["new"])

    def _on_threshold(self, change: dict[str, Any]) -> None:
        present = self._present_threshold()
        if present is not None and abs(np.log10(change["new"] / present)) > self._threshold.step:
            self.sitting.move_threshold(self._unit.value, self._low.value, float(change["new"]))

    def _on_drag(self, layout: Any, shapes: Any) -> None:
        present = self._present_threshold()
        if not shapes or present is None:
            return
        # One end is enough: a line that was tilted stands where its lower end is.
        dragged = float(shapes[0].x0)
        if dragged > 0 and abs(np.log10(dragged / present)) > 1e-6:
            self.sitting.move_threshold(self._unit.value, self._low.value, dragged)

    def _on_click(self, trace: Any, points: Any, _: Any) -> None:
        if points.point_inds and self._grid is not None:
            self._unit.value = self._grid.linears[points.point_inds[0][0]]

    def _row(self) -> Any:
        """The present unit's row of the thresholds, or None."""
        cuts = self.sitting.state.cuts
        if cuts is None:
            return None
        rows = cuts[(cuts["unit"] == self._unit.value) & (cuts["low"] == self._low.value)]
        return rows.iloc[0] if len(rows) else None

    def _present_threshold(self) -> float | None:
        row = self._row()
        if row is None or not np.isfinite(row["threshold"]) or row["threshold"] <= 0:
            return None
        return float(row["threshold"])

    # Showing the state ---------------------------------------------------------------------------------------------

    _grid: StepGrid | None = None

    def _show(self, state: PrecisionState) -> None:
        """Bring the widgets to a state, touching only what differs from the one shown before."""
        before, self._shown = self._shown, state
        idle = not state.busy
        self._analyse.disabled = not idle
        self._run.disabled = not idle or state.cuts is None
        self._cancel.disabled = idle or state.cancelling
        share = state.progress.done / state.progress.total if state.progress and state.progress.total else 0.0
        self._progress.value = share
        self._remaining.value = panels.progress(state.progress)
        self._status.value = panels.status(state)
        if state.possible != before.possible and state.possible is not None:
            self._target.max = max(state.possible[1], self._target.min)
            self._target.min = state.possible[0]
            self._target.disabled = False
        if state.target != before.target:
            self._target.value = state.target
        if state.rule != before.rule:
            self._rule.value = state.rule
        if state.look is not before.look:
            self._show_look(state)
        if state.cuts is not before.cuts:
            self._expected.value = precision_panels.expected(state)
            self._draw_unit()
        if state.trial is not before.trial and state.trial is not None:
            self._measured.value = precision_panels.measured(state.trial)
            self._texts.value = panels.side_by_side(state.trial.generations, "widths per token")

    def _show_look(self, state: PrecisionState) -> None:
        if state.look is None or state.compressed is None:
            return
        table = state.look.table
        n_sequences = int(table["sequence"].max()) + 1
        self._sequence.options = [("all", _ALL_SEQUENCES), *((f"{i}", i) for i in range(n_sequences))]
        lows = sorted(int(low) for low in table.loc[table["low"] < table["high"], "low"].unique())
        chosen = self._low.value
        self._low.options = [(f"{low} bits", low) for low in lows]
        # A menu that was empty has nothing chosen until something is.
        self._low.value = chosen if chosen in lows else next(iter(lows), None)
        self._unit.options = [unit.id for unit in state.compressed.architecture.units]
        self._unit.value = self._unit.value or self._unit.options[0]
        self._draw_all()

    def _draw_all(self) -> None:
        self._draw_map()
        self._draw_unit()
        seen, low = self.sitting.state.look, self._low.value
        if seen is None or low is None:
            return
        self._lags = autocorrelation(seen.table, low)
        self._draw_lags()
        compressed = self.sitting.state.compressed
        if compressed is not None:
            excess = token_excess(seen.table[seen.table["step"] > 0], compressed.architecture)
            self._tokens.show(plots.token_bars(excess, self.sitting.decode))

    def _draw_map(self) -> None:
        seen, low = self.sitting.state.look, self._low.value
        if seen is None or low is None:
            return
        sequence = None if self._sequence.value == _ALL_SEQUENCES else self._sequence.value
        value = self._value.value
        self._grid = plots.choice_grid(seen, low, value, sequence)
        drawn = plots.choice_heatmap(self._grid, seen, low, value)
        first = not self._map.data
        _redraw(self._map, drawn)
        if first:
            self._map.data[0].on_click(self._on_click)

    def _draw_unit(self) -> None:
        """Steps, distribution and share of the present unit."""
        state = self.sitting.state
        seen, low, unit = state.look, self._low.value, self._unit.value
        if seen is None or low is None or unit is None or state.compressed is None:
            return
        table = seen.table
        row, threshold = self._row(), self._present_threshold()
        decided = bool(((table["unit"] == unit) & (table["low"] == low) & (table["low"] < table["high"])).any())
        self._share.value = precision_panels.share(state, unit, low, row, decided)
        self._threshold.disabled = threshold is None or state.rule != "gain"
        if not decided:
            return
        if threshold is not None:
            middle = float(np.log10(threshold))
            low_end, high_end = middle - 1.0, middle + 1.0
            if not self._threshold.min <= middle <= self._threshold.max or self._unit_shown != (unit, low):
                self._threshold.min, self._threshold.max = min(low_end, self._threshold.min), high_end
                self._threshold.min = low_end
            self._threshold.value = threshold
        self._unit_shown = (unit, low)
        self._steps.show(plots.unit_steps(seen, unit, low, threshold))
        index = [one.id for one in state.compressed.architecture.units].index(unit)
        selectors = require_selectors(state.compressed)
        _redraw(self._distribution, plots.error_distribution(seen, selectors, index, unit, low, threshold))
        self._draw_lags()

    _unit_shown: tuple[str, int] | None = None
    _lags: Any = None

    def _draw_lags(self) -> None:
        if self._lags is not None and len(self._lags):
            self._autocorrelation.show(plots.autocorrelation_lines(self._lags, self._unit.value))


def _redraw(widget: Any, drawn: go.Figure) -> None:
    """Bring a figure widget to another figure, traces in place so that listeners stay."""
    with widget.batch_update():
        if len(widget.data) != len(drawn.data):
            widget.data = []
            widget.add_traces(list(drawn.data))
        else:
            for present, new in zip(widget.data, drawn.data, strict=True):
                present.update(new.to_plotly_json(), overwrite=True)
        widget.layout = drawn.update_layout(autosize=False).layout
    # The widget is drawn before it is in the page; only this change, alone, makes plotly measure its cell.
    widget.layout.autosize = True
