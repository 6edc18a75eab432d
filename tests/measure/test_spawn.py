"""The measuring process: progress arrives, errors keep their class, crashes and cancels end it, orphans leave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from workbench import waiting
from workbench.errors import Cancelled, EngineError, InputError
from workbench.measure.spawn import run_child
from workbench.progress import Job, JobState

CHILD = """
import os, sys, time
from workbench.errors import InputError
from workbench.measure.child import serve

def work(request, job):
    job.stage("counting", 3)
    for _ in range(3):
        job.advance()
    print("a library that prints must not break the protocol")
    if request["do"] == "answer":
        policy = os.environ.get("OMP_WAIT_POLICY")
        cpus = len(os.sched_getaffinity(0))
        return {"pid": os.getpid(), "omp": os.environ["OMP_NUM_THREADS"], "cpus": cpus, "policy": policy}
    if request["do"] == "refuse":
        raise InputError("This prompt is too long: shorten it.")
    if request["do"] == "raise":
        raise ValueError("a defect")
    if request["do"] == "die":
        print("out of luck", file=sys.stderr, flush=True)
        os.abort()
    if request["do"] == "kill":
        os.kill(os.getpid(), 9)
    open(request["file"], "w").write(str(os.getpid()))
    time.sleep(600)

serve(work)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "sample_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "sample_child"


def wait_for_pid(file: Path) -> int:
    deadline = time.monotonic() + 30
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < deadline, "the child did not start"
        time.sleep(0.02)
    return int(file.read_text())


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_answer_progress_and_pinning(child: str) -> None:
    states: list[JobState] = []
    answer = run_child(child, {"do": "answer"}, threads=1, job=Job(states.append))
    assert (answer["omp"], answer["cpus"]) == ("1", 1)
    assert answer["pid"] != os.getpid()
    assert [(s.stage, s.done) for s in states] == [("counting", n) for n in range(4)]


def test_what_is_measured_waits_as_the_user_said_and_not_as_fits_do(
    child: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_chosen_here", False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    waiting.let_threads_sleep()
    assert run_child(child, {"do": "answer"}, threads=1)["policy"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    waiting.let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert run_child(child, {"do": "answer"}, threads=1)["policy"] is None


def test_an_expected_error_arrives_as_what_it_was(child: str) -> None:
    with pytest.raises(InputError, match=r"^This prompt is too long: shorten it\.$"):
        run_child(child, {"do": "refuse"}, threads=1)


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("raise", "ended with status 1.*ValueError: a defect"),
        ("die", "killed by SIGABRT.*"),
        ("kill", "killed by SIGKILL, often for lack of memory"),
    ],
)
def test_a_crash_is_one_line_with_the_last_words(child: str, do: str, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        run_child(child, {"do": do}, threads=1)
    assert "\n" not in str(caught.value)


def test_cancel_kills_the_child_promptly(child: str, tmp_path: Path) -> None:
    job, file = Job(), tmp_path / "pid"
    cancelled_at: list[float] = []

    def cancel() -> None:
        wait_for_pid(file)
        cancelled_at.append(time.monotonic())
        job.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Cancelled):
        run_child(child, {"do": "sleep", "file": str(file)}, threads=1, job=job)
    thread.join()
    assert time.monotonic() - cancelled_at[0] < 2
    assert gone(int(file.read_text()))


def test_a_child_leaves_when_its_parent_is_killed(child: str, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = (
        "from workbench.measure.spawn import run_child\n"
        f"run_child({child!r}, {{'do': 'sleep', 'file': {str(file)!r}}}, threads=1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid = wait_for_pid(file)
    parent.kill()
    parent.wait()
    assert gone(pid)


def test_a_cancelled_job_starts_no_child(child: str) -> None:
    job = Job()
    job.cancel()
    with pytest.raises(Cancelled):
        run_child("no.such.module", {}, threads=1, job=job)
