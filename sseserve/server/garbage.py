"""Collections of cyclic garbage, which stop everything: when they come, and of how many objects.

Python collects young objects when some more were made than freed. Streams that wait again make as many as
they free, so that 20,000 of them would have 200,000 young objects by then, which takes 0.1 s. So those are
collected every ``INTERVAL``, too.

A full collection takes 0.4 s with 100,000 sessions and 20,000 streams (800,000 objects). What serves HTTP/1.1
leaves no cycles for it, but a connection over HTTP/2 does. It takes a ten-thousandth of the time: with few
objects it comes every minute and takes some milliseconds, with those about once an hour.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import trio

from ..metrics import Histogram

__all__ = ["collect_garbage", "tune_collector"]

THRESHOLDS = (2000, 3, 10**6)  # of Python's own collections, see gc.set_threshold: no full one
INTERVAL = 0.05  # seconds
FULL_INTERVAL = 60.0  # seconds, at least
SHARE = 1e-4  # of the time for full collections


def tune_collector() -> None:
    """Leave what there is now out of all collections, and the full ones to ``collect_garbage``."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


async def collect_garbage(lag: Histogram, clock: Callable[[], float] = time.perf_counter) -> None:
    """Collect young objects often, and all of them seldom, for ever.

    Args:
        lag: gets how much later than it wanted to this task has run, each time.
        clock: returns seconds.
    """
    full_at = trio.current_time() + FULL_INTERVAL
    while True:
        due = trio.current_time() + INTERVAL
        await trio.sleep_until(due)
        now = trio.current_time()
        lag.observe(now - due)
        if now < full_at:
            gc.collect(1)
        else:
            began = clock()
            gc.collect()
            full_at = trio.current_time() + max(FULL_INTERVAL, (clock() - began) / SHARE)
