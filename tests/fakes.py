"""Servers on real loopback sockets that say what they are told to, and misbehave if they are told to."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import trio

from sseserve import sse
from sseserve.dialects import websocket_text

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Asked(msgspec.Struct):
    """A request as it came; ``rest`` is what was read and not yet made sense of."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""
    rest: bytes = b""

    @property
    def cursor(self) -> str | None:
        """The cursor it carries, however its transport carries it."""
        for name in ("last_event_id", "after"):
            if name in self.query:
                return self.query[name][0]
        return self.headers.get("last-event-id")


Script = Callable[[trio.SocketStream, Asked], Awaitable[None]]


class Fake:
    """One script for each connection, in order; after the last one connections are closed unanswered."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.asked: list[Asked] = []
        self.url = ""

    async def start(self, nursery: trio.Nursery) -> Fake:
        listeners = await nursery.start(trio.serve_tcp, self._serve, 0)
        # Of the listeners for each address family we need but one.
        for listener in listeners:
            _, port = listener.socket.getsockname()[:2]
            if listener.socket.family == socket.AF_INET:
                self.url = f"http://127.0.0.1:{port}"
        return self

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            asked = await read_head(stream)
            self.asked.append(asked)
            if self._scripts:
                await self._scripts.pop(0)(stream, asked)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)


async def read_head(stream: trio.SocketStream) -> Asked:
    """Read a request's head."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        chunk = await stream.receive_some()
        if not chunk:
            raise trio.BrokenResourceError
        raw += chunk
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    method, target, _ = first.split()
    url = urlsplit(target)
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    return Asked(method, url.path, parse_qs(url.query), headers, rest=rest)


async def read_body(stream: trio.SocketStream, asked: Asked, *, chunks: int | None = None) -> None:
    """Read the rest of a body into ``asked.body``; of a chunked one only ``chunks`` if that is given."""
    if "content-length" in asked.headers:
        asked.body += asked.rest
        while len(asked.body) < int(asked.headers["content-length"]):
            asked.body += await more(stream)
        return
    while chunks is None or chunks > 0:
        while b"\r\n" not in asked.rest:
            asked.rest += await more(stream)
        size, _, asked.rest = asked.rest.partition(b"\r\n")
        count = int(size, 16)
        while len(asked.rest) < count + 2:
            asked.rest += await more(stream)
        asked.body += asked.rest[:count]
        asked.rest = asked.rest[count + 2 :]
        if not count:
            return
        chunks = None if chunks is None else chunks - 1


async def more(stream: trio.SocketStream) -> bytes:
    """Read what comes next; the end is an error."""
    if not (chunk := await stream.receive_some()):
        raise trio.BrokenResourceError
    return bytes(chunk)


def reset(stream: trio.SocketStream) -> None:
    """Make the close of this connection a reset."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def response(status: int, body: Any = None, *headers: str) -> Script:
    """Answer once, read the body before that, and close."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()

    async def script(stream: trio.SocketStream, asked: Asked) -> None:
        if asked.method == "POST":
            await read_body(stream, asked)
        lines = [f"HTTP/1.1 {status} X", "Connection: close", *headers]
        if status != 204:
            lines.append(f"Content-Length: {len(raw)}")
        await stream.send_all("\r\n".join([*lines, "\r\n"]).encode() + raw)

    return script


def error(status: int, code: str, message: str = "no", **details: Any) -> Script:
    """Answer with an error in its one shape."""
    return response(status, {"error": {"code": code, "message": message, "request_id": "r1", **details}})


def raw(*chunks: bytes, head: bytes = SSE_HEAD, then: str = "close") -> Script:
    """Send these bytes; ``then`` close, reset, or hang until the client leaves."""

    async def script(stream: trio.SocketStream, asked: Asked) -> None:
        await stream.send_all(head)
        for chunk in chunks:
            await stream.send_all(chunk)
        if then == "reset":
            reset(stream)
        elif then == "hang":
            while await stream.receive_some():
                pass

    return script


def close_frame(code: int, reason: str = "") -> bytes:
    """A WebSocket close frame of a server."""
    payload = struct.pack("!H", code) + reason.encode()
    return bytes((0x88, len(payload))) + payload


def upgrade(*frames: bytes, then: str = "close") -> Script:
    """Accept a WebSocket and send these frames."""

    async def script(stream: trio.SocketStream, asked: Asked) -> None:
        key = asked.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        head = (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
        )
        await raw(*frames, head=head.encode(), then=then)(stream, asked)

    return script


Said = tuple[str | None, str | None, Any]


def said(transport: str, *messages: Said, end: str = "cut", retry: int | None = None) -> Script:
    """Say messages ``(id, event, data)`` over a transport.

    ``end`` is ``cut`` (the connection is), ``end`` (as behind the last message) or ``hang``.
    """
    if transport == "sse":
        blocks = [
            sse.encode(None if data is None else json.dumps(data), event=event, id=cursor, retry=retry)
            for cursor, event, data in messages
        ]
        return raw(*blocks, then="hang" if end == "hang" else "close")
    texts = [
        {"id": cursor, "event": event, "data": data, **({} if retry is None else {"retry": retry})}
        for cursor, event, data in messages
    ]
    if transport == "ws":
        frames = [websocket_text(json.dumps(text).encode()) for text in texts]
        if end == "end":
            frames.append(close_frame(1000, "ended"))
        return upgrade(*frames, then="close" if end == "cut" else "hang")
    resume = next((text["data"] for text in texts if text["event"] == "resume"), None)
    events = [text for text in texts if text["event"] != "resume"]
    last = next((text["id"] for text in reversed(events) if text["id"]), "e-0")
    return response(200, {"resume": resume, "events": events, "next": last, "end": end == "end"})
