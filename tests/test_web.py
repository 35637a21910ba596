"""Request bodies read at the handler's pace, lists, and WebSockets."""

from __future__ import annotations

import logging
import re
import tracemalloc
from contextlib import suppress

import pytest
import trio
from harness import FaultyHarness, ServerHarness
from raw_client import RawConnection, RawWebSocket, chunk, request_bytes
from trio.testing import lockstep_stream_pair, wait_all_tasks_blocked

from sseserve import Grant
from sseserve.demo.artifacts import File

CHUNKED = ("Transfer-Encoding", "chunked")
PIECE = 64 * 1024


@pytest.fixture
async def harness(nursery):
    return ServerHarness(nursery)


class LockstepClient:
    """A client over a lockstep stream, whose ``send_all`` returns when the server has received the data."""

    def __init__(self, harness, nursery):
        client, server = lockstep_stream_pair()
        self.connection = RawConnection(client)
        self.sent = 0
        self.closed = trio.Event()
        nursery.start_soon(self._serve, harness, server)

    async def _serve(self, harness, server):
        await harness.app.connections.serve(server)
        self.closed.set()

    async def send(self, piece, count):
        """Send ``piece`` ``count`` times as a chunk, then the last chunk."""
        for _ in range(count):
            await self.connection.send(chunk(piece))
            self.sent += len(piece)
        await self.connection.send(chunk(b""))


# Pages


async def test_unknown_file_names_are_not_kept(autojump_clock, harness, monkeypatch):
    """However many names are asked for, memory does not grow."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps what is logged
    assert (await harness.get("/static/dashboard.js")).status == 200
    tracemalloc.start()
    try:
        sizes = []
        for number in range(40):
            assert (await harness.get(f"/static/{number}" + "x" * 10_000)).status == 404
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[9] < 200_000


@pytest.mark.parametrize("path", ["/", "/dashboard", "/static/index.js", "/static/style.css"])
async def test_pages_run_their_own_scripts_only(autojump_clock, harness, path):
    """No inline script, nothing from or to elsewhere, no frame, no referrer."""
    response = await harness.get(path)
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert {policy[name] for name in ("object-src", "base-uri", "form-action", "frame-ancestors")} == {
        "'none'"
    }
    assert "script-src" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


async def test_downloads_are_no_pages(autojump_clock, nursery):
    """A job's file is downloaded, and has no scripts and no origin if it is shown, whatever its type."""
    harness = ServerHarness(nursery, demo_seconds=1)
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    await harness.watch(f"/api/jobs/{job}/events")
    page = File("film.png", "text/html", b"<script>alert(1)</script>")
    harness.app.artifacts.put(job, (page,))
    response = await harness.get(f"/api/artifacts/{job}/film.png")
    assert (response.status, response.headers["content-type"]) == (200, "text/html")
    assert response.headers["content-disposition"] == "attachment"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"].split("; ")


# Bodies


async def test_body_is_read_at_the_handlers_pace(autojump_clock, nursery, harness):
    """While the handler waits so does the client; less than 1 MiB of its body is taken."""
    go = trio.Event()

    async def authenticate(request):
        if request.method == "POST":
            await go.wait()
        return Grant(subject="a", role="admin")

    harness.app.admission.authenticate = authenticate
    client = LockstepClient(harness, nursery)
    assert (await client.connection.request("GET", "/health")).status == 200
    headers = [("Content-Type", "application/x-ndjson"), CHUNKED]
    await client.connection.send(request_bytes("POST", "/api/sessions/a/events", b"", headers))
    nursery.start_soon(client.send, b'{"type": "x"}' + b" " * PIECE + b"\n", 100)
    await wait_all_tasks_blocked()
    assert client.sent < 2**20
    go.set()
    response = await client.connection.read_response()
    assert (response.status, response.json["applied"]) == (202, 100)


