"""A stream with two ways to write: no partial or reordered writes, over real socket pairs."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from live_harness import DelayingStream, StallingStream, TornStream, run, socket_streams
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve.live.transport import Transport

LARGE = b"x" * 1_000_000


async def read_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    """Read exactly ``size`` bytes."""
    data = b""
    while len(data) < size:
        chunk = await stream.receive_some(size - len(data))
        assert chunk, f"ended after {len(data)} of {size} bytes"
        data += chunk
    return data


async def test_try_send_writes_at_once():
    """The bytes are sent completely and in order, without a task switch."""
    server, client = socket_streams()
    transport = Transport(server)
    async with transport, client:
        assert transport.try_send(b"one")
        assert transport.try_send(b"two")
        assert not transport.pending
        assert await read_exactly(client, 6) == b"onetwo"


async def test_unsent_rest_of_a_short_write_goes_first():
    """Until the rest is sent try_send refuses; send_all sends the rest before its own bytes."""
    server, client = socket_streams()
    transport = Transport(server)
    async with transport, client, trio.open_nursery() as nursery:
        assert transport.try_send(LARGE)
        assert transport.pending
        assert not transport.try_send(b"no")
        nursery.start_soon(transport.send_all, b"then this")
        await wait_all_tasks_blocked()
        assert await read_exactly(client, len(LARGE)) == LARGE
        assert await read_exactly(client, 9) == b"then this"
        await wait_all_tasks_blocked()
        assert not transport.pending
        assert transport.try_send(b"yes")


async def test_flush_sends_the_unsent_rest():
    """Without an unsent rest it sends nothing."""
    server, client = socket_streams()
    transport = Transport(server)
    async with transport, client, trio.open_nursery() as nursery:
        transport.try_send(LARGE)
        nursery.start_soon(transport.flush)
        assert await read_exactly(client, len(LARGE)) == LARGE
        await wait_all_tasks_blocked()
        assert not transport.pending
        await transport.flush()
        with trio.move_on_after(0.001) as scope:
            await client.receive_some()
        assert scope.cancelled_caught


async def test_full_socket_accepts_nothing():
    """try_send returns False, without a partial write or an error."""
    server, client = socket_streams()
    transport = Transport(server)
    async with transport, client:
        with suppress(BlockingIOError):
            while os.write(server.socket.fileno(), LARGE):
                pass
        assert not transport.try_send(b"x")
        assert not transport.pending


async def test_try_send_does_not_overtake_send_all():
    """While send_all waits for its lock, try_send is refused."""
    server, client = socket_streams()
    transport = Transport(server)
    async with transport, client, trio.open_nursery() as nursery:
        refused = []

        async def try_second() -> None:
            refused.append(transport.try_send(b"second"))

        nursery.start_soon(try_second)
        await transport.send_all(b"first")
        await wait_all_tasks_blocked()
        assert refused == [False]
        assert await read_exactly(client, 5) == b"first"


async def test_try_send_needs_a_socket():
    """On other streams, such as TLS, it is refused; send_all works."""
    server, client = memory_stream_pair()
    transport = Transport(server)
    assert not transport.try_send(b"x")
    await transport.send_all(b"y")
    assert await client.receive_some() == b"y"


async def test_try_send_to_a_closed_peer():
    """A socket closed by its peer is broken, not full."""
    server, client = socket_streams()
    async with Transport(server) as transport:
        await client.aclose()
        with pytest.raises(trio.BrokenResourceError):
            transport.try_send(b"x")


async def test_closed_transport_does_not_write():
    """Its file descriptor may already belong to another connection and must not be used."""
    server, client = socket_streams()
    descriptor = server.socket.fileno()
    transport = Transport(server)
    await transport.aclose()
    others = []
    # The kernel assigns the lowest free file descriptor.
    while not any(stream.socket.fileno() == descriptor for stream in others):
        others += socket_streams()
    with pytest.raises(trio.ClosedResourceError):
        transport.try_send(b"not yours")
    for stream in (*others, client):
        await trio.aclose_forcefully(stream)


async def test_nothing_is_sent_after_a_cancelled_send(autojump_clock):
    """Part of a frame may have been sent, so nothing may follow it."""
    server, client = socket_streams()
    transport = Transport(server)
    async with transport, client:
        with trio.move_on_after(1):
            await transport.send_all(LARGE)
        with trio.move_on_after(1):
            while await client.receive_some():
                pass
        assert not transport.try_send(b"x")


async def test_concurrent_writes_are_not_mixed(autojump_clock):
    """Frames on a slow stream are sent one after another."""
    server, client = memory_stream_pair()
    transport = Transport(DelayingStream(server, 1))
    async with trio.open_nursery() as nursery:
        for letter in (b"a", b"b", b"c"):
            nursery.start_soon(transport.send_all, letter * 10)
    data = await read_exactly(client, 30)
    assert sorted(data[at : at + 10] for at in (0, 10, 20)) == [b"a" * 10, b"b" * 10, b"c" * 10]
    assert trio.current_time() == 3


async def test_stream_that_breaks_during_a_write():
    """The error is raised to the writer, and later writes are refused."""
    server, client = memory_stream_pair()
    transport = Transport(TornStream(server, 5))
    with pytest.raises(trio.BrokenResourceError):
        await transport.send_all(b"much too long")
    assert await client.receive_some() == b"much "
    assert not transport.try_send(b"x")


steps = st.lists(
    st.one_of(
        st.tuples(st.just("try"), st.integers(0, 6000)),
        st.tuples(st.just("send"), st.integers(0, 6000)),
        st.tuples(st.just("read"), st.integers(1, 9000)),
        st.tuples(st.just("settle"), st.just(0)),
    ),
    max_size=30,
)


async def write_and_read(steps: list[tuple[str, int]]) -> None:
    server, client = socket_streams()
    transport = Transport(server)
    sent, received = b"", b""

    async def send(frame: bytes, started: trio.Event) -> None:
        started.set()
        await transport.send_all(frame)

    async with server, client, trio.open_nursery() as nursery:
        for number, (name, size) in enumerate(steps):
            frame = b"%d:" % number + b"." * size
            if name == "try":
                sent += frame if transport.try_send(frame) else b""
            elif name == "send":
                started = trio.Event()
                nursery.start_soon(send, frame, started)
                await started.wait()
                sent += frame
            elif name == "read":
                with trio.move_on_after(0.001):
                    received += await client.receive_some(size)
            else:
                await wait_all_tasks_blocked()
        nursery.start_soon(transport.flush)
        received += await read_exactly(client, len(sent) - len(received))
    assert received == sent


@settings(max_examples=100)
@given(steps)
def test_accepted_bytes_arrive_in_order(steps):
    """With any mix of both ways to write, and a reader at any pace."""
    run(write_and_read, steps)


# Reading


async def test_pushed_back_bytes_come_first():
    """The last bytes pushed back are read first, at most the requested size at a time, then the stream's."""
    server, client = memory_stream_pair()
    transport = Transport(server)
    await client.send_all(b"stream")
    transport.push_back(b"world ")
    transport.push_back(b"hello ")
    assert await transport.receive_some(3) == b"hel"
    assert await transport.receive_some() == b"lo world "
    assert await transport.receive_some(3) == b"str"


