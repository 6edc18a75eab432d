"""The process that times engines and rivals in turns: ``python -m workbench.measure.engine_child``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from workbench.errors import EngineError
from workbench.formats.compressed import CompressedModel
from workbench.formats.selectors import Selectors
from workbench.measure.child import serve
from workbench.measure.decoding import decode, lengthen, prefill_seconds
from workbench.measure.latency_child import order_of_round
from workbench.measure.sparse_plans import layout_key, share_controller, sparse_plan, sparse_policy
from workbench.progress import Job
from workbench.runtime import open_engine
from workbench.runtime.cpu import CpuEngine
from workbench.runtime.holding import Held
from workbench.runtime.plan import Policy, width_plan
from workbench.runtime.precision import gain_thresholds, precision_plan
from workbench.runtime.share_control import ShareController


@dataclass(frozen=True)
class Timing:
    """Seconds of each decoding step; bytes that a step touched, seconds of its parts and of timing them.

    Those three are None where the engine does not say. ``left_out`` is the share of the blocks' weights that a token
    did not use, ``left_out_by_all`` the share that none of a step's tokens did.
    """

    step_s: list[float]
    touched_bytes: float | None
    parts: dict[str, float] | None
    trace_s: float | None
    left_out: float | None = None
    left_out_by_all: float | None = None


class Side(Protocol):
    """One contender."""

    def decode(self, prompt: Sequence[int], new_tokens: int) -> Timing: ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds from a prompt to the logits after it."""
        ...


