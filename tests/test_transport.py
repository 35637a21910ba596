"""One stream with two ways to write: nothing torn, nothing overtaken, over real socket pairs."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from live_harness import DelayingStream, StallingStream, TornStream, run, socket_streams
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from sseserve.live.transport import Transport

MUCH = b"x" * 1_000_000


async def received(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    """Read exactly ``size`` bytes."""
    data = b""
    while len(data) < size:
        chunk = await stream.receive_some(size - len(data))
        assert chunk, f"ended behind {len(data)} of {size} bytes"
        data += chunk
    return data


async def test_try_send_writes_at_once():
    """Without a task switch, whole, in order."""
    ours, theirs = socket_streams()
    transport = Transport(ours)
    async with transport, theirs:
        assert transport.try_send(b"one")
        assert transport.try_send(b"two")
        assert not transport.pending
        assert await received(theirs, 6) == b"onetwo"


async def test_a_short_write_leaves_a_tail_that_goes_first():
    """Until it is flushed nothing else is taken; send_all sends it before its own."""
    ours, theirs = socket_streams()
    transport = Transport(ours)
    async with transport, theirs, trio.open_nursery() as nursery:
        assert transport.try_send(MUCH)
        assert transport.pending
        assert not transport.try_send(b"no")
        nursery.start_soon(transport.send_all, b"then this")
        await wait_all_tasks_blocked()
        assert await received(theirs, len(MUCH)) == MUCH
        assert await received(theirs, 9) == b"then this"
        await wait_all_tasks_blocked()
        assert not transport.pending
        assert transport.try_send(b"yes")


async def test_flush_sends_the_tail():
    """And nothing where there is none."""
    ours, theirs = socket_streams()
    transport = Transport(ours)
    async with transport, theirs, trio.open_nursery() as nursery:
        transport.try_send(MUCH)
        nursery.start_soon(transport.flush)
        assert await received(theirs, len(MUCH)) == MUCH
        await wait_all_tasks_blocked()
        assert not transport.pending
        await transport.flush()
        with trio.move_on_after(0.001) as scope:
            await theirs.receive_some()
        assert scope.cancelled_caught


async def test_a_full_kernel_takes_nothing():
    """Neither in part nor with an error."""
    ours, theirs = socket_streams()
    transport = Transport(ours)
    async with transport, theirs:
        with suppress(BlockingIOError):
            while os.write(ours.socket.fileno(), MUCH):
                pass
        assert not transport.try_send(b"x")
        assert not transport.pending


async def test_nothing_overtakes_a_write_that_waits_for_its_turn():
    """From the first step of send_all on: taking its lock lets others run before it has written."""
    ours, theirs = socket_streams()
    transport = Transport(ours)
    async with transport, theirs, trio.open_nursery() as nursery:
        refused = []

        async def meanwhile() -> None:
            refused.append(transport.try_send(b"second"))

        nursery.start_soon(meanwhile)
        await transport.send_all(b"first")
        await wait_all_tasks_blocked()
        assert refused == [False]
        assert await received(theirs, 5) == b"first"


async def test_without_a_socket_try_send_refuses():
    """Over TLS, say; send_all does it all."""
    ours, theirs = memory_stream_pair()
    transport = Transport(ours)
    assert not transport.try_send(b"x")
    await transport.send_all(b"y")
    assert await theirs.receive_some() == b"y"


async def test_the_peer_is_gone():
    """A socket whose other end is closed is broken, not full."""
    ours, theirs = socket_streams()
    async with Transport(ours) as transport:
        await theirs.aclose()
        with pytest.raises(trio.BrokenResourceError):
            transport.try_send(b"x")


async def test_a_closed_transport_writes_to_nobody():
    """The number of its socket may be another client's by now; it must not be used."""
    ours, theirs = socket_streams()
    number = ours.socket.fileno()
    transport = Transport(ours)
    await transport.aclose()
    others = []
    # The kernel gives out the lowest number that is free.
    while not any(stream.socket.fileno() == number for stream in others):
        others += socket_streams()
    with pytest.raises(trio.ClosedResourceError):
        transport.try_send(b"not yours")
    for stream in (*others, theirs):
        await trio.aclose_forcefully(stream)


