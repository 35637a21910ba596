"""The metrics at ``/metrics``: what they count, their names, and their labels."""

from __future__ import annotations

import re
import subprocess

import pytest
import trio
from harness import ServerHarness
from live_harness import LiveHarness
from programs import require_program
from raw_client import get, post
from test_instances import serve_instances
from trio.testing import wait_all_tasks_blocked

from sseserve.live.fanout import FEW
from sseserve.metrics import BUCKETS, Histogram

STREAM = "/api/sessions/s/status/stream"


@pytest.fixture
def harness(nursery) -> ServerHarness:
    return ServerHarness(nursery)


async def read(harness: ServerHarness) -> dict[str, float]:
    """Return all samples, by name and labels."""
    text = (await harness.get("/metrics")).body.decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def publish(harness: ServerHarness, session_id: str = "s", **update: object) -> int:
    return (await harness.post(f"/api/sessions/{session_id}/progress", update)).status


def test_histogram():
    """Each bucket counts the values up to its bound, the last one all of them."""
    histogram = Histogram()
    for value in (0, BUCKETS[0], BUCKETS[0] * 1.001, 99.0):
        histogram.observe(value)
    histogram.observe(0.5, 10)
    counts = dict(histogram.buckets())
    assert counts == {str(bound): 2 + (bound > BUCKETS[0]) + 10 * (bound >= 0.5) for bound in BUCKETS} | {
        "+Inf": 14
    }
    assert histogram.count == 14
    assert histogram.total == pytest.approx(99 + 5 + 2 * BUCKETS[0], rel=1e-3)


async def test_names_follow_the_conventions(autojump_clock, harness):
    """``promtool check metrics`` finds nothing to object to."""
    promtool = require_program("promtool")
    await publish(harness, progress=1)
    await harness.stream(STREAM)
    await harness.get("/nothing")
    text = (await harness.get("/metrics")).body
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr.decode(), checked.stdout) == (0, "", b"")


@pytest.mark.parametrize("watchers", [1, FEW + 1])
async def test_delivery_seconds(autojump_clock, nursery, watchers):
    """From the record of an event to the sockets: at once, or when a slow client can take it."""
    harness = LiveHarness(nursery)
    seconds = harness.broker.deliveries.seconds
    harness.broker.deliveries._clock = harness.tracker.clock
    await harness.tracker.create("s")
    slow = await harness.watch(connection="stream")
    for _ in range(watchers - 1):
        await harness.watch()
    await harness.tracker.emit("s", "note")
    await wait_all_tasks_blocked()
    assert (seconds.count, seconds.total) == (watchers, 0)
    slow.stall()
    for _ in range(3):
        await harness.tracker.emit("s", "note")
        await wait_all_tasks_blocked()
    assert seconds.count == watchers + 3 * (watchers - 1) + 1  # one is being written
    assert harness.broker.deliveries.clients == 1
    assert harness.broker.deliveries.events == 2
    await trio.sleep(3)
    slow.unstall()
    await wait_all_tasks_blocked()
    assert seconds.count == 4 * watchers
    assert seconds.total == pytest.approx(6)
    assert (harness.broker.deliveries.clients, harness.broker.deliveries.size) == (0, 0)


async def test_delivery_seconds_of_a_bundle(autojump_clock, harness):
    """Each client and batch of a bundle counts, too."""
    for session_id in ("a", "b"):
        await publish(harness, session_id, progress=1)
    stream = await harness.stream("/api/streams?session=a&session=b")
    await stream.take(2)
    await publish(harness, "a", progress=2)
    await stream.next()
    await publish(harness, "b", progress=2)
    await stream.next()
    assert (await read(harness))["sseserve_delivery_seconds_count"] == 2


async def test_streams_opened_and_resumed(autojump_clock, nursery):
    """By transport and dialect; and by how resuming went, for each session."""
    harness = ServerHarness(nursery, history_events=5)
    await publish(harness, progress=1)
    stream = await harness.stream(STREAM)
    cursor = (await stream.next()).id
    await stream.disconnect()
    await harness.stream(STREAM, cursor)
    for percent in range(2, 12):
        await publish(harness, progress=percent)
    await harness.stream(STREAM, cursor)
    await harness.stream(STREAM, "other-1")
    await harness.stream("/api/streams?session=s&session=t", "other-1")
    await wait_all_tasks_blocked()
    samples = await read(harness)
    assert samples['sseserve_streams_opened_total{dialect="sessions",transport="sse"}'] == 5
    assert samples['sseserve_streams{dialect="sessions",transport="sse"}'] == 4
    assert samples["sseserve_reconnects_total"] == 4
    assert {s: samples[f'sseserve_resumes_total{{status="{s}"}}'] for s in ("ok", "gap", "reset")} == {
        "ok": 1,
        "gap": 1,
        "reset": 2,
    }


