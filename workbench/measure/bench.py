"""Benches: one per claim, all rivals in one run, rows with the same keys, one JSON file written whole or not at all.

A bench is a function from a ``BenchContext`` to rows, registered by name in the module of that name in
``measure/benches``. Names are known without importing any of them, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError, WorkbenchError, suggest
from workbench.files import check_output_file, write_json
from workbench.measure.environment import check_threads, environment
from workbench.measure.rows import ROW_KEYS, plain
from workbench.progress import Job

if TYPE_CHECKING:
    from workbench.analysis.profile import Analysis, Profile
    from workbench.apply.recipe import Recipe
    from workbench.formats.compressed import CompressedModel
    from workbench.measure.kept_quality import Shelf
    from workbench.models.base import LoadedModel

Rows = list[dict[str, Any]]

# All benches and what they do, the first line of their docstrings.
BENCHES = {
    "analysis": "Decoding-step sensitivity over T and 4T teacher-forced steps: dense forward passes per width, and "
    "peak memory.",
    "engine": "The cpu engine at every width against transformers, bitsandbytes and llama.cpp, all in turns in one "
    "process.",
    "precision": "What widths cost: uniform ones, static mixes, and widths chosen per token, all read from nested "
    "copies.",
    "quantization": "Quantizers of weights at 3 and 4 bits, of activations too at 8 and 4: AWQ, GPTQ, Tender, and "
    "their rivals.",
    "recipes": "Uniform round-to-nearest at 2 to 8 bits, and solved mixes at the byte budgets of uniform 3 and 4.",
    "sparsity": "What leaving weights out costs and gains: heads and neurons by masks, and small inputs, token by "
    "token.",
}


def _compute(analysis: Analysis, job: Job) -> Profile:
    from workbench.analysis.profile import run

    return run(analysis, job)


def _compress(model: LoadedModel, recipe: Recipe, job: Job) -> CompressedModel:
    from workbench.apply.compress import compress

    return compress(model, recipe, job=job)


@dataclass(frozen=True)
class BenchContext:
    """What a bench is asked to do.

    Attributes:
        model: name or path of the dense model.
        text: evaluation text; None for the bench's own. With it no other text may appear in the rows.
        threads: of every engine.
        quick: end within some five minutes on two cores once fits exist, with the same rows.
        only: methods to measure beside the dense model, also such as quick leaves out; empty for all.
        analyze: how to get an analysis' profile: from a store by default of the command line, else computed.
        compress: how to get a compressed model that takes long to fit: likewise.
        shelf: where quality that was measured is kept for a run that goes on after an interruption; None keeps none.
        job: progress and cancel.
    """

    model: str
    text: str | None
    threads: int
    quick: bool = False
    analyze: Callable[[Analysis, Job], Profile] = _compute
    compress: Callable[[LoadedModel, Recipe, Job], CompressedModel] = _compress
    shelf: Shelf | None = None
    job: Job = field(default_factory=Job)
    only: tuple[str, ...] = ()

    def takes(self, method: str, *, quick: bool = True) -> bool:
        """Whether a method is measured; ``quick`` says whether it is where all are that quick has."""
        return method in self.only if self.only else quick or not self.quick


@dataclass(frozen=True)
class Bench:
    """A registered bench: ``extra_keys`` are those its rows have beside ``ROW_KEYS``.

    ``methods`` are those that it can be asked to measure alone; a bench without any runs as a whole.
    """

    name: str
    run: Callable[[BenchContext], Rows]
    extra_keys: tuple[str, ...]
    methods: tuple[str, ...]


_REGISTRY: dict[str, Bench] = {}


def bench(
    name: str, *, extra_keys: Sequence[str] = (), methods: Sequence[str] = ()
) -> Callable[[Callable[[BenchContext], Rows]], Callable[[BenchContext], Rows]]:
    """Register a function as the bench of a name in ``BENCHES``."""

    def register(function: Callable[[BenchContext], Rows]) -> Callable[[BenchContext], Rows]:
        if name not in BENCHES or name in _REGISTRY:
            raise ValueError(f"'{name}' is not in BENCHES, or there are two of it")
        _REGISTRY[name] = Bench(name, function, tuple(extra_keys), tuple(methods))
        return function

    return register


def check_bench(name: str) -> None:
    """Raise ``InputError`` with the nearest name where there is no such bench; nothing is imported for it."""
    if name not in BENCHES:
        raise InputError(f"There is no bench '{name}': choose {', '.join(BENCHES)}." + suggest(name, BENCHES))


def find_bench(name: str) -> Bench:
    """Return the bench of that name, or raise as ``check_bench``."""
    check_bench(name)
    if name not in _REGISTRY:
        import_module(f"workbench.measure.benches.{name}")
    return _REGISTRY[name]


def check_methods(chosen: Bench, only: Sequence[str]) -> None:
    """Raise ``InputError`` where a bench cannot be asked for these methods alone."""
    if only and not chosen.methods:
        raise InputError(f"The bench '{chosen.name}' runs as a whole: leave out --only.")
    for method in only:
        if method not in chosen.methods:
            raise InputError(
                f"The bench '{chosen.name}' has no method '{method}' to choose; it has {', '.join(chosen.methods)}. "
                "Dense weights are always measured." + suggest(method, chosen.methods)
            )


def run_bench(
    name: str,
    json_path: Path | str | None = None,
    *,
    model: str = "smollm2-135m",
    text: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    only: Sequence[str] = (),
    analyze: Callable[[Analysis, Job], Profile] | None = None,
    compress: Callable[[LoadedModel, Recipe, Job], CompressedModel] | None = None,
    shelf: Shelf | None = None,
    job: Job | None = None,
) -> dict[str, Any]:
    """Run a bench and write ``{"environment": ..., "rows": [...]}``.

    Args:
        name: of the bench.
        json_path: file to write, replaced as a whole; None to write none.
        model, text, threads, quick, only, analyze, compress, shelf, job: see ``BenchContext``.

    Returns:
        What is written: JSON values, every row with all of ``ROW_KEYS`` (None where nothing is known).

    Raises:
        InputError, CorpusError: unknown bench, method, text or threads, before any work.
        StoreError: the file cannot be written there, said before any work.
        WorkbenchError: what the bench raises.
    """
    chosen = find_bench(name)
    check_methods(chosen, only)
    threads = check_threads(threads)
    target = None if json_path is None else check_output_file(json_path)
    text_name = None
    if text is not None and text != "self" and not text.startswith("hf:"):  # those two take long to open
        from workbench.corpus import open_text

        text_name = open_text(text, "evaluation").name
    context = BenchContext(
        model, text, threads, quick, analyze or _compute, compress or _compress, shelf, job or Job(), tuple(only)
    )
    rows = complete_rows(chosen, chosen.run(context), text_name)
    result = plain(
        {
            "environment": {
                **environment(),
                "bench": name,
                "model": model,
                "threads": threads,
                "quick": quick,
                "only": list(only),
            },
            "rows": rows,
        }
    )
    if target is not None:
        write_json(target, result)
    return result


def complete_rows(chosen: Bench, rows: Iterable[Mapping[str, Any]], text_name: str | None) -> Rows:
    """Give every row all keys, in one order.

    Args:
        chosen: the bench.
        rows: what it returned.
        text_name: the only text that may appear in the rows, None for any.

    Raises:
        WorkbenchError: a row with a key that neither all benches nor this one has, or with another text.
    """
    known = (*ROW_KEYS, *chosen.extra_keys)
    complete = []
    for given in rows:
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise WorkbenchError(f"The bench '{chosen.name}' gave a row the unknown key '{unknown[0]}'.")
        complete.append({key: given.get(key) for key in known})
        if text_name is not None and given.get("text") not in (None, text_name):
            raise WorkbenchError(
                f"The bench '{chosen.name}' was asked for the text '{text_name}' and used '{given['text']}'."
            )
    return complete
