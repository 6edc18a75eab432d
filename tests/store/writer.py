"""What the tests run in processes of their own, some of which are killed. ``python writer.py ROLE HOME ARG...``"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.store import Store


def content(number: int) -> bytes:
    """The bytes of artifact ``number``: 20 to 120 kB that any process can check."""
    return hashlib.sha256(str(number).encode()).digest() * (700 + 101 * (number % 30))


def key(number: int) -> str:
    return hashlib.sha256(f"key {number}".encode()).hexdigest()


def put(store: Store, number: int) -> Path:
    return store.put_artifact("blob", key(number), lambda path: _write(path, content(number)), {"number": number})


def put_and_record(store: Store, number: int) -> int:
    put(store, number)
    return store.record_run(
        "bench",
        name=f"run {number}",
        model="toy",
        method="rtn",
        summary={"number": number},
        artifacts={"blob": key(number)},
    )


def loop(home: Path, first: int) -> None:
    """Write artifacts, runs and checkpoint parts, sweeping now and then, until killed."""
    import pandas as pd

    store = Store(home)
    for number in range(first, first + 100_000):
        put_and_record(store, number)
        checkpoint = store.checkpoint(key(number // 8))
        checkpoint.write(f"part {number}", pd.DataFrame({"number": [number] * 500}))
        if number % 8 == 7:
            checkpoint.discard()
        if number % 20 == 0:
            store.gc(max_bytes=10)
        if number == first:
            _say("ready")


def race(home: Path, name: str) -> None:
    """Put the same twenty artifacts as everybody else, and record one run for each."""
    store = Store(home)
    for number in range(20):
        put_and_record(store, number)
    _say(name)


def crash_everywhere(home: Path) -> None:
    """In a child each, die at the 1st, 2nd, 3rd ... call that changes the disk; print how many there were.

    After each death the store must be sound, and the same work done again must succeed.
    """
    calls = 0
    while True:
        folder = home / f"at-{calls}"
        with Store(folder) as store:
            put_and_record(store, 1)
        child = os.fork()
        if child == 0:
            _die_at_call(calls)
            with Store(folder) as store:
                put_and_record(store, 2)
                store.gc(max_bytes=0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        with Store(folder) as store:
            problems = store.verify()
            listed = store.artifacts()
            for artifact in listed:
                path = store.artifact(artifact.kind, artifact.key)
                if path is None or path.read_bytes() != content(artifact.provenance["number"]):
                    problems.append(f"{artifact.key} does not read back")
            put_and_record(store, 2)
        if problems:
            _say(f"died at call {calls}: {problems}")
        if status == 0:
            break
        calls += 1
    _say(f"calls {calls}")


def _die_at_call(number: int) -> None:
    """Make the process end, as if killed, right before call ``number`` of those that change files or the database."""
    from sqlalchemy import Engine, event

    left = number

    def count(*_: Any) -> None:
        nonlocal left
        if left == 0:
            os._exit(9)
        left -= 1

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, wrap(getattr(os, name)))
    event.listen(Engine, "commit", count)
    event.listen(Engine, "before_cursor_execute", count)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    role, where, *rest = sys.argv[1:]
    if role == "loop":
        loop(Path(where), int(rest[0]))
    elif role == "race":
        race(Path(where), rest[0])
    elif role == "crash":
        crash_everywhere(Path(where))
