"""What a recipe may say of each method: fields, defaults and bounds. What a method does is in the module of its name.

Nothing here imports torch, so that a recipe is checked before anything that takes seconds.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StrictBool

from workbench.apply.config import Bits, GroupSize, MethodConfig, Stage, Strict, Whole, Widths
from workbench.formats.limits import BLOCK_SIZES

SHORTEST = 64  # tokens of a sampled document: shorter ones have few tokens with a past
BATCH = 8  # documents that are sampled together
FEWEST_TOKENS = BATCH * SHORTEST  # that calibration windows are made of
WINDOW, SAMPLED = 512, 576  # tokens; text encoded again can come out shorter than it was sampled
_STARTS = 8  # tokens at most that a sampled document continues, beside its own
LONG_CONTEXT = SAMPLED + _STARTS  # that no document is shortened for


def sampled_length(n_tokens: int, context: int = LONG_CONTEXT) -> int:
    """Tokens of a sampled document: as long as the tokens allow in one batch, and shorter than the model's context."""
    return min(SAMPLED, context - _STARTS, -(-n_tokens // BATCH))


def window_length(sampled: int) -> int:
    """Tokens of the calibration windows of sampled documents of that length."""
    return max(2, sampled * WINDOW // SAMPLED)


def fewest_tokens(window: int) -> int:
    """The fewest calibration tokens that make windows of at least that length."""
    return BATCH * (-(-window * SAMPLED // WINDOW) - 1) + 1


CalibrationText = Literal["self", "prose", "pydoc"]


class Calibrated(Strict):
    """What methods share that learn from text of the user's choice.

    Attributes:
        calibration: the text, ``self`` being sampled from the model. The others are one domain each, and what is
            fitted on them looks better on them than it is.
        calibration_tokens: how much of it, at least.
    """

    calibration: CalibrationText = "self"
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 27648


class GridConfig(MethodConfig):
    """What methods share that store group codes.

    Attributes:
        bits: width of every unit that ``unit_bits`` does not name: 2 to 8, or 16 to leave it dense (bf16).
        unit_bits: other widths, by unit id or linear id. A linear's beats its unit's.
        group_size: input channels per scale; at least 1, larger than a row means one group per row.
        symmetric: no zero points.
        output_bits: width of the embedding and the output layer.
    """

    grid: ClassVar[bool] = True

    bits: Bits = 4
    unit_bits: dict[str, Bits] = Field(default_factory=dict)
    group_size: GroupSize = 64
    symmetric: StrictBool = False
    output_bits: Bits = 8


class RtnConfig(GridConfig):
    """Round every matrix to the nearest group codes (``formats.codes.quantize_groups``). Attributes: ``GridConfig``."""

    method: Literal["rtn"] = "rtn"


class AwqConfig(GridConfig, Calibrated):
    """Scale input channels by their activations, clip ranges, and round to the nearest group codes.

    Attributes:
        scale: search scales; off leaves the clipping alone.
        alpha: exponent of the scales of every unit, 0 to 1, instead of a search.
        alpha_steps: exponents tried, 0 up to but not 1, as in the paper.
        weight_factor: divide ``activation^alpha`` by ``weight^(1 - alpha)``.
        clip: search clipped ranges, of all linears but q and k.
        joint: judge each scale by its error after clipping, and not before; costs ten times the search.
        judge: whose output error scales are judged by: of the ``module`` that the unit is in (attention or MLP, run on
            2,048 tokens at every try), or of the ``unit`` itself, which is quicker and worse.
    """

    version: ClassVar[int] = 2

    method: Literal["awq"] = "awq"
    group_size: GroupSize = 64
    scale: StrictBool = True
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    alpha_steps: Annotated[Whole, Field(ge=1, le=100)] = 20
    weight_factor: StrictBool = False
    clip: StrictBool = True
    joint: StrictBool = True
    judge: Literal["module", "unit"] = "module"


class GptqConfig(MethodConfig, Calibrated):
    """Choose the codes of stored group codes anew by error compensation.

    Attributes:
        asymmetric: GPTAQ: also make up for what the units before have done to the inputs.
        drift: how much of that, 0 to 1. The moments come from little text, and all of it follows that text too far.
        act_order: round columns of strong inputs first, and not from left to right.
        damping: added to the diagonal of the moments, as a share of its mean.
        refit: solve the scales anew for the codes, by least squares. Clipped ranges and zero points stay.
    """

    stage: ClassVar[Stage] = "codes"
    grid: ClassVar[bool] = True

    method: Literal["gptq"] = "gptq"
    asymmetric: StrictBool = False
    drift: Annotated[float, Field(gt=0, le=1)] = 0.5
    act_order: StrictBool = True
    damping: Annotated[float, Field(gt=0, le=10)] = 0.2
    refit: StrictBool = False

    @property
    def label(self) -> str:
        return "gptaq" if self.asymmetric else "gptq"


class TuneConfig(MethodConfig, Calibrated):
    """Tune the scales of stored group codes against the dense model.

    Attributes:
        steps: of Adam, each on one window of text.
    """

    stage: ClassVar[Stage] = "codes"
    grid: ClassVar[bool] = True

    method: Literal["tune"] = "tune"
    steps: Annotated[Whole, Field(ge=1)] = 24


class SalientConfig(MethodConfig, Calibrated):
    """Keep the top share of each unit's input channels in bf16, beside stored group codes.

    Attributes:
        share: of the channels, 0 to 1; at least one channel is kept.
        by: what makes a channel salient: the mean magnitude of its ``activation``, the norm of the ``weight`` column
            over the unit's linears, or nothing (``random``).
    """

    stage: ClassVar[Stage] = "codes"

    method: Literal["salient"] = "salient"
    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    by: Literal["activation", "weight", "random"] = "activation"


class NestedConfig(MethodConfig):
    """Code every linear so that the top bits of one parent code are good weights at each of several widths.

    Attributes:
        widths: bits that the model may be read at, ascending; the last is the parent's. One alone gives the codes
            that this quantizer chooses where nothing has to nest.
        group_size: input channels per scale. At least 8: scales are solved for together, all of a row.
        fit: ``compensated`` chooses codes against the activations on text sampled from the model
            (``apply.nested_fit``); ``rounded`` looks at the weights alone and takes seconds.
        calibration_tokens: how much text is sampled.
        tune_steps: steps of tuning the scales of each width up to 4 bits against the dense model; 0 is none.
        output_bits: width of the embedding and the output layer, which are not nested.
    """

    method: Literal["nested"] = "nested"
    widths: Widths = (3, 4, 5, 6)
    group_size: Annotated[Whole, Field(ge=8)] = 64
    fit: Literal["compensated", "rounded"] = "compensated"
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 13824
    tune_steps: Annotated[Whole, Field(ge=0)] = 8
    output_bits: Bits = 8


class AnyPrecisionConfig(MethodConfig):
    """Code every linear by clustering its rows, so that the top bits of one parent code are codes at fewer bits.

    Attributes:
        widths: bits that the model may be read at, ascending; the last is the parent's. Each stores a table of
            2^width fp16 values per output row.
        calibration_tokens: how much text is sampled for the importance of weights.
        output_bits: width of the embedding and the output layer, which are rounded to groups and not nested.
    """

    method: Literal["nested-anyprecision"] = "nested-anyprecision"
    widths: Widths = (3, 4, 5, 6)
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 13824
    output_bits: Bits = 8


Scales = Literal["token", "chunk"]
IntegerBits = Literal[4, 8]
MOST_GROUPS = 12


class TenderConfig(MethodConfig):
    """Round weights and activations to integers, activations in groups of channels at powers of two.

    Attributes:
        bits: of the weights, 8 or 4; symmetric, one scale per output channel, rounded to nearest.
        activation_bits: of the activations, 8 or 4.
        scales: ``token`` or ``chunk``, see ``apply.tender``.
        groups: of channels, at most; None chooses a number for each unit from what its inputs' ranges predict.
        chunk_tokens: positions that share a calibrated scale.
        rounding: of ``chunk``: ``up`` (no calibrated input is clamped), ``down`` (every group takes the scale below:
            finer, and clamps), or ``auto``: whichever makes calibration text likelier.
        bias: channels' middles are subtracted ahead of rounding: ``norms`` for inputs that come from a norm (the
            paper's choice), ``none``, or ``auto``: the first with scales by ``chunk``, the second by ``token``.
        calibration_tokens: how much text is sampled from the model.
        output_bits: of the embedding and the output layer, which are group codes.
    """

    method: Literal["tender"] = "tender"
    bits: IntegerBits = 8
    activation_bits: IntegerBits = 8
    scales: Scales = "token"
    groups: Annotated[Whole, Field(ge=1, le=MOST_GROUPS)] | None = None
    chunk_tokens: Annotated[Whole, Field(ge=1)] = 256
    rounding: Literal["auto", "up", "down"] = "auto"
    bias: Literal["auto", "norms", "none"] = "auto"
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 13824
    output_bits: Bits = 8


Activations = Literal["per-tensor", "per-token", "per-channel", "smoothquant", "plain-groups", "requantize", "rotation"]


class IntegerConfig(MethodConfig):
    """Round weights and activations to integers.

    Attributes:
        activations: what shares a scale.
            ``per-tensor``: everything that enters a unit, calibrated.
            ``per-token``: a row, by its own range.
            ``per-channel``: a channel, calibrated. *Simulated*: such scales do not factor out of integer sums.
            ``smoothquant``: a row, after channels were divided by ``s = max|x|^a / max|w|^(1-a)`` and the weights
            multiplied (Xiao et al. 2023, section 4).
            ``plain-groups``: ``group_size`` neighbouring channels of a row, weights likewise.
            ``requantize``: Tender's groups with every group's sum scaled by itself: what its shift replaces.
            ``rotation``: a row, after a random Hadamard rotation (as QuaRot, Ashkboos et al. 2024; of every unit's
            input by itself, where QuaRot folds most of them into the weights before).
        bits: of the weights, 8 or 4; symmetric, rounded to nearest, one scale per output channel but for
            ``plain-groups``.
        activation_bits: of the activations, 8 or 4.
        group_size: of ``plain-groups``.
        smoothing: a of ``smoothquant``, 0 to 1: how much of the range is moved into the weights.
        clip: share of a row's range that is kept, for ``per-token``, ``smoothquant`` and ``rotation``. None is 1, and
            0.9 for a rotation at 4 bits, as QuaRot has it.
        scales: of ``requantize``, as in ``TenderConfig``.
        calibration_tokens: how much text is sampled from the model, where ranges are calibrated.
        output_bits: of the embedding and the output layer, which are group codes.
    """

    method: Literal["integer"] = "integer"
    activations: Activations
    bits: IntegerBits = 8
    activation_bits: IntegerBits = 8
    group_size: GroupSize = 64
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.5
    clip: Annotated[float, Field(gt=0, le=1)] | None = None
    scales: Scales = "token"
    calibration_tokens: Annotated[Whole, Field(ge=FEWEST_TOKENS)] = 13824
    output_bits: Bits = 8


class GgufConfig(MethodConfig):
    """Keep the codes of the GGUF file that the model was loaded from. Floating-point matrices become bf16."""

    method: Literal["gguf"] = "gguf"


def _block_size(value: int) -> int:
    if value not in BLOCK_SIZES:
        nearest = min(BLOCK_SIZES, key=lambda size: abs(size - value))
        raise ValueError(f"allowed are {', '.join(map(str, BLOCK_SIZES))}; nearest is {nearest}")
    return value


class BnbNf4Config(MethodConfig):
    """4-bit NormalFloat codes of bitsandbytes for all linears of the blocks.

    Attributes:
        block_size: weights per scale; must divide the rows of every linear.
        double_quant: store the scales in 8 bits.
        output_bits: width of the embedding and the output layer in group codes; 16 leaves them as bitsandbytes does.
    """

    method: Literal["bnb-nf4"] = "bnb-nf4"
    block_size: Annotated[Whole, AfterValidator(_block_size)] = 64
    double_quant: StrictBool = False
    output_bits: Bits = 8


class BnbInt8Config(MethodConfig):
    """int8 weights and activations of bitsandbytes (LLM.int8()) for all linears of the blocks.

    Attributes:
        threshold: input channels that hold an activation beyond it are multiplied in full precision; 0 for none. The
            library's own default is 6. It looks for them in all tokens of one call at once, so with a threshold above
            0 a later token can change the output of an earlier one; that is why it is off here.
        output_bits: as for ``BnbNf4Config``.
    """

    method: Literal["bnb-int8"] = "bnb-int8"
    threshold: Annotated[float, Field(ge=0)] = 0.0
    output_bits: Bits = 8
