"""The process that times one analysis of decoding steps: ``python -m workbench.measure.analysis_child``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from workbench.analysis.profile import write_parts
from workbench.analysis.sensitivity import DecodingSteps, teacher_forced
from workbench.measure.child import serve
from workbench.measure.memory import peak_rss_bytes, rss_bytes
from workbench.models import load
from workbench.progress import Job
from workbench.runtime import open_engine


def measure(request: dict[str, Any], job: Job) -> dict[str, Any]:
    """Dense passes and the analysis over the same tokens, in turns; ``benches.analysis`` reads the answer.

    Each window is passed densely before and after it is analysed, so that a machine that slows down meanwhile slows
    both alike. Rows go to a file as they come, which is part of the analysis' time.
    """
    model = load(request["model"])
    loaded = rss_bytes()
    engine = open_engine(model, engine="reference")
    windows = [tuple(window) for window in request["windows"]]
    analysis = DecodingSteps(model, teacher_forced(windows), widths=request["widths"], group_size=request["group_size"])
    engine.score(windows[0])  # warm-up
    dense: list[float] = []
    analysed: list[float] = []
    job.stage(f"analyse {sum(map(len, windows))} steps", len(windows))

    def parts() -> Any:
        for part, window in zip(analysis.parts, windows, strict=True):
            dense.append(_seconds(lambda w=window: engine.score(w)))
            started = time.perf_counter()
            yield analysis.compute(part, Job())
            analysed.append(time.perf_counter() - started)
            dense[-1] = (dense[-1] + _seconds(lambda w=window: engine.score(w))) / 2
            job.advance()

    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder) / "steps.parquet", parts(), analysis.provenance)
    return {
        "dense_seconds": dense,
        "analysis_seconds": analysed,
        "loaded_rss_bytes": loaded,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    serve(measure)
