"""Fake servers on loopback sockets: each connection is served by a handler that may also misbehave."""

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

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class ReceivedRequest(msgspec.Struct):
    """A request; ``unparsed`` is what has been read of the connection but not yet parsed."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""
    unparsed: bytes = b""

    @property
    def cursor(self) -> str | None:
        """The cursor of a watch request, whatever its transport."""
        for name in ("last_event_id", "after"):
            if name in self.query:
                return self.query[name][0]
        return self.headers.get("last-event-id")


Handler = Callable[[trio.SocketStream, ReceivedRequest], Awaitable[None]]


class FakeServer:
    """Serves each connection with the next handler; after the last one, closes connections unanswered.

    ``requests`` are the requests received so far.
    """

    def __init__(self, *handlers: Handler) -> None:
        self._handlers = list(handlers)
        self.requests: list[ReceivedRequest] = []
        self.url = ""

    async def start(self, nursery: trio.Nursery) -> FakeServer:
        """Listen on a free port of 127.0.0.1; ``url`` is the address."""
        listeners = await nursery.start(trio.serve_tcp, self._serve, 0)
        # There is one listener for each address family; IPv4 is enough.
        for listener in listeners:
            _, port = listener.socket.getsockname()[:2]
            if listener.socket.family == socket.AF_INET:
                self.url = f"http://127.0.0.1:{port}"
        return self

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            request = await read_head(stream)
            self.requests.append(request)
            if self._handlers:
                await self._handlers.pop(0)(stream, request)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)


async def read_head(stream: trio.SocketStream) -> ReceivedRequest:
    """Read a request up to the end of its headers."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += await receive_chunk(stream)
    head, _, unparsed = data.partition(b"\r\n\r\n")
    request_line, *fields = head.decode().split("\r\n")
    method, target, _ = request_line.split()
    url = urlsplit(target)
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    return ReceivedRequest(method, url.path, parse_qs(url.query), headers, unparsed=unparsed)


async def read_body(
    stream: trio.SocketStream, request: ReceivedRequest, *, chunks: int | None = None
) -> None:
    """Read the rest of the body into ``request.body``; of a chunked body at most ``chunks`` chunks."""
    if "content-length" in request.headers:
        request.body += request.unparsed
        while len(request.body) < int(request.headers["content-length"]):
            request.body += await receive_chunk(stream)
        return
    while chunks is None or chunks > 0:
        while b"\r\n" not in request.unparsed:
            request.unparsed += await receive_chunk(stream)
        size, _, request.unparsed = request.unparsed.partition(b"\r\n")
        length = int(size, 16)
        while len(request.unparsed) < length + 2:
            request.unparsed += await receive_chunk(stream)
        request.body += request.unparsed[:length]
        request.unparsed = request.unparsed[length + 2 :]
        if not length:
            return
        chunks = None if chunks is None else chunks - 1


async def receive_chunk(stream: trio.SocketStream) -> bytes:
    """Return the next bytes; the end of the stream is an error."""
    if not (chunk := await stream.receive_some()):
        raise trio.BrokenResourceError
    return bytes(chunk)


def reset_on_close(stream: trio.SocketStream) -> None:
    """Make closing this connection send a TCP reset."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def respond(status: int, body: Any = None, *headers: str) -> Handler:
    """Read the request body, send one response and close; a body that is not bytes is encoded as JSON."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()

    async def handler(stream: trio.SocketStream, request: ReceivedRequest) -> None:
        if request.method == "POST":
            await read_body(stream, request)
        lines = [f"HTTP/1.1 {status} X", "Connection: close", *headers]
        if status != 204:
            lines.append(f"Content-Length: {len(content)}")
        await stream.send_all("\r\n".join([*lines, "\r\n"]).encode() + content)

    return handler


def respond_error(status: int, code: str, message: str = "no", **details: Any) -> Handler:
    """Respond with an error object."""
    return respond(status, {"error": {"code": code, "message": message, "request_id": "r1", **details}})


def send_raw(*chunks: bytes, head: bytes = SSE_HEAD, then: str = "close") -> Handler:
    """Send these bytes; then ``close``, ``reset``, or ``hang`` until the client closes the connection."""

    async def handler(stream: trio.SocketStream, request: ReceivedRequest) -> None:
        await stream.send_all(head)
        for chunk in chunks:
            await stream.send_all(chunk)
        if then == "reset":
            reset_on_close(stream)
        elif then == "hang":
            while await stream.receive_some():
                pass

    return handler


async def drip_response(stream: trio.SocketStream, request: ReceivedRequest) -> None:
    """Send the head of a response for ever, a byte at a time."""
    await stream.send_all(b"HTTP/1.1 202 Accepted\r\nX-Filler: ")
    while True:
        await stream.send_all(b"x")
        await trio.sleep(0.001)


def text_frame(payload: bytes) -> bytes:
    """Return an unmasked WebSocket text frame (RFC 6455, section 5.2)."""
    if len(payload) < 126:
        return bytes((0x81, len(payload))) + payload
    return struct.pack("!BBH", 0x81, 126, len(payload)) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """Return an unmasked WebSocket close frame (RFC 6455, section 5.5.1)."""
    payload = struct.pack("!H", code) + reason.encode()
    return bytes((0x88, len(payload))) + payload


def accept_websocket(*frames: bytes, then: str = "close") -> Handler:
    """Accept a WebSocket handshake and send these frames; ``then`` as for ``send_raw``."""

    async def handler(stream: trio.SocketStream, request: ReceivedRequest) -> None:
        key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        head = (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
        )
        await send_raw(*frames, head=head.encode(), then=then)(stream, request)

    return handler


# id, event and data of a message, as they are sent
WireMessage = tuple[str | None, str | None, Any]


def send_messages(
    transport: str, *messages: WireMessage, then: str = "disconnect", retry: int | None = None
) -> Handler:
    """Send messages over a transport.

    Then ``disconnect`` without a close, ``end`` as after the session's final message, or ``hang``.
    ``retry`` is the reconnection time in milliseconds.
    """
    if transport == "sse":
        blocks = [
            sse.encode(None if data is None else json.dumps(data), event=event, id=cursor, retry=retry)
            for cursor, event, data in messages
        ]
        return send_raw(*blocks, then="hang" if then == "hang" else "close")
    events = [
        {"id": cursor, "event": event, "data": data, **({} if retry is None else {"retry": retry})}
        for cursor, event, data in messages
    ]
    if transport == "ws":
        frames = [text_frame(json.dumps(event).encode()) for event in events]
        if then == "end":
            frames.append(close_frame(1000, "ended"))
        return accept_websocket(*frames, then="close" if then == "disconnect" else "hang")
    resume = next((event["data"] for event in events if event["event"] == "resume"), None)
    events = [event for event in events if event["event"] != "resume"]
    last = next((event["id"] for event in reversed(events) if event["id"]), "e-0")
    return respond(200, {"resume": resume, "events": events, "next": last, "end": then == "end"})
