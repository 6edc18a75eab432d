"""Fitting several matrices at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_MOST = 4  # matrices fitted at once: each holds some ten copies of its weights


@contextmanager
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Work on several matrices at once: most steps are too small to be shared by the threads of one product.

    Leaving it by an error or a cancel drops what has not begun.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _MOST)
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
