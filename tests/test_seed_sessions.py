"""Seed 003, the therapy sessions: event format, five edge cases, and three transports of one tracker."""

from __future__ import annotations

import base64
import json
import logging

import httpx
import pytest
import trio
from harness import START, HTTP2Client, ServerHarness, logged
from raw_client import RawWebSocket, request_bytes
from tokens import SECRET, make_token
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.model import isotime

STREAM = "/api/sessions/s/status/stream"
STATUS = "/api/sessions/s/status"
STREAMS = [
    (STREAM, "sessions"),
    ("/api/interaction/events/s", "interaction"),
    ("/api/jobs/s/events", "jobs"),
    ("/api/v1/jobs/s/events", "jobs_v1"),
    ("/api/v1/sessions/s/status/stream", "transcription"),
    ("/api/streams?session=s", "sessions"),
]
MEMBERS = {"session_id", "status", "progress", "message", "updated_at"}


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def start_session(harness, **update):
    """Start a session; return a stream of it and its first message, the snapshot."""
    await harness.tracker.update("s", status="transcribing", progress=45, message="...", **update)
    stream = await harness.stream(STREAM)
    return stream, await stream.next()


# Event format


async def test_a_progress_event(autojump_clock, harness):
    """The seed's members have the seed's values; others may be added."""
    _, message = await start_session(harness)
    assert message.event == "progress"
    assert {name: message.data[name] for name in MEMBERS} == {
        "session_id": "s",
        "status": "transcribing",
        "progress": 45,
        "message": "...",
        "updated_at": isotime(START),
    }


async def test_a_complete_event(autojump_clock, harness):
    """The status is the worker's own label; progress is 100."""
    stream, _ = await start_session(harness)
    await harness.tracker.update("s", status="processed", message="Session processing complete")
    (message,) = await stream.read_to_end()
    assert message.event == "complete"
    assert {name: message.data[name] for name in MEMBERS} == {
        "session_id": "s",
        "status": "processed",
        "progress": 100,
        "message": "Session processing complete",
        "updated_at": isotime(START),
    }
    assert "error" not in message.data


async def test_an_error_event(autojump_clock, harness):
    """The event has ``error`` as well, and progress may go back to 0."""
    stream, _ = await start_session(harness)
    await harness.tracker.update(
        "s", status="failed", progress=0, message="Processing failed", error="no audio"
    )
    (message,) = await stream.read_to_end()
    assert message.event == "error"
    assert {name: message.data[name] for name in MEMBERS | {"error"}} == {
        "session_id": "s",
        "status": "failed",
        "progress": 0,
        "message": "Processing failed",
        "error": "no audio",
        "updated_at": isotime(START),
    }


@pytest.mark.parametrize(
    ("update", "error"),
    [
        ({"status": "failed", "message": "no audio"}, "no audio"),
        ({"status": "failed", "error": "", "message": "no audio"}, "no audio"),
        ({"status": "failed"}, "the work failed; its worker gave no reason"),
        ({"status": "cancelled"}, "the work was cancelled"),
        ({"status": "lost"}, "the worker was lost: it published nothing for too long"),
    ],
)
async def test_an_error_event_always_has_an_error(autojump_clock, harness, update, error):
    """The seed's clients show ``error`` alone: it is never empty, nor the message of earlier progress."""
    stream, _ = await start_session(harness)
    await harness.tracker.update("s", **update)
    (message,) = await stream.read_to_end()
    assert (message.event, message.data["error"]) == ("error", error)
    assert (await harness.get(STATUS)).json["error"] == error


async def test_error_of_a_failure_in_another_dialect(autojump_clock, harness):
    """A podcast that has failed, which has no ``error`` there, and a lease that was not renewed have one."""
    await harness.post("/api/sessions", {"session_id": "leased", "lease": 1})
    await harness.post("/api/v1/sessions/s/status", {"status": "failed", "progress": 0, "message": "m"})
    update = base64.b64encode(b'{"jobId":"p","status":"failed","message":"no articles"}').decode()
    await harness.post("/api/v1/pubsub/push", {"message": {"data": update, "messageId": "1"}})
    await harness.post("/api/interaction/events/i", {"type": "error", "data": {"recoverable": False}})
    await trio.sleep(10)
    expected = {
        "s": "m",
        "p": "no articles",
        "i": "the work failed; its worker gave no reason",
        "leased": "the worker was lost: it published nothing for too long",
    }
    for session_id, error in expected.items():
        (message,) = await harness.watch(f"/api/sessions/{session_id}/status/stream")
        assert (message.event, message.data["error"]) == ("error", error), session_id


