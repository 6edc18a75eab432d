"""Outliers and what protects from them as ipywidgets, for JupyterLab: one skin over an ``OutlierSitting``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.store import Store
from workbench.view import outliers_error_plots as error_plots
from workbench.view import outliers_panels, panels
from workbench.view import outliers_plots as plots
from workbench.view.outliers_controller import OutlierSitting, OutlierState
from workbench.view.outliers_picker import ProtectionPart, RoundingPart
from workbench.view.outliers_picks import Method, OutlierSettings
from workbench.view.parts import ROW, Picture, RunBar, Workbench, button, html, title, widgets

_ALL_STEPS = -1  # None would leave the menu without any entry chosen


class OutlierWorkbench(Workbench):
    """See which channels and values stand out, pick what protects from them, run, and compare with the prediction.

    Args:
        model: what ``models.load`` takes.
        method: ``awq`` or ``tender``: what is picked.
        unit: that is looked at first; empty for the most extreme one.
        settings: how much is looked at and measured.
        store: where analyses and fits are kept; None opens the default store.
        start: begin the analysis at once.

    Attributes:
        sitting: state and actions, the same without widgets.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        method: Method = "awq",
        unit: str = "",
        settings: OutlierSettings | None = None,
        store: Store | None = None,
        start: bool = True,
    ) -> None:
        self.sitting = OutlierSitting(model, method=method, unit=unit, settings=settings, store=store)
        self._shown = OutlierState(model="", method=method)
        self._make_bar()
        self._make_look()
        self._make_pick()
        super().__init__(
            self.sitting,
            panels.heading(str(model), "Outliers in"),
            [
                *self._bar_parts,
                *self._look_parts,
                *self._pick_parts,
            ],
            start=start,
        )

    # Parts ---------------------------------------------------------------------------------------------------------

    def _make_bar(self) -> None:
        self._bar = RunBar(self.sitting, "Look at all inputs of the model", "Carry out what is picked, and measure it")
        self._unit = widgets.Dropdown(
            options=[], description="Unit", tooltip="Whose inputs are shown", layout={"width": "260px"}
        )
        self._unit.add_class("wb-unit")
        self._steps = widgets.Dropdown(
            options=[("all", _ALL_STEPS)],
            description="Steps",
            tooltip="At which positions of a text channels are looked at",
            layout={"width": "240px"},
        )
        self._steps.add_class("wb-range")
        self._unit.observe(self._on_unit, "value")
        self._steps.observe(self._on_steps, "value")
        self._bar_parts = [
            *self._bar.parts,
            widgets.HBox([self._unit, self._steps], layout=ROW),
        ]

    def _make_look(self) -> None:
        self._order = widgets.Dropdown(
            options=[("largest first", True), ("by number", False)],
            description="Channels",
            tooltip="How the profile is ordered",
            layout={"width": "220px"},
        )
        self._order.add_class("wb-order")
        self._groups = widgets.IntSlider(
            4,
            min=1,
            max=12,
            continuous_update=False,
            description="Groups drawn",
            tooltip="Groups at powers of two, over the profile",
            style={"description_width": "initial"},
            layout={"width": "300px"},
        )
        self._groups.add_class("wb-drawn")
        self._marked = widgets.FloatSlider(
            1.0,
            min=0.25,
            max=10.0,
            step=0.25,
            continuous_update=False,
            description="Salient (%)",
            tooltip="Share of the channels that are marked and compared",
            readout_format=".2f",
            layout={"width": "320px"},
        )
        self._marked.add_class("wb-marked")
        for control in (self._order, self._groups):
            control.observe(lambda _: self._draw_profile(), "value")
        self._marked.observe(lambda _: self._draw_salience(), "value")
        self._profile = Picture("wb-profile")
        self._scatter = Picture("wb-scatter")
        self._overlap = html("wb-overlap")
        self._surface = Picture("wb-surface")
        self._massive = html("wb-massive")
        self._look_parts = [
            title("Look: the channels of one unit's input"),
            widgets.HBox([self._order, self._groups], layout=ROW),
            self._profile,
            self._marked,
            self._scatter,
            self._overlap,
            title("Look: single values, token by token"),
            self._surface,
            self._massive,
        ]

    def _make_pick(self) -> None:
        awq = self.sitting.state.method == "awq"
        self._picker = ProtectionPart(self.sitting) if awq else RoundingPart(self.sitting)
        self._predicted = html("wb-predicted")
        self._by_groups = Picture("wb-by-groups")
        self._errors = Picture("wb-errors")
        self._zero = button("Zero and measure", "wb-zero", "Set values of this unit to zero, one by one", "eraser")
        self._zero.on_click(lambda _: self.sitting.intervene())
        self._interventions = html("wb-interventions")
        self._measured = html("wb-measured")
        self._measured.value = outliers_panels.measured(None)
        self._pick_parts = [
            title("Pick: how weights are protected" if awq else "Pick: how inputs are rounded to integers"),
            self._picker,
            self._predicted,
            *([] if awq else [self._by_groups]),
            self._errors,
            title("What one value carries: the largest of the residual, and channels of this unit, set to zero"),
            widgets.HBox([self._zero]),
            self._interventions,
            title("Measured"),
            self._measured,
        ]

    # What the user does --------------------------------------------------------------------------------------------

    # Comparing with the state, rather than a flag that is up while showing, never loses what the user does meanwhile.

    def _on_unit(self, change: dict[str, Any]) -> None:
        if change["new"] and change["new"] != self.sitting.state.unit:
            self.sitting.select_unit(change["new"])

    def _on_steps(self, change: dict[str, Any]) -> None:
        first = None if change["new"] == _ALL_STEPS else change["new"]
        if first != self.sitting.state.first_step:
            self.sitting.select_steps(first)

    # Showing the state ---------------------------------------------------------------------------------------------

    def _show(self, state: OutlierState) -> None:
        """Bring the widgets to a state, touching only what differs from the one shown before."""
        before, self._shown = self._shown, state
        # A prediction makes room for what is asked for by hand.
        self._bar.show(state, free=state.waiting, ready=state.look is not None)
        self._zero.disabled = not state.waiting or state.look is None
        if state.look is not before.look:
            self._fill_menus(state)
        if state.unit != before.unit and state.unit in self._unit.options:
            self._unit.value = state.unit
        if state.first_step != before.first_step:
            self._steps.value = _ALL_STEPS if state.first_step is None else state.first_step
        seen = state.look is not before.look or state.unit != before.unit
        if seen or state.first_step != before.first_step:
            self._draw_profile()
            self._draw_salience()
        picked = state.protection is not before.protection or state.rounding is not before.rounding
        if picked:
            self._picker.show(state)
        predicted = picked or seen or state.predicted is not before.predicted or state.totals is not before.totals
        if predicted:
            self._draw_predictions(state, seen or picked)
        if predicted or state.surface is not before.surface:
            self._draw_surface(state)
        if state.interventions is not before.interventions or state.look is not before.look:
            self._interventions.value = outliers_panels.interventions(state)
        if state.trial is not before.trial:
            self._measured.value = outliers_panels.measured(state.trial)

    def _fill_menus(self, state: OutlierState) -> None:
        if state.look is None or state.architecture is None:
            return
        units = [unit.id for unit in state.architecture.units]
        _fill(self._unit, units, state.unit, self._on_unit)
        starts = state.look.first_steps
        ranges = zip(starts, [*starts[1:], None], strict=True)
        named = [(outliers_panels.steps_name(first, following), first) for first, following in ranges]
        chosen = _ALL_STEPS if state.first_step is None else state.first_step
        _fill(self._steps, [("all", _ALL_STEPS), *named], chosen, self._on_steps)
        self._massive.value = outliers_panels.massive(state, self.sitting.decode)

    def _draw_profile(self) -> None:
        state = self.sitting.state
        if state.channels is not None and state.look is not None:
            said = state.look.said()
            self._profile.show(
                plots.channel_profile(state.channels, state.unit, said, self._groups.value, ranked=self._order.value)
            )

    def _draw_salience(self) -> None:
        state, share = self.sitting.state, self._marked.value / 100
        if state.channels is not None and state.look is not None:
            self._scatter.show(plots.salience_scatter(state.channels, state.unit, state.look.said(), share))
            self._overlap.value = outliers_panels.overlaps(state, share)

    def _draw_surface(self, state: OutlierState) -> None:
        surface, scaling = state.current_surface, state.scaling
        if surface is None or scaling is None:
            return
        after, scales = scaling
        self._surface.show(plots.surface_maps(surface.table, state.unit, scales, after, self.sitting.decode))

    def _draw_predictions(self, state: OutlierState, groups_changed: bool) -> None:
        self._predicted.value = outliers_panels.predicted(state)
        if state.every_unit is not None and len(state.every_unit):
            self._errors.show(error_plots.unit_errors(state.every_unit, state.picked_name, state.unit))
        if groups_changed and state.look is not None and state.look.groups is not None:
            rounding = state.rounding
            self._by_groups.show(
                error_plots.group_errors(
                    state.look.groups.table, state.unit, rounding.bits, rounding.scales, state.look.said()
                )
            )


def _fill(menu: Any, options: list[Any], value: Any, listener: Any) -> None:
    """Give a menu other options. It would choose the first of them by itself, and that would seem chosen by hand."""
    menu.unobserve(listener, "value")
    menu.options, menu.value = options, value
    menu.observe(listener, "value")
