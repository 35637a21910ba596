"""HTTP/2 clients that send what costs work and carries nothing, and those that only look as if they did."""

from __future__ import annotations

import itertools
import logging
import struct
from collections.abc import Callable, Iterator

import h2.errors
import hpack
import hyperframe.frame
import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import RawConnection
from trio.testing import wait_all_tasks_blocked

from sseserve.server.http2 import Http2Connection
from sseserve.server.http2_frames import FRAMES, RATE

SENT = 5_000  # frames of a flood
BATCH = 50  # of them in one write: fewer than the requests that a client may have open
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Encode a frame (RFC 9113, section 4.1)."""
    return struct.pack("!I", len(payload))[1:] + bytes((kind, flags)) + struct.pack("!I", stream) + payload


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING = 0, 1, 2, 3, 4, 6
WINDOW_UPDATE, CONTINUATION = 8, 9
ACK = END_STREAM = 1
END_HEADERS = 4
CANCEL = struct.pack("!I", 8)


def head(method: str = "GET", path: str = "/health", *more: tuple[str, str]) -> bytes:
    """Encode a request's header fields without the dynamic table, so that they can be repeated."""
    fields = [(":method", method), (":scheme", "http"), (":authority", "localhost"), (":path", path), *more]
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder.encode(fields)


POST = frame(HEADERS, END_HEADERS, 1, head("POST", "/api/sessions/a/progress"))
STREAM = head("GET", "/api/sessions/a/status/stream")


def reset_at_once() -> Iterator[bytes]:
    for number in itertools.count(1, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, number, STREAM) + frame(RST_STREAM, 0, number, CANCEL)


def reset_by_the_server() -> Iterator[bytes]:
    """Requests without a method, which the server resets."""
    fields = hpack.Encoder().encode([(":path", "/"), (":scheme", "http")])
    for number in itertools.count(1, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, number, fields)


def after_a_reset(kind: int, payload: bytes = b"") -> Callable[[], Iterator[bytes]]:
    def frames() -> Iterator[bytes]:
        yield POST + frame(RST_STREAM, 0, 1, CANCEL)
        yield from itertools.repeat(frame(kind, 0, 1, payload))

    return frames


def repeated(data: bytes, first: bytes = b"") -> Callable[[], Iterator[bytes]]:
    return lambda: itertools.chain([first], itertools.repeat(data))


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "requests that are reset at once": reset_at_once,
    "requests that the server has to reset": reset_by_the_server,
    "settings": repeated(frame(SETTINGS)),
    "settings that change something": repeated(frame(SETTINGS, 0, 0, struct.pack("!HI", 1, 100) * 20)),
    "pings": repeated(frame(PING, 0, 0, bytes(8))),
    "priorities": repeated(frame(PRIORITY, 0, 1, bytes(5))),
    "empty data": repeated(frame(DATA, 0, 1), POST),
    "nothing but padding": repeated(frame(DATA, 8, 1, b"\xff" + bytes(255)), POST),
    "windows": repeated(frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", 1))),
    "windows of a stream": repeated(frame(WINDOW_UPDATE, 0, 1, struct.pack("!I", 1)), POST),
    "unknown frames": repeated(frame(99)),
    "data after a reset": after_a_reset(DATA),
    "resets after a reset": after_a_reset(RST_STREAM, CANCEL),
}


class Flood:
    """What a client has sent of a flood, and what it got: the error code of the GOAWAY, if there was one."""

    def __init__(self, connection: RawConnection) -> None:
        self.connection = connection
        self.code: int | None = None
        self.received = 0

    async def send(self, frames: Iterator[bytes]) -> None:
        """Send and read until the connection ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, nursery.cancel_scope)
            try:
                await self.connection.send(PREFACE + frame(SETTINGS))
                for _ in range(SENT // BATCH):
                    await self.connection.send(b"".join(itertools.islice(frames, BATCH)))
                    await wait_all_tasks_blocked()
            except trio.BrokenResourceError:
                pass
            await trio.sleep(2)
            nursery.cancel_scope.cancel()

    async def _read(self, scope: trio.CancelScope) -> None:
        buffer = b""
        while await self.connection.receive():
            buffer, self.connection.buffer = buffer + self.connection.buffer, b""
            self.received += len(buffer)
            while len(buffer) >= 9 and len(buffer) >= 9 + int.from_bytes(buffer[:3]):
                size = 9 + int.from_bytes(buffer[:3])
                received, _ = hyperframe.frame.Frame.parse_frame_header(memoryview(buffer[:9]))
                if isinstance(received, hyperframe.frame.GoAwayFrame):
                    self.code = int.from_bytes(buffer[13:17])
                buffer = buffer[size:]
        scope.cancel()


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_ends_its_connection(autojump_clock, nursery, caplog, name):
    """With ENHANCE_YOUR_CALM, and leaves nothing behind; another client's stream goes on."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("a", progress=1)
    stream = await harness.stream("/api/sessions/a/status/stream")
    flood = Flood(harness.connect())
    await flood.send(FLOODS[name]())
    assert flood.code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    assert flood.received < 64 * 1024
    await harness.tracker.update("a", status="done")
    assert "complete" in [message.event for message in await stream.read_to_end()]
    await trio.sleep(2)
    assert (len(harness.app.http2._connections), len(harness.broker.subscribers())) == (0, 0)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", "FRAME_SIZE_ERROR"),
        (b"\x00\x40\x01", "FRAME_SIZE_ERROR"),
        (frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, bytes(16_000)) * 5, "ENHANCE_YOUR_CALM"),
        (frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1) * 65, "PROTOCOL_ERROR"),
    ],
)
async def test_what_is_too_large_is_not_waited_for(autojump_clock, nursery, data, code):
    """A frame is refused by its length, and a header block before its end."""
    flood = Flood(ServerHarness(nursery).connect())
    await flood.send(iter([data]))
    assert flood.code == h2.errors.ErrorCodes[code]


