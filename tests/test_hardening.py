"""Hostile clients and faulty programs, and that they do not affect others."""

from __future__ import annotations

import os
import socket

import httpx
import msgspec
import pytest
import trio
import trio.testing
from harness import ServerHarness
from raw_client import HANDSHAKE, connect, request_bytes, reset
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve import Grant, Tracker
from sseserve.config import Settings
from sseserve.engines import EngineListener
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import Invalid
from sseserve.http.publishing import _split_lines
from sseserve.server.listener import adopt
from sseserve.server.sockets import open_sockets


class CountingChunk(bytes):
    """A chunk that counts the bytes it is appended to."""

    joined = 0

    def __radd__(self, other):
        CountingChunk.joined += len(other)
        return bytes(other) + bytes(self)


async def test_line_in_many_chunks_is_joined_once():
    """The unfinished part of a line is not copied again for each of its chunks."""

    async def chunks():
        for _ in range(5000):
            yield CountingChunk(b"x")
        yield b"\ny"

    assert [line async for line in _split_lines(chunks(), 10_000)] == [b"x" * 5000, b"y"]
    assert CountingChunk.joined == 0


async def test_small_chunks_do_not_block_other_tasks():
    """A body of one-byte chunks that arrives in a single read does not keep the event loop busy."""
    async with sseserve.serve(port=0) as server:
        body = (
            b"".join(b"1\r\n%c\r\n" % c for c in b'{"type":"t","data":"' + b"x" * 5000 + b'"}') + b"0\r\n\r\n"
        )
        head = b"POST /api/sessions/a/events HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n"
        turns = 0
        done = trio.Event()

        async def other():
            nonlocal turns
            while not done.is_set():
                turns += 1
                await trio.lowlevel.checkpoint()

        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream, trio.open_nursery() as nursery:
            await stream.send_all(head + body)
            before = turns
            nursery.start_soon(other)
            assert b" 202 " in await stream.receive_some()
            done.set()
        assert turns - before > 20


DEEP = [
    ("/api/interaction/events/a", b'{"type":"processing","data":\n%b}'),
    ("/api/interaction/events/a", b'{"type":"x","data":\n%b}'),
    ("/api/sessions/a/events", b'{"type":"x","data":\n%b}'),
    ("/api/sessions/a/progress", b'{"data":\n%b}'),
    ("/api/v1/sessions/a/status", b'{"status":"working","data":\n%b}'),
    ("/api/jobs", b'{"data":\n%b}'),
    ("/api/v1/jobs", b'{"data":\n%b}'),
]


@pytest.mark.parametrize(("path", "body"), DEEP)
async def test_deeply_nested_data(autojump_clock, nursery, caplog, path, body):
    """Any depth is accepted and read back, or a bad request: what is accepted is not too deep for later."""
    harness = ServerHarness(nursery)
    for depth in (400, *range(570, 580), *range(860, 1000), 100_000):
        for nested in (b'{"a":\n' * depth + b"1" + b"}" * depth, b"[\n" * depth + b"]" * depth):
            response = await harness.post(path, body % nested)
            if depth == 400 and nested.startswith(b"{"):
                assert response.status in (201, 202)
            assert response.status in (201, 202, 400, 422)  # 422: of a member that is an object
            if response.status == 400:
                assert "nested too deep" in response.error["message"]
    for target in ("/api/sessions", "/api/sessions/a/events", "/api/sessions/a/status", "/api/jobs"):
        assert (await harness.get(target)).status in (200, 404)
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []


@pytest.mark.parametrize("depth", [2000])
async def test_deeply_nested_data_of_this_process(depth):
    """It is refused too."""
    nested: list[object] = []
    for _ in range(depth):
        nested = [nested]
    async with sseserve.serve(port=0) as server:
        with pytest.raises(Invalid):
            await server.tracker.emit("a", "x", nested)


