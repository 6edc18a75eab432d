"""What ``generate --sparsity`` opens: a model that leaves inputs out, or heads and neurons by prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli.options import require_compressed
from workbench.errors import InputError
from workbench.files import check_output_file

if TYPE_CHECKING:
    from workbench.formats.input_cuts import InputCuts
    from workbench.formats.mask_predictor import MaskPredictor
    from workbench.models.base import Architecture
    from workbench.progress import Job
    from workbench.runtime.base import Engine, StepTrace
    from workbench.runtime.feature_log import FeatureLog, FeatureReader
    from workbench.runtime.mask_log import MaskLog
    from workbench.runtime.mask_safety import MaskWatch, Verdict
    from workbench.runtime.plan import Scope
    from workbench.runtime.share_control import ShareController

_MISSED, _FEWEST_STEPS = 0.05, 16  # a share further off than that, over so many steps or more, is worth a warning
_SCOPES = "token, every:N (N tokens from one decision to the next, such as every:8) or reply"


@dataclass
class Sparse:
    """An engine that leaves weights out.

    Attributes:
        engine: opened under the plan.
        asked: the sparsity that was asked for.
        wanted: the same as a share of all weights of the blocks: masks leave keys and values whole.
        expected: that share, of held-out text, first tokens apart.
        predictor: what chooses heads and neurons; None where small inputs are left out.
        scope: when it chooses; None likewise.
        watch: judges prompts; None where small inputs are left out, or where the model keeps no statistics.
        important: the request runs dense.
        guard: it does where the predictor is unsure.
        fail_safe: it does too where it is unlike the calibration text.
        log: what requests are counted in.
        features: where tokens of a request that runs dense are kept, and what reads them.
        controller: holds the share that was asked for; None where nobody does.
        verdict: of the prompt, once it is read.
    """

    engine: Engine
    asked: float
    wanted: float
    expected: float
    predictor: MaskPredictor | None = None
    scope: Scope | None = None
    watch: MaskWatch | None = None
    important: bool = False
    guard: bool = True
    fail_safe: bool = False
    log: MaskLog | None = None
    features: tuple[FeatureLog, FeatureReader] | None = None
    controller: ShareController | None = None
    verdict: Verdict | None = None

    def reply(self, ids: Sequence[int], new_tokens: int, **options: Any) -> tuple[Any, list[int]]:
        """A sequence that read ``ids``, and what it replied; ``options`` as of ``guarded_reply``."""
        from workbench.runtime.mask_safety import guarded_reply

        options |= {"important": self.important, "guard": self.guard, "fail_safe": self.fail_safe}
        options |= {"log": self.log, "features": self.features, "controller": self.controller}
        sequence, reply, verdict = guarded_reply(self.engine, self.watch, ids, new_tokens, **options)
        self.verdict = None if self.predictor is None else verdict
        return sequence, reply

    def facts(self, steps: Sequence[StepTrace], prompt: int) -> dict[str, Any]:
        """What ``--json`` says, of all steps of a text whose first ``prompt`` were its prompt."""
        found: dict[str, Any] = {"sparsity": self.asked, "expected_sparsity": self.expected}
        found["effective_sparsity"] = self.left_out(steps, prompt)
        found["held"] = self.controller is not None
        found["warning"] = self.missed(steps, prompt) or None
        if self.predictor is not None and self.scope is not None:
            found["scope"] = f"every:{self.scope.n}" if self.scope.kind == "every" else self.scope.kind
            found["prefix"] = self.prefix
            found["deciding_share"] = deciding_share(steps[prompt:])
        if self.verdict is not None:
            found |= {"confidence": self.verdict.confidence, "lowest_confidence": self.verdict.lowest}
            found |= {"drift": self.verdict.drift, "drift_band": self.verdict.band}
            found["dense_because"] = self.verdict.dense_because or None
        return found

    def left_out(self, steps: Sequence[StepTrace], prompt: int) -> float | None:
        """Share of the blocks' weights that was not used: inputs, prompt included; heads and neurons, by the reply.

        None where the reply took no step: its first token follows from the prompt.
        """
        counted = steps if self.predictor is None else steps[prompt:]
        return 1 - sum(step.kept_weights for step in counted) / len(counted) if counted else None

    def missed(self, steps: Sequence[StepTrace], prompt: int) -> str:
        """What to say where text leaves out another share than was asked for; empty where it does not, or is short."""
        counted = steps if self.predictor is None else [s for s in steps[prompt:] if s.position >= self.prefix]
        if self.dense_because or len(counted) < _FEWEST_STEPS:
            return ""
        found = 1 - sum(step.kept_weights for step in counted) / len(counted)
        if abs(found - self.wanted) <= _MISSED:
            return ""
        why, fit = "this text is unlike the one that thresholds come from", "fit it with more calibration_tokens"
        if self.predictor is not None:
            fit = f"count such text with --log and run 'workbench retune', or {fit}"
            made_for = str(self.predictor.facts["scope"])
            if self.scope is not None and self.scope.kind != made_for:
                why = f"thresholds were made for the scope '{made_for}'"
                n = f" and 'n': {self.scope.n}" if self.scope.kind == "every" else ""
                fit = f"take that, or fit the predictor with 'scope': '{self.scope.kind}'{n}"
        where = "" if self.predictor is None or not self.prefix else f" after the first {self.prefix} tokens"
        return (
            f"Warning: {found:.1%} of the blocks' weights were left out{where}, {self.wanted:.1%} was asked for: "
            f"{why}; {fit}."
        )

    @property
    def dense_because(self) -> str:
        """Why the request ran dense, once it did; empty where it did not."""
        return "" if self.verdict is None else self.verdict.dense_because

    @property
    def prefix(self) -> int:
        """Tokens at the beginning of a text that stay whole; a decision for the reply has the prompt in its place."""
        if self.predictor is None or self.scope is None or self.scope.kind == "reply":
            return 0
        return int(self.predictor.facts["prefix"])

    def said(self, steps: Sequence[StepTrace], prompt: int) -> list[str]:
        """The same in lines."""
        lines = [line for line in (self._used(steps, prompt), self.missed(steps, prompt)) if line]
        found = self.verdict
        if found is None:
            return lines
        if found.unlike:
            lines.append(
                f"This prompt is unlike the calibration text: it lies {found.drift:.1f} standard errors off, where "
                f"{found.band:.1f} either way are usual. Masks may be predicted as badly."
            )
        if found.unsure and not found.dense_because:
            lines.append(
                f"The predictor is unsure of this prompt: {found.confidence:.5f}, usual is {found.lowest:.5f} and more."
            )
        if self.watch is None and not self.important:
            lines.append("Nobody watched: the model was made before statistics were kept. Compress it again for that.")
        return lines

    def _used(self, steps: Sequence[StepTrace], prompt: int) -> str:
        left_out, found = self.left_out(steps, prompt), self.verdict
        if found is not None and found.dense_because:
            sure = f" ({found.confidence:.5f}, usual is {found.lowest:.5f} and more)" if found.unsure else ""
            return f"Nothing was left out, the request ran dense: {found.dense_because}{sure}."
        if not self.asked:
            return "Nothing was left out: a sparsity of 0 was asked for."
        held = self.controller is not None
        if self.predictor is None:
            aim = f"{self.wanted:.1%} asked for" if held else f"{self.expected:.1%} expected from the calibration text"
            return f"{left_out or 0:.1%} of the blocks' weights were not used, prompt included; {aim}."
        if left_out is None:
            return "The reply took no step of its own, so nothing was left out."
        if len(steps) <= self.prefix:
            return f"Nothing was left out: the first {self.prefix} tokens stay whole, and this text has {len(steps)}."
        share = deciding_share(steps[prompt:])
        time = "" if share is None else f" Choosing took {share:.1%} of its time (one run, no claim)."
        of_all = f"({self.asked:.0%} of the heads and neurons)"
        aim = f"{self.wanted:.1%} {of_all} asked for"
        if not held:
            aim = f"{self.expected:.1%} {of_all} expected from held-out text"
        masked = [step for step in steps[prompt:] if step.position >= self.prefix]
        after = ""
        if len(masked) < len(steps[prompt:]) and masked:  # part of the reply lies in the prefix
            later = 1 - sum(step.kept_weights for step in masked) / len(masked)
            after = f", {later:.1%} after the first {self.prefix} tokens of the text, which stay whole"
        return f"{left_out:.1%} of the blocks' weights were not used by the reply{after}; {aim}.{time}"


def deciding_share(steps: Sequence[StepTrace]) -> float | None:
    """Share of the steps' time that deciders took; None where the engine does not time its parts."""
    timed = [step for step in steps if "deciders" in step.parts]
    total = sum(sum(step.parts.values()) for step in timed)
    return sum(step.parts["deciders"] for step in timed) / total if total > 0 else None


