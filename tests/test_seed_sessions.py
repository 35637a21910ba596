"""Seed 003, the therapy sessions: event shapes, five edge cases, and three transports of one tracker."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
import trio
from harness import START, ServerHarness
from raw_client import RawWebSocket
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.errors import Unauthorized
from sseserve.http.auth import Grant
from sseserve.model import isotime

STREAM = "/api/sessions/s/status/stream"
STATUS = "/api/sessions/s/status"
MEMBERS = {"session_id", "status", "progress", "message", "updated_at"}


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def begin(harness, **update):
    """A session in the middle of its work, and a stream behind the snapshot."""
    await harness.tracker.update("s", status="transcribing", progress=45, message="...", **update)
    stream = await harness.stream(STREAM)
    return stream, await stream.next()


# Shapes


async def test_a_progress_event(autojump_clock, harness):
    """The seed's members with the seed's values, whatever else is there beside them."""
    _, said = await begin(harness)
    assert said.event == "progress"
    assert {name: said.data[name] for name in MEMBERS} == {
        "session_id": "s",
        "status": "transcribing",
        "progress": 45,
        "message": "...",
        "updated_at": isotime(START),
    }


async def test_a_complete_event(autojump_clock, harness):
    """The label is the worker's own; progress is 100."""
    stream, _ = await begin(harness)
    await harness.tracker.update("s", status="processed", message="Session processing complete")
    (said,) = await stream.read_to_end()
    assert said.event == "complete"
    assert {name: said.data[name] for name in MEMBERS} == {
        "session_id": "s",
        "status": "processed",
        "progress": 100,
        "message": "Session processing complete",
        "updated_at": isotime(START),
    }
    assert "error" not in said.data


async def test_an_error_event(autojump_clock, harness):
    """It has the error as well, and may fall back to 0."""
    stream, _ = await begin(harness)
    await harness.tracker.update(
        "s", status="failed", progress=0, message="Processing failed", error="no audio"
    )
    (said,) = await stream.read_to_end()
    assert said.event == "error"
    assert {name: said.data[name] for name in MEMBERS | {"error"}} == {
        "session_id": "s",
        "status": "failed",
        "progress": 0,
        "message": "Processing failed",
        "error": "no audio",
        "updated_at": isotime(START),
    }


async def test_an_event_that_ends_nothing_is_no_error(autojump_clock, harness):
    """Clients close at ``error``: a publisher's own event of that type is a warning to them."""
    stream, _ = await begin(harness)
    await harness.tracker.emit("s", "error", {"recoverable": True})
    await harness.tracker.update("s", status="processed")
    assert [s.event for s in await stream.read_to_end()] == ["warning", "complete"]


async def test_the_bytes_are_those_of_the_protocol(autojump_clock, harness):
    """``event:`` and ``data:`` fields, one line of JSON, an empty line."""
    stream, said = await begin(harness)
    block = stream.raw.decode()
    assert block.startswith(f"id: {said.id}\nevent: progress\ndata: {{")
    assert block.endswith("}\n\n")
    assert block.count("\n") == 4


async def test_heartbeats_every_15_seconds(autojump_clock, harness):
    """``: heartbeat`` and an empty line, at least that often in silence."""
    stream, _ = await begin(harness)
    at = trio.current_time()
    for _ in range(4):
        assert await stream.connection.read_until(b"\n\n") == b": heartbeat\n\n"
        assert 9 < trio.current_time() - at <= 15
        at = trio.current_time()


async def test_headers(autojump_clock, harness):
    """What the seed's proxies need: no cache, no buffering."""
    stream, _ = await begin(harness)
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
    """The production origin may send credentials; ``*`` never may."""
    harness = ServerHarness(nursery, cors_origins=allowed)
    await harness.tracker.update("s", progress=1)
    stream = await harness.stream(STREAM, headers=[("Origin", "https://therapybridge.com")])
    headers = stream.response.headers
    found = headers.get("access-control-allow-origin"), headers.get("access-control-allow-credentials")
    assert found == expected


# The five edge cases


async def test_who_connects_before_the_pipeline_starts_waits(autojump_clock, harness):
    """1. The stream says that it is queued, and sends updates when there are any."""
    await harness.tracker.create("s")
    stream = await harness.stream(STREAM)
    said = await stream.next()
    assert (said.event, said.data["status"], said.data["progress"]) == ("progress", "queued", 0)
    await trio.sleep(1000)
    await harness.tracker.update("s", progress=1)
    assert (await stream.next()).data["progress"] == 1


