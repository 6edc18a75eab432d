"""Small ipywidgets that the workbenches are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from workbench.errors import EngineError
from workbench.view import panels
from workbench.view.sitting import SittingState
from workbench.view.style import TEMPLATE

try:
    import ipywidgets as widgets
    import plotly.graph_objects as go
    from plotly.basewidget import BaseFigureWidget  # noqa: F401 - needs anywidget, which this finds out
except ImportError as error:
    raise EngineError(
        f"The notebook's widgets need {error.name}: install them with pip install 'compression-workbench[lab]'."
    ) from error

__all__ = ["ROW", "WIDE", "Live", "Picture", "RunBar", "button", "go", "html", "label", "title", "widgets"]

WIDE = {"width": "100%"}
ROW = {"align_items": "center", "flex_flow": "row wrap"}  # of parts side by side, as many to a line as fit


class Picture(widgets.Output):  # type: ignore[misc]
    """A plotly figure without a way back to the kernel; set as a trait, so that any thread may show one."""

    def __init__(self, name: str) -> None:
        super().__init__(layout=WIDE)
        self.add_class(name)

    def show(self, figure: go.Figure) -> None:
        content = json.loads(figure.to_json())
        content["config"] = {"displaylogo": False, "responsive": True}
        self.outputs = (
            {
                "output_type": "display_data",
                "data": {"application/vnd.plotly.v1+json": content},
                "metadata": {},
            },
        )

    def clear(self) -> None:
        self.outputs = ()  # type: ignore[assignment]  # mypy takes the tuple in ``show`` for the trait's type


class Live(widgets.VBox):  # type: ignore[misc]
    """A plotly figure that listens: to clicks on its first trace, and to a shape that is dragged.

    Each of these sends plotly's source once more, so what does not listen is a ``Picture``.

    Args:
        name: CSS class.
        height: px, while there is nothing to show.
        clicked: called with the row of the cell that was clicked.
        dragged: called with the new abscissa of the first shape's first end.
    """

    def __init__(
        self,
        name: str,
        height: int,
        *,
        clicked: Callable[[int], None] | None = None,
        dragged: Callable[[float], None] | None = None,
    ) -> None:
        self._clicked, self._dragged = clicked, dragged
        self.figure = go.FigureWidget(go.Figure(layout={"template": TEMPLATE, "height": height}))
        config: dict[str, Any] = {"displaylogo": False}
        if dragged is not None:
            # An editable shape asks for a click before it can be dragged; this lets it be dragged at once, and is a
            # setting of the whole figure, which a FigureWidget takes in this trait alone.
            config["edits"] = {"shapePosition": True}
        self.figure._config = {**self.figure._config, **config}
        super().__init__([self.figure], layout=WIDE)
        self.add_class(name)

    def show(self, drawn: go.Figure) -> None:
        """Bring the widget to another figure: traces in place where there are as many, so that listeners stay."""
        figure = self.figure
        with figure.batch_update():
            if len(figure.data) != len(drawn.data):
                figure.data = []
                figure.add_traces(list(drawn.data))
                if self._clicked is not None:
                    figure.data[0].on_click(self._on_click)
            else:
                for present, new in zip(figure.data, drawn.data, strict=True):
                    present.update(new.to_plotly_json(), overwrite=True)
            figure.layout = drawn.update_layout(autosize=False).layout
        # The widget is drawn before it is in the page; only this change, alone, makes plotly measure its cell.
        figure.layout.autosize = True
        if self._dragged is not None:  # a new layout has none of the old one's listeners
            figure.layout.on_change(self._on_shapes, "shapes")

    def _on_click(self, _: Any, points: Any, __: Any) -> None:
        if points.point_inds and self._clicked is not None:
            self._clicked(int(points.point_inds[0][0]))

    def _on_shapes(self, _: Any, shapes: Any) -> None:
        if shapes and self._dragged is not None:
            self._dragged(float(shapes[0].x0))


def button(text: str, name: str, tooltip: str, icon: str, style: str = "") -> Any:
    button = widgets.Button(description=text, tooltip=tooltip, icon=icon, button_style=style, layout={"width": "auto"})
    button.add_class(name)
    return button


def html(name: str) -> Any:
    element = widgets.HTML(layout={"max_width": "100%"})
    element.add_class(name)
    return element


def label(name: str) -> Any:
    element = widgets.Label()
    element.add_class(name)
    return element


def title(text: str) -> Any:
    return widgets.HTML(panels.panel(f"<h3>{text}</h3>"))


class Workbench(widgets.VBox):  # type: ignore[misc]
    """Widgets that show a sitting, from when they are made until they are closed.

    Args:
        sitting: whose states come to ``_show``, which a workbench defines; it is closed with the widgets.
        heading: escaped HTML.
        children: everything below the heading.
        start: begin the analysis at once.
    """

    def __init__(self, sitting: Any, heading: str, children: Sequence[Any], *, start: bool) -> None:
        super().__init__([widgets.HTML(panels.STYLE + heading), *children], layout=WIDE)
        self.add_class("wb-workbench")
        self._sitting = sitting
        self._stop = sitting.subscribe(self._show)
        self._show(sitting.state)
        if start:
            sitting.analyse()

    def _show(self, state: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Stop what runs, free the model, and remove the widgets."""
        self._stop()
        self._sitting.close()
        super().close()


class RunBar:
    """Analyse, Run and Cancel, with progress and one line of what happens: the head of every workbench.

    Args:
        sitting: whose actions the buttons are.
        look, run: what ``Analyse`` and ``Run`` do, for those who point at them.

    Attributes:
        parts: widgets, from above.
    """

    def __init__(self, sitting: Any, look: str, run: str) -> None:
        self._analyse = button("Analyse", "wb-analyse", look, "search")
        self._run = button("Run", "wb-run", run, "play", "primary")
        self._cancel = button("Cancel", "wb-cancel", "Stop at the next safe point", "stop", "warning")
        self._analyse.on_click(lambda _: sitting.analyse())
        self._run.on_click(lambda _: sitting.run())
        self._cancel.on_click(lambda _: sitting.cancel())
        self._progress = widgets.FloatProgress(
            0.0,
            min=0.0,
            max=1.0,
            description="Progress",
            tooltip="Share of the present step",
            layout={"width": "320px"},
        )
        self._progress.add_class("wb-progress")
        self._remaining = label("wb-remaining")
        self._status = html("wb-status")
        buttons = [self._analyse, self._run, self._cancel]
        self.parts = [widgets.HBox([*buttons, self._progress, self._remaining], layout=ROW), self._status]

    def show(self, state: SittingState, *, free: bool, ready: bool) -> None:
        """Bring the bar to a state.

        Args:
            state: of the sitting.
            free: whether work that is asked for by hand can begin.
            ready: whether there is something to run with.
        """
        self._analyse.disabled = not free
        self._run.disabled = not free or not ready
        self._cancel.disabled = not state.busy or state.cancelling
        self._progress.value = (
            state.progress.done / state.progress.total if state.progress and state.progress.total else 0.0
        )
        self._remaining.value = panels.progress(state.progress)
        self._status.value = panels.status(state)
