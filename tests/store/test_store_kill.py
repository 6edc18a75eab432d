"""A process killed at any moment leaves a store in which everything listed is there and is what it says."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from workbench.store import Store

WRITER = Path(__file__).with_name("writer.py")


def start(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WRITER), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_at_random_moments(tmp_path: Path) -> None:
    pauses = random.Random(7)
    recorded = 0
    for attempt in range(5):
        process = start("loop", tmp_path, attempt * 1000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        time.sleep(pauses.uniform(0.02, 0.4))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with Store(tmp_path) as store:
            assert store.verify() == []
            for artifact in store.artifacts():
                path = store.artifact(artifact.kind, artifact.key)
                assert path is not None
                assert path.stat().st_size == artifact.bytes
            runs = store.runs()
            assert len(runs) > recorded, "the loop was killed before it wrote anything"
            recorded = len(runs)
            for number in runs["id"].head(5):
                assert store.artifact(*store.run(number)["artifacts"]["blob"]) is not None


def test_kill_before_every_call_that_changes_something(tmp_path: Path) -> None:
    said, errors = start("crash", tmp_path).communicate(timeout=120)
    assert errors == ""
    (last,) = said.splitlines()
    word, calls = last.split()
    assert word == "calls", said
    assert int(calls) > 15


def test_processes_put_the_same_artifacts_at_once(tmp_path: Path) -> None:
    processes = [start("race", tmp_path, name) for name in ("a", "b", "c")]
    for process, name in zip(processes, ("a", "b", "c"), strict=True):
        said, errors = process.communicate(timeout=60)
        assert (said, process.returncode) == (f"{name}\n", 0), errors
    with Store(tmp_path) as store:
        assert store.verify() == []
        assert len(store.artifacts()) == 20
        runs = store.runs()
        assert sorted(runs["number"]) == sorted(list(range(20)) * 3)
        assert runs["id"].is_unique
        assert list((tmp_path / "tmp").iterdir()) == []
