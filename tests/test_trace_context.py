"""The W3C trace context of a publisher's request goes with the event to whoever watches."""

from __future__ import annotations

import httpx
import msgspec
import pytest
from harness import ServerHarness
from raw_client import HANDSHAKE, RawWebSocket, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.engines.codec import decode_event, encode_event
from sseserve.model import Event
from sseserve.trace_context import TraceContext, parse_trace_context

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
HEADERS = [("traceparent", TRACEPARENT), ("tracestate", "rojo=00f067aa0ba902b7, congo=t61")]
STATE = "rojo=00f067aa0ba902b7,congo=t61"


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-0g",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01.more",
        f"{TRACEPARENT}, {TRACEPARENT}",  # two header fields
        f" {TRACEPARENT}",
        f"{TRACEPARENT}\n",
    ],
)
def test_a_malformed_traceparent_is_ignored(text):
    """With its tracestate (W3C Trace Context, section 3.2.2.3)."""
    assert parse_trace_context(text, STATE) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TRACEPARENT, TRACEPARENT),
        (f"00-{TRACE}-{PARENT}-00", f"00-{TRACE}-{PARENT}-00"),
        # A later version: its fields that are known, and of the flags the one that is (section 3.2.4).
        (f"cc-{TRACE}-{PARENT}-ff", TRACEPARENT),
        (f"01-{TRACE}-{PARENT}-01-more", TRACEPARENT),
    ],
)
def test_traceparent(text, expected):
    assert parse_trace_context(text) == TraceContext(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ""),
        ("", ""),
        ("a=1", "a=1"),
        ("a=1 ,\tb=2,,", "a=1,b=2"),
        ("tenant@vendor=1", "tenant@vendor=1"),
        ("a=1,a=2", ""),
        ("A=1", ""),
        ("a=", ""),
        ("a=1=2", ""),
        ("a", ""),
        ("a=\u00e9", ""),
        (",".join(f"k{number}=1" for number in range(32)), ",".join(f"k{n}=1" for n in range(32))),
        (",".join(f"k{number}=1" for number in range(33)), ""),
        (",".join(f"{name}={'x' * 200}" for name in "abc"), ""),
    ],
)
def test_tracestate(text, expected):
    """What is malformed or too long is left out; the traceparent stays (section 4.3)."""
    assert parse_trace_context(TRACEPARENT, text) == TraceContext(TRACEPARENT, expected)


def test_it_is_stored_with_the_event():
    event = Event(1, "note", msgspec.Raw(b"1"), 0.0, trace=TraceContext(TRACEPARENT, STATE))
    assert decode_event(1, encode_event(event)) == event
    assert b"trace" not in encode_event(msgspec.structs.replace(event, trace=None))


async def test_what_watchers_get(autojump_clock, nursery):
    """``traceparent`` in the data of progress, and over WebSocket and long-poll with every event."""
    harness = ServerHarness(nursery)
    await harness.tracker.create("s")
    stream = await harness.stream("/api/sessions/s/status/stream")
    await stream.next()
    websocket = await RawWebSocket.open(harness.connect(), "s")
    await websocket.message()
    other = await harness.stream("/api/v1/sessions/s/status/stream")
    await other.next()
    connection = harness.connect()
    await connection.send(request_bytes("GET", "/api/jobs/s/ws", headers=HANDSHAKE))
    await connection.read_head()
    job = RawWebSocket(connection)
    before = (await harness.get("/api/sessions/s/events")).json["next"]
    await harness.post("/api/sessions/s/progress", {"progress": 5}, HEADERS)
    await harness.post("/api/sessions/s/events", {"type": "note", "data": 1}, HEADERS)
    lines = b'{"progress": 6}\n{"type": "note", "data": 2}'
    await harness.post("/api/sessions/s/events", lines, [("Content-Type", "application/x-ndjson"), *HEADERS])
    await harness.post("/api/sessions/s/progress", {"progress": 7}, [("traceparent", "malformed")])
    await wait_all_tasks_blocked()

    data = [(await stream.next()).data for _ in range(5)]
    carried = [item.get("traceparent") if isinstance(item, dict) else None for item in data]
    assert carried == [TRACEPARENT, None, TRACEPARENT, None, None]

    expected = [(TRACEPARENT, STATE)] * 4 + [(None, None)]
    messages = [await websocket.message() for _ in range(5)]
    assert [(item.get("traceparent"), item.get("tracestate")) for item in messages] == expected
    page = (await harness.get(f"/api/sessions/s/events?after={before}")).json
    assert [(item.get("traceparent"), item.get("tracestate")) for item in page["events"]] == expected
    # The payloads of the other systems stay as their clients know them.
    message = await other.next()
    assert set(message.data) == {"session_id", "status", "progress", "message", "timestamp"}
    while (message := await job.message())["event"] != "note":
        pass  # the snapshot is several messages
    assert set(message) == {"id", "event", "data"}


async def test_it_reaches_other_instances(redis):
    """Over a Redis that they share, with the event."""
    async with (
        sseserve.serve(port=0, engine=redis.url, drain=0.1) as one,
        sseserve.serve(port=0, engine=redis.url, drain=0.1) as two,
        httpx.AsyncClient() as client,
    ):
        await two.tracker.create("s")
        path = f"{two.url}/api/sessions/s/events"
        begin = (await client.get(path)).json()["next"]
        await client.post(f"{one.url}/api/sessions/s/progress", json={"progress": 5}, headers=dict(HEADERS))
        (event,) = (await client.get(f"{path}?after={begin}&wait=10")).json()["events"]
    assert (event["traceparent"], event["tracestate"]) == (TRACEPARENT, STATE)
    assert event["data"]["traceparent"] == TRACEPARENT