async def test_streams_closed(autojump_clock, harness):
    """By the reason that the log names, too; with how long they were open."""
    await publish(harness, progress=1)
    stream = await harness.stream(STREAM)
    await trio.sleep(2)
    await stream.disconnect()
    await harness.stream(STREAM)
    await publish(harness, status="completed")
    await trio.sleep(2)
    samples = await read(harness)
    names = 'dialect="sessions",reason="{}",transport="sse"'
    for reason in ("client_left", "ended"):
        assert samples[f"sseserve_streams_closed_total{{{names.format(reason)}}}"] == 1
    assert samples['sseserve_stream_duration_seconds_count{dialect="sessions",transport="sse"}'] == 2
    assert 2 <= samples['sseserve_stream_duration_seconds_sum{dialect="sessions",transport="sse"}'] < 4


async def test_appends(autojump_clock, harness):
    """Their time is that of those which the engine has done."""
    for percent in (1, 2, 3):
        await publish(harness, progress=percent)
    assert await publish(harness, progress=1) == 422
    samples = await read(harness)
    assert samples["sseserve_append_seconds_count"] == samples["sseserve_events_total"] == 3


async def test_leases(autojump_clock, harness):
    """Producers that have stalled, and sessions that are lost because of that."""
    await harness.post("/api/sessions", {"session_id": "s", "lease": 10})
    await publish(harness, progress=1)
    await trio.sleep(12)
    samples = await read(harness)
    assert (samples["sseserve_leases_stalled_total"], samples["sseserve_leases_lost_total"]) == (1, 0)
    await trio.sleep(30)
    samples = await read(harness)
    assert (samples["sseserve_leases_stalled_total"], samples["sseserve_leases_lost_total"]) == (1, 1)


async def test_labels_are_bounded(autojump_clock, harness):
    """What clients send makes no samples: neither ids nor paths, methods, event types or hosts."""
    await publish(harness, progress=1)
    before = (await read(harness)).keys()
    for n in range(50):
        await publish(harness, f"session-{n}", progress=1, status=f"status-{n}")
        await harness.get(f"/nothing-{n}", headers=[("Host", "localhost"), ("User-Agent", f"agent-{n}")])
        stream = await harness.stream(f"/api/sessions/session-{n}/status/stream", f"epoch{n}-1")
        await stream.disconnect()
    after = (await read(harness)).keys()
    assert {re.sub(r'"[^"]*"', "", name) for name in after - before} == {
        "sseserve_responses_total{status=}",
        "sseserve_streams_opened_total{dialect=,transport=}",
        "sseserve_streams_closed_total{dialect=,reason=,transport=}",
        "sseserve_stream_duration_seconds_count{dialect=,transport=}",
        "sseserve_stream_duration_seconds_sum{dialect=,transport=}",
    }
    assert len(after - before) == 6  # of the statuses 200 and 404


async def test_process(harness):
    """Under the names that the clients of Prometheus use."""
    samples = await read(harness)
    assert samples["process_resident_memory_bytes"] > 10e6
    assert samples["process_cpu_seconds_total"] > 0
    assert samples["process_start_time_seconds"] > 1.7e9
    assert any(name.startswith("sseserve_build_info{") for name in samples)


async def test_redis_lag(redis):
    """How long an event of another instance has taken to come; one's own do not count."""
    async with serve_instances(redis) as servers:
        await post(servers[0].port, "/api/sessions/s/progress", {"progress": 1})
        lag = servers[1].app.counters.redis_lag
        with servers[1].app.broker.wakeup("s") as wakeup, trio.fail_after(20):
            await servers[1].app.engine.wait_followed("s")
            await post(servers[0].port, "/api/sessions/s/progress", {"progress": 2})
            await wakeup.wait()
        assert lag.count == 1
        assert servers[0].app.counters.redis_lag.count == 0
        text = (await get(servers[1].port, "/metrics")).body.decode()
        assert "sseserve_redis_lag_seconds_count 1.0" in text
