"""A publisher gets its response before its few watchers get the event, and nothing delays them."""

from __future__ import annotations

import os
import socket

import pytest
import trio
from harness import ServerHarness
from live_harness import StreamWrapper
from raw_client import RawConnection, request_bytes
from trio.testing import memory_stream_pair

EVENT = request_bytes("POST", "/api/sessions/a/events", b'{"type":"x","data":1}')


class SocketHarness(ServerHarness):
    """A server whose connections are pairs of sockets. ``connect_raw`` returns the client's."""

    def connect_raw(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._nursery.start_soon(
            self.app.connections.serve, trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        )
        return theirs

    def connect(self) -> RawConnection:
        return RawConnection(trio.SocketStream(trio.socket.from_stdlib_socket(self.connect_raw())))


@pytest.fixture
async def server(autojump_clock, nursery):
    server = SocketHarness(nursery)
    await server.tracker.create("a")
    return server


async def watch(server: SocketHarness) -> RawConnection:
    watcher = server.connect()
    await watcher.watch("a")
    assert (await watcher.event()).event == "progress"
    return watcher


async def test_the_response_is_written_first(server, monkeypatch):
    watcher, publisher = await watch(server), server.connect()
    written = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(bytes(data)) or write(fd, data))
    await publisher.send(EVENT)
    assert (await publisher.read_response()).status == 202
    assert (await watcher.event()).event == "x"
    written = [data for data in written if b"HTTP/1.1 202" in data or b"event: x" in data]
    assert [data[:8] == b"HTTP/1.1" for data in written] == [True, False]
    for connection in (watcher, publisher):
        await connection.stream.aclose()


class BlockedStream(StreamWrapper):
    """A stream whose client does not read."""

    async def send_all(self, data):
        await trio.sleep_forever()


async def test_a_publisher_that_does_not_read_holds_up_nobody(server, nursery):
    """Its watchers have the event whose response waits."""
    watcher = await watch(server)
    client, ours = memory_stream_pair()
    nursery.start_soon(server.app.connections.serve, BlockedStream(ours))
    await client.send_all(EVENT)
    with trio.fail_after(1):  # before the send timeout
        assert (await watcher.event()).event == "x"
    await watcher.stream.aclose()


async def test_a_publisher_that_has_left(server):
    """Its event is delivered although there is nobody to respond to."""
    watcher, publisher = await watch(server), server.connect_raw()
    publisher.send(EVENT)
    publisher.close()
    assert (await watcher.event()).event == "x"
    await watcher.stream.aclose()
