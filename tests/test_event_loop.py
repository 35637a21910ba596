"""No task keeps the event loop busy for long, however many sessions and streams there are."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from benchmarks.operations.event_loop import LineMeter, exercise
from sseserve.server import GC_THRESHOLDS

# Lines of Python that a task may run without letting others run: they stand for 5 ms, as 10,000 take about a
# millisecond (python -m benchmarks event-loop measures the time itself). A walk over all sessions, or all
# streams, takes more. What C does in one call, such as to copy or sort a list, is not seen here.
MAX_LINES = 50_000


@pytest.mark.timeout(300)
def test_no_step_is_long():
    """Requests, background services, and a shutdown, with 40,000 sessions and 8,000 streams."""
    meter = LineMeter()
    trio.run(exercise, meter, 40_000, 8_000, clock=MockClock(autojump_threshold=0))
    assert len(meter.longest) == 9
    assert {name: step for name, step in meter.longest.items() if step.cost > MAX_LINES} == {}


def test_young_collections_are_short():
    """Those of young objects, and no full one comes while a server grows."""
    youngest, middle, oldest = GC_THRESHOLDS
    assert youngest * (middle + 1) <= 10_000
    assert youngest * middle * oldest >= 4 * 1_140_000  # objects of 100,000 sessions and 20,000 streams