@pytest.mark.parametrize(
    "host", ["a..b", "a" * 64, "a" * 64 + ".example", "[::1", "a b", "\xe9", "127.0.0.1:99999", "%", ":"]
)
async def test_malformed_host(autojump_clock, nursery, caplog, host):
    """An error in the one shape, with the request's id, or as if nothing was wrong."""
    harness = ServerHarness(nursery)
    connection = harness.connect()
    await connection.send(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
    response = await connection.read_response()
    assert response.status in (200, 400, 421)
    if response.status != 200:
        assert response.error["request_id"]
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("settings", ["", "%%%", "AAMAAABkAAQCAAAAAAIAAAAA", "a" * 5000])
async def test_http2_settings_are_ignored(autojump_clock, nursery, caplog, settings):
    """RFC 9113, section 3.1, has removed the upgrade to h2c, so they may be anything."""
    headers = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", settings)]
    response = await ServerHarness(nursery).get("/health", headers)
    assert (response.status, "upgrade" in response.headers) == (200, False)
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


async def test_clients_that_reset_at_once_with_a_stream_limit(caplog):
    """Their slots are given back, and none of them is an error of the server."""
    async with sseserve.serve(port=0, max_streams_per_user=3, limit_loopback=True) as server:
        await server.tracker.update("a", progress=1)
        for target in (
            "/api/sessions/a/status/stream",
            "/api/sessions/a/status/ws",
            "/api/streams?session=a",
        ):
            for _ in range(50):
                connection = await connect(server.port)
                headers = HANDSHAKE if target.endswith("/ws") else ()
                await connection.send(request_bytes("GET", target, headers=headers))
                reset(connection)
        while server.app.counters.connections:
            await trio.lowlevel.checkpoint()
        assert not server.app.coordination.slots.taken
        assert server.app.broker.statistics().subscribers == 0
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("behind", [b"x", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
async def test_clients_that_reset_with_a_pipelined_request(caplog, behind):
    """With anything behind its first request, a client's place and file are given back."""
    async with sseserve.serve(port=0, max_connections=30) as server:
        await server.tracker.update("a", progress=1)
        files = len(os.listdir("/proc/self/fd"))
        for target in ("/api/sessions/a/status?wait=60", "/", "/api/sessions/a/events"):
            for _ in range(50):
                connection = await connect(server.port)
                await connection.send(request_bytes("GET", target) + behind)
                reset(connection)
                while server.app.counters.connections > 20:
                    await trio.lowlevel.checkpoint()
        while server.app.counters.connections:
            await trio.lowlevel.checkpoint()
        assert len(os.listdir("/proc/self/fd")) == files
        assert sum(server.app.counters.refused.values()) == 0
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("depth", [33, 200])
async def test_deeply_nested_error_is_refused(depth):
    """An error is copied into every later event, so its depth is limited; a deeper one changes nothing."""
    error = {}
    for _ in range(depth):
        error = {"in": error}
    tracker = Tracker(MemoryEngine(Settings(), EngineListener()))
    await tracker.update("a", progress=1)
    with pytest.raises(Invalid, match="deep"):
        await tracker.update("a", error=error)
    assert (await tracker.get("a")).seq == 1


async def test_raw_data_is_validated():
    """A ``msgspec.Raw`` that is not JSON is refused before it is in the log."""
    tracker = Tracker(MemoryEngine(Settings(), EngineListener()))
    with pytest.raises(Invalid, match="JSON"):
        await tracker.emit("a", "note", msgspec.Raw(b"{nonsense"))


async def test_deleting_in_process_ends_the_streams():
    """A session that the program itself deletes ends its streams; its ID can then be used again."""
    async with sseserve.serve(port=0) as server:
        await server.tracker.update("a", progress=1)
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("GET", "/api/interaction/events/a") as response,
        ):
            chunks = response.aiter_text()
            assert "processing" in await anext(chunks)
            await server.tracker.delete("a")
            assert "deleted" in "".join([chunk async for chunk in chunks])
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("GET", "/api/interaction/events/a") as response,
        ):
            await server.tracker.update("a", progress=2, status="done")
            assert "complete" in (await response.aread()).decode()


async def test_health_counts_without_looking_at_every_watcher(autojump_clock, nursery, monkeypatch):
    """``/health`` and ``/metrics`` read counters, and ``/health`` names only sessions that exist."""
    harness = ServerHarness(nursery)
    monkeypatch.setattr(harness.broker, "subscribers", None)

    async def watched():
        await wait_all_tasks_blocked()
        health = (await harness.get("/health")).json
        return health["streams"], health["connections_per_job"]

    stream = "/api/sessions/{}/status/stream"
    waiting = [await harness.stream(f"/api/interaction/events/nobody-{n}") for n in range(3)]
    assert await watched() == (3, {})
    for name in "abc":
        await harness.tracker.create(name)
    opened = [await harness.stream(stream.format(name)) for name in "aabbbc"]
    assert await watched() == (9, {"b": 3, "a": 2, "c": 1})
    metrics = (await harness.get("/metrics")).body.decode()
    assert 'sseserve_streams{dialect="sessions",transport="sse"} 6.0' in metrics
    assert 'sseserve_streams{dialect="interaction",transport="sse"} 3.0' in metrics
    await harness.tracker.update("nobody-1", progress=1)
    assert await watched() == (9, {"b": 3, "a": 2, "nobody-1": 1, "c": 1})
    for gone in (*opened[2:5], waiting[1]):
        await gone.disconnect()
    assert await watched() == (5, {"a": 2, "c": 1})
    await harness.tracker.delete("a")
    assert await watched() == (3, {"c": 1})


async def test_health_hides_session_ids_with_authentication():
    """With ``authenticate`` set ``/health`` does not name the sessions that are watched."""

    async def authenticate(_request):
        return Grant("root", "admin")

    async with (
        sseserve.serve(port=0, authenticate=authenticate) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        assert "connections_per_job" not in (await client.get("/health")).json()


async def test_exception_in_authenticate(caplog):
    """Whatever ``authenticate`` raises is logged and gets 500."""

    async def authenticate(_request):
        raise trio.BrokenResourceError("the key server is gone")

    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.update("a", progress=1)
        async with httpx.AsyncClient(base_url=server.url) as client:
            for method, path in [
                ("GET", "/api/sessions/a/status/stream"),
                ("POST", "/api/sessions/a/progress"),
                ("GET", "/api/sessions/a/status"),
            ]:
                response = await client.request(method, path)
                assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert caplog.text.count("authenticate failed") == 3


async def test_stream_opened_during_shutdown_is_asked_to_reconnect():
    """A stream that is admitted after the others were ended gets ``retry`` and a clean end like them."""
    requested, go = trio.Event(), trio.Event()

    async def authenticate(_request):
        requested.set()
        await go.wait()
        return Grant("root", "admin")

    async with sseserve.serve(port=0, authenticate=authenticate) as server:
        await server.tracker.update("a", progress=1)
        responses = []

        async def watch():
            async with httpx.AsyncClient(base_url=server.url) as client:
                responses.append(await client.get("/api/sessions/a/status/stream"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await requested.wait()
            server.stop()
            await server.app.stopping.wait()
            go.set()
    # Not 503, which would stop an EventSource for good.
    assert responses[0].status_code == 200
    assert responses[0].text.startswith("retry: ")


async def test_accepted_connections_detect_dead_peers():
    """One is closed when its peer acknowledges nothing for 30 seconds (tcp(7)); small writes do not wait."""
    (listener,) = map(adopt, (await open_sockets(Settings(port=0))).listen())
    async with listener:
        client = await trio.open_tcp_stream(*listener.socket.getsockname())
        accepted = await listener.accept()
        async with client, accepted:
            assert accepted.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert accepted.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_unverified_token_is_not_a_user():
    """Without ``authenticate`` streams are limited by address, whatever the ``Authorization`` header says."""
    async with sseserve.serve(port=0, max_streams_per_user=1, limit_loopback=True) as server:
        await server.tracker.update("a", progress=1)
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("GET", "/api/sessions/a/status/stream", headers={"Authorization": "1"}),
        ):
            second = await client.get("/api/sessions/a/status/stream", headers={"Authorization": "2"})
            assert second.status_code == 429


async def test_leases_that_are_not_due_are_not_loaded():
    """Checking a thousand leases of which none is due reads nothing from the engine."""
    reads = 0

    class Counting(MemoryEngine):
        async def load(self, session_id):
            nonlocal reads
            reads += 1
            return await super().load(session_id)

    tracker = Tracker(Counting(Settings(), EngineListener()), clock=lambda: 1000.0)
    for number in range(1000):
        await tracker.create(f"s{number}", lease=10)
    reads = 0
    await tracker.check_leases()
    assert reads == 0
