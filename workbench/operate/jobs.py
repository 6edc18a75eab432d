"""Analyses joined to the store: asked for twice they come from the cache, interrupted they resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workbench.analysis.profile import Analysis, Profile, Provenance, run, write_parts
from workbench.errors import InputError
from workbench.progress import Job
from workbench.store import Checkpoint, PartMissing, Store

PROFILE = "profile"  # the artifact kind


@dataclass(frozen=True)
class Analyzed:
    """A profile and how it came about.

    Attributes:
        profile: the result.
        cached: whether it was in the store already.
        resumed_parts: parts that an earlier, interrupted run had finished.
        path: its file in the store, or None without one.
    """

    profile: Profile
    cached: bool
    resumed_parts: int
    path: Path | None


def analyze(store: Store | None, analysis: Analysis, job: Job | None = None, *, refresh: bool = False) -> Analyzed:
    """Return the analysis' profile, from the store if it has it, else computed part by part and stored.

    Each finished part is kept at once. An analysis that was cancelled or killed goes on where it stopped, and its
    table equals that of an uninterrupted run: every part is read back from the store before they are joined.

    Args:
        store: where results are kept; None computes in memory.
        analysis: what to compute; its ``provenance.key`` names the result.
        job: progress and cancel.
        refresh: compute again even if the store has it.

    Raises:
        Cancelled: by ``job``; finished parts are kept.
        StoreError: the disk refuses.
    """
    job = job or Job()
    if not analysis.parts:
        raise InputError(f"The analysis '{analysis.provenance.kind}' has nothing to do: give it a longer text.")
    if store is None:
        return Analyzed(run(analysis, job), cached=False, resumed_parts=0, path=None)
    key = analysis.provenance.key
    checkpoint = store.checkpoint(key)
    if refresh:
        checkpoint.discard()
    elif (path := store.artifact(PROFILE, key)) is not None:
        return Analyzed(Profile.load(path), cached=True, resumed_parts=0, path=path)

    resumed = _compute_missing(checkpoint, analysis, job)
    path = None
    while path is None:
        try:
            path = _join(store, checkpoint, analysis)
        except PartMissing:
            # Damaged since, or discarded by another process that has just stored the same profile.
            path = store.artifact(PROFILE, key)
            if path is None:
                _compute_missing(checkpoint, analysis, job)
    checkpoint.discard()
    return Analyzed(Profile.load(path), cached=False, resumed_parts=resumed, path=path)


class ProfileShelf:
    """Profiles that benches keep in a store; see ``measure.kept_quality``.

    Args:
        store: where.
        fresh: find nothing, so that everything is measured anew and replaces what was kept.
    """

    def __init__(self, store: Store, fresh: bool = False) -> None:
        self._store, self._fresh = store, fresh

    def find(self, provenance: Provenance) -> Profile | None:
        """Return the profile of that provenance, or None."""
        path = None if self._fresh else self._store.artifact(PROFILE, provenance.key)
        return None if path is None else Profile.load(path)

    def keep(self, profile: Profile) -> None:
        """Keep a profile, replacing one of the same provenance."""
        provenance = profile.provenance
        self._store.put_artifact(PROFILE, provenance.key, profile.save, provenance.model_dump(mode="json"))


def _compute_missing(checkpoint: Checkpoint, analysis: Analysis, job: Job) -> int:
    """Compute and keep every part that the checkpoint lacks; return how many it had."""
    missing = [part for part in analysis.parts if not checkpoint.has(part)]
    finished = len(analysis.parts) - len(missing)
    job.stage(analysis.provenance.kind, len(analysis.parts), done=finished)
    for part in missing:
        checkpoint.write(part, analysis.compute(part, job))
        job.advance()
    return finished


def _join(store: Store, checkpoint: Checkpoint, analysis: Analysis) -> Path:
    """Stream the parts, in order and one in memory at a time, into one stored profile."""

    def write(path: Path) -> None:
        write_parts(path, (checkpoint.read(part) for part in analysis.parts), analysis.provenance)

    return store.put_artifact(PROFILE, analysis.provenance.key, write, analysis.provenance.model_dump(mode="json"))
