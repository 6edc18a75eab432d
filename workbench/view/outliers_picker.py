"""What protects from outliers, to be picked, as ipywidgets: of weights (AWQ), or of integer inputs (Tender)."""

from __future__ import annotations

from typing import Any

from workbench.view.outliers_controller import OutlierSitting, OutlierState
from workbench.view.outliers_picks import Protection, Rounding
from workbench.view.parts import ROW, WIDE, widgets

_SEARCH = -1.0  # None would leave a menu without any entry chosen
_CHOSEN = 0


class _Picker(widgets.VBox):  # type: ignore[misc]
    """Controls by the name of what they set, which are brought to the state and tell the sitting when they move.

    Args:
        controls: by field of what is picked.
    """

    def __init__(self, controls: dict[str, Any]) -> None:
        self._controls = controls
        for field, control in controls.items():
            control.add_class(f"wb-{field.replace('_', '-')}")
            control.observe(lambda change, field=field: self._moved(field, change["new"]), "value")
        super().__init__([widgets.HBox(list(controls.values()), layout=ROW)], layout=WIDE)

    def _moved(self, field: str, value: Any) -> None:
        raise NotImplementedError

    def _bring(self, values: dict[str, Any]) -> None:
        for field, value in values.items():
            self._controls[field].value = value


class ProtectionPart(_Picker):
    """Bits, groups, scales, clipping, and channels that are kept.

    Args:
        sitting: whose protection is picked.
    """

    def __init__(self, sitting: OutlierSitting) -> None:
        self._sitting = sitting
        super().__init__(
            {
                "bits": _menu([3, 4], "Bits", "Of the weights"),
                "group_size": _menu([32, 64, 128], "Group size", "Input channels that share a scale"),
                "alpha": widgets.SelectionSlider(
                    options=[("search", _SEARCH), *((f"{i / 20:.2f}", i / 20) for i in range(21))],
                    value=_SEARCH,
                    continuous_update=False,
                    description="Exponent",
                    tooltip="Of AWQ's scales: 0 scales nothing, search takes the best for each unit",
                    layout={"width": "340px"},
                ),
                "clip": widgets.Checkbox(
                    value=True, description="Clip ranges", indent=False, layout={"width": "130px", "margin": "0 12px"}
                ),
                "share": widgets.FloatSlider(
                    0.0,
                    min=0.0,
                    max=5.0,
                    step=0.25,
                    readout_format=".2f",
                    continuous_update=False,
                    description="Kept (%)",
                    tooltip="Share of the input channels kept in 16 bits",
                    layout={"width": "340px"},
                ),
                "by": _menu(["activation", "weight", "random"], "Chosen by", "What chooses the channels that are kept"),
            }
        )

    def _moved(self, field: str, value: Any) -> None:
        if field == "alpha":
            value = None if value == _SEARCH else value
        elif field == "share":
            value = round(value / 100, 6)
        if getattr(self._sitting.state.protection, field) != value:
            self._sitting.set_protection(**{field: value})

    def show(self, state: OutlierState) -> None:
        """Bring the controls to what is picked."""
        picked: Protection = state.protection
        self._bring(
            {
                "bits": picked.bits,
                "group_size": picked.group_size,
                "alpha": _SEARCH if picked.alpha is None else picked.alpha,
                "clip": picked.clip,
                "share": 100 * picked.share,
                "by": picked.by,
            }
        )


class RoundingPart(_Picker):
    """Bits, groups, and where scales come from.

    Args:
        sitting: whose rounding is picked.
    """

    def __init__(self, sitting: OutlierSitting) -> None:
        self._sitting = sitting
        numbers = [("chosen for each unit", _CHOSEN), *((str(n), n) for n in range(1, 13))]
        super().__init__(
            {
                "bits": _menu([8, 4], "Bits", "Of weights and of inputs"),
                "groups": _menu(numbers, "Groups", "Of input channels, at powers of two", "260px"),
                "scales": _menu(
                    [("each token's own range", "token"), ("calibrated by chunk", "chunk")],
                    "Scales",
                    "Where the scale of a row comes from",
                    "280px",
                ),
            }
        )

    def _moved(self, field: str, value: Any) -> None:
        if field == "groups":
            value = value or None
        if getattr(self._sitting.state.rounding, field) != value:
            self._sitting.set_rounding(**{field: value})

    def show(self, state: OutlierState) -> None:
        """Bring the controls to what is picked."""
        picked: Rounding = state.rounding
        self._bring({"bits": picked.bits, "groups": picked.groups or _CHOSEN, "scales": picked.scales})


def _menu(options: list[Any], description: str, tooltip: str, width: str = "200px") -> Any:
    return widgets.Dropdown(options=options, description=description, tooltip=tooltip, layout={"width": width})
