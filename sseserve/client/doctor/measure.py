"""What is measured between a client and the server, all at the same time."""

from __future__ import annotations

import math
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import trio

from ..errors import CannotConnect
from .judge import CURSOR, LATE
from .records import Body, Cors, Headers, Measured, Poll, Response, Seen, Target, Tls
from .streams import DIAGNOSTICS, INTERVAL, open_socket, open_stream, open_timed_stream
from .wire import BROKEN, SLACK, Connection, parse_seen, request

__all__ = ["measure"]

EVENTS = 6  # of a stream
BLOCK_EVENTS, BLOCK_INTERVAL, BLOCK_SIZE = 50, 0.03, 1024  # of one that shows how much a proxy collects
LINES, LINE_INTERVAL = 3, 0.2  # of a body
CONTINUE = 1.0  # seconds to wait for a 100; curl waits as long
REPEATS = 2  # of what a busy machine may delay now and then, a proxy always
LEAVE = 3.0  # seconds in which the server should learn that a client has left
COOKIE = "sseserve-doctor=1"
BROWSER = "gzip, deflate, br"  # what a browser accepts


class _Parts(msgspec.Struct):
    parts: list[tuple[float, int]]


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

    browser = [*headers, ("Accept-Encoding", BROWSER), ("Last-Event-ID", CURSOR), ("Cookie", COOKIE)]
    timed = partial(open_timed_stream, target, headers, events=EVENTS, round_trip=round_trip)
    works: dict[str, Callable[[], Awaitable[Any]]] = {
        "error_page": partial(_provoke, target),
        "asked": partial(open_stream, target, browser, events=EVENTS),
        "plain": timed,
        "twin": partial(open_stream, target, headers, events=EVENTS),
        "quiet": partial(open_stream, target, headers, quiet=idle),
        "socket": partial(open_socket, target, headers, idle),
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

    async def repeat(name: str, is_delayed: Callable[[], bool]) -> None:
        for _ in range(REPEATS):
            if is_delayed():
                await store(name, works[name])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(repeat, "plain", lambda: LATE < measured.plain.delay(offset) < math.inf)
        nursery.start_soon(repeat, "body", lambda: measured.body.is_delayed)
        nursery.start_soon(repeat, "noticed", lambda: measured.noticed is False)
    if measured.plain.is_collected:
        measured.blocks = await open_stream(
            target, headers, events=BLOCK_EVENTS, interval=BLOCK_INTERVAL, size=BLOCK_SIZE
        )
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
    except (*BROKEN, trio.TooSlowError):
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
    except BROKEN:
        pass
    return ""


async def _poll(target: Target, headers: Headers, wait: float) -> Poll:
    """Send a request that is responded to late."""
    began, wait = time.time(), min(wait, 60.0)
    try:
        response, _ = await request(target, f"{DIAGNOSTICS}?wait={wait:g}", headers, wait=wait)
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
                with suppress(msgspec.DecodeError):
                    result.parts = msgspec.json.decode(await connection.read(), type=_Parts).parts
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
    except BROKEN:
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


async def _leave(target: Target, headers: Headers) -> bool | None:
    """Open a stream and leave; return whether the server learns of it, None if that cannot be said."""
    name = secrets.token_hex(8)
    path = f"{DIAGNOSTICS}/stream?events={int(LEAVE * 5)}&interval={INTERVAL}&name={name}"

    async def is_open() -> tuple[str, bool] | None:
        _, body = await request(target, f"{DIAGNOSTICS}?name={name}", headers)
        return None if (seen := parse_seen(body)) is None else (seen.instance, seen.is_open)

    with suppress(*BROKEN):
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
    with suppress(*BROKEN):
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