@pytest.mark.parametrize("responded", [False, True])
async def test_unread_body_is_discarded(autojump_clock, nursery, harness, responded):
    """A body that its handler does not read takes no memory, and a disconnect is still noticed at once."""
    await harness.tracker.update("a", progress=1)
    client = LockstepClient(harness, nursery)
    await client.connection.send(request_bytes("GET", "/api/sessions/a/status?wait=50", headers=[CHUNKED]))
    tracemalloc.start()
    try:
        await client.send(b"x" * PIECE, 200)
        await wait_all_tasks_blocked()
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
    assert client.sent == 200 * PIECE
    assert not client.closed.is_set()
    if responded:
        await harness.tracker.update("a", progress=2)
        assert (await client.connection.read_response()).json["progress"] == 2
        assert (await client.connection.request("GET", "/health")).status == 200
    before = trio.current_time()
    await client.connection.stream.aclose()
    await client.closed.wait()
    assert trio.current_time() == before


async def test_rest_of_a_refused_body_is_discarded(autojump_clock, nursery, harness):
    """413 comes before the body's end; the rest is read for a limited time, then the connection ends."""
    client = LockstepClient(harness, nursery)
    await client.connection.send(request_bytes("POST", "/api/sessions", b"", [CHUNKED]))

    async def send():
        with suppress(trio.BrokenResourceError):
            await client.send(b"x" * PIECE, 100)

    nursery.start_soon(send)
    response = await client.connection.read_response()
    assert (response.status, response.error["code"]) == (413, "payload_too_large")
    await client.closed.wait()
    assert trio.current_time() < 5


# Lists


async def test_lists_omit_large_members(autojump_clock, harness):
    """A session's data and a job's request are in its own record, not in the list."""
    large = {"x": "y" * 100_000}
    await harness.post("/api/sessions", {"session_id": "a", "data": large})
    await harness.post("/api/sessions/b/progress", {"progress": 1, "data": large})
    job = (await harness.post("/api/jobs", large)).json["id"]
    sessions, jobs = await harness.get("/api/sessions"), await harness.get("/api/jobs")
    assert {s["session_id"] for s in sessions.json["sessions"]} == {"a", "b", job}
    assert {j["jobId"] for j in jobs.json["jobs"]} == {"a", "b", job}
    assert len(sessions.body) + len(jobs.body) < 10_000
    for session_id in ("a", "b"):
        assert (await harness.get(f"/api/sessions/{session_id}/status")).json["data"] == large
    assert (await harness.get(f"/api/jobs/{job}")).json["request"] == large


async def test_lists_are_paged_by_bytes(autojump_clock, harness):
    """A page has about 1 MiB of sessions; ``Link`` leads through all of them, each once, the newest first."""
    for number in range(150):
        await trio.sleep(0.001)
        await harness.post(f"/api/sessions/s{number}/progress", {"message": "x" * 16_000})
    for path, items in (("/api/sessions", "sessions"), ("/api/jobs", "jobs")):
        ids, pages = [], []
        target = f"{path}?state=running&limit=1000"
        while target:
            response = await harness.get(target)
            pages.append(len(response.body))
            ids += [item.get("session_id") or item["jobId"] for item in response.json[items]]
            target = None
            if link := response.headers.get("link"):
                target = re.fullmatch(r'<(.*)>; rel="next"', link)[1]
            if len(pages) == 1:
                await harness.request("DELETE", f"/api/sessions/{ids[-1]}")  # the place does not depend on it
        assert len(ids) == len(set(ids))
        assert ids == [f"s{number}" for number in range(149, -1, -1) if f"s{number}" in ids]
        assert len(ids) >= 149
        assert len(pages) > 2
        assert max(pages) < 2.2 * 2**20  # a job has its message twice
    response = await harness.get("/api/sessions?after=x")
    assert (response.status, response.error["code"]) == (422, "invalid")


