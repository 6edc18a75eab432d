"""Small ipywidgets that the workbenches are made of."""

from __future__ import annotations

import json
from typing import Any

from workbench.errors import EngineError
from workbench.view import panels

try:
    import ipywidgets as widgets
    import plotly.graph_objects as go
    from plotly.basewidget import BaseFigureWidget  # noqa: F401 - needs anywidget, which this finds out
except ImportError as error:
    raise EngineError(
        f"The notebook's widgets need {error.name}: install them with pip install 'compression-workbench[lab]'."
    ) from error

__all__ = ["WIDE", "Picture", "button", "go", "html", "label", "title", "widgets"]

WIDE = {"width": "100%"}


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