# Closing


async def test_pushed_back_bytes_are_received_from_a_socket_that_has_none():
    """There is something to receive, although the peer sends nothing more."""
    server, client = socket_streams()
    transport = Transport(server)
    async with transport, client:
        assert not transport.is_readable()
        transport.push_back(b"hello")
        assert transport.is_readable()
        assert [await transport.receive_later(3) for _ in range(2)] == [b"hel", b"lo"]
        assert not transport.is_readable()


async def test_lingering_close_waits_for_the_peer(autojump_clock):
    """Unread bytes are read and discarded, so that no TCP reset discards the bytes sent last."""
    server, client = socket_streams(4096)
    transport = Transport(server)
    await client.send_all(b"never read")
    await transport.send_all(b"last words")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.aclose_lingering, 5)
        assert await read_exactly(client, 10) == b"last words"
        assert await client.receive_some() == b""
        await client.aclose()
    assert trio.current_time() < 5


async def test_lingering_close_timeout(autojump_clock):
    """A peer that does not close its side is disconnected after the timeout."""
    server, client = socket_streams(4096)
    started = trio.current_time()
    await client.send_all(b"close frame")
    await Transport(server).aclose_lingering(5)
    assert trio.current_time() - started == 5
    assert server.socket.fileno() == -1
    await client.aclose()


async def test_lingering_close_of_a_broken_stream(autojump_clock):
    """The stream is closed even if nothing can be sent."""
    server, client = memory_stream_pair()
    stream = StallingStream(server)
    stream.stall()
    await trio.aclose_forcefully(client)
    await Transport(stream).aclose_lingering(5)
    with pytest.raises(trio.ClosedResourceError):
        await server.receive_some()


# Waiting for the end


@pytest.fixture(params=["socket", "plain socket", "other stream"])
def pair(request) -> tuple[Transport, trio.abc.Stream]:
    if request.param == "other stream":
        server, client = memory_stream_pair()
        return Transport(server), client
    if request.param == "socket":
        server, client = socket_streams()
        return Transport(server), client
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Transport(ours), trio.SocketStream(trio.socket.from_stdlib_socket(theirs))


async def test_waiting_until_the_peer_closes(pair):
    """What it sends before is dropped."""
    transport, client = pair
    async with transport, trio.open_nursery() as nursery:
        ends = []

        async def wait() -> None:
            ends.append(await transport.wait_disconnected())

        nursery.start_soon(wait)
        await client.send_all(b"more")
        await wait_all_tasks_blocked()
        assert ends == []
        await client.aclose()
    assert ends == [True]


@pytest.mark.parametrize("when", ["before", "while", "with data"])
async def test_waiting_can_be_stopped(pair, when):
    """Also before it begins, and when the peer sends something in the same moment. The socket stays open."""
    transport, client = pair
    async with transport, client:
        ends = []

        async def wait() -> None:
            ends.append(await transport.wait_disconnected())

        async with trio.open_nursery() as nursery:
            if when == "before":
                transport.stop_waiting()
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            if when == "with data":
                await client.send_all(b"more")
            if when != "before":
                transport.stop_waiting()
        assert ends == [False]
        await transport.send_all(b"after it")
        assert await client.receive_some() == b"after it"


async def test_waiting_ends_with_the_transport(pair):
    """Another task has closed it."""
    transport, client = pair
    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(transport.aclose)
        with pytest.raises(trio.ClosedResourceError):
            await transport.wait_disconnected()


async def test_a_plain_socket_that_is_closed(pair):
    """Nothing is made of it any more: its file descriptor may be another connection's."""
    transport, client = pair
    await transport.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await transport.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await transport.receive_some()
    await client.aclose()