async def test_non_final_error_is_a_warning(autojump_clock, harness):
    """Clients close on ``error``, so a publisher's own event of that type is sent as a warning."""
    stream, _ = await start_session(harness)
    await harness.tracker.emit("s", "error", {"recoverable": True})
    await harness.tracker.update("s", status="processed")
    assert [message.event for message in await stream.read_to_end()] == ["warning", "complete"]


async def test_byte_format(autojump_clock, harness):
    """``event:``, ``data:`` and ``id:`` fields, one line of JSON, an empty line."""
    stream, message = await start_session(harness)
    block = stream.raw.decode()
    assert block.startswith("event: progress\ndata: {")
    assert block.endswith(f"}}\nid: {message.id}\n\n")
    assert block.count("\n") == 4


async def test_heartbeats_every_15_seconds(autojump_clock, harness):
    """``: heartbeat``, at least every 15 seconds without events."""
    stream, _ = await start_session(harness)
    at = trio.current_time()
    for _ in range(4):
        assert await stream.connection.read_until(b"\n") == b": heartbeat\n"
        assert 9 < trio.current_time() - at <= 15
        at = trio.current_time()


async def test_headers(autojump_clock, harness):
    """The headers that the seed's proxies need: no caching, no buffering."""
    stream, _ = await start_session(harness)
    assert stream.response.headers["content-type"] == "text/event-stream"
    assert "no-cache" in stream.response.headers["cache-control"]
    assert stream.response.headers["x-accel-buffering"] == "no"
    assert "access-control-allow-origin" not in stream.response.headers


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (["https://therapybridge.com"], ("https://therapybridge.com", "true")),
        (["*"], ("*", None)),
        (["https://other.example"], (None, None)),
    ],
)
async def test_cors(autojump_clock, nursery, allowed, expected):
    """The production origin may send credentials; with ``*`` no origin may."""
    harness = ServerHarness(nursery, cors_origins=allowed)
    await harness.tracker.update("s", progress=1)
    stream = await harness.stream(STREAM, headers=[("Origin", "https://therapybridge.com")])
    headers = stream.response.headers
    cors = headers.get("access-control-allow-origin"), headers.get("access-control-allow-credentials")
    assert cors == expected


# The five edge cases


async def test_connecting_before_the_pipeline_starts(autojump_clock, harness):
    """1. The stream begins with the status queued, and sends updates when there are any."""
    await harness.tracker.create("s")
    stream = await harness.stream(STREAM)
    message = await stream.next()
    assert (message.event, message.data["status"], message.data["progress"]) == ("progress", "queued", 0)
    await trio.sleep(1000)
    await harness.tracker.update("s", progress=1)
    assert (await stream.next()).data["progress"] == 1


@pytest.mark.parametrize(("status", "event"), [("processed", "complete"), ("failed", "error")])
async def test_connecting_after_the_end(autojump_clock, harness, status, event):
    """2. The final status is sent at once, and the stream ends."""
    await harness.tracker.update("s", status=status)
    before = trio.current_time()
    assert [message.event for message in await harness.watch(STREAM)] == [event]
    assert trio.current_time() == before


async def test_disconnecting_mid_stream(autojump_clock, harness, caplog):
    """3. The watcher is removed at once, that is logged, and other streams go on."""
    caplog.set_level(logging.INFO, "sseserve")
    stream, _ = await start_session(harness)
    other = await harness.stream(STREAM)
    await other.next()
    await stream.disconnect()
    await wait_all_tasks_blocked()
    assert harness.broker.count_watchers("s").total() == 1
    await harness.tracker.update("s", status="processed")
    assert [message.event for message in await other.read_to_end()] == ["complete"]
    assert [fields["reason"] for fields in logged(caplog, "stream ended")] == ["client_left", "ended"]


