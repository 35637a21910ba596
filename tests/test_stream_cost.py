"""What an event stream costs while it is open, and that nothing of it is left when it ends."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio
from harness import ServerHarness
from raw_client import RawConnection, request_bytes
from trio.testing import wait_all_tasks_blocked

from sseserve.live.transport import Transport

STREAM = "/api/sessions/a/status/stream"


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


@pytest.mark.parametrize("target", [STREAM, "/api/streams?session=a"])
async def test_a_stalled_client_is_no_failure(autojump_clock, streams, caplog, target):
    """Its connection is closed after the send timeout, and nothing is logged as an error."""
    await streams.open(target=target)
    await streams.stall(300)
    await trio.sleep(60)
    assert tasks(streams.connections) == 0
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_stream_that_ends_while_its_client_sends_is_closed(streams):
    """Waiting for the client to leave ends although the socket is readable in the same moment."""
    client = await streams.open()
    await wait_all_tasks_blocked()
    await client.send(b"what nobody asked for")
    (subscriber,) = streams.harness.broker.subscribers()
    subscriber.ask_to_reconnect(500)
    await client.events()
    assert client.ended == "eof"
