"""How PyTorch's threads wait for each other: they sleep while something is fitted, and wait as they come when measured.

OpenMP's threads spin at every barrier. Where other work has one of the processors, the one that is waited for gets its
turn only when that work's slice of time ends, some milliseconds later, at each of hundreds of small operations: a pass
over a text took ten times as long beside a compiler. Threads that sleep are woken ahead of it; on an idle machine that
costs less than a tenth.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_VARIABLE = "OMP_WAIT_POLICY"
_chosen_here = False


def let_threads_sleep() -> None:
    """Ask OpenMP for sleeping threads, unless the user has said how they wait; in force if PyTorch comes after it."""
    global _chosen_here
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = "PASSIVE"
        _chosen_here = True


def environment_as_given() -> Mapping[str, str]:
    """The environment of this process without what ``let_threads_sleep`` put there: for what is measured."""
    return {name: value for name, value in os.environ.items() if not (_chosen_here and name == _VARIABLE)}
