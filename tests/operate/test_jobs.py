"""An analysis asked for twice is computed once; an interrupted one resumes to the same bytes."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench.analysis.profile import Provenance
from workbench.errors import Cancelled, InputError
from workbench.operate.jobs import analyze
from workbench.progress import Job, JobState
from workbench.store import Store


class Toy:
    """Ten parts of noise; part ``stop_at`` does not come to an end before ``interrupt`` happens."""

    def __init__(self, seed: int = 0, stop_at: str | None = None, interrupt: BaseException | None = None) -> None:
        self.provenance = Provenance(
            kind="toy", model="toy", architecture_sha256="0", weights_sha256="0", seed=seed, parameters={"n": 10}
        )
        self.computed: list[str] = []
        self._stop_at = stop_at
        self._interrupt = interrupt

    @property
    def parts(self) -> Sequence[str]:
        return [f"blocks.{index}" for index in range(10)]

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        if part == self._stop_at:
            if self._interrupt is not None:
                raise self._interrupt
            sys.stdout.write("stopped\n")
            sys.stdout.flush()
            signal.pause()
        self.computed.append(part)
        digest = hashlib.sha256(f"{part} {self.provenance.seed}".encode()).digest()
        noise = np.random.default_rng(list(digest))
        return pd.DataFrame({"block": part, "bits": [2, 3, 4], "kl": noise.normal(size=3)}, index=[7, 8, 9])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "interrupted") as opened:
        yield opened


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    """The stored bytes of the uninterrupted analysis."""
    with Store(tmp_path / "uninterrupted") as other:
        return stored(analyze(other, Toy()).path)


def stored(path: Path | None) -> bytes:
    assert path is not None
    return path.read_bytes()


def test_second_time_comes_from_the_store(store: Store) -> None:
    first = analyze(store, Toy())
    again = Toy()
    second = analyze(store, again)
    assert (first.cached, second.cached) == (False, True)
    assert again.computed == []
    assert second.path == first.path
    pd.testing.assert_frame_equal(second.profile.table, first.profile.table)
    assert second.profile.provenance == again.provenance
    assert store.info()["checkpoints"] == 0
    assert not analyze(store, Toy(seed=1)).cached


def test_same_table_with_and_without_a_store(store: Store) -> None:
    memory = analyze(None, Toy())
    assert (memory.cached, memory.path) == (False, None)
    pd.testing.assert_frame_equal(memory.profile.table, analyze(store, Toy()).profile.table)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), MemoryError(), Cancelled("stop")])
@pytest.mark.parametrize("stop_at", [0, 4, 9])
def test_resumed_equals_uninterrupted(store: Store, expected: bytes, interrupt: BaseException, stop_at: int) -> None:
    with pytest.raises(type(interrupt)):
        analyze(store, Toy(stop_at=f"blocks.{stop_at}", interrupt=interrupt))
    assert store.verify() == []
    resumed = Toy()
    result = analyze(store, resumed)
    assert result.resumed_parts == stop_at
    assert resumed.computed == list(resumed.parts)[stop_at:]
    assert stored(result.path) == expected


def test_cancel_through_the_job(store: Store, expected: bytes) -> None:
    def cancel_at_three(state: JobState) -> None:
        if state.done == 3:
            job.cancel()

    job = Job(cancel_at_three)
    with pytest.raises(Cancelled, match="run the same again to resume"):
        analyze(store, Toy(), job)
    states: list[JobState] = []
    result = analyze(store, Toy(), Job(states.append))
    assert result.resumed_parts == 3
    assert [state.done for state in states] == list(range(3, 11))
    assert {state.total for state in states} == {10}
    assert stored(result.path) == expected


def test_killed_analysis_resumes(tmp_path: Path, expected: bytes) -> None:
    home = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, __file__, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    process.kill()
    process.communicate()
    with Store(home) as store:
        assert store.verify() == []
        result = analyze(store, Toy())
        assert result.resumed_parts == 6
        assert stored(result.path) == expected


def test_refresh_computes_again(store: Store, expected: bytes) -> None:
    analyze(store, Toy())
    again = Toy()
    result = analyze(store, again, refresh=True)
    assert not result.cached
    assert again.computed == list(again.parts)
    assert stored(result.path) == expected


def test_damaged_profile_is_computed_again(store: Store, expected: bytes) -> None:
    path = analyze(store, Toy()).path
    assert path is not None
    path.write_bytes(expected[:-1])
    result = analyze(store, Toy())
    assert not result.cached
    assert stored(result.path) == expected


def test_damaged_part_is_computed_again(store: Store, expected: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        analyze(store, Toy(stop_at="blocks.5", interrupt=KeyboardInterrupt()))
    damaged = next((store.home / "checkpoints").rglob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    result = analyze(store, Toy())
    assert result.resumed_parts == 4
    assert stored(result.path) == expected


class Overtaken(Toy):
    """While its last part is computed, another process completes the same analysis."""

    def __init__(self, home: Path, finish: bool) -> None:
        super().__init__()
        self._home = home
        self._finish = finish

    def compute(self, part: str, job: Job) -> pd.DataFrame:
        if part == "blocks.9" and len(self.computed) == 9:
            with Store(self._home) as other:
                if self._finish:
                    assert not analyze(other, Toy()).cached
                else:
                    other.checkpoint(self.provenance.key).discard()
        return super().compute(part, job)


@pytest.mark.parametrize("finish", [True, False])
def test_checkpoint_discarded_by_another_process(store: Store, expected: bytes, finish: bool) -> None:
    """If the other one stored the profile it is taken; if it only discarded, the parts are computed once more."""
    overtaken = Overtaken(store.home, finish)
    result = analyze(store, overtaken)
    assert stored(result.path) == expected
    assert len(overtaken.computed) == (10 if finish else 19)
    assert store.info()["checkpoints"] == 0


def test_nothing_to_do_is_said(store: Store) -> None:
    class Empty(Toy):
        @property
        def parts(self) -> Sequence[str]:
            return []

    with pytest.raises(InputError, match="has nothing to do"):
        analyze(store, Empty())


if __name__ == "__main__":
    with Store(Path(sys.argv[1])) as where:
        analyze(where, Toy(stop_at="blocks.6"))
