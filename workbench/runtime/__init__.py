"""Running models: the plan, and the engines behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import EngineError, suggest

if TYPE_CHECKING:
    from workbench.formats.compressed import CompressedModel
    from workbench.models.base import LoadedModel
    from workbench.progress import Job
    from workbench.runtime.plan import Plan
    from workbench.runtime.reference import ReferenceEngine

ENGINES = ("reference",)

__all__ = ["ENGINES", "choose_engine", "open_engine"]


def choose_engine(engine: str) -> str:
    """Return the engine that ``auto`` stands for, or the named one.

    Raises:
        EngineError: an engine that does not exist.
    """
    if engine == "auto":
        return "reference"
    if engine not in ENGINES:
        raise EngineError(f"No engine '{engine}': use auto or one of {', '.join(ENGINES)}." + suggest(engine, ENGINES))
    return engine


def open_engine(
    target: LoadedModel | CompressedModel | str | Path,
    *,
    engine: str = "auto",
    plan: Plan | None = None,
    threads: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    job: Job | None = None,
) -> ReferenceEngine:
    """Open an engine on a dense or compressed model.

    Args:
        target: a loaded model, a compressed model, or the name or path of either.
        engine: ``auto`` or an engine's name; a named engine that cannot run is an error.
        plan: decisions to take while decoding.
        threads: CPU threads of this process, None to leave them as they are.
        dtype: computation type where the target is not loaded yet.
        device: where to compute, likewise.
        job: progress and cancel of loading.

    Raises:
        EngineError: the engine does not exist or cannot run this model.
        ModelError, IntegrityError: the model cannot be loaded.
    """
    import torch

    from workbench.formats.compressed import CompressedModel, is_compressed
    from workbench.formats.rebuild import to_model
    from workbench.models import load
    from workbench.models.base import LoadedModel
    from workbench.runtime.reference import ReferenceEngine
    from workbench.runtime.weights import CompressedWeights

    choose_engine(engine)
    if threads is not None:
        torch.set_num_threads(threads)
    if isinstance(target, str | Path):
        target = (
            CompressedModel.load(Path(target))
            if is_compressed(Path(target))
            else load(str(target), dtype=dtype, device=device, job=job)
        )
    if isinstance(target, LoadedModel):
        return ReferenceEngine(target, plan)
    return ReferenceEngine(to_model(target, dtype=dtype, device=device), plan, CompressedWeights(target))
