"""Running models: the plan, and the engines behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import EngineError, suggest

if TYPE_CHECKING:
    from workbench.formats.compressed import CompressedModel
    from workbench.models.base import LoadedModel
    from workbench.progress import Job
    from workbench.runtime.base import ActivationMode, Engine
    from workbench.runtime.plan import Plan

ENGINES = ("reference", "cpu")

__all__ = ["ENGINES", "choose_engine", "open_engine", "why_not_cpu"]


def choose_engine(engine: str, target: LoadedModel | CompressedModel | None = None) -> str:
    """Return the engine that ``auto`` stands for, or the named one.

    Args:
        engine: ``auto`` or a name. ``auto`` is the cpu engine where it was built and runs the target, else reference.
        target: what will run; None where that is not known yet.

    Raises:
        EngineError: an engine that does not exist, or a named one that was not built.
    """
    if engine not in (*ENGINES, "auto"):
        raise EngineError(f"No engine '{engine}': use auto or one of {', '.join(ENGINES)}." + suggest(engine, ENGINES))
    if engine == "auto":
        return "cpu" if why_not_cpu(target) is None else "reference"
    if engine == "cpu" and (why := why_not_cpu()) is not None:
        raise EngineError(why)
    return engine


def why_not_cpu(target: LoadedModel | CompressedModel | None = None) -> str | None:
    """Why the cpu engine cannot run ``target`` (or anything, where it was not built), None where it can."""
    from workbench.runtime.cpu_build import check, kernels

    try:
        kernels()
        if target is not None:
            check(target)
    except EngineError as error:
        return str(error)
    return None


def open_engine(
    target: LoadedModel | CompressedModel | str | Path,
    *,
    engine: str = "auto",
    plan: Plan | None = None,
    threads: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    activation_mode: ActivationMode | None = None,
    job: Job | None = None,
) -> Engine:
    """Open an engine on a dense or compressed model.

    Args:
        target: a loaded model, a compressed model, or the name or path of either.
        engine: ``auto`` or an engine's name; a named engine that cannot run is an error.
        plan: decisions to take while decoding.
        threads: CPU threads, None for one per usable core.
        dtype: computation type where the target is not loaded yet.
        device: where to compute, likewise.
        activation_mode: of the cpu engine, ``fp32`` or ``int8``; None for what the weights are made for.
        job: progress and cancel of loading.

    Raises:
        EngineError: the engine does not exist or cannot run this model.
        ModelError, IntegrityError: the model cannot be loaded.
    """
    choose_engine(engine)
    if engine == "cpu" and device != "cpu":
        raise EngineError(f"The cpu engine does not run on '{device}': use device cpu, or the reference engine.")
    if isinstance(target, str | Path):
        from workbench.formats.folder import is_compressed

        if is_compressed(Path(target)) and engine == "cpu":  # needs no torch
            from workbench.runtime.cpu import CpuEngine

            return CpuEngine(Path(target), plan, threads=threads, activation_mode=activation_mode, job=job)
        from workbench.formats.compressed import CompressedModel
        from workbench.models import load

        target = (
            CompressedModel.load(Path(target))
            if is_compressed(Path(target))
            else load(str(target), dtype=dtype, device=device, job=job)
        )
    name = choose_engine(engine, target) if device == "cpu" else "reference"
    if name == "cpu":
        from workbench.runtime.cpu import CpuEngine

        return CpuEngine(target, plan, threads=threads, activation_mode=activation_mode, job=job)

    import torch

    from workbench.formats.rebuild import to_model
    from workbench.models.base import LoadedModel
    from workbench.runtime.reference import ReferenceEngine
    from workbench.runtime.weights import CompressedWeights

    if activation_mode not in (None, "fp32" if dtype == "float32" else "bf16"):
        raise EngineError(f"The reference engine has no {activation_mode} activations: use the cpu engine.")
    if threads is not None:
        torch.set_num_threads(threads)
    if isinstance(target, LoadedModel):
        return ReferenceEngine(target, plan)
    return ReferenceEngine(to_model(target, dtype=dtype, device=device), plan, CompressedWeights(target))
