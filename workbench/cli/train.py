"""The command that trains: ``train-relu``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import console
from workbench.cli.options import Json, Quiet, require_text
from workbench.progress import duration


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("train-relu")(train_relu)


def train_relu(
    out: Annotated[Path, typer.Option(help="Folder for the model; new or empty.")],
    text: Annotated[
        str, typer.Option(help="self (sampled from the teacher), prose, pydoc, hf:..., or a file.")
    ] = "self",
    teacher: Annotated[
        str, typer.Option(help="What 'self' is sampled from: smollm2-135m, a folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to sample, and a sixth more to measure; a --text is used whole.")
    ] = 27648,
    steps: Annotated[int, typer.Option(min=1, help="Training steps at most.")] = 300,
    sparsity: Annotated[float, typer.Option(min=0, help="Weight of the activations' mean (L1) in the loss.")] = 0.0,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks.")] = 4,
    hidden: Annotated[int, typer.Option(min=4, help="Hidden size; the MLP has four times as many neurons.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    vocabulary: Annotated[
        int, typer.Option(min=257, help="Entries of the tokenizer, which is made of the text.")
    ] = 2048,
    length: Annotated[int, typer.Option(min=2, help="Tokens per training window, and the model's context.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of the training, whose bytes they decide; 1 is fastest on a busy machine."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small ReLU model (OPT's architecture) on text sampled from a model, for work on sparsity."""
    from workbench.formats.folder import check_output_folder

    folder = check_output_folder(out)
    require_text(text)
    from workbench.models import load
    from workbench.operate.relu_model import ReluOptions, make_relu_model
    from workbench.operate.relu_training import TrainingOptions
    from workbench.runtime import choose_engine
    from workbench.store import Store

    options = ReluOptions(
        text=text,
        tokens=tokens,
        blocks=blocks,
        hidden=hidden,
        heads=heads,
        vocabulary=vocabulary,
        training=TrainingOptions(steps=steps, length=length, sparsity=sparsity, seed=seed),
        seed=seed,
    )
    with Store() as store, console.running(quiet or as_json) as job:
        # Half the bytes, half again as fast where the cpu engine samples; PyTorch is slow in bf16 on many processors.
        dtype = "bfloat16" if choose_engine("auto") == "cpu" else "float32"
        origin = load(teacher, dtype=dtype, job=job) if text == "self" else None
        made = make_relu_model(store, folder, options, teacher=origin, threads=threads, job=job)
    if as_json:
        console.show_json({"out": str(folder), "seconds": made.seconds, **made.to_json()})
        return
    import pandas as pd

    console.say(
        f"{made.n_parameters:,} parameters, trained on {made.tokens:,} tokens for {made.trained.steps} steps; weights "
        f"of step {made.trained.best_step}; {duration(made.seconds)}."
    )
    console.say(
        f"Perplexity on {made.seen.n_tokens:,} held-out tokens: {made.perplexity:.1f}; by the tokens' frequency alone: "
        f"{made.unigram_perplexity:.1f}."
    )
    if made.perplexity > made.vocabulary:
        console.tell(
            f"The model is worse than guessing among its {made.vocabulary:,} tokens: train it for more steps, or on "
            "more text like that."
        )
    rows = [
        (f"blocks.{block}", f"{zero:.1%}", f"{silent:.1%}")
        for block, (zero, silent) in enumerate(zip(made.seen.zeros, made.seen.silent, strict=True))
    ]
    console.show_table(
        "Neurons that are exactly zero",
        pd.DataFrame(rows, columns=["block", "at one token", "at every token"]),
        rows=100,
    )
    console.say(f"Written: {folder}")
    console.say(f'Next: workbench generate {shlex.quote(str(out))} "The"')