@pytest.mark.parametrize(
    ("path", "dialect", "protocol"),
    [
        *((path, dialect, protocol) for path, dialect in STREAMS for protocol in ("http/1.1", "h2")),
        ("/api/sessions/s/status/ws", "sessions", "websocket"),
    ],
)
async def test_every_client_that_leaves_is_logged(autojump_clock, harness, caplog, path, dialect, protocol):
    """One line in every dialect, with its session, dialect, protocol, duration and events."""
    transport = "ws" if protocol == "websocket" else "sse"
    await harness.tracker.emit("s", "note", 1)
    await harness.tracker.update("s", status="transcribing", progress=45)
    caplog.set_level(logging.INFO, "sseserve")
    connection = harness.connect()
    if protocol == "h2":
        client = HTTP2Client(connection)
        (number,) = await client.request(path)
        await client.read_until(lambda: b"45" in client.bodies[number])
    elif transport == "ws":
        await (await RawWebSocket.open(connection, "s")).message()
    else:
        await connection.send(request_bytes("GET", path))
        await connection.read_until(b"45")
    for percent in (50, 60):
        await trio.sleep(2)
        await harness.tracker.update("s", progress=percent)
    await trio.sleep(1)
    await connection.stream.aclose()
    await wait_all_tasks_blocked()
    events = 4 if dialect == "interaction" else 3  # which replays its log
    (fields,) = logged(caplog, "stream ended")
    assert fields.pop("bytes") > 200
    ids = fields.pop("request_id"), fields.pop("correlation_id")
    assert ids[0] == ids[1]
    assert fields == {
        "reason": "client_left",
        "session_id": "s",
        "transport": transport,
        "dialect": dialect,
        "user": None,  # without an address
        "seconds": 5.0,
        "events": events,
    }


async def test_planned_ends_are_not_departures(autojump_clock, harness, caplog):
    """The line of a stream that is complete says so."""
    caplog.set_level(logging.INFO, "sseserve")
    stream, _ = await start_session(harness)
    bundle = await harness.stream("/api/streams?session=s")
    await harness.tracker.update("s", status="processed")
    await stream.read_to_end()
    await bundle.read_to_end()
    await wait_all_tasks_blocked()
    assert [fields["reason"] for fields in logged(caplog, "stream ended")] == ["ended", "ended"]


# Monitoring


async def test_durations_and_error_rate(autojump_clock, harness):
    """The average duration of streams and of sessions, and how many have failed, are metrics."""
    streams = []
    for number, status in enumerate(["processed", "failed", "failed", "cancelled", "lost"]):
        await harness.tracker.update(f"s{number}", progress=1)
        streams.append(await harness.stream(f"/api/sessions/s{number}/status/stream"))
        await streams[-1].next()
        await trio.sleep(2)
        await harness.tracker.update(f"s{number}", status=status)
        await streams[-1].read_to_end()
    text = (await harness.get("/metrics")).body.decode()
    for line in (
        'sseserve_sessions_finished_total{state="succeeded"} 1.0',
        'sseserve_sessions_finished_total{state="failed"} 2.0',
        'sseserve_sessions_finished_total{state="cancelled"} 1.0',
        'sseserve_sessions_finished_total{state="lost"} 1.0',
        "sseserve_session_duration_seconds_count 5.0",
        "sseserve_session_duration_seconds_sum 10.0",
        'sseserve_stream_duration_seconds_count{dialect="sessions",transport="sse"} 5.0',
        'sseserve_stream_duration_seconds_sum{dialect="sessions",transport="sse"} 10.0',
    ):
        assert line in text.splitlines(), line


async def test_an_unknown_session_is_not_found(autojump_clock, harness):
    """4. 404 for the stream, the status and the history."""
    for target in (STREAM, STATUS, "/api/sessions/s/events"):
        response = await harness.get(target)
        assert (response.status, response.error["code"]) == (404, "session_not_found")


