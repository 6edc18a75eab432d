"""Judge a folder of weights before it is read: only whole safetensors files, and never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import ModelError

# Formats that can run code when they are opened.
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def refuse_pickle(what: str) -> ModelError:
    """Return the error for weights in a pickle file. ``what`` names the file or the place that has only those."""
    return ModelError(
        f"{what}: pickle files can run code when opened and are not read. Convert the weights to safetensors (load "
        "them once where you trust them and call save_pretrained), or take a safetensors or GGUF release of the model."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        ModelError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}. Download the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__} and not a JSON object. Download the model again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, each checked to be whole, in order of their names.

    Raises:
        ModelError: no safetensors (with what to do if there are pickles), a shard missing or cut off.
    """
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file():
        files: dict[Path, set[str]] = {folder / _WEIGHTS: set()}
    elif index.is_file():
        files = _shards(folder, read_json(index))
    else:
        raise _no_weights(folder)
    for path, names in files.items():
        _check(path, names)
    return sorted(files)


def _no_weights(folder: Path) -> ModelError:
    if (folder / "compressed.json").is_file():
        return ModelError(
            f"{folder} is a compressed model, and this takes the dense one that it was made from (in Python, "
            "workbench.runtime.open_engine opens it)."
        )
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in found if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        return refuse_pickle(f"{folder} has {pickles[0]} but no {_WEIGHTS}")
    ggufs = [name for name in found if name.lower().endswith(".gguf")]
    if ggufs:
        return ModelError(f"{folder} has no {_WEIGHTS}. Give its GGUF file itself: {folder / ggufs[0]}.")
    return ModelError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}: give a folder that save_pretrained wrote.")


def _shards(folder: Path, index: Mapping[str, Any]) -> dict[Path, set[str]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map or "metadata" not in index:
        raise ModelError(f"{folder / _INDEX} lacks 'weight_map' or 'metadata'. Download the model again.")
    shards: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        # A shard is a plain name: anything else could point outside the folder.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / _INDEX} names '{name}', which is not a safetensors file of this folder.")
        shards.setdefault(folder / name, set()).add(tensor)
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise ModelError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(shards)} shards are missing). Download it again."
        )
    return shards


def _check(path: Path, names: set[str]) -> None:
    """Open one file: the safetensors library checks its header, every offset, and its length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut off ({error}). Download it again.") from error
    absent = sorted(names - held)
    if absent:
        raise ModelError(f"{path} lacks '{absent[0]}', which the index says it holds. Download the model again.")
