"""What is measured between a client and the server, all at the same time."""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import h11
import msgspec
import trio
from wsproto.connection import Connection as WebSocketConnection
from wsproto.connection import ConnectionType
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

from ...sse import Decoder
from ..errors import CannotConnect
from .judge import CURSOR, LATE
from .records import Arrival, Body, Cors, Headers, Measured, Poll, Response, Seen, Socket, Stream, Target, Tls
from .wire import Connection, decompressor

__all__ = ["measure", "parse_seen", "request"]

EVENTS, INTERVAL = 6, 0.25  # of a stream, in seconds
BLOCK_EVENTS, BLOCK_INTERVAL, BLOCK_SIZE = 50, 0.03, 1024  # of one that shows how much a proxy collects
LINES, LINE_INTERVAL = 3, 0.3  # of a body
CONTINUE = 1.0  # seconds to wait for a 100; curl waits as long
SLACK = 5.0  # seconds that an answer may take
LEAVE = 3.0  # seconds in which the server should learn that a client has left
COOKIE = "sseserve-doctor=1"
BROWSER = "gzip, deflate, br"  # what a browser accepts
STREAM = "/api/diagnostics/stream"
DIAGNOSTICS = "/api/diagnostics"

_BROKEN = (OSError, trio.BrokenResourceError, h11.ProtocolError, CannotConnect)


async def request(
    target: Target, path: str, headers: Headers, *, method: str = "GET", timeout: float = 10.0
) -> tuple[Response, bytes]:
    """Send a request on a new connection, and read its whole response.

    Raises:
        CannotConnect: there was none.
        ssl.SSLCertVerificationError: the certificate is not valid.
    """
    connection = await Connection.open(target)
    try:
        with trio.fail_after(timeout):
            await connection.send_request(method, path, headers)
            return await connection.response(), await connection.read()
    except trio.TooSlowError:
        raise CannotConnect(f"{target.host} has not answered within {timeout:g} s") from None
    except (OSError, trio.BrokenResourceError, h11.ProtocolError) as error:
        raise CannotConnect(f"{target.host} does not answer in HTTP: {error or 'it has closed'}") from error
    finally:
        await connection.aclose()


async def measure(
    target: Target,
    first: Response,
    seen: Seen,
    headers: Headers,
    *,
    origin: str | None,
    idle: float,
) -> Measured:
    """Measure everything.

    Args:
        target: the server.
        first: the response to a first request to ``/api/diagnostics``.
        seen: its content.
        headers: of every request: the token.
        origin: of a page whose requests are tried, too.
        idle: seconds of silence that are tried.
    """
    offset, round_trip = await _compare_clocks(target, headers)
    measured = Measured(
        target=target,
        now=time.time(),
        origin=origin,
        has_token=bool(headers),
        idle=idle,
        first=first,
        seen=seen,
        offset=offset,
        round_trip=round_trip,
    )

    async def store(name: str, work: Callable[[], Awaitable[Any]]) -> None:
        setattr(measured, name, await work())

    accept: Headers = [("Accept", "text/event-stream")]
    browser: Headers = [*headers, *accept, ("Accept-Encoding", BROWSER)]
    events = f"{STREAM}?events={EVENTS}&interval={INTERVAL}"
    works: dict[str, Callable[[], Awaitable[Any]]] = {
        "error_page": partial(_provoke, target),
        "asked": partial(_stream, target, events, [*browser, ("Last-Event-ID", CURSOR), ("Cookie", COOKIE)]),
        "plain": partial(_stream, target, events, [*headers, *accept]),
        "twin": partial(_stream, target, events, [*headers, *accept]),
        "quiet": partial(_stream, target, f"{STREAM}?quiet={idle:g}", [*headers, *accept], idle),
        "socket": partial(_socket, target, headers, idle),
        "poll": partial(_poll, target, headers, idle),
        "body": partial(_body, target, headers),
        "repeated": partial(_repeat, target, headers),
        "noticed": partial(_leave, target, headers),
    }
    if target.scheme == "https":
        works["tls"] = partial(_tls, target)
    if origin is not None:
        works["cors"] = partial(_cors, target, headers, origin)
    async with trio.open_nursery() as nursery:
        for name, work in works.items():
            nursery.start_soon(store, name, work)
    if measured.plain.arrivals and measured.plain.delay(offset) > LATE + round_trip:
        # A busy machine delays events now and then, a proxy always.
        again = await _stream(target, events, [*headers, *accept])
        measured.plain = min(measured.plain, again, key=lambda stream: stream.delay(offset))
    if measured.plain.is_collected:
        query = f"events={BLOCK_EVENTS}&interval={BLOCK_INTERVAL}&size={BLOCK_SIZE}"
        measured.blocks = await _stream(target, f"{STREAM}?{query}", [*headers, *accept])
    return measured


