"""Peak memory of decoding a stored model without torch: ``python -m workbench.measure.lean_child``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from workbench.measure.child import serve
from workbench.measure.memory import peak_rss_bytes
from workbench.progress import Job


def measure(request: dict[str, Any], job: Job) -> dict[str, Any]:
    """Decode from ``folder`` after ``prompt``; how much memory that took in all, and how much of it was cache."""
    from workbench.runtime.cpu import CpuEngine

    engine = CpuEngine(Path(request["folder"]), threads=request["threads"], job=job)
    sequence = engine.start()
    engine.generate(sequence, request["prompt"], request["new_tokens"], job=job)
    return {
        "peak_rss_bytes": peak_rss_bytes(),
        "cache_bytes": sequence.cache_bytes,
        "engine_bytes": engine.weight_bytes,
        "torch": "torch" in sys.modules,
    }


if __name__ == "__main__":
    serve(measure)