def open_log(path: Path, model: str, predictor: MaskPredictor) -> MaskLog:
    """The log at a path, or an empty one where there is none yet."""
    from workbench.runtime.mask_log import MaskLog

    check_output_file(path)
    return MaskLog.load(path, model, predictor) if path.exists() else MaskLog.empty(model, predictor)


def open_features(
    path: Path, model: str, architecture: Architecture, predictor: MaskPredictor
) -> tuple[FeatureLog, FeatureReader]:
    """The features at a path, or none yet, and what adds to them.

    Raises:
        InputError: a predictor that nothing could be trained on for.
    """
    from workbench.runtime.feature_log import FeatureLog, FeatureReader, why_no_features
    from workbench.runtime.mask_safety import site_of

    if (why := why_no_features(predictor)) is not None:
        raise InputError(f"--log-features is of no use for this predictor: {why}.")
    check_output_file(path)
    log = FeatureLog.load(path, model, predictor) if path.exists() else FeatureLog.empty(model, predictor)
    sites = tuple(site_of(architecture, part) for part in predictor.parts)
    return log, FeatureReader(architecture, predictor, sites, log)


def scope_of(text: str) -> Scope:
    """A scope as it is given on the command line.

    Raises:
        InputError: no such scope.
    """
    from workbench.runtime.plan import Scope

    if text == "token":
        return Scope("token")
    if text == "reply":
        return Scope("reply")
    kind, _, n = text.partition(":")
    if kind == "every" and n.isascii() and n.isdigit() and int(n) > 0:
        return Scope("every", int(n))
    raise InputError(f"Unknown scope '{text}'; allowed are {_SCOPES}.")