async def test_requests_are_begun_a_few_at_a_time(autojump_clock, nursery, monkeypatch):
    """Other tasks run between them, however many came in one read."""
    harness = ServerHarness(nursery)
    opened, most = 0, 0
    open_request = Http2Connection._open

    async def count(connection, number, headers):
        nonlocal opened, most
        opened += 1
        await open_request(connection, number, headers)

    async def other():
        nonlocal opened, most
        while True:
            most, opened = max(most, opened), 0
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Http2Connection, "_open", count)
    connection = harness.connect()
    fields = head(path="/health?" + "x" * 100)
    requests = b"".join(
        frame(HEADERS, END_HEADERS | END_STREAM, number, fields) for number in range(1, 200, 2)
    )
    nursery.start_soon(other)
    await connection.send(PREFACE + frame(SETTINGS) + requests)
    for _ in range(200):
        await trio.lowlevel.checkpoint()
    nursery.cancel_scope.cancel()
    assert 0 < most < 60  # 2 KB, or twice that in one turn of all tasks


async def test_a_client_may_leave_any_number_of_streams(autojump_clock, nursery):
    """As the pages behind a proxy do, which all share its connection: what has a response is no flood."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("a", progress=1)
    client = HTTP2Client(harness.connect())
    for _ in range(3 * FRAMES):
        (number,) = await client.request("/api/sessions/a/status/stream")
        await client.read_until(lambda: number in client.statuses)  # noqa: B023 - awaited in this turn
        await client.cancel(number)
    (number,) = await client.request("/health")
    await client.read_until(lambda: number in client.ended)
    assert client.statuses[number] == 200


async def test_a_client_may_release_every_frame_by_itself(autojump_clock, nursery):
    """Its window and the connection's, for each event that it gets."""
    harness = ServerHarness(nursery)
    await harness.tracker.create("a")
    client = HTTP2Client(harness.connect())
    (number,) = await client.request("/api/interaction/events/a")
    for count in range(2 * FRAMES):
        await harness.tracker.emit("a", "note", count)
        size = len(client.bodies[number])
        await client.read_until(lambda: len(client.bodies[number]) > size)  # noqa: B023 - likewise
        one = struct.pack("!I", 1)
        await client.send_frames(frame(WINDOW_UPDATE, 0, 0, one) + frame(WINDOW_UPDATE, 0, number, one))
    assert number not in client.ended


async def test_a_client_may_send_pings_now_and_then(autojump_clock, nursery):
    """More than a flood in the end, but not faster than the limit."""
    harness = ServerHarness(nursery)
    client = HTTP2Client(harness.connect())
    await client.request("/health")
    for _ in range(4 * FRAMES):
        await client.send_frames(frame(PING, 0, 0, bytes(8)))
        await trio.sleep(1 / RATE)
    (number,) = await client.request("/health")
    await client.read_until(lambda: number in client.ended)
    assert client.statuses[number] == 200


async def test_a_window_that_is_given_byte_by_byte_is_given_up(autojump_clock, nursery):
    """A response of which a byte is read now and then stalls as one of which nothing is read."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("a", progress=1, data="x" * 100_000)
    connection = harness.connect()
    none = struct.pack("!HI", 4, 0)
    request = frame(HEADERS, END_HEADERS | END_STREAM, 1, head(path="/api/sessions/a/status"))
    await connection.send(PREFACE + frame(SETTINGS, payload=none) + request)
    with trio.move_on_after(300) as scope:
        async with trio.open_nursery() as reading:

            async def read() -> None:
                while frame(RST_STREAM, 0, 1, struct.pack("!I", 2)) not in connection.buffer:
                    assert await connection.receive()
                reading.cancel_scope.cancel()

            reading.start_soon(read)
            while True:
                await trio.sleep(5)
                await connection.send(frame(WINDOW_UPDATE, 0, 1, struct.pack("!I", 1)))
    assert not scope.cancelled_caught
    assert trio.current_time() < 100