async def test_access_is_denied_whether_the_session_exists_or_not(autojump_clock, nursery):
    """5. 401 without a token, 403 without permission; patients, their therapists and admins have it."""

    def bearer(subject, role, **claims):
        token = make_token(sub=subject, role=role, now=int(START), **claims)
        return [("Authorization", f"Bearer {token}")]

    harness = ServerHarness(nursery, jwt_key=SECRET)
    await harness.tracker.create("s", owner="p1")
    assert (await harness.get(STREAM)).status == 401
    assert (await harness.get(STREAM, [("Authorization", "Bearer x")])).status == 401
    others = [bearer("p2", "patient"), bearer("t1", "therapist", patients=["p2"])]
    for target in (STREAM, "/api/sessions/none/status/stream"):
        for headers in others:
            assert (await harness.get(target, headers)).status == 403
    for headers in (
        bearer("p1", "patient"),
        bearer("t1", "therapist", patients=["p1"]),
        bearer("a", "admin"),
    ):
        await harness.stream(STREAM, headers=headers)


# One tracker


async def test_websocket_and_sse_deliver_the_same(autojump_clock, harness):
    """Both have the same events, data and cursors, and end with the session."""
    stream, first = await start_session(harness)
    socket = await RawWebSocket.open(harness.connect(), "s")
    assert (await socket.message())["id"] == first.id
    await harness.tracker.update("s", progress=60)
    await harness.tracker.emit("s", "note", 1)
    await harness.tracker.update("s", status="processed")
    messages, (code, _) = await socket.messages()
    assert code == 1000
    assert [(m["event"], m["data"], m["id"]) for m in messages] == [
        tuple(m) for m in await stream.read_to_end()
    ]


async def test_a_client_may_change_transport(autojump_clock, harness):
    """A cursor of SSE resumes over WebSocket."""
    stream, _ = await start_session(harness)
    await harness.tracker.update("s", progress=50)
    cursor = (await stream.next()).id
    await stream.disconnect()
    await harness.tracker.update("s", progress=60)
    socket = await RawWebSocket.open(harness.connect(), "s", cursor)
    assert (await socket.message())["data"] == {"status": "ok", "missed": 0}
    assert (await socket.message())["data"]["progress"] == 60


async def test_polling_every_two_seconds(autojump_clock, harness, nursery):
    """The seed's polling client is never more than two seconds late, and it gets the end."""

    async def run_pipeline():
        for percent in range(0, 100, 10):
            await harness.tracker.update("s", progress=percent)
            await trio.sleep(1.5)
        await harness.tracker.update("s", status="processed")

    await harness.tracker.create("s")
    nursery.start_soon(run_pipeline)
    polled = []
    while not polled or polled[-1]["status"] != "processed":
        response = await harness.get(STATUS)
        assert response.headers["cache-control"] == "no-store"
        polled.append(response.json)
        assert polled[-1].keys() >= MEMBERS
        await trio.sleep(2)
    percents = [p["progress"] for p in polled]
    assert percents == sorted(percents)
    assert 8 <= len(percents) <= 10


async def test_polling_with_an_etag(autojump_clock, harness):
    """304 without a body until there is something newer."""
    await harness.tracker.update("s", progress=1)
    etag = (await harness.get(STATUS)).headers["etag"]
    again = await harness.get(STATUS, [("If-None-Match", etag)])
    assert (again.status, again.body) == (304, b"")
    await harness.tracker.update("s", progress=2)
    assert (await harness.get(STATUS, [("If-None-Match", etag)])).json["progress"] == 2


async def test_the_seeds_python_client():
    """The client reads line by line and stops at the final event; here with httpx in place of requests."""
    printed = []

    def stream_session_progress(url, token, publish):
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.stream("GET", url, headers=headers) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line:
                    continue
                if line.startswith("event:"):
                    event_type = line.split(":", 1)[1].strip()
                elif line.startswith("data:"):
                    data = json.loads(line.split(":", 1)[1].strip())
                    printed.append((event_type, data["progress"], data["message"]))
                    if event_type in ["complete", "error"]:
                        break
                    trio.from_thread.run(publish)

    async with sseserve.serve(port=0, drain=0.2) as server:

        async def finish():
            await server.tracker.update("s", status="processed")

        await server.tracker.update("s", progress=20, message="m")
        await trio.to_thread.run_sync(stream_session_progress, f"{server.url}{STREAM}", "x", finish)
    assert printed == [("progress", 20, "m"), ("complete", 100, "m")]
