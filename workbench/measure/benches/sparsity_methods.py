"""What the bench ``sparsity`` compares: contenders, each a set of weights and how some of them are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from workbench.apply.config import MethodConfig
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.recipe import Recipe
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import Criterion, PredictedSparsityConfig
from workbench.errors import InputError
from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext
from workbench.measure.sparse_plans import sparse_plan
from workbench.models.base import LoadedModel

WEIGHT_BITS = (16, 4)
SPARSITIES: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
QUICK_SPARSITIES: tuple[float, ...] = (0.3, 0.4, 0.5)
ONE_SPARSITY = 0.5  # of what is shown at one sparsity alone: criteria, scopes, the speed of a fixed mask
QUICK_MASKED: dict[int, tuple[float, ...]] = {16: QUICK_SPARSITIES, 4: (0.5,)}  # of masks where quick, by width
QUICK_TIMED = {"inputs": (0.4, 0.5), "masks": (0.5,)}  # sparsities whose speed is measured where quick
FIXED = ("random", "static", "magnitude", "oracle")  # their masks are not predicted
PREDICTED = ("per-layer", "per-layer-published", "unified")
METHODS = (*FIXED, *PREDICTED, "teal", "wina", "learnt")
_GROUP_SIZE = 64
_OUTPUT_BITS = {16: 16, 4: 8}
_EVERY = 8  # tokens from one decision to the next, of the scope "every"
# Fits on a CPU: minutes, and for the better ones hours, once.
QUICK_MASKS = PredictedSparsityConfig(width=64, epochs=10, tune_steps=60)
MASKS = PredictedSparsityConfig(width=64, calibration_tokens=55296, tune_steps=240, aggregates=get_args(Criterion))
QUICK_INPUTS = InputSparsityConfig(allocation_tokens=512)
INPUTS = InputSparsityConfig()
# Learnt for one share, to the same weights whole and to the dense model. Hours on a CPU, so only where asked for.
LEARNT_SPARSITY = 0.4
LEARNT = InputSparsityConfig(
    criterion="learnt", targets=(LEARNT_SPARSITY,), calibration_tokens=82944, learning_steps=360
)
QUICK_LEARNT = InputSparsityConfig(criterion="learnt", targets=(LEARNT_SPARSITY,), allocation_tokens=512)
_HELD, _NOT_HELD = ", share held", ", thresholds of calibration"
_CONTROL = "hybrid"  # how masks without a predictor spread their share over blocks


@dataclass(eq=False)
class Contender:
    """One way to leave weights out, of weights of one width.

    Attributes:
        method, variant, sparsity, criterion, scope: columns of its rows.
        bits: width of the weights.
        whole: the weights, which engines run.
        tables: the weights with the tables that its plan is made from.
        asked: the plan (``measure.sparse_plans``), None for the weights whole.
        timed: whether its speed is measured.
        note: why it cannot be run on this model, or an empty string.
        ran_by, activation_mode: what quality was measured with.
    """

    method: str
    bits: int
    sparsity: float
    whole: CompressedModel
    tables: CompressedModel
    asked: Mapping[str, Any] | None = None
    variant: str = ""
    criterion: str | None = None
    scope: str | None = None
    timed: bool = False
    note: str = ""
    ran_by: str = ""
    activation_mode: str = ""

    @property
    def stored(self) -> CompressedModel:
        """What it takes on disk; one mask for all tokens weighs nothing, and the truth is not stored."""
        return self.whole if self.asked is None or self.method in FIXED else self.tables


@dataclass(frozen=True)
class Models:
    """Weights of one width, whole and with each kind of table."""

    whole: CompressedModel
    masks: Mapping[str, CompressedModel]  # by name in ``PREDICTED``
    inputs: Mapping[str, CompressedModel]  # by "teal" and "wina"
    learnt: Sequence[CompressedModel]


def contenders(model: LoadedModel, context: BenchContext) -> list[Contender]:
    """Fit what there is to fit, and list everything; ``note`` says what cannot be run."""
    found = []
    for bits, models in _models(model, context).items():
        found.append(Contender("dense", bits, 0.0, models.whole, models.whole, variant="whole", timed=True))
        for sparsity in QUICK_SPARSITIES if context.quick else SPARSITIES:
            if not context.quick or sparsity in QUICK_MASKED[bits]:
                found += _masks(bits, models, sparsity, context.quick)
            found += _inputs(bits, models, sparsity, context.quick)
        found += (_left_out("learnt", bits, LEARNT_SPARSITY, models.whole, made, True) for made in models.learnt)
        if bits == WEIGHT_BITS[0] and not context.quick:
            found += _variants(bits, models)
    found = [one for one in found if one.method == "dense" or context.takes(one.method)]
    for contender in found:
        contender.note = _why_not(contender)
        contender.timed &= not contender.note
    return found


def _models(model: LoadedModel, context: BenchContext) -> dict[int, Models]:
    def made(*methods: MethodConfig) -> CompressedModel:
        return context.compress(model, Recipe.for_model(model, *methods), context.job)

    config, cuts = (QUICK_MASKS, QUICK_INPUTS) if context.quick else (MASKS, INPUTS)
    configs = {}
    if any(context.takes(method) for method in ("unified", *FIXED)):  # fixed masks have its groups and mean scores
        configs["unified"] = config
    if context.takes("per-layer"):
        configs["per-layer"] = config.model_copy(update={"predictor": "per-layer"})
    if context.takes("per-layer-published", quick=False):  # as DejaVu trains its own
        configs["per-layer-published"] = config.model_copy(update={"predictor": "per-layer", "tune_steps": 0})
    learnt = QUICK_LEARNT if context.quick else LEARNT
    teachers: Any = get_args(InputSparsityConfig.model_fields["teacher"].annotation) if "learnt" in context.only else ()
    by_criterion = {"teal": cuts, "wina": cuts.model_copy(update={"criterion": "weighted"})}
    found: dict[int, Models] = {}
    for bits in WEIGHT_BITS:
        stored = RtnConfig(bits=bits, group_size=_GROUP_SIZE, output_bits=_OUTPUT_BITS[bits])
        whole = made(stored)
        inputs = {name: made(stored, one) for name, one in by_criterion.items() if context.takes(name)}
        if not found:
            masks = {name: made(stored, one) for name, one in configs.items()}
        else:  # predictors are fitted on the dense model, so they are the same whatever its weights are stored in
            first = found[WEIGHT_BITS[0]]
            masks = {
                name: _moved(model, first.masks[name], first.whole, whole, stored, one) for name, one in configs.items()
            }
        # Without rounding the two teachers are one, so there is nothing to tell apart.
        by_teacher = [made(stored, learnt.model_copy(update={"teacher": one})) for one in teachers if bits < 16]
        found[bits] = Models(whole, masks, inputs, by_teacher)
    return found


def _moved(
    model: LoadedModel,
    made: CompressedModel,
    without: CompressedModel,
    whole: CompressedModel,
    stored: RtnConfig,
    config: PredictedSparsityConfig,
) -> CompressedModel:
    """Other weights with the predictor that was made for these; its own time of fitting is what they took longer."""
    seconds = [one.fit_seconds or 0.0 for one in (whole, made, without)]
    return replace(
        whole,
        recipe=Recipe.for_model(model, stored, config).model_dump(mode="json"),
        mask_predictor=made.mask_predictor,
        fit_seconds=seconds[0] + max(0.0, seconds[1] - seconds[2]),
        folder=None,
        recorded_sha256=None,
    )


def _masks(bits: int, models: Models, sparsity: float, quick: bool) -> Iterator[Contender]:
    timed = not quick or sparsity in QUICK_TIMED["masks"]
    if "unified" in models.masks:
        for kind in FIXED:
            yield _fixed(bits, models, sparsity, kind, timed=kind == "static" and sparsity == ONE_SPARSITY)
    for name in (name for name in PREDICTED if name in models.masks):
        yield _predicted(bits, models, sparsity, name, timed=timed)


def _fixed(
    bits: int, models: Models, sparsity: float, kind: str, criterion: str | None = None, timed: bool = False
) -> Contender:
    tables = models.masks["unified"]
    known = criterion or str(_facts(tables)["criterion"])
    asked: dict[str, Any] = {"kind": kind, "sparsity": sparsity, "allocation": _CONTROL}
    if kind == "static":
        asked["criterion"] = known
    variant, scope = "one mask for all tokens", "none"
    if kind == "oracle":
        variant, scope = "true scores of each token: not causal", "token"
    by = {"random": None, "magnitude": "magnitude"}.get(kind, known)
    return Contender(kind, bits, sparsity, models.whole, tables, asked, variant, by, scope, timed)


def _predicted(
    bits: int,
    models: Models,
    sparsity: float,
    name: str,
    scope: str = "token",
    timed: bool = False,
    hold: bool = True,
) -> Contender:
    made = models.masks[name]
    hold &= scope != "reply"  # nothing moves what one decision is in force for
    asked: dict[str, Any] = {"kind": "predicted", "sparsity": sparsity, "hold": hold}
    variant = _settings(made) + (_HELD if hold else _NOT_HELD)
    if scope != "token":
        asked |= {"scope": scope, "n": _EVERY if scope == "every" else 1}
        variant += ", made for decisions at every token"
    told = f"every {_EVERY} tokens" if scope == "every" else scope
    return Contender(
        name, bits, sparsity, models.whole, made, asked, variant, str(_facts(made)["criterion"]), told, timed
    )


def _inputs(bits: int, models: Models, sparsity: float, quick: bool) -> Iterator[Contender]:
    timed = not quick or sparsity in QUICK_TIMED["inputs"]
    for name, made in models.inputs.items():
        yield _left_out(name, bits, sparsity, models.whole, made, timed)


def _left_out(
    name: str, bits: int, sparsity: float, whole: CompressedModel, made: CompressedModel, timed: bool
) -> Contender:
    config = made.recipe["methods"][-1]
    asked = {"kind": "inputs", "sparsity": sparsity, "hold": True}
    variant = f"{config['allocation']} shares of units, {config['calibration_tokens']} tokens{_HELD}"
    if config["criterion"] == "learnt":
        teacher = {"compressed": "the same weights whole", "dense": "the dense model"}[config["teacher"]]
        variant = f"learnt from {teacher} in {config['learning_steps']} steps, from {variant}"
    return Contender(name, bits, sparsity, whole, made, asked, variant, config["criterion"], "token", timed)


def _variants(bits: int, models: Models) -> Iterator[Contender]:
    """Static masks by the other criteria, predictors whose share is not held, the unified one deciding less often."""
    for name in models.masks:  # published ones have not learnt to leave out less where text is hard
        if name != "per-layer-published":
            yield _predicted(bits, models, ONE_SPARSITY, name, hold=False)
    if "unified" not in models.masks:
        return
    known = str(_facts(models.masks["unified"])["criterion"])
    for criterion in get_args(Criterion):
        if criterion != known:  # that one is there at every sparsity
            yield _fixed(bits, models, ONE_SPARSITY, "static", criterion)
    for scope in ("every", "reply"):
        yield _predicted(bits, models, ONE_SPARSITY, "unified", scope)


def _facts(made: CompressedModel) -> Mapping[str, Any]:
    assert made.mask_predictor is not None  # it was compressed so
    return made.mask_predictor.facts


def _settings(made: CompressedModel) -> str:
    config = made.recipe["methods"][-1]
    told = "as published: " if config["predictor"] == "per-layer" and not config["tune_steps"] else ""
    told += f"width {config['width']}, {config['calibration_tokens']} tokens, {config['epochs']} epochs"
    return told + (f", tuned for {config['tune_steps']} steps" if config["tune_steps"] else "")


def _why_not(contender: Contender) -> str:
    """Why so much cannot be left out of this model: small ones have few blocks that may be masked."""
    if contender.asked is None or contender.asked["kind"] == "inputs":
        return ""
    asked = dict(contender.asked)
    if asked["kind"] == "oracle":  # its masks are made text by text, under the same bounds
        asked |= {"kind": "static"}
    try:
        sparse_plan(contender.tables, asked)
    except InputError as error:
        return str(error)
    return ""


def group_size(bits: int) -> int | None:
    """Weights per scale, None where there is none."""
    return None if bits == WEIGHT_BITS[0] else _GROUP_SIZE


def standard(among: Sequence[Contender], like: Contender, method: str) -> Contender | None:
    """The contender of a method at the same weights and sparsity, as it is by default."""
    same = (c for c in among if (c.method, c.bits, c.sparsity) == (method, like.bits, like.sparsity))
    return next(same, None)
