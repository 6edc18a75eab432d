"""A fresh process for a measurement, seen from the parent: start it, follow its progress, end it on cancel.

The child (``measure/child.py``) gets one JSON line on stdin and answers with JSON lines on stdout. Its stdin stays
open as long as the parent lives: a child whose parent was killed reads the end of it and leaves.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

import workbench.errors as errors
from workbench.errors import EngineError, WorkbenchError
from workbench.measure.environment import THREAD_VARIABLES
from workbench.progress import Job
from workbench.waiting import environment_as_given

_POLL_S = 0.1  # how late a cancel may reach the child
_LAST_BREATH_S = 30.0  # a crashing process that holds gigabytes takes a while to be gone


def run_child(module: str, request: Mapping[str, Any], *, threads: int, job: Job | None = None) -> dict[str, Any]:
    """Run ``python -m module`` on ``request`` with ``threads`` threads in every numerical library; return its answer.

    Args:
        module: a module whose ``main`` is ``child.serve(...)``.
        request: JSON values.
        threads: of OpenMP and the BLAS libraries; the child also binds itself to as many processors.
        job: gets the child's stages; a cancel kills the child.

    Raises:
        WorkbenchError: what the child raised, as the same class and text.
        EngineError: the child ended without an answer (crashed, or was killed for memory); holds its last words.
        Cancelled: the job was cancelled.
    """
    job = job or Job()
    job.check()
    pinned = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            encoding="utf-8",
            env={**environment_as_given(), **pinned},
        )
        assert process.stdin is not None  # a pipe
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        pump = threading.Thread(target=_pump, args=(process, lines), daemon=True)
        pump.start()
        try:
            answer = _follow(process, {**request, "threads": threads}, lines, job)
            if answer is None:
                process.wait(_LAST_BREATH_S)
        finally:
            process.kill()
            process.wait()
            pump.join()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if answer is None:
            raise EngineError(_obituary(module, process.returncode, words))
    if "error" in answer:
        kind = getattr(errors, answer["error"], WorkbenchError)
        raise kind(answer["message"])
    return answer["result"]


def _follow(
    process: subprocess.Popen[str], request: Mapping[str, Any], lines: queue.SimpleQueue[str | None], job: Job
) -> dict[str, Any] | None:
    """Send the request, pass progress on to ``job``, and return the last line, or None where the child fell silent."""
    assert process.stdin is not None  # a pipe
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    while True:
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            job.check()
            continue
        if line is None:
            return None
        message = json.loads(line)
        if "job" not in message:
            return message
        changes: dict[str, Callable[..., None]] = {"stage": job.stage, "advance": job.advance, "within": job.within}
        changes[message["job"]](*message["arguments"])


def _pump(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Move lines from the child to a queue, whose reader can then also watch the cancel flag; None ends them."""
    assert process.stdout is not None  # a pipe
    with process.stdout as stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _obituary(module: str, status: int, words: IO[bytes]) -> str:
    words.seek(0)
    lines = [line for line in words.read().decode("utf-8", "replace").splitlines() if line.strip()]
    last = f" Its last line: {lines[-1].strip()}" if lines else ""
    if status < 0:
        name = signal.Signals(-status).name
        how = f"was killed by {name}" + (", often for lack of memory" if name == "SIGKILL" else "")
    else:
        how = f"ended with status {status}"
    return f"The measuring process ({module}) {how} before it had a result.{last}"
