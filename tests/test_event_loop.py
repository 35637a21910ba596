"""No task keeps the event loop busy for long, however many sessions and streams there are."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock

from benchmarks.operations.event_loop import LineMeter, exercise
from sseserve.logs.lines import JSONFormatter
from sseserve.logs.writer import BackgroundHandler
from sseserve.metrics import Histogram
from sseserve.server.garbage import collect_garbage

# Lines of Python that a task may run without letting others run: they stand for 5 ms, as 10,000 take about a
# millisecond (python -m benchmarks event-loop measures the time itself). A walk over all sessions, or all
# streams, takes more. What C does in one call, such as to copy or sort a list, is not seen here.
MAX_LINES = 50_000


@pytest.fixture
def at_info() -> Iterator[None]:
    """Lines of the log are written at level info, as by a server."""
    log = logging.getLogger("sseserve")
    descriptor = os.open(os.devnull, os.O_WRONLY)
    handler = BackgroundHandler(descriptor)
    handler.setFormatter(JSONFormatter(None))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield
    log.setLevel(logging.NOTSET)
    log.removeHandler(handler)
    handler.close()
    os.close(descriptor)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("at_info")
def test_no_step_is_long():
    """Requests, background services, and a shutdown, with 40,000 sessions and 8,000 streams."""
    meter = LineMeter()
    trio.run(exercise, meter, 40_000, 8_000, clock=MockClock(autojump_threshold=0))
    assert sys.gettrace() is None
    assert len(meter.longest) == 9
    assert {name: step for name, step in meter.longest.items() if step.cost > MAX_LINES} == {}


async def test_collections_of_garbage(autojump_clock, monkeypatch):
    """Young objects are collected often, all of them once a minute, or for a ten-thousandth of the time."""
    collected: list[tuple[float, int]] = []
    seconds, lag = 0.0, Histogram()

    def collect(generation: int = 2) -> None:
        nonlocal seconds
        collected.append((trio.current_time(), generation))
        seconds += 0.02 if len(collected) > 1500 else 0.001

    monkeypatch.setattr(gc, "collect", collect)
    with trio.move_on_after(400):
        await collect_garbage(lag, lambda: seconds)
    full = [round(at) for at, generation in collected if generation == 2]
    assert full == [60, 120, 320]
    assert {generation for _, generation in collected} == {1, 2}
    assert lag.count == len(collected) >= 400 / 0.06
