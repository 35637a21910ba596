"""Background services: a failure is logged and counted, and the service starts again."""

from __future__ import annotations

from itertools import pairwise

import trio
from harness import ServerHarness

from sseserve.metrics import Counters
from sseserve.server.supervision import supervise


async def test_failed_service_starts_again_with_growing_delays(autojump_clock, nursery, caplog):
    """After 1, 2, 4 and more seconds, at most 60; each failure is logged with its traceback once."""
    counters, started_at = Counters(), []

    async def service():
        started_at.append(trio.current_time())
        raise RuntimeError(f"failure {len(started_at)}")

    nursery.start_soon(supervise, "sweep", service, counters)
    await trio.sleep(240)
    assert [b - a for a, b in pairwise(started_at)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert counters.background_failures == {"sweep": 9}
    assert [caplog.text.count(f"RuntimeError: failure {number}\n") for number in range(1, 10)] == [1] * 9
    assert caplog.text.count("Traceback") == 9


async def test_delay_is_short_again_after_a_long_run(autojump_clock, nursery):
    """A failure a day is no reason to wait for a minute."""
    counters, started_at = Counters(), []

    async def service():
        started_at.append(trio.current_time())
        await trio.sleep(1000)
        raise RuntimeError

    nursery.start_soon(supervise, "sweep", service, counters)
    await trio.sleep(5000)
    assert [b - a for a, b in pairwise(started_at)] == [1001] * 4


async def test_service_that_fails_does_not_end_the_server(autojump_clock, nursery, monkeypatch):
    """Leases are checked again, and in the meantime all else goes on; the metrics count."""
    harness = ServerHarness(nursery)
    expired = []

    async def fail(**_options):
        raise OSError("no space left on device")

    async def expire(_watched):
        expired.append(trio.current_time())

    await harness.post("/api/sessions", {"session_id": "s", "lease": 1})
    with monkeypatch.context() as patch:
        patch.setattr(harness.tracker, "check_leases", fail)
        patch.setattr(harness.app.engine, "expire", expire)
        await trio.sleep(10.5)
        metrics = (await harness.get("/metrics")).body.decode()
    assert 'sseserve_background_failures_total{service="leases"} 3.0' in metrics
    assert 'sseserve_background_failures_total{service="retention"} 0.0' in metrics
    assert 'sseserve_background_failures_total{service="heartbeats"} 0.0' in metrics
    assert expired == [float(second) for second in range(1, 11)]
    await trio.sleep(20)
    assert (await harness.tracker.get("s")).ended
