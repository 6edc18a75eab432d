"""What may be picked against outliers, how recipes follow from it, and how much is looked at and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.apply.awq import AwqConfig
from workbench.apply.calibration import FEWEST_TOKENS
from workbench.apply.integer import IntegerConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.salient import SalientConfig
from workbench.apply.tender import IntegerBits, Scales, TenderConfig
from workbench.models import LoadedModel
from workbench.view.demo import Measuring

Method = Literal["awq", "tender"]


@dataclass(frozen=True)
class OutlierSettings(Measuring):
    """How much is looked at, fitted on and measured in one sitting.

    Attributes:
        texts: names of texts, of whose calibration split windows are looked at.
        look_windows, look_length: windows of each text, and their tokens.
        surface_tokens: of the first window, whose tokens x channels are shown.
        calibration_tokens: sampled from the model, that a run fits on.
        text: evaluation text.
        seed: of everything drawn.
    """

    texts: tuple[str, ...] = ("prose", "pydoc")
    look_windows: int = 6
    look_length: int = 256
    surface_tokens: int = 96
    calibration_tokens: int = 13824
    text: str = "prose"
    seed: int = 0
    n_windows: int = 8
    window_length: int = 128
    pairs: int = 10

    @classmethod
    def quick(cls) -> OutlierSettings:
        """Seconds of looking, and a fit on little text: what stands out shows, and figures are rough."""
        return cls(look_windows=2, look_length=128, surface_tokens=48, calibration_tokens=FEWEST_TOKENS, pairs=3)


@dataclass(frozen=True)
class Protection:
    """How weights are protected before they are rounded.

    Attributes:
        bits, group_size: of the weights.
        alpha: exponent of AWQ's scales, 0 to 1, of every unit; None searches one for each.
        clip: clip ranges where that costs less.
        share: of the input channels, kept in 16 bits beside the codes; 0 keeps none.
        by: what chooses these: the ``activation``, the ``weight``, or chance (``random``).
    """

    bits: int = 3
    group_size: int = 64
    alpha: float | None = None
    clip: bool = True
    share: float = 0.0
    by: Literal["activation", "weight", "random"] = "activation"

    def awq(self, calibration_tokens: int) -> AwqConfig:
        """The method that stores the weights. Scales are judged as the prediction judges: by the unit, before clipping.

        Raises:
            RecipeError: a value that is not possible.
        """
        return AwqConfig(
            bits=self.bits,
            group_size=self.group_size,
            alpha=self.alpha,
            clip=self.clip,
            joint=False,
            judge="unit",
            calibration_tokens=calibration_tokens,
        )

    def salient(self, calibration_tokens: int) -> SalientConfig | None:
        """The method that keeps channels, if any are kept.

        Raises:
            RecipeError: a value that is not possible.
        """
        if self.share == 0:
            return None
        return SalientConfig(share=self.share, by=self.by, calibration_tokens=calibration_tokens)

    def recipes(self, model: LoadedModel, settings: OutlierSettings) -> dict[str, Recipe]:
        """What is measured, the rival first: plain rounding of the same bits, and this."""
        plain = RtnConfig(bits=self.bits, group_size=self.group_size)
        kept = self.salient(settings.calibration_tokens)
        awq, seed = self.awq(settings.calibration_tokens), settings.seed
        name = awq.label if kept is None else f"{awq.label} and {100 * self.share:g} % by {self.by}"
        methods = (awq,) if kept is None else (awq, kept)
        return {
            f"rtn, {self.bits} bits": Recipe.for_model(model, plain, seed=seed),
            f"{name}, {self.bits} bits": Recipe.for_model(model, *methods, seed=seed),
        }


@dataclass(frozen=True)
class Rounding:
    """How inputs are rounded to integers, weights with them.

    Attributes:
        bits: of both, 8 or 4.
        groups: of channels, at powers of two; None chooses a number for every unit.
        scales: of a row's own range (``token``), or calibrated by chunks of positions (``chunk``).
    """

    bits: IntegerBits = 8
    groups: int | None = None
    scales: Scales = "token"

    def tender(self, calibration_tokens: int) -> TenderConfig:
        """The method.

        Raises:
            RecipeError: a value that is not possible.
        """
        return TenderConfig(
            bits=self.bits,
            activation_bits=self.bits,
            groups=self.groups,
            scales=self.scales,
            calibration_tokens=calibration_tokens,
        )

    def recipes(self, model: LoadedModel, settings: OutlierSettings) -> dict[str, Recipe]:
        """What is measured, the rival first: rows rounded without groups, and this."""
        plain = IntegerConfig(activations="per-token", bits=self.bits, activation_bits=self.bits)
        tender, seed = self.tender(settings.calibration_tokens), settings.seed
        return {
            f"integers per token, {self.bits} bits": Recipe.for_model(model, plain, seed=seed),
            f"tender, {self.bits} bits": Recipe.for_model(model, tender, seed=seed),
        }
