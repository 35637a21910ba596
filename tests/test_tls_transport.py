"""A TLS stream that can be written without waiting: as test_transport.py, and what is of TLS itself."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from live_harness import run
from test_transport import LARGE, read_exactly
from tls_streams import client_context, request_key_update, server_context, tls_pair
from trio.testing import wait_all_tasks_blocked

from sseserve.live import tls
from sseserve.live.tls import TlsBuffers, TlsTransport
from sseserve.live.transport import Transport

# Writing


async def test_try_send_writes_at_once():
    """The bytes are sent completely and in order, without a task switch."""
    async with tls_pair(4096) as (transport, client):
        assert transport.immediate
        assert transport.try_send(b"one")
        assert transport.try_send(b"")
        assert transport.try_send(b"two")
        assert not transport.pending
        assert await read_exactly(client, 6) == b"onetwo"


async def test_unsent_rest_of_a_short_write_goes_first():
    """Until it is sent try_send refuses; send_all sends it before its own bytes."""
    async with tls_pair() as (transport, client), trio.open_nursery() as nursery:
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


async def test_bytes_that_were_sent_are_counted():
    """Those of whoever sends, not those of TLS, each once."""
    async with tls_pair() as (transport, client), trio.open_nursery() as nursery:
        assert transport.try_send(b"one")
        assert transport.sent == 3
        assert transport.try_send(LARGE)
        nursery.start_soon(transport.send_all, b"two")
        await read_exactly(client, 3 + len(LARGE) + 3)
        await wait_all_tasks_blocked()
        assert transport.sent == 3 + len(LARGE) + 3


async def test_what_waits_is_not_encrypted():
    """But for a piece of it: the rest is what all clients share."""
    async with tls_pair() as (transport, _):
        assert transport.try_send(LARGE)
        assert transport._rest.obj is LARGE
        assert len(transport.tail) <= tls.PIECE + 1024


async def test_full_socket_leaves_all_of_a_write():
    """What has been encrypted must be sent: it counts in the records that follow."""
    async with tls_pair() as (transport, _client):
        with suppress(BlockingIOError):
            while os.write(transport.socket.fileno(), b"\x17\x03\x03\x00\x01x"):
                pass
        assert transport.try_send(b"x")
        assert transport.pending


async def test_try_send_does_not_overtake_send_all():
    async with tls_pair(4096) as (transport, client):
        refused = []

        async def try_second() -> None:
            refused.append(transport.try_send(b"second"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_second)
            await transport.send_all(b"first")
        assert refused == [False]
        assert await read_exactly(client, 5) == b"first"


async def test_try_send_to_a_closed_peer():
    async with tls_pair() as (transport, client):
        await trio.aclose_forcefully(client)
        with pytest.raises(trio.BrokenResourceError):
            transport.try_send(b"x")


async def test_closed_transport_does_not_write():
    async with tls_pair() as (transport, _client):
        await transport.aclose()
        with pytest.raises(trio.ClosedResourceError):
            transport.try_send(b"not yours")
        with pytest.raises(trio.ClosedResourceError):
            transport.try_receive(10)
        with pytest.raises(trio.ClosedResourceError):
            await transport.receive_some(10)


async def test_nothing_is_sent_after_a_cancelled_send(autojump_clock):
    """Part of a record may have been sent, so nothing may follow it: no close_notify either."""
    async with tls_pair() as (transport, client):
        with trio.move_on_after(1):
            await transport.send_all(LARGE)
        assert not transport.try_send(b"x")
        with trio.move_on_after(1):
            while await client.transport_stream.receive_some():
                pass
        transport.close_socket()
        assert await client.transport_stream.receive_some() == b""


steps = st.lists(
    st.one_of(
        st.tuples(st.just("try"), st.integers(0, 6000)),
        st.tuples(st.just("try"), st.integers(100_000, 200_000)),
        st.tuples(st.just("send"), st.integers(0, 100_000)),
        st.tuples(st.just("read"), st.integers(1, 9000)),
        st.tuples(st.just("update"), st.just(0)),
        st.tuples(st.just("settle"), st.just(0)),
    ),
    max_size=30,
)


async def write_and_read(steps: list[tuple[str, int]]) -> None:
    buffers = TlsBuffers.create()
    async with (
        tls_pair(buffers=buffers) as (transport, client),
        tls_pair(4096, buffers=buffers) as (other, other_client),
    ):
        sent, received = b"", b""

        async def send(frame: bytes, started: trio.Event) -> None:
            started.set()
            await transport.send_all(frame)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.wait_disconnected)  # reads the key updates
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
                elif name == "update":
                    request_key_update(client)
                    await client.send_all(b".")
                else:
                    await wait_all_tasks_blocked()
                    assert other.try_send(b"the buffers are shared")
                    assert await read_exactly(other_client, 22) == b"the buffers are shared"
                assert buffers.incoming.pending + buffers.outgoing.pending == 0
            nursery.start_soon(transport.flush)
            received += await read_exactly(client, len(sent) - len(received))
            nursery.cancel_scope.cancel()
        assert received == sent


@settings(max_examples=60)
@given(steps)
def test_accepted_bytes_arrive_in_order(steps):
    """With any mix of both ways to write, a reader at any pace, and key updates in between."""
    run(write_and_read, steps)


async def test_a_peer_that_asks_and_does_not_read(monkeypatch):
    """What waits for it is bounded: each key update that it sends is to be answered (RFC 8446, 4.6.3)."""
    async with tls_pair() as (transport, client):
        assert transport.try_send(LARGE)
        updates = 0

        async def ask() -> None:
            nonlocal updates
            while True:
                request_key_update(client)
                await client.send_all(b".")
                transport.try_receive(4096)
                updates += 1
                assert len(transport.tail) <= tls.PIECE + tls.MAX_ANSWERS

        with pytest.raises(trio.BrokenResourceError, match="does not read"):
            await ask()
        assert updates > 1000


# Reading


async def test_records_that_arrive_in_parts():
    """Nothing is received until one is complete; what the caller does not take is kept."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    transport = TlsTransport(Transport(ours), server_context(), TlsBuffers.create())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")

    def handshake() -> bool:
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.do_handshake, b"")
        while not handshake():
            for byte in outgoing.read():
                theirs.send(bytes([byte]))
                await wait_all_tasks_blocked()
            incoming.write(theirs.recv(65536))
        client.write(b"with the handshake")
        theirs.send(outgoing.read())
    assert transport.is_readable()
    assert transport.try_receive(4) == b"with"
    assert await transport.receive_later(1000) == b" the handshake"
    assert not transport.is_readable()
    client.write(b"x" * 1000)
    record = outgoing.read()
    for at in range(len(record)):
        assert transport.try_receive(10) is None
        theirs.send(record[at : at + 1])
    received = [transport.try_receive(600), transport.try_receive(600)]
    assert received == [b"x" * 600, b"x" * 400]
    assert transport.try_receive(600) is None
    client.write(b"y" * 100)
    client.write(b"z" * 100)
    theirs.send(outgoing.read())
    assert await transport.receive_some(150) == b"y" * 100
    assert await transport.receive_some() == b"z" * 100
    transport.close_socket()
    theirs.close()


