"""The compressed model: encodings of all matrices, everything else of the model, and one folder that holds it all.

On disk: ``compressed.json`` (what it is, and size and SHA-256 of each file), ``weights.safetensors``, ``config.json``,
the tokenizer, ``fit.json`` (how long the fit took: a fact about one run, so no part of the identity), and where inputs
were scaled ``input_scales.safetensors`` (which nothing that runs the model reads).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workbench.errors import IntegrityError, ModelError
from workbench.formats import bnb as bnb  # these modules' encodings register themselves
from workbench.formats import ggml as ggml
from workbench.formats import integer as integer
from workbench.formats import manifest
from workbench.formats import nested as nested
from workbench.formats import salient as salient
from workbench.formats import tables as tables
from workbench.formats.encodings import Encoding, Tensors, from_parts
from workbench.formats.folder import MANIFEST, file_sha256, is_compressed, new_folder, refusal
from workbench.formats.input_cuts import PREFIX as CUTS_PREFIX
from workbench.formats.input_cuts import InputCuts
from workbench.formats.manifest import Base, EncodingRecord, FileRecord, Manifest
from workbench.formats.mask_predictor import PREFIX as MASKS_PREFIX
from workbench.formats.mask_predictor import MaskPredictor
from workbench.formats.selectors import PREFIX as SELECTORS_PREFIX
from workbench.formats.selectors import Selectors
from workbench.formats.stored import CONFIG, WEIGHTS, check_folder
from workbench.models.base import Architecture
from workbench.models.build import config_from_dict
from workbench.models.families import architecture
from workbench.models.tokenizer import load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Base", "CompressedModel", "is_compressed"]

FIT, SCALES = "fit.json", "input_scales.safetensors"
_EMBEDDING, _OUTPUT, _OTHERS = "embedding", "output", "others."
_PREFIXES = (SELECTORS_PREFIX, CUTS_PREFIX, MASKS_PREFIX)  # of the tables that decide while a model runs


@dataclass(frozen=True, eq=False)
class CompressedModel:
    """A model whose matrices are stored in encodings. Immutable; ``save`` and ``load`` are exact inverses.

    Attributes:
        recipe: the recipe that made it, JSON values.
        base: the model that it was made from.
        config: plain transformers config.
        tokenizer: the model's tokenizer.
        linears: encoding of each linear of the blocks, by linear id.
        embedding: encoding of the token embedding.
        output: encoding of the output layer, None where it is tied to the embedding.
        others: all other parameters by state-dict name: norms and biases in fp32, other matrices in bf16.
        selectors: how widths are chosen per token, None where they are not.
        input_cuts: how inputs of small magnitude are left out, None where they are not.
        mask_predictor: how heads and neurons are chosen per token, None where they are not.
        input_scales: by unit id, what the columns of its linears were multiplied by, float32 (in,); the inverse is
            folded into what comes before. For comparing weights with dense ones and choosing codes anew, not to run.
        fit_seconds: wall time of making it, None where unknown.
        folder: where it was loaded from, None where it was made in memory.
        recorded_sha256: identity read from disk; ``sha256`` is computed where it is None.
    """

    recipe: Mapping[str, Any]
    base: Base
    config: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    linears: Mapping[str, Encoding]
    embedding: Encoding
    output: Encoding | None
    others: Mapping[str, torch.Tensor]
    selectors: Selectors | None = None
    input_cuts: InputCuts | None = None
    mask_predictor: MaskPredictor | None = None
    input_scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fit_seconds: float | None = None
    folder: Path | None = None
    recorded_sha256: str | None = field(default=None, repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        """Names and sizes of the model's parts."""
        return architecture(config_from_dict(self.config))

    def encodings(self) -> Iterator[tuple[str, Encoding]]:
        """All encodings by their names on disk: linear ids, ``embedding``, ``output``."""
        yield from self.linears.items()
        yield _EMBEDDING, self.embedding
        if self.output is not None:
            yield _OUTPUT, self.output

    def tensors(self) -> dict[str, torch.Tensor]:
        """All stored tensors by their names on disk (``blocks.3.q.codes``, ``others.model.norm.weight``)."""
        stored = {f"{name}.{part}": t for name, encoding in self.encodings() for part, t in encoding.tensors().items()}
        stored |= {_OTHERS + key: tensor for key, tensor in self.others.items()}
        for table in self._tables:
            stored |= {name: torch.from_numpy(array) for name, array in table.arrays().items()}
        return stored

    @property
    def _tables(self) -> list[Selectors | InputCuts | MaskPredictor]:
        """What decides while the model runs."""
        return [table for table in (self.selectors, self.input_cuts, self.mask_predictor) if table is not None]

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight of the blocks' linears: codes, scales, zero points, padding, and what decides."""
        bits = _bits_per_weight(self.linears.values())
        decides = sum(table.stored_bits for table in self._tables)
        return bits + decides / sum(linear.n_weights for linear in self.architecture.linears)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that every linear may be read at, ascending; empty where one has a single width."""
        offered = [set(getattr(encoding, "widths", ())) for encoding in self.linears.values()]
        return tuple(sorted(set.intersection(*offered))) if offered else ()

    @property
    def bits_by_unit(self) -> dict[str, float]:
        """Effective bits of each unit."""
        return {
            unit.id: _bits_per_weight([self.linears[linear.id] for linear in unit.linears])
            for unit in self.architecture.units
        }

    @property
    def output_bits(self) -> float:
        """Stored bits per weight of the output layer (of the embedding where they are one tensor)."""
        return _bits_per_weight([self.output or self.embedding])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all on disk that is computed with: linears, embedding, output, norms, biases, what decides."""
        return sum(_bytes(tensor) for tensor in self.tensors().values())

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines that can run every encoding in here."""
        names = self.embedding.engines
        return tuple(name for name in names if all(name in encoding.engines for _, encoding in self.encodings()))

    @cached_property
    def sha256(self) -> str:
        """Identity (hex) of what this model computes: recipe, base weights, config and every stored tensor.

        Names, folders and timings take no part in it, so that the same recipe gives the same identity anywhere.
        """
        if self.recorded_sha256 is not None:
            return self.recorded_sha256
        return manifest.digest(
            {
                "schema": manifest.MAJOR,
                "recipe": self.recipe,
                "base": self.base.model_dump(mode="json", exclude={"name", "source"}),
                "config": self.config,
                "encodings": {name: [e.kind, e.meta()] for name, e in self.encodings()},
                "tensors": {name: _tensor_digest(tensor) for name, tensor in self.tensors().items()},
            }
        )

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folder, as a whole or not at all. Equal models give equal bytes (``fit.json`` apart).

        Args:
            path: a new or empty folder, or one that holds a compressed model if ``overwrite``.
            overwrite: replace that model, with everything in its folder.

        Returns:
            The absolute path.

        Raises:
            InputError: something else is there.
            StoreError: the disk refuses.
        """
        target = Path(path).expanduser().absolute()
        with new_folder(target, need_bytes=self.weight_bytes, overwrite=overwrite) as folder:
            try:
                save_file(_apart(self.tensors()), folder / WEIGHTS)
                if self.input_scales:
                    save_file({name: t.contiguous() for name, t in self.input_scales.items()}, folder / SCALES)
            except SafetensorError as error:
                raise refusal(target, error) from error
            for written in folder.glob("*.safetensors"):
                written.chmod((folder.stat().st_mode & 0o666) | 0o600)  # safetensors makes files private
            _write_json(folder / CONFIG, dict(self.config))
            save_tokenizer(self.tokenizer, folder)
            files = {
                file.name: FileRecord(size=file.stat().st_size, sha256=file_sha256(file))
                for file in sorted(folder.iterdir())
            }
            _write_json(folder / MANIFEST, self._manifest(files).sealed())
            if self.fit_seconds is not None:
                _write_json(folder / FIT, {"fit_seconds": self.fit_seconds})
        return target

    def _manifest(self, files: Mapping[str, FileRecord]) -> Manifest:
        records = {name: EncodingRecord(kind=e.kind, meta=e.meta()) for name, e in self.encodings()}
        return Manifest(
            sha256=self.sha256,
            recipe=dict(self.recipe),
            base=self.base,
            embedding=records.pop(_EMBEDDING),
            output=records.pop(_OUTPUT, None),
            linears=records,
            files=dict(files),
        )

    @classmethod
    def load(cls, path: Path | str, verify: bool = True) -> CompressedModel:
        """Read a folder written by ``save``. Nothing outside the folder is read, and nothing in it is run.

        Args:
            path: the folder.
            verify: compare the SHA-256 of every file; sizes, names and shapes are always checked.

        Raises:
            InputError: something else is there.
            ModelError: nothing is there, or it is written in a format that this version does not read.
            IntegrityError: missing, changed or damaged files; the message names the file.
        """
        folder, record, config = check_folder(path, verify)
        parts, others, tables = _read_tensors(folder / WEIGHTS)
        records = {**record.linears, _EMBEDDING: record.embedding}
        if record.output is not None:
            records[_OUTPUT] = record.output
        if set(parts) != set(records):
            odd = sorted(set(parts) ^ set(records))[0]
            raise IntegrityError(f"{folder / WEIGHTS} and {MANIFEST} disagree on '{odd}': compress the model again.")
        encodings = {name: _encoding(folder, name, entry, parts[name]) for name, entry in records.items()}
        try:
            tokenizer = load_tokenizer(folder)
        except ModelError as error:
            raise IntegrityError(str(error)) from error
        model = cls(
            recipe=record.recipe,
            base=record.base,
            config=config,
            tokenizer=tokenizer,
            embedding=encodings.pop(_EMBEDDING),
            output=encodings.pop(_OUTPUT, None),
            linears=encodings,
            others=others,
            selectors=_table(Selectors, folder, config, tables[SELECTORS_PREFIX]),
            input_cuts=_table(InputCuts, folder, config, tables[CUTS_PREFIX]),
            mask_predictor=_table(MaskPredictor, folder, config, tables[MASKS_PREFIX]),
            input_scales=_read(folder / SCALES) if SCALES in record.files else {},
            fit_seconds=_fit_seconds(folder / FIT),
            folder=folder,
            recorded_sha256=record.sha256,
        )
        model._check_architecture()
        return model

    def _check_architecture(self) -> None:
        """Raise ``IntegrityError`` where the encodings are not those of the config's architecture."""
        parts = self.architecture
        table = (parts.vocab_size, parts.hidden_size)
        expected = {linear.id: (linear.out_features, linear.in_features) for linear in parts.linears}
        expected[_EMBEDDING] = table
        if not parts.tied_embeddings:
            expected[_OUTPUT] = table
        found = {name: encoding.shape for name, encoding in self.encodings()}
        for name in sorted(set(expected) | set(found)):
            if expected.get(name) != found.get(name):
                raise IntegrityError(
                    f"{self.folder}: {name} has shape {found.get(name)} where {CONFIG} says {expected.get(name)}: "
                    "compress the model again."
                )
        inputs = {unit.id: (unit.linears[0].in_features,) for unit in parts.units}
        for name, scales in self.input_scales.items():
            if inputs.get(name) != tuple(scales.shape) or scales.dtype != torch.float32:
                raise IntegrityError(f"{self.folder}: the input scales of {name} do not fit {CONFIG}: compress again.")


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, and each in memory of its own: linears of a unit may share what they know of their inputs."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.contiguous() if place not in seen else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return found


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bits_per_weight(encodings: Any) -> float:
    pairs = [(encoding.stored_bits, encoding.shape[0] * encoding.shape[1]) for encoding in encodings]
    return sum(bits for bits, _ in pairs) / sum(weights for _, weights in pairs)


