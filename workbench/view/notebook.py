"""The sensitivity workbench as ipywidgets, for JupyterLab: one skin over a ``Controller``, holding no state of its own.

The controller's worker sets widget traits, which is the documented way from a thread; nothing is printed. Only the
heat map is a ``FigureWidget``, because only it listens to clicks, and each of those sends plotly's source once; the
other pictures are plain figures in ``Output`` widgets.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from workbench.analysis.sensitivity import rank_linears, rank_units
from workbench.store import Store
from workbench.view import panels, plots
from workbench.view.controller import Controller, State
from workbench.view.heatmap import StepGrid, grid_figure, step_grid
from workbench.view.loop import Settings
from workbench.view.parts import Live, Picture, RunBar, Workbench, button, html, title, widgets

_VALUE = "relative_error"
# Values of the first entries of two menus; None would leave a menu without any entry chosen.
_ALL_SEQUENCES = -1
_SOLVER_DECIDES = 0


class SensitivityWorkbench(Workbench):
    """Look at a model's sensitivity, pick bits, run, and read what was measured.

    Args:
        model: what ``models.load`` takes.
        budget: effective bits to begin with.
        settings: how much is looked at and measured.
        store: where analyses are kept; None opens the default store.
        out: folder for the compressed model; None for one inside the store's home.
        start: begin the analysis at once.

    Attributes:
        controller: state and actions, the same without widgets.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        budget: float = 4.5,
        settings: Settings | None = None,
        store: Store | None = None,
        out: Path | None = None,
        start: bool = True,
    ) -> None:
        self.controller = Controller(model, budget=budget, settings=settings, store=store, out=out)
        self._shown = State(model="", budget=0.0)
        self._grid: StepGrid | None = None
        self._make_look()
        self._make_pick()
        self._make_run()
        super().__init__(
            self.controller,
            panels.heading(str(model)),
            [
                *self._bar.parts,
                *self._look_parts,
                *self._pick_parts,
                *self._result_parts,
            ],
            start=start,
        )

    # Parts ---------------------------------------------------------------------------------------------------------

    def _make_run(self) -> None:
        self._bar = RunBar(
            self.controller, "Look at the model (again)", "Compress with the bits picked, generate, and measure"
        )
        self._measured = html("wb-measured")
        self._measured.value = panels.measured(None)
        self._latency = Picture("wb-latency")
        self._texts = html("wb-texts")
        self._result_parts = [
            title("Measured"),
            self._measured,
            self._latency,
            self._texts,
        ]

    def _make_look(self) -> None:
        widths = self.controller.settings.looking.widths
        self._bits = widgets.ToggleButtons(
            options=widths,
            value=3 if 3 in widths else widths[0],
            description="Map at bits",
            tooltip="Width that the heat map and the rankings show",
            style={"button_width": "46px", "description_width": "initial"},
        )
        self._bits.add_class("wb-bits")
        self._sequence = widgets.Dropdown(
            options=[("all", _ALL_SEQUENCES)],
            description="Sequence",
            tooltip="Which prompt with its reply",
            layout={"width": "220px"},
        )
        self._sequence.add_class("wb-sequence")
        self._bits.observe(lambda _: self._draw_look(), "value")
        self._sequence.observe(lambda _: self._draw_look(), "value")
        self._map = Live("wb-heatmap", 320, clicked=self._on_click)
        self._linears = html("wb-linears")
        self._units = html("wb-units")
        self._look_parts = [
            title("Look: relative output error over decoding steps"),
            widgets.HBox([self._bits, self._sequence], layout={"flex_flow": "row wrap"}),
            self._map,
            widgets.HBox(
                [self._linears, self._units], layout={"flex_flow": "row wrap", "justify_content": "flex-start"}
            ),
        ]

    def _make_pick(self) -> None:
        self._budget = widgets.FloatSlider(
            self.controller.state.budget,
            min=2.0,
            max=9.0,
            step=0.05,
            readout_format=".2f",
            continuous_update=False,
            disabled=True,
            description="Budget (effective bits)",
            tooltip="Stored bits per weight, scales and zero points counted",
            style={"description_width": "initial"},
            layout={"width": "520px"},
        )
        self._budget.add_class("wb-budget")
        self._predicted = html("wb-predicted")
        self._unit = widgets.Dropdown(
            options=[], description="Unit", tooltip="Or click a row of the heat map", layout={"width": "260px"}
        )
        self._unit.add_class("wb-unit")
        self._unit_bits = widgets.Dropdown(
            options=[
                ("the solver decides", _SOLVER_DECIDES),
                *((f"{b} bits", b) for b in self.controller.settings.looking.widths),
            ],
            description="Its bits",
            tooltip="Pin this unit to a width",
            layout={"width": "260px"},
        )
        self._unit_bits.add_class("wb-unit-bits")
        self._unpin = button("Unpin all", "wb-unpin", "Leave every unit to the solver", "undo")
        self._budget.observe(self._on_budget, "value")
        self._unit.observe(lambda _: self._show_pin(), "value")
        self._unit_bits.observe(self._on_pin, "value")
        self._unpin.on_click(lambda _: self.controller.unpin_all())
        self._grid_picture = Picture("wb-grid")
        self._pareto = Picture("wb-pareto")
        self._pick_parts = [
            title("Pick: bits of each unit"),
            self._budget,
            self._predicted,
            widgets.HBox([self._unit, self._unit_bits, self._unpin], layout={"flex_flow": "row wrap"}),
            self._grid_picture,
            self._pareto,
        ]

    # What the user does --------------------------------------------------------------------------------------------

    # The state is set from the widgets and the widgets from the state: comparing with the state, rather than a flag
    # that is up while showing, never loses what the user does meanwhile in another thread.

    def _on_budget(self, change: dict[str, Any]) -> None:
        if abs(change["new"] - self.controller.state.budget) > self._budget.step / 2:
            self.controller.set_budget(change["new"])

    def _on_pin(self, change: dict[str, Any]) -> None:
        unit = self._unit.value
        if unit is not None and change["new"] != self.controller.state.pinned.get(unit, _SOLVER_DECIDES):
            self.controller.pin(unit, change["new"] or None)

    def _on_click(self, row: int) -> None:
        architecture = self.controller.state.architecture
        if self._grid is not None and architecture is not None:
            self._unit.value = architecture.linear(self._grid.linears[row]).unit

    def _show_pin(self) -> None:
        self._unit_bits.value = self.controller.state.pinned.get(self._unit.value, _SOLVER_DECIDES)

    # Showing the state ---------------------------------------------------------------------------------------------

    def _show(self, state: State) -> None:
        """Bring the widgets to a state, touching only what differs from the one shown before."""
        before, self._shown = self._shown, state
        self._bar.show(state, free=not state.busy, ready=state.solution is not None)
        if state.look is not before.look and state.look is not None:
            n_sequences = int(state.look.steps.table["sequence"].max()) + 1
            self._sequence.options = [("all", _ALL_SEQUENCES), *((f"{i}", i) for i in range(n_sequences))]
            if state.architecture is not None:
                self._unit.options = [unit.id for unit in state.architecture.units]
                self._unit.value = (
                    self._unit.value or self._unit.options[0]
                )  # starts empty: nothing was there to choose
            self._draw_look()
        if state.budget_range != before.budget_range and state.budget_range is not None:
            # Whole steps inside the range, so that both ends of the slider can be met.
            step = self._budget.step
            low, high = (round(n * step, 2) for n in _whole_steps(*state.budget_range, step))
            self._budget.max = max(high, self._budget.min)
            self._budget.min = low
            self._budget.max = high
            self._budget.disabled = False
        if state.budget != before.budget:
            self._budget.value = state.budget
        if state.pinned != before.pinned:
            self._show_pin()
        if state.recipe is not before.recipe or state.budget_range != before.budget_range:
            self._predicted.value = panels.prediction(state)
        if state.recipe is not before.recipe or state.trial is not before.trial:
            self._draw_choice(state)
        if state.trial is not before.trial and state.trial is not None:
            self._measured.value = panels.measured(state.trial)
            self._latency.show(plots.latency_comparison(state.trial.found.latency))
            self._texts.value = panels.side_by_side(state.trial.generations)

    def _draw_look(self) -> None:
        """Heat map and rankings at the chosen width."""
        seen = self.controller.state.look
        if seen is None:
            return
        bits = self._bits.value
        sequence = None if self._sequence.value == _ALL_SEQUENCES else self._sequence.value
        self._grid = step_grid(seen.steps, bits, sequence, _VALUE)
        self._map.show(grid_figure(self._grid, seen.steps, bits, _VALUE))
        self._linears.value = panels.ranking(
            rank_linears(seen.steps, bits),
            {"linear": "linear", "mean": "mean error", "p95": "p95", "max": "max", "worst_step": "worst step"},
            f"Linears by relative error over steps, {bits} bits",
        )
        self._units.value = panels.ranking(
            rank_units(seen.units.table, bits, seen.damage),
            {"unit": "unit", seen.damage: f"{seen.damage} (nats per token)", "share": "share"},
            f"Units by predicted damage, {bits} bits",
        )

    def _draw_choice(self, state: State) -> None:
        """Grid of bits and trade-off of the present solution."""
        if state.look is None or state.solution is None:
            return
        found, trial = state.solution, state.trial
        self._grid_picture.show(
            plots.damage_by_unit(state.look.units.table, found.unit_bits, pinned=list(state.pinned))
        )
        self._pareto.show(
            plots.pareto(
                state.look.trade_off,
                chosen={"effective_bits": found.achieved_bits, "damage": found.predicted_damage},
                measured=trial.point if trial is not None else None,
                note=f"predicted: {state.look.damage} on {state.look.score_tokens} tokens",
            )
        )


def _whole_steps(low: float, high: float, step: float) -> tuple[int, int]:
    """First and last multiple of ``step`` within [low, high]."""
    return math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
