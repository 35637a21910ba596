"""Clients that speak HTTP/1.1, event streams and WebSocket byte by byte, over any stream.

They read what the server wrote and nothing into it: a test sees every header, every block and where the
connection ended. Nothing here waits for a time; a test that would wait for ever is ended by its timeout.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterable
from typing import Any

import msgspec
import trio

from sseserve import sse

__all__ = ["Connection", "Reply", "Socket", "connect", "frame", "get", "post", "request_bytes", "reset"]

Headers = Iterable[tuple[str, str]]
CHUNK = 65536


class Reply(msgspec.Struct):
    """A response. ``headers`` has lower-case names; ``body`` is empty while a stream goes on."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, after checking that it has the one shape that all errors have."""
        assert self.headers["content-type"] == "application/json"
        assert list(self.json) == ["error"]
        error: dict[str, Any] = self.json["error"]
        assert {"code", "message", "request_id"} <= error.keys()
        assert error["request_id"] == self.headers["x-request-id"]
        return error


def request_bytes(
    method: str,
    target: str,
    body: bytes | None = None,
    headers: Headers = (),
    *,
    kind: str = "application/json",
) -> bytes:
    """Write a request. With a body it says its length and type, unless ``headers`` do."""
    lines = [f"{method} {target} HTTP/1.1", "Host: test", *(f"{name}: {value}" for name, value in headers)]
    names = {name.lower() for name, _ in headers}
    if body is not None and not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    if body is not None and "content-type" not in names:
        lines.append(f"Content-Type: {kind}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunk(data: bytes) -> bytes:
    """Write one chunk of a chunked body; an empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection:
    """One connection as its client sees it. ``ended`` says how: "eof", "reset", or None if it goes on."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = b""
        self.ended: str | None = None
        self.decoder = sse.Decoder()
        self._events: list[sse.ServerSentEvent] = []
        self.raw = b""  # what a stream has said so far

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive(self) -> bool:
        """Read what is there next; False at the end."""
        try:
            data = bytes(await self.stream.receive_some(CHUNK))
        except trio.BrokenResourceError:
            self.ended = "reset"
            return False
        if not data:
            self.ended = "eof"
        self.buffer += data
        return bool(data)

    async def rest(self) -> bytes:
        """Read to the connection's end."""
        while await self.receive():
            pass
        data, self.buffer = self.buffer, b""
        return data

    async def until(self, mark: bytes) -> bytes:
        """Read up to and with ``mark``."""
        while mark not in self.buffer:
            assert await self.receive(), f"ended ({self.ended}) after {self.buffer!r}"
        data, self.buffer = self.buffer.split(mark, 1)
        return data + mark

    async def exactly(self, size: int) -> bytes:
        """Read ``size`` bytes."""
        while len(self.buffer) < size:
            assert await self.receive(), f"ended ({self.ended}) after {self.buffer!r}"
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    async def head(self) -> Reply:
        """Read a response's head."""
        text = (await self.until(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.split("\r\n")[:-2]
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"twice: {name}"
            headers[name.lower()] = value.strip()
        return Reply(int(first.split(" ")[1]), headers)

    async def reply(self, method: str = "GET") -> Reply:
        """Read a whole response, the answer to a ``method`` request."""
        reply = await self.head()
        headers = reply.headers
        if method == "HEAD" or reply.status in (204, 304) or reply.status < 200:
            return reply
        if "content-length" in headers:
            reply.body = await self.exactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.until(b"\r\n"), 16):
                reply.body += await self.exactly(size)
                await self.exactly(2)
            await self.until(b"\r\n")
        else:
            reply.body = await self.rest()
        return reply

    async def ask(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Headers = (),
        *,
        kind: str = "application/json",
    ) -> Reply:
        """Send a request and read its response."""
        await self.send(request_bytes(method, target, body, headers, kind=kind))
        return await self.reply(method)

    # An event stream

    async def watch(self, session_id: str, cursor: str | None = None, headers: Headers = ()) -> Reply:
        """Ask for a session's stream and read the response's head."""
        if cursor is not None:
            headers = [*headers, ("Last-Event-ID", cursor)]
        await self.send(request_bytes("GET", f"/api/sessions/{session_id}/status/stream", headers=headers))
        return await self.head()

    async def event(self) -> sse.ServerSentEvent | None:
        """The stream's next event; None at its end."""
        while not self._events:
            while not self.buffer:
                if not await self.receive():
                    return None
            self.raw += self.buffer
            self._events += self.decoder.feed(self.buffer)
            self.buffer = b""
        return self._events.pop(0)

    async def events(self) -> list[sse.ServerSentEvent]:
        """All events up to the stream's end."""
        found = []
        while (event := await self.event()) is not None:
            found.append(event)
        return found


async def connect(port: int, *, receive_buffer: int | None = None) -> Connection:
    """Connect to a server on this machine. A small ``receive_buffer`` (bytes) makes a reader stall soon."""
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return Connection(trio.SocketStream(sock))


async def get(port: int, target: str, headers: Headers = ()) -> Reply:
    """Ask on a connection of its own."""
    connection = await connect(port)
    async with connection.stream:
        return await connection.ask("GET", target, headers=headers)


async def post(port: int, target: str, value: Any = None, headers: Headers = ()) -> Reply:
    """Post JSON (bytes as they are) on a connection of its own."""
    connection = await connect(port)
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    async with connection.stream:
        return await connection.ask("POST", target, body, headers)


def reset(connection: Connection) -> None:
    """Close so that the server gets a RST (socket(7), SO_LINGER)."""
    stream = connection.stream
    assert isinstance(stream, trio.SocketStream)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


# WebSocket, RFC 6455

HANDSHAKE = (
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
)


def frame(opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True) -> bytes:
    """Write a client's frame (section 5.2)."""
    head = bytes((opcode | (0x80 if final else 0),))
    mark = 0x80 if masked else 0
    if len(payload) < 126:
        head += bytes((mark | len(payload),))
    elif len(payload) < 65536:
        head += struct.pack("!BH", mark | 126, len(payload))
    else:
        head += struct.pack("!BQ", mark | 127, len(payload))
    if not masked:
        return head + payload
    mask = os.urandom(4)
    return head + mask + bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))