class CpuSide:
    """The cpu engine; several sides may share one nested model, each with its policy, or what moves it."""

    def __init__(self, engine: CpuEngine, policy: Policy, controller: ShareController | None = None) -> None:
        self._engine, self._policy, self._controller = engine, policy, controller

    def decode(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        controller = self._controller
        self._engine.set_policy(self._policy if controller is None else controller.policy)
        sequence, at = self._engine.start(), [0.0]
        held = None if controller is None else Held(self._engine, sequence, controller)

        def on_token(token: int) -> None:
            at.append(time.perf_counter())
            if held is not None:
                held(token)

        self._engine.generate(sequence, prompt, new_tokens + 1, on_token=on_token)
        if held is not None:
            held.finish()
        steps = sequence.trace[len(prompt) :]
        parts = {name: float(np.median([step.parts[name] for step in steps])) for name in steps[0].parts}
        return Timing(
            np.diff(at[1:]).tolist(),
            float(np.mean([step.touched_bytes for step in steps])),
            parts,
            self._engine.trace_seconds,
        )

    def prefill(self, prompt: Sequence[int]) -> float:
        self._engine.set_policy(self._policy)
        return prefill_seconds(self._engine, prompt)


class BatchSide(CpuSide):
    """Several texts at once: all but the last tokens of each are its prompt, and those are fed step by step.

    Given text, and not replies: where much is left out replies fall into loops, and choose more alike than texts do.
    """

    def __init__(
        self,
        engine: CpuEngine,
        policy: Policy,
        controller: ShareController | None,
        texts: Sequence[Sequence[int]],
    ) -> None:
        super().__init__(engine, policy, controller)
        self._texts = texts

    def decode(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        engine, controller = self._engine, self._controller
        engine.set_policy(self._policy if controller is None else controller.policy)
        sequences, seconds = [engine.start() for _ in self._texts], list[float]()
        for sequence, text in zip(sequences, self._texts, strict=True):
            engine.prefill(sequence, text[:-new_tokens])
        for tokens in zip(*(text[-new_tokens:] for text in self._texts), strict=True):
            started = time.perf_counter()
            engine.step(sequences, tokens)
            seconds.append(time.perf_counter() - started)
            if controller is not None:
                controller.observe([sequence.trace[-1] for sequence in sequences])
                engine.set_policy(controller.policy)
        steps = [s.trace[-new_tokens:] for s in sequences]  # what a pass took lies shared out evenly on its tokens
        passes = [sum(step.touched_bytes for step in here) for here in zip(*steps, strict=True)]
        parts = {
            name: float(np.median([sum(step.parts[name] for step in here) for here in zip(*steps, strict=True)]))
            for name in steps[0][0].parts
        }
        kept = float(np.mean([[step.kept_weights for step in trace] for trace in steps]))
        of_all = float(np.mean([step.pass_weights for step in steps[0]]))
        return Timing(seconds, float(np.mean(passes)), parts, engine.trace_seconds, 1 - kept, 1 - of_all)


class ReferenceSide:
    """PyTorch through transformers, and bitsandbytes through it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def decode(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        return Timing(decode(self._engine, prompt, new_tokens).step_s, None, None, None)

    def prefill(self, prompt: Sequence[int]) -> float:
        return prefill_seconds(self._engine, prompt)


class LlamaCppSide:
    """llama.cpp through llama-cpp-python: only the evaluation is timed, no sampling."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        from llama_cpp import Llama

        self._model = Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        self._model.reset()
        self._model.eval(list(prompt))
        seconds = []
        for i in range(new_tokens):
            token = prompt[i % len(prompt)]
            started = time.perf_counter()
            self._model.eval([token])
            seconds.append(time.perf_counter() - started)
        return Timing(seconds, None, None, None)

    def prefill(self, prompt: Sequence[int]) -> float:
        self._model.reset()
        started = time.perf_counter()
        self._model.eval(list(prompt))
        return time.perf_counter() - started


def _open(sides: Sequence[dict[str, Any]], threads: int, context: int, job: Job) -> list[Side]:
    engines: dict[tuple, Any] = {}
    models: dict[str, CompressedModel] = {}

    def stored(source: str) -> CompressedModel:
        if source not in models:
            models[source] = CompressedModel.load(source)
        return models[source]

    found: list[Side] = []
    for side in sides:
        # Plans of the rule ``gain`` differ in thresholds alone, those of ``error`` in their estimators.
        rule, sparse = side.get("rule"), side.get("sparse")
        plan = (rule, side["target"] if rule == "error" else None, sparse and layout_key(sparse))
        key = (side["engine"], side["source"], side["dtype"], plan)
        if side["engine"] == "llama.cpp":
            found.append(LlamaCppSide(side["source"], threads, context))
        else:
            if key not in engines:
                engines[key] = _engine(side, threads, stored)
            engine = engines[key]
            if side["engine"] == "cpu":
                controller, policy = sparse and share_controller(stored(side["source"]), sparse), _policy(side, stored)
                texts = side.get("texts")
                found.append(
                    CpuSide(engine, policy, controller)
                    if texts is None
                    else BatchSide(engine, policy, controller, texts)
                )
            else:
                found.append(ReferenceSide(engine))
        job.advance()
    return found


def _engine(side: dict[str, Any], threads: int, stored: Callable[[str], CompressedModel]) -> Any:
    if side.get("sparse") is not None:
        model = stored(side["source"])
        return CpuEngine(model, sparse_plan(model, side["sparse"]), threads=threads)
    if side.get("rule") is None and side["bits"] is None:
        return open_engine(side["source"], engine=side["engine"], threads=threads, dtype=side["dtype"])
    model = stored(side["source"])
    if side.get("rule") is None:
        plan = width_plan(model.architecture, side["widths"], side["widths"][-1])
    else:
        plan = precision_plan(model.architecture, _selectors(model), side["target"], side["rule"])
    return CpuEngine(model, plan, threads=threads)


def _policy(side: dict[str, Any], stored: Callable[[str], CompressedModel]) -> Policy:
    if side.get("sparse") is not None:
        return sparse_policy(stored(side["source"]), side["sparse"])
    if "thresholds" in side:
        return Policy(thresholds={unit: tuple(cuts) for unit, cuts in side["thresholds"].items()})
    if side.get("rule") == "gain":
        model = stored(side["source"])
        return Policy(thresholds=gain_thresholds(model.architecture, _selectors(model), side["target"]))
    return Policy({} if side["bits"] is None else {"width": side["bits"]})


def _selectors(model: CompressedModel) -> Selectors:
    if model.selectors is None:
        raise EngineError(f"{model.folder} has no selectors: compress it with 'dynamic-precision'.")
    return model.selectors


def measure(request: dict[str, Any], job: Job) -> dict[str, Any]:
    """Time all sides in turns; ``benches.engine`` writes the request and reads the answer.

    A side with ``decode`` false has its prefill timed alone, and no runs; one with ``texts`` reads all of them at
    once.
    """
    from workbench.runtime.cpu_build import kernels

    prompt, new_tokens, threads = request["prompt"], request["new_tokens"], request["threads"]
    long_prompt = lengthen(prompt, request["prefill_tokens"])
    context = max(len(long_prompt), len(prompt) + new_tokens) + 16
    job.stage("load engines", len(request["sides"]))
    sides = _open(request["sides"], threads, context, job)
    bandwidth = [kernels().bandwidth(threads)]
    rounds = request["warmup"] + request["pairs"]
    runs: list[list[dict[str, Any]]] = [[] for _ in sides]
    decoding = [i for i, side in enumerate(request["sides"]) if side.get("decode", True)]
    job.stage("time decoding", rounds * len(decoding))
    for index in range(rounds):
        for i in (decoding[turn] for turn in order_of_round(index, len(decoding))):
            timing = sides[i].decode(prompt, new_tokens)
            if index >= request["warmup"]:
                runs[i].append(vars(timing))
            job.advance()
        if index % 5 == 4:  # the machine is shared: its bandwidth is measured along the way
            bandwidth.append(kernels().bandwidth(threads, repeats=2))
    prefill: list[list[float]] = [[] for _ in sides]
    job.stage("time prefill", request["prefill_repeats"] * len(sides))
    for index in range(request["prefill_repeats"]):
        for i in order_of_round(index, len(sides)):
            prefill[i].append(sides[i].prefill(long_prompt))
            job.advance()
    if any(not runs[i] for i in decoding):
        raise EngineError("No round of timing counted: ask for at least one pair.")
    return {
        "sides": [{"runs": run, "prefill_s": seconds} for run, seconds in zip(runs, prefill, strict=True)],
        "prefill_tokens": len(long_prompt),
        "bandwidth": bandwidth,
    }


if __name__ == "__main__":
    serve(measure)