async def end_properly(client: trio.SSLStream[trio.SocketStream]) -> None:
    await client.unwrap()


async def end_without_a_word(client: trio.SSLStream[trio.SocketStream]) -> None:
    await client.transport_stream.send_eof()


@pytest.mark.parametrize("end", [end_properly, end_without_a_word])
async def test_end_of_what_is_received(end: Callable):
    """With a close_notify, after which the socket may stay open, or without one."""
    async with tls_pair(4096) as (transport, client):
        await client.send_all(b"last words")
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end, client)
            assert await transport.receive_later(100) == b"last words"
            for _ in range(2):
                assert await transport.receive_later(100) == b""
                assert await transport.receive_some(100) == b""
                assert transport.try_receive(100) == b""
                assert transport.is_readable()
                assert await transport.wait_disconnected()
            transport.close_socket()


async def test_garbage_behind_the_handshake():
    """The connection is broken, and the peer is told so; the buffers are empty for the others."""
    buffers = TlsBuffers.create()
    async with tls_pair(4096, buffers=buffers) as (transport, client):
        await client.transport_stream.send_all(b"\x17\x03\x03\x00\x40" + bytes(300))
        with pytest.raises(trio.BrokenResourceError, match="TLS has failed"):
            transport.try_receive(4096)
        assert buffers.incoming.pending + buffers.outgoing.pending == 0
        with pytest.raises(trio.BrokenResourceError):
            transport.try_send(b"x")
        with pytest.raises(trio.BrokenResourceError) as error:
            await client.receive_some()
        assert "BAD_RECORD_MAC" in str(error.value.__cause__).upper().replace(" ", "_")


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x16\x03"])
async def test_no_handshake(data):
    """What is no handshake, or not a whole one, breaks the connection; the buffers are left empty."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    buffers = TlsBuffers.create()
    transport = TlsTransport(Transport(ours), server_context(), buffers)
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(trio.BrokenResourceError):
        await transport.do_handshake(b"")
    assert buffers.incoming.pending + buffers.outgoing.pending == 0
    transport.close_socket()
    theirs.close()


# Closing


async def test_lingering_close(autojump_clock):
    """Our side ends with a close_notify; what the peer still sends is read and dropped."""
    async with tls_pair(4096) as (transport, client):
        await client.send_all(b"never read")
        await transport.send_all(b"last words")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.aclose_lingering, 5)
            assert await read_exactly(client, 10) == b"last words"
            client_ssl_object = client._ssl_object
            assert await client.receive_some() == b""
            assert client_ssl_object.read(1) == b""  # not only the end of the socket
            await client.aclose()
        assert trio.current_time() < 5


async def test_lingering_close_sends_what_waits(autojump_clock):
    """Before the close_notify, which must be the last record."""
    async with tls_pair() as (transport, client):
        transport.try_send(LARGE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.aclose_lingering, 5)
            assert await read_exactly(client, len(LARGE)) == LARGE
            assert await client.receive_some() == b""
            await trio.aclose_forcefully(client)


async def test_lingering_close_timeout(autojump_clock):
    """A peer that neither reads nor closes is disconnected after the timeout."""
    async with tls_pair() as (transport, _client):
        transport.try_send(LARGE)
        await transport.aclose_lingering(5)
        assert trio.current_time() == 5
        assert transport.socket.fileno() == -1


async def test_closing_says_so():
    """A close_notify tells the peer that it was not cut, if it can be sent at once."""
    async with tls_pair(4096) as (transport, client):
        transport.close_socket()
        await client.transport_stream.send_all(b"")
        assert await client.receive_some() == b""
        assert client._ssl_object.read(1) == b""
