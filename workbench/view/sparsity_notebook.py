"""Contextual sparsity as ipywidgets, for JupyterLab: one skin over a ``SparsitySitting``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from workbench.store import Store
from workbench.view import panels, sparsity_loop, sparsity_panels
from workbench.view import sparsity_plots as plots
from workbench.view import sparsity_quality_plots as quality_plots
from workbench.view.parts import ROW, Picture, RunBar, Workbench, html, title, widgets
from workbench.view.sparsity_controller import SparsitySitting, SparsityState
from workbench.view.sparsity_picks import METHODS, MOST, SparsityPick, SparsitySettings

_ALL_STEPS = -1  # None would leave the slider without any entry chosen
_SCOPES = {"token": "every token", "every": "every 8 tokens", "reply": "once a reply"}


class SparsityWorkbench(Workbench):
    """See what is left out beside what mattered, pick how it is chosen and how much, run, and compare.

    Args:
        model: what ``models.load`` takes, or the folder of a compressed model with a mask predictor or input cuts.
        pick: to begin with; None for predicted masks at 30 %.
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
        pick: SparsityPick | None = None,
        settings: SparsitySettings | None = None,
        store: Store | None = None,
        start: bool = True,
    ) -> None:
        self.sitting = SparsitySitting(model, pick=pick, settings=settings, store=store)
        self._shown = SparsityState(model="")
        self._make_bar()
        self._make_look()
        self._make_results()
        super().__init__(
            self.sitting,
            panels.heading(str(model), "Contextual sparsity of"),
            [
                *self._bar_parts,
                *self._look_parts,
                *self._result_parts,
            ],
            start=start,
        )

    # Parts ---------------------------------------------------------------------------------------------------------

    def _make_bar(self) -> None:
        self._bar = RunBar(
            self.sitting,
            "Make or read the model, and look at what matters in its replies",
            "Generate and measure with this pick, beside its rivals",
        )
        pick = self.sitting.state.pick
        self._sparsity = widgets.FloatSlider(
            pick.sparsity,
            min=0.0,
            max=MOST,
            step=0.05,
            readout_format=".0%",
            continuous_update=False,
            description="Sparsity",
            tooltip="Share of the weights that is left out",
            layout={"width": "380px"},
        )
        self._sparsity.add_class("wb-sparsity")
        self._method = _menu("wb-method", "Method", "How it is chosen what is left out", list(METHODS.items()), "360px")
        self._criterion = _menu("wb-criterion", "Criterion", "What matters: of true and of static masks", [], "240px")
        self._scope = _menu("wb-scope", "Chosen", "When predicted masks are chosen", list(_SCOPES.items()), "230px")
        self._controls = {
            "sparsity": self._sparsity,
            "method": self._method,
            "criterion": self._criterion,
            "scope": self._scope,
        }
        for control in (self._method, self._scope):
            control.options = [(words, key) for key, words in control.options]
        self._pickers = {field: partial(self._on_pick, field) for field in self._controls}
        for field, control in self._controls.items():
            control.disabled = True
            control.observe(self._pickers[field], "value")
        self._predicted = html("wb-predicted")
        self._curves = Picture("wb-curves")
        self._bar_parts = [
            *self._bar.parts,
            title("Pick: what is left out, and what that is predicted to cost"),
            widgets.HBox([self._sparsity, self._method, self._criterion, self._scope], layout=ROW),
            self._predicted,
            self._curves,
        ]

    def _make_look(self) -> None:
        self._text = _menu("wb-text", "Text", "Which reply is looked at", [], "180px")
        self._kind = _menu("wb-kind", "Map of", "What the maps show", ["heads", "neurons"], "200px")
        self._block = _menu("wb-block", "Block", "Whose steps are shown below the map", [], "180px")
        self._step = widgets.SelectionSlider(
            options=[("all", _ALL_STEPS)],
            continuous_update=False,
            description="Step",
            tooltip="One step, or all of them",
            layout={"width": "340px"},
        )
        self._step.add_class("wb-step")
        self._text.observe(self._on_text, "value")
        self._step.observe(self._on_step, "value")
        self._block.observe(self._on_block, "value")
        self._kind.observe(self._on_step, "value")
        self._kind.observe(self._on_block, "value")
        self._counts, self._map, self._steps = html("wb-counts"), Picture("wb-map"), Picture("wb-steps")
        self._quality, self._verdict = Picture("wb-quality"), html("wb-verdict")
        self._look_parts = [
            title("Look: masks beside what turned out to matter"),
            self._counts,
            widgets.HBox([self._text, self._kind, self._step, self._block], layout=ROW),
            self._map,
            self._steps,
            title("Does the predictor say more than a mask that never changes?"),
            self._verdict,
            self._quality,
        ]

    def _make_results(self) -> None:
        self._measured, self._groups = html("wb-measured"), Picture("wb-groups")
        self._batches = Picture("wb-batches")
        self._replied, self._texts = html("wb-replied"), html("wb-texts")
        self._measured.value = sparsity_panels.measured(None)
        self._result_parts = [title("Measured"), self._measured, self._batches, self._groups]
        self._result_parts += [self._replied, self._texts]

    # What the user does --------------------------------------------------------------------------------------------

    # Comparing with the state, rather than a flag that is up while showing, never loses what the user does meanwhile.

    def _on_pick(self, field: str, change: dict[str, Any]) -> None:
        value, present = change["new"], getattr(self.sitting.state.pick, field)
        same = abs(value - present) < 1e-9 if field == "sparsity" else value == present
        if value is not None and not same:
            self.sitting.set_pick(**{field: value})
            self._show_pick(self.sitting.state)  # what was refused goes back

    def _on_text(self, change: dict[str, Any]) -> None:
        if change["new"] is not None and change["new"] != self.sitting.state.text:
            self.sitting.select_text(change["new"])

    def _on_step(self, _: dict[str, Any]) -> None:
        self._draw_map()

    def _on_block(self, _: dict[str, Any]) -> None:
        self._draw_steps()

    # Showing the state ---------------------------------------------------------------------------------------------

    def _show(self, state: SparsityState) -> None:
        """Bring the widgets to a state, touching only what differs from the one shown before."""
        before, self._shown = self._shown, state
        self._bar.show(state, free=not state.busy, ready=state.look is not None)
        seen = state.look is not before.look
        if state.tables is not before.tables and state.tables is not None:
            self._fill_picks(state)
        if state.pick != before.pick:
            self._show_pick(state)
        if seen:
            self._show_look(state)
        if seen or state.pick != before.pick or state.predicted != before.predicted or state.trial is not before.trial:
            self._draw_curves(state)
        if seen or state.outcomes is not before.outcomes or state.pick != before.pick:
            self._follow_text(state)
        if state.trial is not before.trial and state.trial is not None:
            self._measured.value = sparsity_panels.measured(state.trial)
            if len(state.trial.batches):
                self._batches.show(quality_plots.batch_lines(state.trial))
            else:  # not timed, which is said above
                self._batches.clear()
            self._groups.show(quality_plots.group_dots(state.trial))
            self._replied.value = sparsity_panels.replies(state.trial)
            self._texts.value = panels.side_by_side(state.trial.generations, state.trial.pick.line)

    def _fill_picks(self, state: SparsityState) -> None:
        assert state.tables is not None
        methods = [(METHODS[name], name) for name in state.tables.methods]
        _fill(self._method, methods, state.pick.method, self._pickers["method"])
        _fill(self._criterion, list(state.tables.criteria), state.pick.criterion, self._pickers["criterion"])

    def _show_pick(self, state: SparsityState) -> None:
        for field, control in self._controls.items():
            value = getattr(state.pick, field)
            if control.value != value and (field == "sparsity" or value in [v for _, v in _pairs(control.options)]):
                control.value = value

    def _show_look(self, state: SparsityState) -> None:
        if state.look is None:
            return
        for field, control in self._controls.items():
            control.disabled = field in ("criterion", "scope") and not state.look.texts
        _fill(self._text, list(range(len(state.look.texts))), state.text, self._on_text)
        self._verdict.value = sparsity_panels.verdict(state)
        if state.look.quality is not None:
            self._quality.show(quality_plots.quality_lines(state.look.quality))

    def _draw_curves(self, state: SparsityState) -> None:
        self._predicted.value = sparsity_panels.predicted(state)
        if state.look is not None:
            seen = state.look
            said = f"{seen.n_tokens} tokens in {seen.n_windows} windows that the model sampled"
            self._curves.show(quality_plots.curve_lines(seen.curves, state.pick, state.predicted, said, state.trial))

    def _follow_text(self, state: SparsityState) -> None:
        """Menus, numbers and pictures of the text that is looked at."""
        self._counts.value = sparsity_panels.counts(state)
        if state.outcomes is not None:
            positions = [int(position) for position in state.outcomes.positions]
            chosen = self._step.value if self._step.value in positions else _ALL_STEPS
            _fill(self._step, [("all", _ALL_STEPS), *((str(one), one) for one in positions)], chosen, self._on_step)
            blocks = list(state.outcomes.blocks)
            block = self._block.value if self._block.value in blocks else blocks[len(blocks) // 2]
            _fill(self._block, blocks, block, self._on_block)
        self._draw_map()
        self._draw_steps()

    def _draw_map(self) -> None:
        state = self.sitting.state
        if state.outcomes is not None and self._step.value is not None:
            position = None if self._step.value == _ALL_STEPS else self._step.value
            said = sparsity_panels.said_of(state)
            self._map.show(plots.outcome_map(state.outcomes, self._kind.value, said, position))
        elif state.look is not None and state.tables is not None and not state.pick.masks:
            table = sparsity_loop.unit_shares(state.tables, state.pick)
            self._map.show(plots.share_map(table, state.pick.line, state.pick.sparsity))

    def _draw_steps(self) -> None:
        state = self.sitting.state
        scored, shown = state.scored, state.outcomes
        if scored is None or shown is None or self._block.value is None:
            self._steps.clear()
            return
        names = [self.sitting.decode([scored.tokens[position]]) for position in shown.positions]
        said = sparsity_panels.said_of(state)
        self._steps.show(plots.outcome_steps(shown, self._block.value, self._kind.value, said, names))


def _menu(name: str, description: str, tooltip: str, options: list[Any], width: str) -> Any:
    menu = widgets.Dropdown(options=options, description=description, tooltip=tooltip, layout={"width": width})
    menu.add_class(name)
    return menu


def _pairs(options: Any) -> list[tuple[Any, Any]]:
    return [option if isinstance(option, tuple) else (option, option) for option in options]


def _fill(menu: Any, options: list[Any], value: Any, listener: Any) -> None:
    """Give a menu other options. It would choose the first of them by itself, and that would seem chosen by hand."""
    values = [one for _, one in _pairs(options)]
    if values == [one for _, one in _pairs(menu.options)] and menu.value == value:
        return
    menu.unobserve(listener, "value")
    menu.options = options
    if value in values:
        menu.value = value
    menu.observe(listener, "value")