async def _compare_clocks(target: Target, headers: Headers) -> tuple[float, float]:
    """Return how far the server's clock is ahead, and the time of a round trip, both in seconds."""
    best = (0.0, float("inf"))
    connection = await Connection.open(target)
    try:
        for _ in range(3):
            began = time.time()
            with trio.fail_after(SLACK):
                await connection.send_request("GET", DIAGNOSTICS, headers)
                await connection.response()
                body = await connection.read()
            ended = time.time()
            if (seen := parse_seen(body)) is not None:
                best = min(best, (seen.time - (began + ended) / 2, ended - began), key=_second)
            connection.next_request()
    except (*_BROKEN, trio.TooSlowError):
        pass
    finally:
        await connection.aclose()
    return best if best[1] < float("inf") else (0.0, SLACK)


def _second(pair: tuple[float, float]) -> float:
    return pair[1]


async def _provoke(target: Target) -> str:
    """Return the response to what is no request: each proxy has its own."""
    try:
        connection = await Connection.open(target)
        try:
            with trio.move_on_after(SLACK):
                await connection.stream.send_all(b"sseserve doctor\r\n\r\n")
                data = b""
                while len(data) < 4096 and (part := await connection.stream.receive_some(4096)):
                    data += part
                return data.decode("latin-1")
        finally:
            await connection.aclose()
    except _BROKEN:
        pass
    return ""


async def _stream(target: Target, path: str, headers: Headers, quiet: float = 0.0) -> Stream:
    """Read an event stream to its end."""
    stream = Stream()
    try:
        connection = await Connection.open(target)
        try:
            with trio.move_on_after(quiet + EVENTS * INTERVAL + BLOCK_EVENTS * BLOCK_INTERVAL + SLACK):
                await connection.send_request("GET", path, headers)
                stream.response = await connection.response()
                await _read_events(connection, stream)
            stream.end = connection.end
        finally:
            await connection.aclose()
    except _BROKEN:
        stream.end = "cut"
    return stream


async def _read_events(connection: Connection, stream: Stream) -> None:
    assert stream.response is not None
    decoder, last = Decoder(), time.time()
    decompress = decompressor(stream.response.field("content-encoding"))
    async for at, part in connection.body():
        data = part if decompress is None else decompress.decompress(part)
        for event in decoder.feed(data):
            with suppress(ValueError, KeyError, TypeError):
                _note(stream, event.event, json.loads(event.data), at)
        last = at
    stream.silence = time.time() - last


def _note(stream: Stream | Socket, event: str, data: Any, at: float) -> None:
    if event == "request":
        stream.seen = msgspec.convert(data, Seen)
        stream.arrivals.append(Arrival(data["time"], at))
    elif event == "probe":
        stream.arrivals.append(Arrival(data["time"], at))
    elif event == "end":
        stream.finished = True


async def _socket(target: Target, headers: Headers, quiet: float) -> Socket:
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
    except _BROKEN:
        result.end = "cut"
    return result


async def _read_frames(connection: Connection, result: Socket) -> None:
    frames = WebSocketConnection(ConnectionType.CLIENT)
    await connection.stream.send_all(frames.send(Ping(b"doctor")))
    data, last, text = connection.trailing, time.time(), ""
    while True:
        if data:
            last = time.time()
            frames.receive_data(data)
        for event in frames.events():
            match event:
                case Pong():
                    result.ponged = True
                case TextMessage():
                    text += event.data
                    if event.message_finished:
                        with suppress(ValueError, KeyError, TypeError):
                            message = json.loads(text)
                            _note(result, message["event"], message["data"], last)
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


async def _poll(target: Target, headers: Headers, wait: float) -> Poll:
    """Send a request that is responded to late."""
    began, wait = time.time(), min(wait, 60.0)
    try:
        response, _ = await request(target, f"{DIAGNOSTICS}?wait={wait:g}", headers, timeout=wait + SLACK)
        return Poll(response.status, time.time() - began)
    except CannotConnect:
        return Poll(None, time.time() - began)


