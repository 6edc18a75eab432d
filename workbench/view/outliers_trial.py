"""Carry out what was picked against outliers, and measure it beside dense and its plain rival."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.apply.recipe import Recipe
from workbench.formats.compressed import CompressedModel
from workbench.measure.bench import BenchContext
from workbench.measure.benches.engine import bench_prompt, step_columns, time_in_turns
from workbench.measure.environment import check_threads, environment
from workbench.measure.measurement import evaluation_windows
from workbench.measure.quality import QualityResult, compare_candidates, compare_many
from workbench.measure.result import Sizes
from workbench.models import LoadedModel
from workbench.operate.fits import fitted
from workbench.progress import Job
from workbench.runtime import choose_engine, open_engine
from workbench.store import Store
from workbench.view.outliers_picks import OutlierSettings


@dataclass(frozen=True)
class ChannelTrial:
    """What was picked, measured.

    Attributes:
        table: one row each for dense, the plain rival and what was picked: ``method``, ``effective_bits``,
            ``predicted`` (relative errors of all units, added up), ``perplexity``, ``ratio`` (to dense), ``kl``,
            ``kl_low``, ``kl_high``, ``to_rival`` (nats a token more than the rival on the same windows),
            ``to_rival_low``, ``to_rival_high``, ``ms_per_token``, ``ms_p95``.
        engine: that ran all compressed ones.
        n_windows, n_tokens: behind the quality.
        pairs: rounds behind the speed.
        threads: of the engine.
        run: its number in the store.
    """

    table: pd.DataFrame
    engine: str
    n_windows: int
    n_tokens: int
    pairs: int
    threads: int
    run: int


def try_recipes(
    dense: LoadedModel,
    recipes: Mapping[str, Recipe],
    predicted: Mapping[str, float],
    settings: OutlierSettings,
    store: Store,
    job: Job,
) -> ChannelTrial:
    """Compress, read back, and measure on the same windows and in turns.

    Args:
        dense: the dense model.
        recipes: by the name of their row, the rival first.
        predicted: relative errors of all units, added up, by the same names.
        settings: how much.
        store: where fits are kept and the run is recorded.
        job: progress and cancel.
    """
    threads = check_threads(settings.threads)
    made = {name: fitted(store, dense, recipe, job) for name, recipe in recipes.items()}
    # One engine for all: the engines round activations differently, and that is not what is compared.
    able = {choose_engine(settings.engine, model) for model in made.values()}
    engine = able.pop() if len(able) == 1 else "reference"
    text, record = evaluation_windows(
        settings.text, dense, settings.n_windows, settings.window_length, seed=settings.seed
    )
    dense_engine = open_engine(dense, engine=engine, threads=threads, activation_mode="fp32")
    engines = [dense_engine]
    try:
        for model in made.values():
            engines.append(open_engine(model, engine=engine, threads=threads))
        found = compare_many(dense_engine, engines[1:], text, text=record, seed=settings.seed, job=job)
    finally:
        for opened in engines:
            opened.close()
    speeds = _speeds(dense, made, engine, BenchContext(dense.source, settings.text, threads, True, job=job), settings)
    table = _table(made, predicted, found, speeds, settings.seed)
    chosen = list(recipes)[-1]
    number = store.record_run(
        "measure",
        name=f"notebook, {chosen}",
        model=dense.name,
        method=recipes[chosen].label,
        recipe_sha256=recipes[chosen].sha256,
        summary={row["method"]: {k: v for k, v in row.items() if k != "method"} for row in table.to_dict("records")},
        environment=environment(),
    )
    first = found[0]
    return ChannelTrial(table, engine, first.n_windows, first.n_tokens, settings.pairs, threads, number)


def _table(
    made: Mapping[str, CompressedModel],
    predicted: Mapping[str, float],
    found: list[QualityResult],
    speeds: Mapping[str, Mapping[str, float]],
    seed: int,
) -> pd.DataFrame:
    rival = found[0]
    rows: list[dict[str, Any]] = [
        {"method": "dense", "effective_bits": 16.0, "predicted": 0.0, "perplexity": rival.perplexity_dense}
        | {"ratio": 1.0, "kl": 0.0, "kl_low": 0.0, "kl_high": 0.0}
    ]
    for (name, model), quality in zip(made.items(), found, strict=True):
        kl = quality.kl_mean
        row = {
            "method": name,
            "effective_bits": Sizes.of_compressed(model).effective_bits,
            "predicted": predicted[name],
            "perplexity": quality.perplexity_candidate,
            "ratio": math.exp(quality.delta_nll.value),
            "kl": kl.value,
            "kl_low": kl.low,
            "kl_high": kl.high,
        }
        if quality is not rival:
            more = compare_candidates(quality, rival, seed=seed).delta_nll
            row |= {"to_rival": more.value, "to_rival_low": more.low, "to_rival_high": more.high}
        rows.append(row)
    columns = ["to_rival", "to_rival_low", "to_rival_high"]
    table = pd.DataFrame(rows)
    table = table.reindex(columns=[*table.columns, *(c for c in columns if c not in table)])
    for name in ("ms_per_token", "ms_p95"):
        table[name] = [speeds.get(method, {}).get(name, np.nan) for method in table["method"]]
    return table


def _speeds(
    dense: LoadedModel,
    made: Mapping[str, CompressedModel],
    engine: str,
    context: BenchContext,
    settings: OutlierSettings,
) -> dict[str, dict[str, float]]:
    """Time per token of dense (bf16) and all others in turns in one process; empty where the cpu engine cannot run one.

    The reference engine dequantizes weights: its time says nothing of bits.
    """
    if engine != "cpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, dict[str, Any]] = {
            "dense": {"engine": "cpu", "source": dense.source, "dtype": "bfloat16", "bits": None}
        }
        for index, (name, model) in enumerate(made.items()):
            source = model.folder or model.save(Path(folder) / str(index))
            sides[name] = {"engine": "cpu", "source": str(source), "dtype": "float32", "bits": None}
        answer = time_in_turns(
            list(sides.values()), bench_prompt(dense), context, prefill_repeats=1, pairs=settings.pairs
        )
    return {
        name: step_columns(side, answer["prefill_tokens"]) for name, side in zip(sides, answer["sides"], strict=True)
    }
