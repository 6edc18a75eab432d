"""The child's side of a measurement in a fresh process: read a request, report progress, answer once.

Stdout carries the protocol alone: whatever a library prints goes to stderr, which the parent quotes on a crash.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from workbench.errors import WorkbenchError
from workbench.measure.environment import pin
from workbench.progress import Job


class ReportingJob(Job):
    """A ``Job`` whose every change is sent to the parent, which repeats it on its own."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._send = send

    def stage(self, name: str, total: float, done: float = 0.0) -> None:
        self._send({"job": "stage", "arguments": [name, total, done]})
        super().stage(name, total, done)

    def advance(self, amount: float = 1.0) -> None:
        self._send({"job": "advance", "arguments": [amount]})
        super().advance(amount)

    def within(self, share: float) -> None:
        self._send({"job": "within", "arguments": [share]})
        super().within(share)


def serve(work: Callable[[dict[str, Any], Job], dict[str, Any]]) -> None:
    """Answer the one request on stdin with ``work(request, job)``, then leave.

    An expected error travels to the parent as its class and message; any other keeps its traceback on stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    request = json.loads(_first_line())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    pin(request["threads"])
    try:
        send({"result": work(request, ReportingJob(send))})
    except WorkbenchError as error:
        send({"error": type(error).__name__, "message": str(error)})
    sys.stderr.flush()


def _first_line() -> bytes:
    """Read stdin up to the first line end, unbuffered, so that the watching thread holds no lock at exit."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            break
        line += piece
    return bytes(line)


def _leave_with_parent() -> None:
    """End this process when stdin ends: the parent has died, and nobody waits for the answer."""
    while os.read(0, 1):
        continue
    os._exit(1)
