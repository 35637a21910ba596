"""What an event stream costs while it is open, and that nothing of it is left when it ends."""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import trio
from harness import FaultyHarness, ServerHarness
from raw_client import RawConnection, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.config import Settings
from sseserve.dialects import Encoding
from sseserve.engines import EngineListener
from sseserve.engines.memory import MemoryEngine
from sseserve.http.open_streams import OpenStream
from sseserve.live.transport import Transport
from sseserve.model import EndReason

STREAM = "/api/sessions/a/status/stream"
TARGETS = [STREAM, "/api/streams?session=a", "/api/streams/sessions"]


class Streams:
    """Connections over socket pairs; those of the server run in a nursery of their own."""

    def __init__(self, harness: ServerHarness, connections: trio.Nursery) -> None:
        self.harness = harness
        self.connections = connections
        self.clients: list[RawConnection] = []

    async def open(self, cursor: str | None = None, target: str = STREAM) -> RawConnection:
        """Open an event stream, and read what it begins with."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        theirs.setblocking(False)
        self.connections.start_soon(self.harness.app.connections.serve, Transport(theirs, "127.0.0.1"))
        client = RawConnection(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        headers = [] if cursor is None else [("Last-Event-ID", cursor)]
        await client.send(request_bytes("GET", target, headers=headers))
        assert (await client.read_head()).status == 200
        await client.event()
        self.clients.append(client)
        return client

    async def stall(self, number: int) -> None:
        """Publish more than the socket buffers of clients hold that do not read."""
        for _ in range(number):
            await self.harness.tracker.emit("a", "x", "." * 1000)
        await wait_all_tasks_blocked()


@pytest.fixture
async def streams(nursery) -> Any:
    harness = ServerHarness(nursery)
    await harness.tracker.update("a", progress=1)
    async with trio.open_nursery() as connections:
        opened = Streams(harness, connections)
        yield opened
        connections.cancel_scope.cancel()
    for client in opened.clients:
        client.stream.socket.close()


def tasks(nursery: trio.Nursery) -> int:
    return len(nursery.child_tasks)


async def test_an_idle_stream_is_one_task_without_a_nursery(streams):
    """Its stack and what it waits for are most of its memory."""
    for _ in range(3):
        await streams.open()
    await wait_all_tasks_blocked()
    assert [task.child_nurseries for task in streams.connections.child_tasks] == [[], [], []]


@pytest.mark.parametrize("end", ["the client leaves", "the server cancels it", "it is cut"])
async def test_a_stream_that_ends_leaves_no_task(autojump_clock, streams, end):
    """The task that drains its buffer, in a nursery of all connections, ends with it."""
    server = streams.harness.app.nursery
    before = tasks(server)
    async with trio.open_nursery() as streams.connections:
        client = await streams.open()
        await streams.stall(30)
        assert tasks(server) == before + 1
        if end == "the client leaves":
            await client.stream.aclose()
        elif end == "the server cancels it":
            streams.connections.cancel_scope.cancel()
        else:
            await streams.stall(300)
    await wait_all_tasks_blocked()
    assert tasks(server) == before
    assert not streams.harness.broker.subscribers()
    assert not streams.harness.app.open_streams.total


async def test_an_error_while_a_buffer_is_drained_ends_one_connection(streams, monkeypatch, caplog):
    """Not the server, in whose nursery that happens."""
    other = await streams.open()
    client = await streams.open()
    await streams.stall(1)

    async def fail(*_arguments: Any) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(Transport, "send_all", fail)
        await streams.stall(30)
    assert {record.message.partition(" of ")[0] for record in caplog.records} == {
        "sending to <_StreamSubscriber sse"
    }
    assert await client.events()
    assert client.ended is not None
    assert await other.events()
    assert tasks(streams.connections) == 0


@pytest.mark.parametrize("target", TARGETS[:2])
async def test_a_stalled_client_is_no_failure(autojump_clock, streams, caplog, target):
    """Its connection is closed after the send timeout, and nothing is logged as an error."""
    await streams.open(target=target)
    await streams.stall(300)
    await trio.sleep(60)
    assert tasks(streams.connections) == 0
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_stalls_while_a_page_is_sent(autojump_clock, streams, monkeypatch, caplog):
    """It is no failure of what makes the pages either."""

    async def pages(_watch: Any, encoding: Encoding, _stream: OpenStream) -> AsyncGenerator[bytes]:
        yield encoding.chunk(b"data: 1\n\n")
        while True:
            yield encoding.chunk(b": " + b"." * 1_000_000 + b"\n\n")

    monkeypatch.setattr(streams.harness.app.connections._streams, "_read_pages", pages)
    await streams.open(target="/api/streams/sessions")
    await trio.sleep(60)
    assert tasks(streams.connections) == 0
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("target", TARGETS)
async def test_a_token_that_ends_while_a_stream_is_opened(streams, monkeypatch, target):
    """The stream has ended before it begins to wait for anything."""
    attach = OpenStream.attach

    def attach_late(stream: OpenStream, client: Any) -> None:
        attach(stream, client)
        client.expire("the token was revoked", EndReason.REVOKED)

    monkeypatch.setattr(OpenStream, "attach", attach_late)
    client = await streams.open(target=target)
    assert await client.events() == []
    await client.stream.aclose()
    await wait_all_tasks_blocked()
    assert tasks(streams.connections) == 0


async def test_a_stream_that_ends_while_its_client_sends_is_closed(streams):
    """Waiting for the client to leave ends although the socket is readable in the same moment."""
    client = await streams.open()
    await wait_all_tasks_blocked()
    await client.send(b"what nobody asked for")
    (subscriber,) = streams.harness.broker.subscribers()
    subscriber.ask_to_reconnect(500)
    await client.events()
    assert client.ended == "eof"


# What one is opened with

SYSTEM_CALLS = {
    *("_accept", "bind", "fcntl", "getpeername", "getsockname", "getsockopt", "ioctl", "modify", "poll"),
    *("read", "recv", "recv_into", "register", "send", "setblocking", "setsockopt", "unregister", "write"),
}


@contextmanager
def counted_system_calls() -> Iterator[Counter[str]]:
    """Count what this thread calls of the functions that are a system call, by their names."""
    counts: Counter[str] = Counter()

    def note(_frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in SYSTEM_CALLS:
            counts[function.__name__] += 1

    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(None)


async def test_system_calls_of_an_opened_stream():
    """One each to accept it, to read, to write and to wait for its client; it inherits its options."""
    number = 50
    async with sseserve.serve(port=0) as server:
        await server.tracker.update("a", progress=1)
        # Nothing here lets the server's tasks run before all requests have arrived.
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(number)]
        for client in clients:
            client.sendall(request_bytes("GET", STREAM))
        with counted_system_calls() as counts:
            while server.app.broker.statistics().subscribers < number:
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
        for client in clients:
            client.settimeout(10)
            assert b"data: " in client.recv(4096)
            client.close()
    each = {"_accept", "read", "write", "setblocking", "register"}
    others = {name: count for name, count in counts.items() if name not in each}
    assert {name: counts[name] - number for name in each if abs(counts[name] - number) > 2} == {}
    assert others.pop("modify") <= number + 5  # Trio tries this before it registers a socket
    assert sum(others.values()) <= 20, others


@pytest.mark.parametrize("cursor", [None, "unknown-1"])
async def test_what_is_asked_of_the_engine(autojump_clock, nursery, cursor):
    """The record is loaded to admit a client, and read once more when it is on the topic."""
    harness = FaultyHarness(nursery)
    await harness.tracker.update("a", progress=1)
    harness.engine.calls.clear()
    stream = await harness.stream(STREAM, cursor)
    await stream.next()
    calls = harness.engine.calls
    assert {name: calls[name] for name in ("load", "latest", "read", "wait_followed", "receipt")} == {
        "load": 1,
        "latest": 0,
        "read": 1,
        "wait_followed": 1,
        "receipt": 0,
    }


async def test_an_immediate_engine_never_waits():
    """So a stream over it is joined without a cancel scope."""
    engine = MemoryEngine(Settings(), EngineListener())
    assert engine.immediate
    for reading in (engine.load("a"), engine.read("a", 0, 1), engine.wait_followed("a")):
        with pytest.raises(StopIteration):
            reading.send(None)


async def test_heads_of_one_second(autojump_clock, nursery):
    """They are made once, and each stream has its own ids, and what its origin may know."""
    harness = ServerHarness(nursery, cors_origins=("https://a.example",))
    await harness.tracker.update("a", progress=1)

    async def head(*headers: tuple[str, str]) -> dict[str, str]:
        return (await harness.stream(STREAM, headers=headers)).response.headers

    first, second = await head(), await head(("X-Request-ID", "mine"))
    assert first["x-request-id"] != second["x-request-id"] == "mine"
    assert second["x-correlation-id"] == "mine"
    assert "access-control-allow-origin" not in second
    own = await head(("Origin", "https://a.example"))
    assert own["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in await head(("Origin", "https://b.example"))
    ids = ("x-request-id", "x-correlation-id")
    assert {k: v for k, v in first.items() if k not in ids} == {
        k: v for k, v in second.items() if k not in ids
    }
    await trio.sleep(1)
    assert (await head())["date"] != first["date"]


async def test_heads_are_bounded(nursery):
    """An ``Origin`` is whatever a client says."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("a", progress=1)
    for number in range(200):
        await harness.stream(STREAM, headers=[("Origin", f"https://{number}.example")])
    assert len(harness.app.connections._streams._heads) <= 64