def open_sparse(
    model: str,
    sparsity: float,
    scope: str | None,
    engine: str,
    threads: int | None,
    job: Job,
    important: bool = False,
    guard: bool | None = None,
    fail_safe: bool = False,
    log: Path | None = None,
    device: str = "cpu",
    features: Path | None = None,
    hold: bool | None = None,
) -> Sparse:
    """Open a compressed model that leaves a share of its weights out.

    Raises:
        InputError: a model that cannot, a sparsity that is not possible, a scope that is none or that nothing decides
            at.
    """
    from workbench.formats.compressed import CompressedModel
    from workbench.runtime import open_engine

    require_compressed(model, "--sparsity reads")
    wanted = None if scope is None else scope_of(scope)
    compressed = CompressedModel.load(model)
    architecture = compressed.architecture
    if compressed.mask_predictor is not None:
        from workbench.runtime.mask_shares import expected_left_out, mask_thresholds, total_weights
        from workbench.runtime.masks import mask_plan, scope_of_predictor

        predictor = compressed.mask_predictor
        chosen = scope_of_predictor(predictor) if wanted is None else wanted
        plan = mask_plan(architecture, predictor, sparsity, scope=chosen)
        expected = expected_left_out(architecture, predictor, mask_thresholds(architecture, predictor, sparsity))
        wanted_share = sparsity * total_weights(architecture) / sum(unit.n_weights for unit in architecture.units)
        held = _controller(architecture, predictor, sparsity, hold, chosen)
        watch = None
        if predictor.statistics is not None or fail_safe or log is not None:
            from workbench.runtime.mask_safety import MaskWatch

            watch = MaskWatch(architecture, predictor, sparsity)
        counted = None if log is None else open_log(log, compressed.sha256, predictor)
        kept = None if features is None else open_features(features, compressed.sha256, architecture, predictor)
        opened = open_engine(compressed, engine=engine, plan=plan, threads=threads, device=device, job=job)
        guarding = guard is not False
        return Sparse(
            *(opened, sparsity, wanted_share, expected, predictor, chosen, watch, important, guarding, fail_safe),
            log=counted,
            features=kept,
            controller=held,
        )
    if compressed.input_cuts is None:
        raise InputError(
            f"{model} cannot leave weights out: compress with the method 'input-sparsity' or 'predicted-sparsity' "
            "after the others."
        )
    named = {
        "--scope": scope is not None,
        "--important": important,
        "--guard" if guard else "--no-guard": guard is not None,
        "--fail-safe": fail_safe,
        "--log": log is not None,
        "--log-features": features is not None,
    }
    for name in (name for name, given in named.items() if given):
        raise InputError(
            f"{name} means nothing to {model}, which looks at the inputs of every token: it is for models with the "
            "method 'predicted-sparsity'."
        )
    from workbench.runtime.input_sparsity import expected_sparsity, input_plan, input_thresholds

    cuts = compressed.input_cuts
    expected = expected_sparsity(architecture, cuts, input_thresholds(architecture, cuts, sparsity))
    # Without sparsity, as without the option: the layout for it rounds activations otherwise and takes longer.
    cut = input_plan(architecture, cuts, sparsity) if sparsity != 0 else None
    opened = open_engine(compressed, engine=engine, plan=cut, threads=threads, device=device, job=job)
    held = _controller(architecture, cuts, sparsity, hold)
    return Sparse(opened, sparsity, sparsity, expected, controller=held)


def _controller(
    architecture: Architecture,
    tables: MaskPredictor | InputCuts,
    sparsity: float,
    hold: bool | None,
    scope: Scope | None = None,
) -> ShareController | None:
    """What holds a share: nothing where there is none, or where one decision stands for the whole reply.

    Raises:
        InputError: it was asked for where it cannot be.
    """
    from workbench.runtime.share_control import ShareController

    if scope is not None and scope.kind == "reply":
        if hold:
            raise InputError("--hold is not possible with the scope reply, which decides once: leave one of them out.")
        return None
    return None if hold is False or sparsity == 0 else ShareController(architecture, tables, sparsity)
