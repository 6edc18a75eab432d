"""The process that holds one engine alone: ``python -m workbench.measure.alone_child``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from workbench.measure.child import serve
from workbench.measure.decoding import SteadyDecoding, Target, check_room, decode, default_prompt
from workbench.measure.energy import PowerModel, measure_energy
from workbench.measure.memory import MemoryResult, peak_rss_bytes, rss_bytes
from workbench.progress import Job


def measure(request: dict[str, Any], job: Job) -> dict[str, Any]:
    """Memory, then energy; ``alone.measure_alone`` writes the request and reads the answer."""
    job.stage("memory and energy", 3)
    target = Target(**request["target"])
    engine = target.open(request["threads"])
    loaded = rss_bytes()
    job.advance()
    prompt = request["prompt"] or default_prompt(engine)
    new_tokens = request["new_tokens"]
    check_room([engine], len(prompt), new_tokens)
    first = decode(engine, prompt, new_tokens)
    memory = MemoryResult(peak_rss_bytes(), loaded, _peak_device_bytes(target.device))
    job.advance()

    decoding = SteadyDecoding(engine, prompt)
    energy = measure_energy(
        lambda: decoding.run(new_tokens),
        bytes_per_token=first.read_bytes,
        device=target.device,
        model=PowerModel(**request["power"]),
        powercap=Path(request["powercap"]),
    )
    job.advance()
    return {"memory": asdict(memory), "energy": asdict(energy)}


def _peak_device_bytes(device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(torch.device(device)))


if __name__ == "__main__":
    serve(measure)
