"""The compressed model in the making, which methods write into one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from workbench.apply.folding import Folded
from workbench.apply.parts import Parts
from workbench.errors import RecipeError, suggest
from workbench.formats.encodings import DENSE_BITS, Dense, Encoding, Groups
from workbench.formats.input_cuts import InputCuts
from workbench.formats.mask_predictor import MaskPredictor
from workbench.formats.selectors import Selectors
from workbench.models.base import Architecture, Linear, LoadedModel
from workbench.progress import Job


@dataclass
class Draft:
    """Encodings chosen so far.

    Attributes:
        model: the dense model; methods read it and leave it as it is.
        linears: by linear id.
        embedding: of the token embedding.
        output: of the output layer, None where tied.
        selectors: how widths are chosen per token, None where they are not.
        input_cuts: how inputs of small magnitude are left out, None where they are not.
        mask_predictor: how heads and neurons are chosen per token, None where they are not.
        folded: input scales, folded away: the dense weights that are encoded are those after folding.
        parts: what the present method's fit has finished, and where it hands over what it finishes.
    """

    model: LoadedModel
    linears: dict[str, Encoding] = field(default_factory=dict)
    embedding: Encoding | None = None
    output: Encoding | None = None
    selectors: Selectors | None = None
    input_cuts: InputCuts | None = None
    mask_predictor: MaskPredictor | None = None
    folded: Folded = field(default_factory=Folded)
    parts: Parts = field(default_factory=Parts)

    def weight(self, path: str) -> torch.Tensor:
        """Weights of the module at ``path``, float32 on the CPU, so that any device gives the same codes."""
        weight = self.model.submodule(path).weight
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"{path} has no weight.")
        return weight.detach().to("cpu", torch.float32)

    def folded_weight(self, linear: Linear) -> torch.Tensor:
        """Dense weights of a linear after folding, float32 on the CPU."""
        return self.folded.weight(linear, self.weight(linear.path))

    def encode_linears(self, encode: Callable[[Linear, torch.Tensor], Encoding], job: Job) -> None:
        """Encode every linear with ``encode(linear, folded weight)``, one at a time; cancels between two."""
        for linear in self.model.architecture.linears:
            self.linears[linear.id] = encode(linear, self.folded_weight(linear))
            job.advance(linear.n_weights)

    def encode_outputs(self, bits: int, group_size: int, symmetric: bool, job: Job) -> None:
        """Encode the embedding, and the output layer where it is a tensor of its own."""
        parts = self.model.architecture
        self.embedding = encode(self.weight(parts.embedding_path), bits, group_size, symmetric)
        job.advance(parts.vocab_size * parts.hidden_size)
        if not parts.tied_embeddings:
            self.output = encode(self.weight(parts.output_path), bits, group_size, symmetric)
            job.advance(parts.vocab_size * parts.hidden_size)


def encode(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> Encoding:
    """Round a matrix (out, in) to group codes of ``bits`` bits, or to bf16 at 16 bits."""
    if bits == DENSE_BITS:
        return Dense.of(weight)
    return Groups.of(weight, bits, group_size, symmetric)


def n_weights(architecture: Architecture) -> int:
    """Weights that a method encodes: all linears, the embedding, and an untied output layer."""
    tables = 1 if architecture.tied_embeddings else 2
    table = architecture.vocab_size * architecture.hidden_size
    return sum(linear.n_weights for linear in architecture.linears) + tables * table


def check_ids(architecture: Architecture, ids: Iterable[str], where: str) -> None:
    """Raise ``RecipeError`` naming the nearest id where ``ids`` has neither a unit nor a linear of the model."""
    known = [unit.id for unit in architecture.units] + [linear.id for linear in architecture.linears]
    for given in ids:
        if given not in known:
            raise RecipeError(
                f"{where} names '{given}', which this model does not have: units are named "
                f"blocks.<0..{architecture.n_blocks - 1}>.<qkv|o|gate_up|down>.{suggest(given, known)}"
            )