class Socket:
    """A WebSocket over a ``Connection``, frame by frame."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @classmethod
    async def open(
        cls, connection: Connection, session_id: str, cursor: str | None = None, headers: Headers = HANDSHAKE
    ) -> Socket:
        target = f"/api/sessions/{session_id}/status/ws" + (f"?last_event_id={cursor}" if cursor else "")
        await connection.send(request_bytes("GET", target, headers=headers))
        reply = await connection.head()
        assert reply.status == 101, reply
        assert reply.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # section 1.3
        assert "sec-websocket-extensions" not in reply.headers
        return cls(connection)

    async def send(self, opcode: int, payload: bytes = b"", **more: bool) -> None:
        await self.connection.send(frame(opcode, payload, **more))

    async def frame(self) -> tuple[int, bytes]:
        """The server's next frame: its opcode and payload. It must be whole and not masked."""
        first, size = await self.connection.exactly(2)
        assert first & 0xF0 == 0x80
        assert size < 0x80
        if size == 126:
            (size,) = struct.unpack("!H", await self.connection.exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.connection.exactly(8))
        return first & 0x0F, await self.connection.exactly(size)

    async def message(self) -> dict[str, Any] | tuple[int, str]:
        """The next message; at the end the close code and reason, which are answered."""
        while True:
            opcode, payload = await self.frame()
            if opcode == 1:
                message: dict[str, Any] = json.loads(payload)
                return message
            if opcode == 8:
                await self.send(8, payload)
                return struct.unpack("!H", payload[:2])[0], payload[2:].decode()

    async def messages(self) -> tuple[list[dict[str, Any]], tuple[int, str]]:
        """All messages to the end, and the close code and reason."""
        found = []
        while isinstance(message := await self.message(), dict):
            found.append(message)
        return found, message
