"""Memory and energy of one engine, alone in a fresh process: neither can be told apart between two in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.measure.decoding import Target
from workbench.measure.energy import POWERCAP, EnergyResult, PowerModel
from workbench.measure.environment import check_threads
from workbench.measure.memory import MemoryResult
from workbench.measure.spawn import run_child
from workbench.progress import Job
from workbench.runtime import choose_engine

_CHILD = "workbench.measure.alone_child"


@dataclass(frozen=True)
class AloneResult:
    """What one engine takes by itself."""

    memory: MemoryResult
    energy: EnergyResult

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_alone(
    target: Target,
    *,
    prompt: Sequence[int] | None = None,
    new_tokens: int = 16,
    threads: int | None = None,
    power: PowerModel | None = None,
    powercap: Path = POWERCAP,
    job: Job | None = None,
) -> AloneResult:
    """Open ``target`` in a fresh process, decode, and report its peak memory and its energy per token.

    Args:
        target: what to open.
        prompt: token ids to decode after; None for a prompt of the project.
        new_tokens: decoding steps, at least 1; more where an energy counter is watched.
        threads: of the engine; None for one per usable core.
        power: of the estimate where there is no counter.
        powercap: folder of the RAPL zones.
        job: progress; a cancel ends the child at once.

    Raises:
        InputError, EngineError, Cancelled: as ``latency.measure_many``.
    """
    if new_tokens < 1 or (prompt is not None and not prompt):
        raise InputError(f"Measuring memory needs a prompt and new_tokens of at least 1, got {new_tokens}.")
    choose_engine(target.engine)
    request = {
        "target": target.request(),
        "prompt": None if prompt is None else [int(token) for token in prompt],
        "new_tokens": new_tokens,
        "power": asdict(power or PowerModel()),
        "powercap": str(powercap),
    }
    answer = run_child(_CHILD, request, threads=check_threads(threads), job=job)
    return AloneResult(MemoryResult(**answer["memory"]), EnergyResult(**answer["energy"]))