async def test_a_cancelled_send_takes_nothing_more(autojump_clock):
    """Half a frame is out, so nothing may follow it."""
    ours, theirs = socket_streams()
    transport = Transport(ours)
    async with transport, theirs:
        with trio.move_on_after(1):
            await transport.send_all(MUCH)
        with trio.move_on_after(1):
            while await theirs.receive_some():
                pass
        assert not transport.try_send(b"x")


async def test_writers_take_turns(autojump_clock):
    """Two frames on one slow stream are never mixed."""
    ours, theirs = memory_stream_pair()
    transport = Transport(DelayingStream(ours, 1))
    async with trio.open_nursery() as nursery:
        for letter in (b"a", b"b", b"c"):
            nursery.start_soon(transport.send_all, letter * 10)
    data = await received(theirs, 30)
    assert sorted(data[at : at + 10] for at in (0, 10, 20)) == [b"a" * 10, b"b" * 10, b"c" * 10]
    assert trio.current_time() == 3


async def test_a_torn_stream_is_broken():
    """What breaks in the middle of a write is told to whoever writes, and tried no more."""
    ours, theirs = memory_stream_pair()
    transport = Transport(TornStream(ours, 5))
    with pytest.raises(trio.BrokenResourceError):
        await transport.send_all(b"much too long")
    assert await theirs.receive_some() == b"much "
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
    ours, theirs = socket_streams()
    transport = Transport(ours)
    sent, got = b"", b""

    async def send(frame: bytes, begun: trio.Event) -> None:
        begun.set()
        await transport.send_all(frame)

    async with ours, theirs, trio.open_nursery() as nursery:
        for number, (name, size) in enumerate(steps):
            frame = b"%d:" % number + b"." * size
            if name == "try":
                sent += frame if transport.try_send(frame) else b""
            elif name == "send":
                begun = trio.Event()
                nursery.start_soon(send, frame, begun)
                await begun.wait()
                sent += frame
            elif name == "read":
                with trio.move_on_after(0.001):
                    got += await theirs.receive_some(size)
            else:
                await wait_all_tasks_blocked()
        nursery.start_soon(transport.flush)
        got += await received(theirs, len(sent) - len(got))
    assert got == sent


@settings(max_examples=100, deadline=None)
@given(steps)
def test_all_that_is_taken_arrives_whole_and_in_order(steps):
    """Whatever is written by which way, while the reader takes what it likes."""
    run(write_and_read, steps)


# Reading


async def test_pushed_back_bytes_come_first():
    """The last ones pushed before the others, in pieces as large as asked for, then the stream's own."""
    ours, theirs = memory_stream_pair()
    transport = Transport(ours)
    await theirs.send_all(b"stream")
    transport.push_back(b"world ")
    transport.push_back(b"hello ")
    assert await transport.receive_some(3) == b"hel"
    assert await transport.receive_some() == b"lo world "
    assert await transport.receive_some(3) == b"str"


# Closing


async def test_a_lingering_close_waits_for_the_peer(autojump_clock):
    """Unread bytes are read away, so that no reset overtakes our last words."""
    ours, theirs = socket_streams(4096)
    transport = Transport(ours)
    await theirs.send_all(b"never read")
    await transport.send_all(b"last words")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.aclose_lingering, 5)
        assert await received(theirs, 10) == b"last words"
        assert await theirs.receive_some() == b""
        await theirs.aclose()
    assert trio.current_time() < 5


async def test_a_lingering_close_has_its_time(autojump_clock):
    """A peer that goes on talking and does not leave is left when the time is over."""
    ours, theirs = socket_streams(4096)
    started = trio.current_time()
    await theirs.send_all(b"close frame")
    await Transport(ours).aclose_lingering(5)
    assert trio.current_time() - started == 5
    assert ours.socket.fileno() == -1
    await theirs.aclose()


async def test_a_lingering_close_of_a_broken_stream(autojump_clock):
    """Closes it, whatever it cannot do."""
    ours, theirs = memory_stream_pair()
    stream = StallingStream(ours)
    stream.stall()
    await trio.aclose_forcefully(theirs)
    await Transport(stream).aclose_lingering(5)
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()
