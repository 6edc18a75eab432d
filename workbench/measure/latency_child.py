"""The process that times engines side by side: ``python -m workbench.measure.latency_child``.

All engines are loaded here, so that they share one process, one set of threads and one moment of a noisy machine.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import psutil

from workbench.measure.child import serve
from workbench.measure.decoding import Target, check_room, decode, default_prompt, lengthen, prefill_seconds
from workbench.measure.environment import environment
from workbench.progress import Job
from workbench.runtime.base import Engine


def order_of_round(index: int, sides: int) -> list[int]:
    """Order in which the sides run in a round: each odd round mirrors the one before, every two rounds rotate.

    Two sides give AB BA BA AB: a drift of the machine, linear within four rounds, falls on both alike.
    """
    turn = index // 2 % sides
    order = [(turn + i) % sides for i in range(sides)]
    return order[::-1] if index % 2 else order


def measure(request: dict[str, Any], job: Job) -> dict[str, Any]:
    """Time the requested engines; ``latency.measure_many`` writes the request and reads the answer."""
    targets = [Target(**target) for target in request["targets"]]
    engines: list[Engine] = []
    job.stage("loading models", len(targets))
    for target in targets:
        engines.append(target.open(request["threads"]))
        job.advance()
    prompt = request["prompt"] or default_prompt(engines[0])
    context = check_room(engines, len(prompt), request["new_tokens"])
    before, started = psutil.cpu_times(), time.perf_counter()
    runs: list[list[dict[str, Any]]] = [[] for _ in engines]
    rounds = request["warmup"] + request["pairs"]
    job.stage("timing", rounds * len(engines))
    for index in range(rounds):
        for side in order_of_round(index, len(engines)):
            run = decode(engines[side], prompt, request["new_tokens"])
            if index >= request["warmup"]:
                runs[side].append(asdict(run))
            job.advance()
    long_prompt = lengthen(prompt, min(request["prefill_tokens"], context))
    prefills: list[list[float]] = [[] for _ in engines]
    job.stage("timing prefill", request["prefill_repeats"] * len(engines))
    for index in range(request["prefill_repeats"]):
        for side in order_of_round(index, len(engines)):
            prefills[side].append(prefill_seconds(engines[side], long_prompt))
            job.advance()
    return {
        "sides": [
            {"engine": engine.name, "activation_mode": engine.activation_mode, "runs": found, "prefill_s": seconds}
            for engine, found, seconds in zip(engines, runs, prefills, strict=True)
        ],
        "prompt_tokens": len(prompt),
        "prefill_tokens": len(long_prompt),
        "steal_share": _steal_share(before, time.perf_counter() - started),
        "environment": environment(),
    }


def _steal_share(before: Any, seconds: float) -> float | None:
    """Share of the machine's processor time since ``before`` that a hypervisor gave away, None where unknown."""
    if not hasattr(before, "steal"):
        return None
    stolen = psutil.cpu_times().steal - before.steal
    return round(stolen / (seconds * (psutil.cpu_count() or 1)), 4)


if __name__ == "__main__":
    serve(measure)
