"""Event streams and WebSockets, with the time at which each of their events comes."""

from __future__ import annotations

import time
from contextlib import suppress
from statistics import median

import msgspec
import trio
from wsproto.connection import Connection as WebSocketConnection
from wsproto.connection import ConnectionType
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

from ...sse import Decoder
from .records import Arrival, Headers, Seen, Socket, Stream, Target
from .wire import BROKEN, MAX_SIZE, SLACK, Connection, decompressor

__all__ = ["DIAGNOSTICS", "INTERVAL", "open_socket", "open_stream", "open_timed_stream"]

DIAGNOSTICS = "/api/diagnostics"
INTERVAL = 0.25  # seconds between events


class _Probe(msgspec.Struct):
    time: float


class _Message(msgspec.Struct):
    event: str
    data: msgspec.Raw


async def open_stream(
    target: Target,
    headers: Headers,
    *,
    events: int = 0,
    interval: float = INTERVAL,
    size: int = 0,
    quiet: float = 0.0,
) -> Stream:
    """Read an event stream to its end.

    Args:
        target: the server.
        headers: of the request.
        events: how many it has, besides the first and the last one.
        interval: seconds between them.
        size: of each, in bytes.
        quiet: seconds of silence before the last one.
    """
    stream = Stream()
    query = f"events={events}&interval={interval:g}&size={size}&quiet={quiet:g}"
    try:
        connection = await Connection.open(target)
        try:
            with trio.move_on_after(events * interval + quiet + SLACK):
                accept = ("Accept", "text/event-stream")
                await connection.send_request("GET", f"{DIAGNOSTICS}/stream?{query}", [accept, *headers])
                stream.response = await connection.response()
                await _read_events(connection, stream)
            stream.end = connection.end
        finally:
            await connection.aclose()
    except BROKEN:
        stream.end = "cut"
    return stream


async def open_timed_stream(target: Target, headers: Headers, *, events: int, round_trip: float) -> Stream:
    """Read an event stream to its end, and measure how long ordinary responses take meanwhile.

    ``round_trip``: how long they took before, when nothing else went on, in seconds.
    """
    round_trips: list[float] = []

    async def repeat_requests() -> None:
        with suppress(*BROKEN):
            connection = await Connection.open(target)
            try:
                while True:
                    began = time.time()
                    await connection.send_request("GET", DIAGNOSTICS, headers)
                    await connection.response()
                    await connection.read()
                    round_trips.append(time.time() - began)
                    await trio.sleep(INTERVAL)
                    connection.next_request()
            finally:
                await connection.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(repeat_requests)
        stream = await open_stream(target, headers, events=events)
        nursery.cancel_scope.cancel()
    stream.latency = max(median(round_trips or [round_trip]) - round_trip / 2, 0.0)
    return stream


async def _read_events(connection: Connection, stream: Stream) -> None:
    assert stream.response is not None
    decoder, last, size = Decoder(), time.time(), 0
    decompress = decompressor(stream.response.field("content-encoding"))
    try:
        while size < MAX_SIZE and (data := await connection.receive()):
            last = time.time()
            if decompress is not None:
                data = decompress.decompress(data, MAX_SIZE)
            size += len(data)
            for event in decoder.feed(data):
                _note(stream, event.event, event.data.encode(), last)
    finally:
        stream.silence = time.time() - last


def _note(stream: Stream | Socket, event: str, data: bytes, at: float) -> None:
    """Take note of a message; what no server sends is ignored."""
    with suppress(msgspec.DecodeError):
        if event in ("request", "probe"):
            stream.arrivals.append(Arrival(msgspec.json.decode(data, type=_Probe).time, at))
        if event == "request":
            stream.seen = msgspec.json.decode(data, type=Seen)
        stream.finished |= event == "end"


async def open_socket(target: Target, headers: Headers, quiet: float) -> Socket:
    """Open a WebSocket, ping, and read it to its end."""
    result = Socket()
    handshake: Headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "c3Nlc2VydmUgZG9jdG9yIQ=="),
    ]
    try:
        connection = await Connection.open(target)
        try:
            with trio.move_on_after(quiet + SLACK):
                path = f"{DIAGNOSTICS}/ws?events=2&interval={INTERVAL}&quiet={quiet:g}"
                await connection.send_request("GET", path, [*headers, *handshake])
                result.status = (await connection.response()).status
                if result.status == 101:
                    await _read_frames(connection, result)
        finally:
            await connection.aclose()
    except BROKEN:
        result.end = "cut"
    return result


async def _read_frames(connection: Connection, result: Socket) -> None:
    frames = WebSocketConnection(ConnectionType.CLIENT)
    await connection.stream.send_all(frames.send(Ping(b"doctor")))
    data, last, text, size = connection.trailing, time.time(), "", 0
    while size < MAX_SIZE:
        if data:
            last, size = time.time(), size + len(data)
            frames.receive_data(data)
        for event in frames.events():
            match event:
                case Pong():
                    result.ponged = True
                case TextMessage():
                    text += event.data
                    if event.message_finished:
                        with suppress(msgspec.DecodeError):
                            message = msgspec.json.decode(text, type=_Message)
                            _note(result, message.event, bytes(message.data), last)
                        text = ""
                case CloseConnection():
                    result.end = "complete"
                    await connection.stream.send_all(frames.send(event.response()))
                    return
        try:
            data = bytes(await connection.stream.receive_some(65536))
        except (OSError, trio.BrokenResourceError):
            data = b""
        if not data:
            result.silence, result.end = time.time() - last, "cut"
            return
