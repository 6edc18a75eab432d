"""Keep what native libraries print away from standard output, which belongs to the program's own answers."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()  # file descriptors belong to the process: one redirection at a time


@contextmanager
def native_output_dropped() -> Iterator[None]:
    """Drop what C and C++ code writes to standard output inside the block.

    HiGHS (1.12, inside SciPy 1.17) prints a line of its own debugging there, whatever its output flag says, and that
    line would break a JSON document that a command writes to standard output.
    """
    if os.name == "nt":  # no portable way to flush the C library that HiGHS was linked with
        yield
        return
    with _lock:
        try:
            kept = os.dup(1)
        except OSError:  # the process was started without a standard output
            yield
            return
        if sys.stdout is not None:
            sys.stdout.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 1)
            yield
        finally:
            ctypes.CDLL(None).fflush(None)  # while it still goes nowhere
            os.dup2(kept, 1)
            os.close(kept)
            os.close(null)
