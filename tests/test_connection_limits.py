"""How many connections and streams there may be, of a server, an address, a user and a session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import HANDSHAKE, RawConnection, connect, request_bytes, reset

import sseserve

STREAM = "/api/sessions/s/status/stream"


async def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


# Connections of an address


async def test_connections_of_an_address():
    """One more is refused at once; other addresses have their own; what has ended counts no more, however."""
    limits: dict[str, Any] = {
        "max_connections_per_address": 3,
        "limit_loopback": True,
        "request_timeout": 0.3,
    }
    async with sseserve.serve(port=0, drain=0.5, **limits) as server, AsyncExitStack() as stack:

        async def refused() -> bool:
            extra = await connect(server.port)
            async with extra.stream:
                with trio.move_on_after(0.2):
                    response = await extra.read_response()
                    assert (response.status, response.error["code"]) == (429, "too_many_connections")
                    assert "max_connections_per_address = 3" in response.error["message"]
                    assert int(response.headers["retry-after"]) > 0
                    return True
            return False

        await server.tracker.update("s", progress=1)
        idle, stream, socket = [await connect(server.port) for _ in range(3)]
        assert (await idle.request("GET", "/health")).status == 200
        await stream.watch("s")
        await socket.send(request_bytes("GET", "/api/sessions/s/status/ws", headers=HANDSHAKE))
        assert (await socket.read_head()).status == 101
        for _ in range(3):
            assert await refused()
        other = await connect(server.port, address="127.0.0.2")
        await stack.enter_async_context(other.stream)
        text = (await other.request("GET", "/metrics")).body.decode()
        assert 'sseserve_refused_total{limit="max_connections_per_address"} 3.0' in text
        # A connection that closes, one that is reset, and one whose WebSocket breaks the protocol.
        await idle.stream.aclose()
        reset(stream)
        await socket.send(b"\xc1\x80\0\0\0\0")
        await socket.read_to_end()
        await socket.stream.aclose()
        await wait_until(lambda: server.app.counters.connections == 1)
        # Malformed requests, silence, and heads that never end.
        frame = b"\0\0\3\x08\0\0\0\0\0abc"  # of HTTP/2, of a wrong size
        for data in (b"\0\r\n\r\n", b"", b"GET / HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame):
            broken = await connect(server.port)
            async with broken.stream:
                await broken.send(data)
                if data:
                    await broken.read_to_end()
        await wait_until(lambda: server.app.counters.connections == 1)
        for _ in range(3):
            await stack.enter_async_context((await connect(server.port)).stream)
        await wait_until(lambda: server.app.counters.connections == 4)
        assert await refused()


async def test_loopback_connections_are_not_limited():
    async with sseserve.serve(port=0, max_connections_per_address=1) as server, AsyncExitStack() as stack:
        for _ in range(5):
            connection = await connect(server.port)
            await stack.enter_async_context(connection.stream)
            assert (await connection.request("GET", "/health")).status == 200


# Streams

KINDS = ("stream", "bundle", "list", "socket", "poll", "history", "http2", "http2 socket")
TARGETS = {
    "stream": STREAM,
    "bundle": "/api/streams?session=s&session=t",
    "list": "/api/streams/sessions",
    "socket": "/api/sessions/s/status/ws",
    "poll": "/api/sessions/s/status?wait=60",
    "history": "/api/sessions/s/events?after={cursor}&wait=60",
    "http2": STREAM,
    "http2 socket": "/api/sessions/s/status/ws",
}


class Client:
    """Opens one stream of a kind; ``status`` is None while a long-poll waits."""

    def __init__(self, harness: ServerHarness, kind: str, connection: RawConnection | None = None) -> None:
        self.harness = harness
        self.kind = kind
        self.connection = harness.connect() if connection is None else connection
        self.status: int | None = None
        self.http2: HTTP2Client | None = None

    async def open(self, method: str = "GET") -> int | None:
        cursor = (await self.harness.tracker.get("s")).cursor
        target = TARGETS[self.kind].format(cursor=cursor)
        if self.kind.startswith("http2"):
            client = self.http2 = HTTP2Client(self.connection)
            if self.kind == "http2":
                (number,) = await client.request(target)
            else:
                number = await client.connect(target)
            await client.read_until(lambda: number in client.statuses or number in client.ended)
            self.status = client.statuses.get(number)
            # A WebSocket over HTTP/2 is open with 200 (RFC 8441, section 5).
            return self.status
        headers = HANDSHAKE if self.kind == "socket" else ()
        await self.connection.send(request_bytes(method, target, headers=headers))
        with trio.move_on_after(1):
            self.status = (await self.connection.read_head()).status
        return self.status

    async def open_unless_closed(self) -> None:
        """Open it; do nothing if ``close`` is called meanwhile."""
        with contextlib.suppress(trio.ClosedResourceError):
            await self.open()

    async def close(self) -> None:
        await self.connection.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()


def is_open(status: int | None) -> bool:
    return status in (200, 101, None)


@pytest.fixture
async def server(nursery) -> ServerHarness:
    harness = ServerHarness(nursery, max_streams=4, limit_loopback=True)
    for name in "st":
        await harness.tracker.update(name, progress=1)
    return harness


def nothing_is_taken(harness: ServerHarness) -> bool:
    streams = harness.app.open_streams
    return not (streams.total or streams._addresses or harness.app.coordination.slots.taken)


@pytest.mark.parametrize("kind", KINDS)
async def test_streams_of_every_kind_count(autojump_clock, server, kind):
    """Of each kind there may be as many as the limit allows, and none of another kind besides them."""
    clients = [Client(server, kind) for _ in range(4)]
    for client in clients:
        assert is_open(await client.open())
    assert server.app.open_streams.total == 4
    for other in KINDS:
        extra = Client(server, other)
        assert await extra.open() == 429, other
    if kind not in ("poll", "history"):
        assert await Client(server, "stream").open("HEAD") == 429
    # What does not stay open is served, and nobody was ended for it.
    assert (await server.get("/api/sessions/s/status")).status == 200
    assert (await server.post("/api/sessions/t/progress", {"progress": 2})).status == 202
    assert server.app.open_streams.total == 4
    assert server.app.counters.refused["max_streams"] == len(KINDS) + (kind not in ("poll", "history"))
    for client in clients:
        await client.close()
    assert nothing_is_taken(server)
    assert is_open(await Client(server, kind).open())


async def test_the_error_names_the_limit(autojump_clock, nursery):
    for setting in (
        "max_streams",
        "max_streams_per_address",
        "max_streams_per_user",
        "max_streams_per_session",
    ):
        harness = ServerHarness(nursery, limit_loopback=True, **{setting: 1})
        await harness.tracker.update("s", progress=1)
        await harness.stream(STREAM)
        refused = await harness.get(STREAM)
        assert (refused.status, refused.error["code"]) == (429, "too_many_streams")
        assert f"{setting} = 1" in refused.error["message"]
        assert refused.headers["retry-after"] == "5"
        assert harness.app.counters.refused[setting] == 1


async def test_existing_streams_stay_and_publishers_still_connect():
    """When all places for streams are taken there are connections left for publishers."""
    async with sseserve.serve(port=0, drain=0.5, max_connections=10) as server, AsyncExitStack() as stack:
        await server.tracker.update("s", progress=1)
        streams = [await connect(server.port) for _ in range(9)]
        for stream in streams:
            await stack.enter_async_context(stream.stream)
            assert (await stream.watch("s")).status == 200
            await stream.event()
        for percent in range(2, 6):
            extra = await connect(server.port)
            async with extra.stream:
                assert (await extra.watch("s")).status == 429
                await extra.read_to_end()
            await wait_until(lambda: server.app.counters.connections == 9)
            publisher = await connect(server.port)
            async with publisher.stream:
                body = b'{"progress": %d}' % percent
                assert (await publisher.request("POST", "/api/sessions/s/progress", body)).status == 202
            await wait_until(lambda: server.app.counters.connections == 9)
            for stream in streams:
                event = await stream.event()
                assert event is not None
                assert f'"progress":{percent}' in event.data


async def test_streams_of_an_address():
    """Each address has streams of its own, whatever it opens them with."""
    settings: dict[str, Any] = {"max_streams_per_address": 2, "limit_loopback": True}
    async with sseserve.serve(port=0, drain=0.5, **settings) as server, AsyncExitStack() as stack:
        await server.tracker.update("s", progress=1)

        async def open_one(address: str) -> int:
            connection = await connect(server.port, address=address)
            await stack.enter_async_context(connection.stream)
            if len(statuses) % 2:
                client = HTTP2Client(connection)
                (number,) = await client.request(STREAM)
                await client.read_until(lambda: number in client.statuses)
                return client.statuses[number]
            return (await connection.watch("s")).status

        statuses: list[int] = []
        for address in ("127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.2"):
            statuses.append(await open_one(address))  # noqa: PERF401 - ``open_one`` reads it
        assert statuses == [200, 200, 429] * 2


# Giving places back


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_while_its_stream_is_opened(
    autojump_clock, nursery, server, monkeypatch, kind
):
    coordination, go = server.app.coordination, trio.Event()
    take = coordination.take_slot

    async def take_slowly(name: str, limit: int) -> bool:
        taken = await take(name, limit)
        try:
            await go.wait()
        except trio.Cancelled:
            coordination.release_slot(name)
            raise
        return taken

    monkeypatch.setattr(coordination, "take_slot", take_slowly)
    client = Client(server, kind)
    nursery.start_soon(client.open_unless_closed)
    await trio.testing.wait_all_tasks_blocked()
    assert not nothing_is_taken(server)
    await client.close()
    go.set()
    await trio.testing.wait_all_tasks_blocked()
    assert nothing_is_taken(server)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_whose_serving_fails(autojump_clock, server, monkeypatch, kind):
    async def fail(*_arguments: Any, **_more: Any) -> Any:
        raise RuntimeError("broken")

    opened = []
    open_stream = server.app.open_streams.open

    async def open_and_break(*arguments: Any) -> Any:
        stream = await open_stream(*arguments)
        opened.append(stream)
        for name in ("load", "read", "sessions", "count"):
            monkeypatch.setattr(server.app.engine, name, fail)
        return stream

    monkeypatch.setattr(server.app.open_streams, "open", open_and_break)
    client = Client(server, kind)
    with contextlib.suppress(AssertionError):  # the connection may end without a response
        await client.open()
    assert opened
    await client.close()
    assert nothing_is_taken(server)


@pytest.mark.parametrize("key", ["Sec-WebSocket-Key", "Sec-WebSocket-Version", "Upgrade"])
async def test_a_handshake_that_fails_takes_no_place(autojump_clock, server, key):
    headers = [header for header in HANDSHAKE if header[0] != key]
    for _ in range(6):
        assert (await server.get("/api/sessions/s/status/ws", headers)).status in (400, 426)
    assert nothing_is_taken(server)


async def test_a_client_that_breaks_a_websocket_gives_its_place_back(autojump_clock, server):
    for data in (b"\xc1\x80\0\0\0\0", b"\x88\x80\0\0\0\0", b"\x81\xff" + b"\xff" * 20, b""):
        client = Client(server, "socket")
        assert await client.open() == 101
        await client.connection.send(data or b"\x89")
        if data:
            await client.connection.read_to_end()
        await client.close()
    assert nothing_is_taken(server)
