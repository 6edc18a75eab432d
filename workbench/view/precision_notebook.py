"""Widths chosen per token as ipywidgets, for JupyterLab: one skin over a ``PrecisionSitting``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.analysis.precision import autocorrelation, token_excess
from workbench.runtime.precision import Rule
from workbench.store import Store
from workbench.view import panels, precision_panels
from workbench.view import precision_plots as plots
from workbench.view.heatmap import StepGrid
from workbench.view.parts import ROW, Live, Picture, RunBar, Workbench, html, title, widgets
from workbench.view.precision_controller import PrecisionSitting, PrecisionState
from workbench.view.precision_loop import PrecisionSettings
from workbench.view.precision_token_plots import VALUES_OVER_STEPS, autocorrelation_lines, token_bars
from workbench.view.precision_unit import UnitPart

_ALL_SEQUENCES = -1  # None would leave the menu without any entry chosen


class PrecisionWorkbench(Workbench):
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
        self._grid: StepGrid | None = None
        self._unit = UnitPart(self.sitting)
        self._make_bar()
        self._make_look()
        self._make_tokens()
        self._make_results()
        super().__init__(
            self.sitting,
            panels.heading(str(model), "Widths chosen per token in"),
            [
                *self._bar_parts,
                *self._look_parts,
                self._unit,
                *self._token_parts,
                *self._result_parts,
            ],
            start=start,
        )

    # Parts ---------------------------------------------------------------------------------------------------------

    def _make_bar(self) -> None:
        self._bar = RunBar(
            self.sitting,
            "Let the model reply at this target, and look at it",
            "Generate and measure at this target, beside the rivals",
        )
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
        self._bar_parts = [
            *self._bar.parts,
            widgets.HBox([self._target, self._rule], layout=ROW),
            self._expected,
        ]

    def _make_look(self) -> None:
        self._value = widgets.Dropdown(
            options=[(name, key) for key, name in plots.SHOWN.items()],
            description="Map of",
            tooltip="What the cells show",
            layout={"width": "280px"},
        )
        self._value.add_class("wb-value")
        self._low = widgets.Dropdown(
            options=[], description="Step from", tooltip="Narrower width of the step", layout={"width": "190px"}
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
        self._low.observe(lambda _: self._draw_step(), "value")
        self._map = Live("wb-heatmap", 320, clicked=self._on_click)
        self._look_parts = [
            title("Look: what decides, and what is chosen, at every step"),
            widgets.HBox([self._value, self._low, self._sequence], layout={"flex_flow": "row wrap"}),
            self._map,
        ]
        self._unit.menu.observe(lambda _: self._draw_unit(), "value")

    def _make_tokens(self) -> None:
        self._over = widgets.Dropdown(
            options=[(name, key) for key, name in VALUES_OVER_STEPS.items()],
            description="Over steps",
            tooltip="What the autocorrelation is of",
            layout={"width": "260px"},
        )
        self._over.add_class("wb-over")
        self._over.observe(lambda _: self._draw_lags(), "value")
        self._lags = Picture("wb-autocorrelation")
        self._tokens = Picture("wb-tokens")
        self._token_table = html("wb-token-table")
        self._token_parts = [
            title("Over steps and tokens"),
            self._over,
            self._lags,
            self._tokens,
            self._token_table,
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

    def _on_click(self, row: int) -> None:
        if self._grid is not None:
            self._unit.menu.value = self._grid.linears[row]

    # Showing the state ---------------------------------------------------------------------------------------------

    def _show(self, state: PrecisionState) -> None:
        """Bring the widgets to a state, touching only what differs from the one shown before."""
        before, self._shown = self._shown, state
        self._bar.show(state, free=not state.busy, ready=state.cuts is not None)
        if state.possible != before.possible and state.possible is not None:
            # All at once: a range alone would cut off the value, which would seem to be chosen by hand.
            with self._target.hold_sync(), self._target.hold_trait_notifications():
                self._target.min, self._target.max = state.possible
                self._target.value, self._target.disabled = state.target, False
        if state.target != before.target:
            self._target.value = state.target
        if state.rule != before.rule:
            self._rule.value = state.rule
        if state.look is not before.look:
            self._show_look(state)
        if state.cuts is not before.cuts or state.look is not before.look:
            self._expected.value = precision_panels.expected(state)
            self._unit.show(state)
        if state.trial is not before.trial and state.trial is not None:
            self._measured.value = precision_panels.measured(state.trial)
            self._texts.value = panels.side_by_side(state.trial.generations, "widths per token")

    def _show_look(self, state: PrecisionState) -> None:
        """Menus and pictures of what was looked at, but for those of the unit."""
        if state.look is None or state.compressed is None:
            return
        table = state.look.table
        n_sequences = int(table["sequence"].max()) + 1
        self._sequence.options = [("all", _ALL_SEQUENCES), *((f"{i}", i) for i in range(n_sequences))]
        lows = sorted(int(low) for low in table.loc[table["low"] < table["high"], "low"].unique())
        chosen = self._low.value
        self._low.options = [(f"{low} bits", low) for low in lows]
        self._low.value = chosen if chosen in lows else lows[0] if lows else None
        self._unit.low = self._low.value
        units = [unit.id for unit in state.compressed.architecture.units]
        if list(self._unit.menu.options) != units:
            self._unit.menu.options = units
            self._unit.menu.value = units[0]  # a menu that was empty has nothing chosen until something is
        self._draw_map()
        self._draw_lags()
        excess = token_excess(table[table["step"] > 0], state.compressed.architecture)
        if len(excess):
            self._tokens.show(token_bars(excess, self.sitting.decode))
            self._token_table.value = precision_panels.tokens(excess, self.sitting.decode)

    def _draw_step(self) -> None:
        """Everything that shows one step between widths."""
        self._unit.low = self._low.value
        self._draw_map()
        self._draw_unit()

    def _draw_unit(self) -> None:
        self._unit.show(self.sitting.state)
        self._draw_lags()

    def _draw_map(self) -> None:
        seen, low = self.sitting.state.look, self._low.value
        if seen is None or low is None:
            return
        sequence = None if self._sequence.value == _ALL_SEQUENCES else self._sequence.value
        self._grid = plots.choice_grid(seen, low, self._value.value, sequence)
        self._map.show(plots.choice_heatmap(self._grid, seen, low, self._value.value))

    def _draw_lags(self) -> None:
        seen, low, column = self.sitting.state.look, self._low.value, self._over.value
        if seen is None or low is None:
            return
        lags = autocorrelation(seen.table, low, column)
        if len(lags):
            self._lags.show(autocorrelation_lines(lags, self._unit.menu.value, column))
        else:
            self._lags.clear()
