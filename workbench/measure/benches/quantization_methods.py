"""What the bench ``quantization`` compares: contenders, each a recipe and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from workbench.apply.awq import AwqConfig
from workbench.apply.bnb import BnbInt8Config, BnbNf4Config
from workbench.apply.calibration import CalibrationText
from workbench.apply.config import MethodConfig
from workbench.apply.gptq import GptqConfig
from workbench.apply.integer import CALIBRATED, Activations, IntegerConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.salient import SalientConfig
from workbench.apply.tender import IntegerBits, Scales, TenderConfig
from workbench.apply.tune import TuneConfig
from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext
from workbench.models import load
from workbench.models.base import LoadedModel
from workbench.runtime import open_engine
from workbench.runtime.base import Engine

BITS = (3, 4)
_QUICK = ("rtn", "awq", "awq+gptaq", "learnt")
_GROUP_SIZE = 64
_OUTPUT_BITS = 16  # the claim is about the blocks' linears
_NF4_BLOCK = 64  # weights per scale, bitsandbytes' own default
_SALIENT_BITS, _SHARE = 3, 0.01
_SHIFT_BITS = 3
_SCHEMES: tuple[Activations, ...] = (
    "per-tensor",
    "per-token",
    "per-channel",
    "smoothquant",
    "plain-groups",
    "requantize",
    "rotation",
)
_INTEGER_BITS: tuple[IntegerBits, ...] = (8, 4)
_SCALES: tuple[Scales, ...] = ("token", "chunk")
_QUICK_SCHEMES = ("per-tensor", "per-token")
SHIFT = "shift"  # stands for the comparison across domains where methods are chosen
_TENDER = "scales by token"  # what the others are judged by
_TOKENS = GptqConfig().calibration_tokens


METHODS = (
    *("rtn", "awq", "gptq", "gptaq", "awq+gptq", "awq+gptaq", "learnt", "salient", "nf4", "int8"),
    *_SCHEMES,
    *("tender", SHIFT),
)


@dataclass(eq=False)
class Contender:
    """One method at one width.

    Attributes:
        method, variant, bits: columns of its rows.
        recipe: how it is made; None for the dense model.
        name: who runs it.
        side: engine that runs it.
        dtype: of the model for timing, where the engine is PyTorch's or the model dense.
        calibration: text that it was fitted on, None where none was needed.
        group_size: weights per scale.
        activation_bits: that the recipe asks for.
        rival: label of what it is judged by, beside round-to-nearest; None for nothing.
        timed: whether its speed is measured; ``prefill`` for that of a prompt alone.
        shift: text whose own split it was fitted on, in the comparison across domains; None elsewhere.
        compressed: what the recipe gave.
        ran_by, activation_mode: what quality was measured with.
    """

    method: str
    bits: int
    recipe: Recipe | None = None
    variant: str = "uniform"
    name: str = "workbench"
    side: str = "cpu"
    dtype: str = "float32"
    calibration: str | None = None
    group_size: int | None = _GROUP_SIZE
    activation_bits: int = 16
    rival: str | None = None
    timed: bool | Literal["prefill"] = True
    shift: str | None = None
    compressed: CompressedModel | None = None
    ran_by: str = ""
    activation_mode: str = ""

    @property
    def label(self) -> str:
        """What rows name it by where it is a rival."""
        told = [self.method, *([] if self.variant == "uniform" else [self.variant]), f"{self.bits} bits"]
        return ", ".join(told)

    def engine(self, model: LoadedModel, threads: int) -> Engine:
        """Open what its quality is measured with; rivals of other projects compute in fp32."""
        if self.compressed is not None:
            return open_engine(self.compressed, engine=self.side, threads=threads)
        return open_engine(load(model.source, dtype=self.dtype), engine=self.side, threads=threads)


def dense_rows() -> list[Contender]:
    """The dense model in bf16: this engine's, and PyTorch's, which is there for the time of a prompt."""
    ours = Contender("bf16", 16, variant="dense", dtype="bfloat16", group_size=None)
    return [ours, replace(ours, name="transformers", side="reference", timed="prefill")]


def weight_only(model: LoadedModel, context: BenchContext) -> list[Contender]:
    """Every method that leaves activations to the engine."""
    found = []
    for bits in BITS:
        for method, configs in _methods(bits).items():
            if context.takes(method, quick=method in _QUICK):
                rival = "nf4, 4 bits" if bits == 4 else None
                calibration = None if method == "rtn" else "self"
                recipe = Recipe.for_model(model, *configs)
                found.append(Contender(method, bits, recipe, calibration=calibration, rival=rival))
    if context.takes("salient", quick=False):
        found += _salient(model)
    return [*found, *(one for one in _bitsandbytes(model) if context.takes(one.method, quick=False))]


def _methods(bits: int, text: CalibrationText = "self") -> dict[str, Sequence[MethodConfig]]:
    rtn = RtnConfig(bits=bits, group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS)
    awq = AwqConfig(
        bits=bits, group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS, calibration=text, calibration_tokens=_TOKENS
    )
    gptq, gptaq = (
        GptqConfig(asymmetric=asymmetric, calibration=text, calibration_tokens=_TOKENS) for asymmetric in (False, True)
    )
    tune = TuneConfig(calibration=text, calibration_tokens=_TOKENS)
    return {
        "rtn": (rtn,),
        "awq": (awq,),
        "gptq": (rtn, gptq),
        "gptaq": (rtn, gptaq),
        "awq+gptq": (awq, gptq),
        "awq+gptaq": (awq, gptaq),
        "learnt": (awq, gptaq, tune),
    }


def _salient(model: LoadedModel) -> list[Contender]:
    """A share of the channels kept in bf16; no engine but the reference mixes them with codes."""
    by_activation = f"salient, by activation, {_SALIENT_BITS} bits"
    found = []
    ways: tuple[Literal["activation", "weight", "random"], ...] = ("activation", "weight", "random")
    for by in ways:
        rtn = _methods(_SALIENT_BITS)["rtn"]
        found.append(
            Contender(
                "salient",
                _SALIENT_BITS,
                Recipe.for_model(model, *rtn, SalientConfig(share=_SHARE, by=by, calibration_tokens=_TOKENS)),
                variant=f"by {by}",
                side="reference",
                calibration="self" if by == "activation" else None,
                rival=None if by == "activation" else by_activation,
                timed=False,
            )
        )
    return found


def _bitsandbytes(model: LoadedModel) -> list[Contender]:
    if find_spec("bitsandbytes") is None:
        return []
    nf4 = Recipe.for_model(model, BnbNf4Config(block_size=_NF4_BLOCK, output_bits=_OUTPUT_BITS))
    int8 = Recipe.for_model(model, BnbInt8Config(output_bits=_OUTPUT_BITS))
    found = [Contender("int8", 8, int8, activation_bits=8, group_size=None)]
    if all(linear.in_features % _NF4_BLOCK == 0 for linear in model.architecture.linears):  # its kernels need that
        found.append(Contender("nf4", 4, nf4))
    for contender in found:
        contender.name, contender.side, contender.dtype = "bitsandbytes", "reference", "bfloat16"
    return found


def integer_activations(model: LoadedModel, context: BenchContext) -> list[Contender]:
    """Everything that rounds activations too, with as many bits as the weights have; 8, and 4 where not quick."""
    found = []
    shortened = context.quick and not context.only
    for bits in _INTEGER_BITS[: 1 if shortened else None]:
        schemes = [scheme for scheme in _SCHEMES if context.takes(scheme, quick=scheme in _QUICK_SCHEMES)]
        found += [_integer(model, scheme, bits) for scheme in schemes]
        if context.takes("tender"):
            found += [_tender(model, scales, bits) for scales in _SCALES[: 1 if shortened else None]]
    return found


def _integer(model: LoadedModel, scheme: Activations, bits: IntegerBits) -> Contender:
    config = IntegerConfig(activations=scheme, bits=bits, activation_bits=bits, output_bits=_OUTPUT_BITS)
    simulated = scheme == "per-channel"  # no product of integers can be scaled so: nothing to time
    return Contender(
        scheme,
        bits,
        Recipe.for_model(model, config),
        side="reference" if simulated else "cpu",
        calibration="self" if scheme in CALIBRATED else None,
        group_size=config.group_size if scheme == "plain-groups" else None,
        activation_bits=bits,
        rival=f"tender, {_TENDER}, {bits} bits",
        timed=not simulated,
    )


def _tender(model: LoadedModel, scales: Scales, bits: IntegerBits) -> Contender:
    config = TenderConfig(bits=bits, activation_bits=bits, scales=scales, output_bits=_OUTPUT_BITS)
    return Contender(
        "tender",
        bits,
        Recipe.for_model(model, config),
        variant=f"scales by {scales}",
        calibration="self",
        group_size=None,
        activation_bits=bits,
        rival=f"per-token, {bits} bits",
    )


def shifted(model: LoadedModel, texts: Sequence[CalibrationText]) -> list[Contender]:
    """AWQ and GPTQ fitted on each text's calibration split, to be judged on the evaluation splits of all of them."""
    found = []
    for method in ("awq", "gptq"):
        for text in texts:
            found.append(
                Contender(
                    method,
                    _SHIFT_BITS,
                    Recipe.for_model(model, *_methods(_SHIFT_BITS, text)[method]),
                    variant=f"fitted on {text}",
                    calibration=text,
                    timed=False,
                    shift=text,
                )
            )
    return found