async def _body(target: Target, headers: Headers) -> Body:
    """Send a body in parts, and one that waits for a 100."""
    result = Body()
    fields: Headers = [*headers, ("Content-Type", "application/x-ndjson")]
    try:
        connection = await Connection.open(target)
        try:
            with trio.move_on_after(LINES * LINE_INTERVAL + SLACK):
                chunked: Headers = [*fields, ("Transfer-Encoding", "chunked")]
                await connection.send_request("POST", DIAGNOSTICS, chunked, body=True)
                for _ in range(LINES):
                    await trio.sleep(LINE_INTERVAL)
                    await connection.send_body(b"{}\n")
                await connection.send_body(b"", end=True)
                result.status = (await connection.response()).status
                with suppress(ValueError, KeyError, TypeError):
                    result.parts = [tuple(p) for p in json.loads(await connection.read())["parts"]]
        finally:
            await connection.aclose()
        connection = await Connection.open(target)
        try:
            with trio.move_on_after(CONTINUE):
                expecting: Headers = [*fields, ("Expect", "100-continue"), ("Content-Length", "3")]
                await connection.send_request("POST", DIAGNOSTICS, expecting, body=True)
                result.continued = await connection.wait_interim() == 100
            if result.continued is None:
                result.continued = False
        finally:
            await connection.aclose()
    except _BROKEN:
        pass
    return result


async def _cors(target: Target, headers: Headers, origin: str) -> Cors:
    """Ask as a page of that origin does."""
    result = Cors()
    asking: Headers = [
        ("Origin", origin),
        ("Access-Control-Request-Method", "GET"),
        ("Access-Control-Request-Headers", "authorization,last-event-id"),
    ]
    with suppress(CannotConnect):
        result.preflight, _ = await request(target, DIAGNOSTICS, asking, method="OPTIONS")
        result.response, _ = await request(target, DIAGNOSTICS, [*headers, ("Origin", origin)])
    return result


async def _repeat(target: Target, headers: Headers) -> list[tuple[Response, Seen | None]]:
    """Send the same request twice."""
    results = []
    with suppress(CannotConnect):
        for _ in range(2):
            response, body = await request(target, DIAGNOSTICS, headers)
            results.append((response, parse_seen(body)))
    return results


def parse_seen(body: bytes) -> Seen | None:
    """Read what the server has received; None: it does not say that."""
    try:
        return msgspec.json.decode(body, type=Seen)
    except msgspec.DecodeError:
        return None


async def _leave(target: Target, headers: Headers) -> bool | None:
    """Open a stream and leave; return whether the server learns of it, None if that cannot be said."""
    name = secrets.token_hex(8)
    path = f"{STREAM}?events={int(LEAVE * 5)}&interval={INTERVAL}&name={name}"

    async def is_open() -> tuple[str, bool] | None:
        _, body = await request(target, f"{DIAGNOSTICS}?name={name}", headers)
        return None if (seen := parse_seen(body)) is None else (seen.instance, seen.is_open)

    with suppress(*_BROKEN):
        connection = await Connection.open(target)
        try:
            with trio.fail_after(SLACK):
                await connection.send_request("GET", path, headers)
                await connection.response()
                before = await is_open()
        except trio.TooSlowError:
            return None
        finally:
            await connection.aclose()
        if before is None or not before[1]:
            return None  # another process has answered, or a proxy collects the stream
        deadline = trio.current_time() + LEAVE - 1
        while (now := await is_open()) == before:
            if trio.current_time() > deadline:
                return False
            await trio.sleep(INTERVAL)
        return None if now is None or now[0] != before[0] else True
    return None


async def _tls(target: Target) -> Tls | None:
    """Return what a browser would agree on."""
    with suppress(*_BROKEN):
        connection = await Connection.open(target)
        try:
            assert isinstance(connection.stream, trio.SSLStream)
            certificate = connection.stream.getpeercert()
            expires_at = ssl.cert_time_to_seconds(certificate["notAfter"]) if certificate else None
            version = str(connection.stream.version())
        finally:
            await connection.aclose()
        connection = await Connection.open(target, offer_http2=True)
        try:
            assert isinstance(connection.stream, trio.SSLStream)
            return Tls(version, expires_at, connection.stream.selected_alpn_protocol())
        finally:
            await connection.aclose()
    return None
