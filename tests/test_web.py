"""What comes through Hypercorn: bodies at the pace of their handlers, lists, and sockets."""

from __future__ import annotations

import tracemalloc
from contextlib import nullcontext, suppress

import pytest
import trio
from harness import ServerHarness
from raw_client import HANDSHAKE, RawConnection, RawWebSocket, chunk, request_bytes
from trio.testing import lockstep_stream_pair, wait_all_tasks_blocked

from sseserve import Grant
from sseserve.errors import Forbidden
from sseserve.http.messages import Request, check_origin

CHUNKED = ("Transfer-Encoding", "chunked")
PIECE = 64 * 1024


@pytest.fixture
async def harness(nursery):
    return ServerHarness(nursery)


class Flood:
    """A client over a stream on which nothing is sent before it is received, and its connection."""

    def __init__(self, harness, nursery):
        client, server = lockstep_stream_pair()
        self.connection = RawConnection(client)
        self.sent = 0
        self.over = trio.Event()
        nursery.start_soon(self._serve, harness, server)

    async def _serve(self, harness, server):
        await harness.app.connections.serve(server)
        self.over.set()

    async def send(self, piece, count):
        """Send chunks, and what ends them."""
        for _ in range(count):
            await self.connection.send(chunk(piece))
            self.sent += len(piece)
        await self.connection.send(chunk(b""))


# Bodies


async def test_a_body_comes_at_the_pace_of_its_handler(autojump_clock, nursery, harness):
    """While that is at something else the client waits; next to nothing is kept of what it has to say."""
    go = trio.Event()

    async def authenticate(request):
        if request.method == "POST":
            await go.wait()
        return Grant(subject="a", role="admin")

    harness.app.admission.authenticate = authenticate
    flood = Flood(harness, nursery)
    assert (await flood.connection.request("GET", "/health")).status == 200
    headers = [("Content-Type", "application/x-ndjson"), CHUNKED]
    await flood.connection.send(request_bytes("POST", "/api/sessions/a/events", b"", headers))
    nursery.start_soon(flood.send, b'{"type": "x"}' + b" " * PIECE + b"\n", 100)
    await wait_all_tasks_blocked()
    assert flood.sent < 2**20
    go.set()
    response = await flood.connection.read_response()
    assert (response.status, response.json["applied"]) == (202, 100)


@pytest.mark.parametrize("answered", [False, True])
async def test_a_body_that_nobody_reads_is_not_kept(autojump_clock, nursery, harness, answered):
    """However much comes: it goes by. That the client leaves is noticed all the same."""
    await harness.tracker.update("a", progress=1)
    flood = Flood(harness, nursery)
    await flood.connection.send(request_bytes("GET", "/api/sessions/a/status?wait=50", headers=[CHUNKED]))
    tracemalloc.start()
    try:
        await flood.send(b"x" * PIECE, 200)
        await wait_all_tasks_blocked()
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
    assert flood.sent == 200 * PIECE
    assert not flood.over.is_set()
    if answered:
        await harness.tracker.update("a", progress=2)
        assert (await flood.connection.read_response()).json["progress"] == 2
        assert (await flood.connection.request("GET", "/health")).status == 200
    before = trio.current_time()
    await flood.connection.stream.aclose()
    await flood.over.wait()
    assert trio.current_time() == before


async def test_the_rest_of_a_refused_body_holds_nobody_up(autojump_clock, nursery, harness):
    """413 before the body is over; what follows is read for a moment, and the connection ends."""
    flood = Flood(harness, nursery)
    await flood.connection.send(request_bytes("POST", "/api/sessions", b"", [CHUNKED]))

    async def send():
        with suppress(trio.BrokenResourceError):
            await flood.send(b"x" * PIECE, 100)

    nursery.start_soon(send)
    response = await flood.connection.read_response()
    assert (response.status, response.error["code"]) == (413, "payload_too_large")
    await flood.over.wait()
    assert trio.current_time() < 5


# Lists


async def test_lists_leave_out_what_may_be_large(autojump_clock, harness):
    """What a session was created or published with is in its snapshot, the request of a job in the job."""
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


# WebSocket


async def test_a_quiet_socket_is_kept_in_use(autojump_clock, nursery):
    """Pings between the messages, and only where nothing else is said."""
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


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "a.example", True),
        ("http://a.example", "a.example", True),
        ("https://A.example", "a.example", True),  # behind a proxy that takes the TLS off
        ("https://a.example", "a.example:443", True),
        ("https://a.example:443", "a.example", True),
        ("http://a.example:8000", "a.example:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("https://listed.example", "a.example", True),
        ("http://a.example", "a.example:8000", False),
        ("https://a.example:444", "a.example", False),
        ("https://evil.example", "a.example", False),
        ("https://a.example.evil.example", "a.example", False),
        ("https://evil.example?a.example", "a.example", False),
        ("http://listed.example", "a.example", False),
        ("null", "a.example", False),
        ("null", "", False),
        ("", "", False),
        ("http://a.example:99999", "a.example:99999", False),
        ("http://[", "[", False),
    ],
)
def test_a_page_of_another_origin_is_told_from_our_own(origin, host, allowed):
    """Listed origins and those of our own host; ``*`` is nobody."""
    headers = [(b"host", host.encode())] + ([] if origin is None else [(b"origin", origin.encode())])
    request = Request.create("GET", "/", headers=headers)
    with nullcontext() if allowed else pytest.raises(Forbidden):
        check_origin(("https://listed.example", "*"), request)


@pytest.mark.parametrize("authenticated", [False, True])
@pytest.mark.parametrize("origin", ["https://evil.example", "http://test"])
async def test_a_socket_behind_hypercorn_is_refused_to_other_origins(
    autojump_clock, harness, authenticated, origin
):
    """A page could use the cookies of whoever looks at it. Without grants there is nothing to use."""

    async def authenticate(request):
        return Grant(subject="a", role="admin")

    await harness.tracker.update("a", progress=1)
    harness.app.admission.authenticate = authenticate if authenticated else None
    connection = harness.connect()
    assert (await connection.request("GET", "/health")).status == 200
    headers = [*HANDSHAKE, ("Origin", origin)]
    if not authenticated or origin == "http://test":
        socket = await RawWebSocket.open(connection, "a", headers=headers)
        assert (await socket.message())["event"] == "progress"
        return
    for session_id in ("a", "none"):
        response = await connection.request("GET", f"/api/sessions/{session_id}/status/ws", headers=headers)
        assert (response.status, response.json["error"]["code"]) == (403, "forbidden")
        connection = harness.connect()
        assert (await connection.request("GET", "/health")).status == 200