async def test_history_page_is_limited_in_bytes(autojump_clock, harness):
    """One response holds at most about what may wait for a client."""
    for _ in range(10):
        await harness.post("/api/sessions/s/events", {"type": "note", "data": "x" * 100_000})
    response = await harness.get("/api/sessions/s/events?limit=1000")
    assert len(response.json["events"]) == 2
    rest = await harness.get(f"/api/sessions/s/events?after={response.json['next']}")
    assert [event["id"].partition("-")[2] for event in rest.json["events"]] == ["3", "4"]


# Limits


async def test_full_server_says_when_to_retry(autojump_clock, nursery):
    """Where a request may succeed later, ``Retry-After`` has the seconds (RFC 9110, section 10.2.3)."""
    harness = ServerHarness(
        nursery,
        max_sessions=2,
        max_waiting_jobs=1,
        max_running_jobs=1,
        max_streams_per_user=1,
        limit_loopback=True,
    )
    await harness.post("/api/sessions/s/progress", {"progress": 1})
    stream = await harness.stream("/api/sessions/s/status/stream")
    refused = [await harness.get("/api/sessions/s/status/stream")]
    await harness.post("/api/quick/demo")
    refused.append(await harness.post("/api/sessions"))
    refused.append(await harness.post("/api/sessions/t/progress", {}))
    assert [response.status for response in refused] == [429, 503, 503]
    assert [response.headers.get("retry-after") for response in refused] == ["5"] * 3
    await stream.disconnect()


@pytest.mark.parametrize("session_id", ["x" * 129, "a%20b", "a%22"])
async def test_stream_of_an_impossible_session(autojump_clock, harness, session_id):
    """A stream that may be opened first does not wait for a session that cannot exist."""
    response = await harness.get(f"/api/interaction/events/{session_id}")
    assert (response.status, response.error["code"]) == (422, "invalid")


# WebSocket


async def test_idle_websocket_gets_pings(autojump_clock, nursery):
    """Pings come at the heartbeat interval, and only while there is no message to send."""
    harness = ServerHarness(nursery, heartbeat=10.0)
    await harness.tracker.update("a", progress=1)
    connection = harness.connect()
    assert (await connection.request("GET", "/health")).status == 200
    socket = await RawWebSocket.open(connection, "a")
    assert (await socket.message())["event"] == "progress"
    for number in range(3):
        before = trio.current_time()
        assert await socket.frame() == (9, b"")
        assert 5 <= trio.current_time() - before <= 10
        await socket.send(10)
        await harness.tracker.emit("a", "x", number)
        assert (await socket.message())["data"] == number
    before = trio.current_time()
    while trio.current_time() < before + 60:
        await trio.sleep(4)
        await harness.tracker.emit("a", "x")
        assert (await socket.frame())[0] == 1
    await harness.tracker.update("a", status="succeeded")
    assert (await socket.message())["event"] == "complete"
    assert (await socket.message())[0] == 1000


@pytest.mark.parametrize("path", ["/api/sessions?limit=5", "/api/jobs", "/api/streams/sessions"])
async def test_a_list_reads_no_more_than_it_needs(autojump_clock, nursery, path):
    """Pages ask for it every few seconds, and there may be a hundred thousand sessions."""
    harness = FaultyHarness(nursery)
    for number in range(20):
        await harness.tracker.create(f"s{number}")
    sessions, asked = harness.engine.memory.sessions, []

    async def count_sessions(newest=None):
        asked.append(newest)
        return await sessions(newest)

    harness.engine.memory.sessions = count_sessions
    await wait_all_tasks_blocked()
    jobs = harness.engine.calls["jobs"]
    if path.startswith("/api/streams"):
        snapshot = await (await harness.stream(path)).next()
        assert snapshot.data["total"] == 20
    else:
        response = await harness.get(path)
        assert response.headers["x-total-count"] == "20"
        page = response.json.get("sessions") or response.json["jobs"]
        assert len(page) == (5 if "limit" in path else 20)
        assert ("link" in response.headers) == ("limit" in path)
    assert asked
    assert None not in asked
    assert harness.engine.calls["jobs"] - jobs == (path == "/api/jobs")
