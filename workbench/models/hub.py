"""Fetch a model's safetensors, configs and tokenizer from the Hugging Face hub, failing within seconds."""

from __future__ import annotations

import re
from pathlib import Path

from workbench.errors import ModelError
from workbench.models.checkpoint import PICKLE_SUFFIXES, refuse_pickle
from workbench.progress import Job

TIMEOUT_S = 10.0
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.))*"
_ID = re.compile(rf"{_NAME}/{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_/-]|\.(?!\.))*")
_MAX_ID = 96  # the hub's own limit
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*"]  # sub-folders hold other formats of the same weights


def check_id(source: str, revision: str | None) -> None:
    """Refuse, before any connection, what cannot be a hub id (``owner/name``) or a revision.

    Raises:
        ModelError: with the form that is expected.
    """
    if len(source) > _MAX_ID or not _ID.fullmatch(source):
        raise ModelError(
            f"'{source[:_MAX_ID]}' is neither a file, a folder, nor a hub id: a hub id is owner/name, of letters, "
            "digits, '-', '_' and '.'."
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ModelError(f"'{revision[:_MAX_ID]}' is not a revision: give a branch, a tag or a commit hash.")


def fetch(source: str, revision: str | None, job: Job | None = None) -> Path:
    """Return the local folder of a hub model, downloading what is not there yet.

    Without a connection, a complete earlier download is used.

    Args:
        source: a hub id that ``check_id`` accepts.
        revision: branch, tag or commit; None is the hub's default branch.

    Raises:
        ModelError: no such model or revision, no access, no safetensors, or no connection.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"'{source}'" + (f" at revision '{revision}'" if revision else "")
    try:
        info = HfApi().model_info(source, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelError(
            f"The hub model {what} asks for an agreement: accept it on the model's page, then log in ('hf auth login')."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model {what}: no such folder is here, and the hub has none of that name, or it is private "
            "(check the id, or 'hf auth login')."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"The hub model '{source}' has no revision '{revision}': see its list of branches.") from error
    except _no_answer() as error:
        try:
            # Without a connection nothing can be compared: only a download that finished is taken.
            return Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED, local_files_only=True))
        except (LocalEntryNotFoundError, OSError):
            raise ModelError(
                f"There is no model {what}: no such folder and no earlier download is here, and the hub could not be "
                f"asked for it ({_first_line(error)}). Check the path or the connection, or give the embedded model "
                "'smollm2-135m'."
            ) from error
    names = [sibling.rfilename for sibling in info.siblings or []]
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        if any(Path(name).suffix.lower() in PICKLE_SUFFIXES for name in names):
            raise refuse_pickle(f"The hub model {what} has no safetensors")
        if any(name.lower().endswith(".gguf") for name in names):
            raise ModelError(f"The hub model {what} holds GGUF files: download one and give its path.")
        raise ModelError(f"The hub model {what} has no safetensors weights: choose another release of the model.")
    if job is not None:
        job.check()
    try:
        return Path(
            snapshot_download(
                source,
                revision=info.sha,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                etag_timeout=TIMEOUT_S,
            )
        )
    except _no_answer() as error:
        raise ModelError(
            f"Downloading {what} stopped ({_first_line(error)}). Run the same again: it resumes."
        ) from error


def _no_answer() -> tuple[type[Exception], ...]:
    """What a missing connection raises: the errors of the HTTP library that huggingface_hub is built on."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return OfflineModeIsEnabled, OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