@pytest.mark.parametrize(("status", "event"), [("processed", "complete"), ("failed", "error")])
async def test_who_connects_after_the_end_gets_it_at_once(autojump_clock, harness, status, event):
    """2. The final status, and the stream closes."""
    await harness.tracker.update("s", status=status)
    before = trio.current_time()
    assert [s.event for s in await harness.watch(STREAM)] == [event]
    assert trio.current_time() == before


async def test_who_disconnects_is_forgotten_at_once(autojump_clock, harness, caplog):
    """3. In the middle of a stream: nothing is left of it, nothing fails, the others go on."""
    caplog.set_level(logging.WARNING)
    stream, _ = await begin(harness)
    other = await harness.stream(STREAM)
    await other.next()
    await stream.disconnect()
    await wait_all_tasks_blocked()
    assert harness.broker.count_watchers("s") == 1
    await harness.tracker.update("s", status="processed")
    assert [s.event for s in await other.read_to_end()] == ["complete"]
    assert caplog.text == ""


async def test_an_unknown_session_is_not_found(autojump_clock, harness):
    """4. 404, by every way to watch."""
    for target in (STREAM, STATUS, "/api/sessions/s/events"):
        response = await harness.get(target)
        assert (response.status, response.error["code"]) == (404, "session_not_found")


async def test_who_may_not_see_a_session_learns_nothing(autojump_clock, nursery):
    """5. 401 without a grant, 403 without a right, whether the session exists or not.

    Where tokens come from is the program's own: here a header names the subject.
    """
    subjects = {"Bearer own": "p1", "Bearer other": "p2"}

    async def authenticate(request):
        if (subject := subjects.get(request.headers.get("authorization", ""))) is None:
            raise Unauthorized("no token")
        return Grant(subject, "patient")

    harness = ServerHarness(nursery)
    harness.app.admission.authenticate = authenticate
    await harness.tracker.create("s", owner="p1")
    assert (await harness.get(STREAM)).status == 401
    for target in (STREAM, "/api/sessions/none/status/stream"):
        assert (await harness.get(target, [("Authorization", "Bearer other")])).status == 403
    await harness.stream(STREAM, headers=[("Authorization", "Bearer own")])


# One tracker


async def test_websocket_and_sse_say_the_same(autojump_clock, harness):
    """Both see the same events, with the same data and cursors, and end with the session."""
    stream, first = await begin(harness)
    socket = await RawWebSocket.open(harness.connect(), "s")
    assert (await socket.message())["id"] == first.id
    await harness.tracker.update("s", progress=60)
    await harness.tracker.emit("s", "note", 1)
    await harness.tracker.update("s", status="processed")
    messages, (code, _) = await socket.messages()
    assert code == 1000
    assert [(m["event"], m["data"], m["id"]) for m in messages] == [
        tuple(s) for s in await stream.read_to_end()
    ]


async def test_a_client_may_change_transport(autojump_clock, harness):
    """A cursor of one is a cursor of the other."""
    stream, _ = await begin(harness)
    await harness.tracker.update("s", progress=50)
    cursor = (await stream.next()).id
    await stream.disconnect()
    await harness.tracker.update("s", progress=60)
    socket = await RawWebSocket.open(harness.connect(), "s", cursor)
    assert (await socket.message())["data"] == {"status": "ok", "missed": 0}
    assert (await socket.message())["data"]["progress"] == 60


async def test_polling_every_two_seconds(autojump_clock, harness, nursery):
    """The seed's polling client: never more than two seconds behind, and it sees the end."""

    async def work():
        for percent in range(0, 100, 10):
            await harness.tracker.update("s", progress=percent)
            await trio.sleep(1.5)
        await harness.tracker.update("s", status="processed")

    await harness.tracker.create("s")
    nursery.start_soon(work)
    polled = []
    while not polled or polled[-1]["status"] != "processed":
        response = await harness.get(STATUS)
        assert response.headers["cache-control"] == "no-cache"
        polled.append(response.json)
        assert polled[-1].keys() >= MEMBERS
        await trio.sleep(2)
    percents = [p["progress"] for p in polled]
    assert percents == sorted(percents)
    assert 8 <= len(percents) <= 10


async def test_polling_what_has_not_changed_costs_little(autojump_clock, harness):
    """An ETag: 304 without a body until there is something newer."""
    await harness.tracker.update("s", progress=1)
    etag = (await harness.get(STATUS)).headers["etag"]
    again = await harness.get(STATUS, [("If-None-Match", etag)])
    assert (again.status, again.body) == (304, b"")
    await harness.tracker.update("s", progress=2)
    assert (await harness.get(STATUS, [("If-None-Match", etag)])).json["progress"] == 2


async def test_the_seeds_python_client():
    """It reads line by line and breaks at the end; here with httpx in place of requests."""
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
