"""Long arrays in cache-sized chunks, on a few threads: NumPy lets go of the GIL in its loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

THREADS = min(4, os.cpu_count() or 1)
"""More would wait for one another: between NumPy's loops the GIL is held."""


_KEPT = 24 << 20


def keep_freed_memory() -> None:
    """Let the C library keep what chunks free, up to some 50 MB, for the next ones.

    glibc gives the system back all above twice the largest block that was freed, at a page fault
    for every 4 kB when it is taken again: half of all the time of moving Q4_K.
    """
    np.empty(_KEPT, np.uint8)


def in_chunks(count: int, step: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` on slices of at most ``step`` that cover ``range(count)``, in any order.

    ``work`` writes its result into arrays made beforehand. Its first exception is raised here,
    once the other threads are done.
    """
    keep_freed_memory()
    starts = range(0, count, step)
    threads = min(THREADS, len(starts))

    def share(thread: int) -> None:
        for start in starts[thread::threads]:
            work(slice(start, min(start + step, count)))

    if threads < 2:
        for thread in range(threads):
            share(thread)
        return
    with ThreadPoolExecutor(threads, "chunks") as pool:
        for _ in pool.map(share, range(threads)):
            pass