def _tensor_digest(tensor: torch.Tensor) -> list[Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().data if len(flat) else b""  # an empty tensor has no bytes to view
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_bytes((text + "\n").encode("utf-8"))


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged: {error}. Compress the model again.") from error


def _read_tensors(
    path: Path,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Return the tensors of each encoding, all others by state-dict name, and those of each table by its prefix."""
    stored = _read(path)
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    others: dict[str, torch.Tensor] = {}
    tables: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in _PREFIXES}
    for name, tensor in stored.items():
        table = next((prefix for prefix in tables if name.startswith(prefix)), None)
        if table is not None:
            tables[table][name] = tensor
        elif name.startswith(_OTHERS):
            others[name.removeprefix(_OTHERS)] = tensor
        else:
            owner, _, part = name.rpartition(".")
            parts[owner][part] = tensor
    return dict(parts), others, tables


_T = TypeVar("_T", Selectors, InputCuts, MaskPredictor)


def _table(kind: type[_T], folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> _T | None:
    if not tensors:
        return None
    try:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return kind.from_arrays(arrays, architecture(config_from_dict(config)))
    except (IntegrityError, TypeError) as error:
        raise IntegrityError(f"{folder}: {error}") from error


def _encoding(folder: Path, name: str, record: EncodingRecord, tensors: Tensors) -> Encoding:
    try:
        return from_parts(record.kind, record.meta, tensors)
    except IntegrityError as error:
        raise IntegrityError(f"{folder}: {name} ({record.kind}): {error}") from error


def _fit_seconds(path: Path) -> float | None:
    """Read a timing that nothing depends on: where it is missing or unreadable, it is unknown."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes()).get("fit_seconds")
    except (ValueError, AttributeError):
        return None
    return float(value) if isinstance(value, int | float) else None
