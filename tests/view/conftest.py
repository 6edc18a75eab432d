"""Hand-made profiles with the columns that the analyses document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench.analysis.profile import Profile, Provenance
from workbench.models import LoadedModel

ROLES = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}


def make_steps(
    *,
    blocks: int = 3,
    prompts: Sequence[int] = (5, 8),
    replies: Sequence[int] = (12, 9),
    widths: Sequence[int] = (3, 4),
    model: str = "tiny",
    suffix: str = "",
) -> Profile:
    """A decoding-steps profile with log-normal errors; names of linears may carry a ``suffix``."""
    rng = np.random.default_rng(0)
    rows = []
    for sequence, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        for step in range(prompt + reply):
            for block in range(blocks):
                for role, unit in ROLES.items():
                    for bits in widths:
                        error = float(np.exp(rng.normal(-bits, 0.7)))
                        rows.append(
                            (
                                sequence,
                                step,
                                "prompt" if step < prompt else "reply",
                                block,
                                f"blocks.{block}.{unit}",
                                f"blocks.{block}.{role}{suffix}",
                                bits,
                                error,
                                2 * error,
                                2.0,
                            )
                        )
    columns = "sequence step phase block unit linear bits relative_error error_norm output_norm".split()  # noqa: SIM905
    return Profile(pd.DataFrame(rows, columns=columns), provenance("decoding-steps", model))


def make_scores(*, blocks: int = 3, widths: Sequence[int] = (3, 4, 8), model: str = "tiny") -> Profile:
    """A unit-damage profile whose damage falls by four for each bit."""
    rows = [
        (block, f"blocks.{block}.{kind}", bits, (block + 1) * 4.0 ** (3 - bits), 1e-3, 1e-3, bits * 1000, 1000)
        for block in range(blocks)
        for kind in ("qkv", "o", "gate_up", "down")
        for bits in widths
    ]
    columns = ["block", "unit", "bits", "kl", "gradient", "fisher", "stored_bits", "n_weights"]
    return Profile(pd.DataFrame(rows, columns=columns), provenance("unit-damage", model))


def provenance(kind: str, model: str) -> Provenance:
    return Provenance(
        kind=kind, model=model, architecture_sha256="a" * 64, weights_sha256="b" * 64, parameters={"group_size": 64}
    )


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., LoadedModel],
    save_model: Callable[[LoadedModel, Path], Path],
) -> Path:
    """A tiny random model as a folder."""
    return save_model(make_model(), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def steps_profile() -> Callable[..., Profile]:
    return make_steps


@pytest.fixture
def scores_profile() -> Callable[..., Profile]:
    return make_scores
