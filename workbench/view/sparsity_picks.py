"""What may be picked of contextual sparsity, and how much is fitted, looked at and measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from workbench.analysis.sparsity import check_criteria
from workbench.apply.config import MethodConfig
from workbench.apply.input_sparsity_config import InputSparsityConfig
from workbench.apply.rtn import RtnConfig
from workbench.apply.sparsity_config import Criterion, PredictedSparsityConfig
from workbench.errors import InputError, suggest
from workbench.runtime.mask_shares import Allocation
from workbench.view.demo import Measuring

Method = Literal["predicted", "static", "random", "oracle", "teal", "wina", "learnt"]
METHODS: dict[Method, str] = {
    "predicted": "predicted masks",
    "static": "static mask",
    "random": "random mask",
    "oracle": "true masks: not causal",
    "teal": "inputs by size (TEAL)",
    "wina": "inputs by size and weights (WINA)",
    "learnt": "inputs by learnt factors",
}
INPUT_METHODS: dict[str, Method] = {"magnitude": "teal", "weighted": "wina", "learnt": "learnt"}  # by criterion
FIXED = ("static", "random", "oracle")  # their masks are not predicted
SCOPES = ("token", "every", "reply")
MOST = 0.7  # of what a slider asks for; beyond it nothing that is measured here is of use
CONTROL: Allocation = "hybrid"  # how masks without a predictor, and the true ones, spread their share over blocks


def _weights() -> MethodConfig:
    return RtnConfig(bits=16, output_bits=16)


@dataclass(frozen=True)
class SparsitySettings(Measuring):
    """How the model is made, and how much is looked at and measured in one sitting.

    Attributes:
        weights: how weights are stored; 16 bits, so that what is seen is what leaving out costs.
        masks: the predictor of heads and neurons.
        inputs: what leaves inputs out, by size (``teal``); ``wina`` differs in its criterion alone.
        texts: to be looked at as they are, in place of prompts and replies.
        prompts: whose replies are looked at, in the chat template; empty for some of the project's own.
        n_prompts: how many of those.
        new_tokens: longest reply, tokens.
        curve: sparsities at which every method is measured on sampled text; predictions lie between them.
        curve_windows, curve_length: windows of sampled text for that, and their tokens.
        by_domain: sparsities at which quality is shown by domain and language.
        quality_windows, quality_length: windows on which the predictor is held against true scores.
        text: evaluation text.
        seed: of everything drawn.
    """

    weights: MethodConfig = field(default_factory=_weights)
    masks: PredictedSparsityConfig = field(
        default_factory=lambda: PredictedSparsityConfig(width=128, aggregates=get_args(Criterion))
    )
    inputs: InputSparsityConfig = field(default_factory=InputSparsityConfig)
    texts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    n_prompts: int = 3
    new_tokens: int = 128
    curve: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    curve_windows: int = 8
    curve_length: int = 160
    by_domain: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    quality_windows: int = 8
    quality_length: int = 128
    text: str = "prose"
    seed: int = 0
    n_windows: int = 40
    window_length: int = 128
    pairs: int = 10

    @classmethod
    def quick(cls) -> SparsitySettings:
        """A predictor and tables from so little text that they are made in two or three minutes.

        How masks differ shows; the predictor is far from its best. Replies are masked from token 32 on, so that all of
        them is seen; quality counts what follows the first 64 tokens all the same.
        """
        tokens = 1024
        return cls(
            weights=RtnConfig(bits=8),  # half the bytes to write and to read, at some 0.002 nats a token
            masks=PredictedSparsityConfig(
                epochs=8, prefix=32, decisions_per_text=128, calibration_tokens=tokens, aggregates=get_args(Criterion)
            ),
            inputs=InputSparsityConfig(allocation="uniform", calibration_tokens=tokens),
            n_prompts=2,
            new_tokens=64,
            curve=(0.3, 0.7),
            curve_windows=2,
            curve_length=112,
            by_domain=(0.1, 0.3, 0.5),
            quality_windows=2,
            quality_length=96,
            n_windows=16,
            window_length=96,
            pairs=3,
        )

    @property
    def input_configs(self) -> tuple[InputSparsityConfig, ...]:
        """What is fitted to leave inputs out: by size, and by size and weights."""
        return self.inputs, self.inputs.model_copy(update={"criterion": "weighted"})


@dataclass(frozen=True)
class SparsityPick:
    """What is left out, and how it is chosen.

    Attributes:
        method: of ``METHODS``.
        sparsity: share of the weights of all heads and neurons, or of all weights of the blocks where inputs are left
            out.
        criterion: what matters: of the true masks that are looked at, and of a static mask.
        scope: when predicted masks are chosen.
        n: of ``every``: tokens from one choice to the next.
    """

    method: Method = "predicted"
    sparsity: float = 0.3
    criterion: str = "plainact"
    scope: Literal["token", "every", "reply"] = "token"
    n: int = 8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(
                f"Unknown method '{self.method}'; allowed are {', '.join(METHODS)}." + suggest(self.method, METHODS)
            )
        if self.scope not in SCOPES:
            raise InputError(
                f"Unknown scope '{self.scope}'; allowed are {', '.join(SCOPES)}." + suggest(self.scope, SCOPES)
            )
        if not 0 <= self.sparsity <= MOST:
            raise InputError(f"A sparsity of {self.sparsity:g} is not possible here: give 0 to {MOST:g}.")
        # A slider's 0.1 + 0.2 is the 0.3 of a setting: they are measured once, and shown as one.
        object.__setattr__(self, "sparsity", round(float(self.sparsity), 6))
        if self.n < 1:
            raise InputError(f"A choice every {self.n} tokens is not possible: give 1 or more.")
        check_criteria([self.criterion])

    @property
    def masks(self) -> bool:
        """Whether heads and neurons are left out, and not inputs."""
        return self.method not in INPUT_METHODS.values()

    @property
    def line(self) -> str:
        """What is the same at every sparsity, in words; curves go by it."""
        if self.method == "predicted" and self.scope != "token":
            return f"{METHODS[self.method]}, " + (f"every {self.n} tokens" if self.scope == "every" else "once a reply")
        if self.method == "static":
            return f"{METHODS[self.method]} by {self.criterion}"
        return METHODS[self.method]

    @property
    def asked(self) -> dict[str, Any]:
        """The same for ``measure.sparse_plans``."""
        if not self.masks:
            return {"kind": "inputs", "sparsity": self.sparsity, "hold": True}
        found: dict[str, Any] = {"kind": self.method, "sparsity": self.sparsity}
        if self.method in FIXED:
            found["allocation"] = CONTROL
        if self.method == "static":
            found["criterion"] = self.criterion
        if self.method == "predicted" and self.scope != "reply":
            found["hold"] = True
        if self.method == "predicted" and self.scope != "token":
            found |= {"scope": self.scope, "n": self.n if self.scope == "every" else 1}
        return found

    def at(self, sparsity: float) -> SparsityPick:
        """The same at another sparsity."""
        return replace(self, sparsity=sparsity)
