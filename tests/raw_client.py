"""Minimal HTTP/1.1, Server-Sent Events and WebSocket clients that work on raw bytes, over any stream.

They hide nothing that the server sends but the chunks of a stream, which are checked: a test sees every
header, every block of a stream and how it ended. Nothing here has a timeout; a test that hangs is ended by
pytest's.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Iterable
from typing import Any

import msgspec
import trio

from sseserve import sse

__all__ = [
    "HANDSHAKE",
    "ChunkReader",
    "RawConnection",
    "RawResponse",
    "RawWebSocket",
    "chunk",
    "connect",
    "frame",
    "get",
    "post",
    "request_bytes",
    "reset",
]

Headers = Iterable[tuple[str, str]]
CHUNK = 65536


class RawResponse(msgspec.Struct):
    """A response. ``headers`` has lower-case names; the ``body`` of a stream is empty."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, after checking that it has the members that every error has."""
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
    content_type: str = "application/json",
) -> bytes:
    """Encode a request. Content-Length and Content-Type are added for a body unless ``headers`` has them."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    names = {name.lower() for name, _ in headers}
    if "host" not in names:
        lines.insert(1, "Host: localhost")
    if body is not None and not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    if body is not None and "content-type" not in names:
        lines.append(f"Content-Type: {content_type}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunk(data: bytes) -> bytes:
    """Encode one chunk of a chunked body (RFC 9112, section 7.1); an empty one ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ChunkReader:
    """Reads a chunked body (RFC 9112, section 7.1) as its bytes arrive; any other byte is an error.

    ``sizes`` are those of the chunks that have begun; the last one, which is empty, makes it ``complete``.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.complete = False
        self._waiting = b""
        self._left: int | None = None  # bytes of data of the chunk that is being read

    def feed(self, data: bytes) -> bytes:
        """Return the data in these bytes."""
        assert not (data and self.complete), f"after the last chunk: {data!r}"
        self._waiting += data
        out = b""
        while self._waiting:
            if self._left is None:
                line, found, rest = self._waiting.partition(b"\r\n")
                if not found:
                    break
                assert re.fullmatch(rb"0|[1-9a-f][0-9a-f]*", line), line
                self._left, self._waiting = int(line, 16), rest
                self.sizes.append(self._left)
            taken, self._waiting = self._waiting[: self._left], self._waiting[self._left :]
            out += taken
            self._left -= len(taken)
            if self._left or len(self._waiting) < 2:
                break
            assert self._waiting[:2] == b"\r\n", self._waiting
            self._waiting, self._left = self._waiting[2:], None
            self.complete = not self.sizes[-1]
        assert not (self._waiting and self.complete), f"after the last chunk: {self._waiting!r}"
        return out


class RawConnection:
    """A client connection. ``ended`` is "eof" or "reset", or None while the connection is open.

    An event stream in chunks is read by ``chunks``, and ``buffer`` has what is in them.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = b""
        self.chunks: ChunkReader | None = None
        self.ended: str | None = None
        self.decoder = sse.Decoder()
        self._events: list[sse.ServerSentEvent] = []
        self.raw = b""  # the bytes of the event stream read so far

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive(self) -> bool:
        """Read more bytes into ``buffer``; return False at the end of the connection."""
        try:
            data = bytes(await self.stream.receive_some(CHUNK))
        except trio.BrokenResourceError:
            self.ended = "reset"
            return False
        if not data:
            self.ended = "eof"
        self.buffer += data if self.chunks is None else self.chunks.feed(data)
        return bool(data)

    async def read_to_end(self) -> bytes:
        """Read to the end of the connection."""
        while await self.receive():
            pass
        data, self.buffer = self.buffer, b""
        return data

    async def read_until(self, delimiter: bytes) -> bytes:
        """Read up to and including ``delimiter``."""
        while delimiter not in self.buffer:
            assert await self.receive(), f"ended ({self.ended}) after {self.buffer!r}"
        data, self.buffer = self.buffer.split(delimiter, 1)
        return data + delimiter

    async def read_exactly(self, size: int) -> bytes:
        """Read ``size`` bytes."""
        while len(self.buffer) < size:
            assert await self.receive(), f"ended ({self.ended}) after {self.buffer!r}"
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    async def read_head(self) -> RawResponse:
        """Read the status line and the headers of a response."""
        text = (await self.read_until(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.split("\r\n")[:-2]
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"repeated header: {name}"
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") == "chunked":
            self.chunks = ChunkReader()
            self.buffer = self.chunks.feed(self.buffer)
        return RawResponse(int(first.split(" ")[1]), headers)

    async def read_response(self, method: str = "GET") -> RawResponse:
        """Read a complete response to a ``method`` request."""
        response = await self.read_head()
        headers = response.headers
        if method == "HEAD" or response.status in (204, 304) or response.status < 200:
            self.chunks = None
            return response
        if "content-length" in headers:
            response.body = await self.read_exactly(int(headers["content-length"]))
        else:
            response.body = await self.read_to_end()
        return response

    async def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Headers = (),
        *,
        content_type: str = "application/json",
    ) -> RawResponse:
        """Send a request and read its response."""
        await self.send(request_bytes(method, target, body, headers, content_type=content_type))
        return await self.read_response(method)

    # Server-Sent Events

    async def watch(self, session_id: str, cursor: str | None = None, headers: Headers = ()) -> RawResponse:
        """Request a session's event stream and read the head of the response."""
        if cursor is not None:
            headers = [*headers, ("Last-Event-ID", cursor)]
        await self.send(request_bytes("GET", f"/api/sessions/{session_id}/status/stream", headers=headers))
        return await self.read_head()

    async def event(self) -> sse.ServerSentEvent | None:
        """Read an event; None at the end of the stream."""
        while not self._events:
            while not self.buffer:
                if not await self.receive():
                    return None
            self.raw += self.buffer
            self._events += self.decoder.feed(self.buffer)
            self.buffer = b""
        return self._events.pop(0)

    async def events(self) -> list[sse.ServerSentEvent]:
        """Read all events to the end of the stream."""
        events = []
        while (event := await self.event()) is not None:
            events.append(event)
        return events


async def connect(
    port: int, *, receive_buffer: int | None = None, address: str = "127.0.0.1"
) -> RawConnection:
    """Connect to 127.0.0.1, from an address of the loopback interface.

    A small ``receive_buffer`` (bytes) lets the server's writes block soon.
    """
    sock = trio.socket.socket()
    await sock.bind((address, 0))
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return RawConnection(trio.SocketStream(sock))


async def get(port: int, target: str, headers: Headers = ()) -> RawResponse:
    """Send a GET request on a new connection."""
    connection = await connect(port)
    async with connection.stream:
        return await connection.request("GET", target, headers=headers)


async def post(port: int, target: str, value: Any = None, headers: Headers = ()) -> RawResponse:
    """Send a POST request on a new connection; a value that is not bytes is encoded as JSON."""
    connection = await connect(port)
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    async with connection.stream:
        return await connection.request("POST", target, body, headers)


def reset(connection: RawConnection) -> None:
    """Close the connection with a TCP reset (socket(7), SO_LINGER)."""
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
    """Encode a client frame (section 5.2)."""
    head = bytes((opcode | (0x80 if final else 0),))
    mask_bit = 0x80 if masked else 0
    if len(payload) < 126:
        head += bytes((mask_bit | len(payload),))
    elif len(payload) < 65536:
        head += struct.pack("!BH", mask_bit | 126, len(payload))
    else:
        head += struct.pack("!BQ", mask_bit | 127, len(payload))
    if not masked:
        return head + payload
    mask = os.urandom(4)
    return head + mask + bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))


class RawWebSocket:
    """A WebSocket on a ``RawConnection``, frame by frame."""

    def __init__(self, connection: RawConnection) -> None:
        self.connection = connection

    @classmethod
    async def open(
        cls,
        connection: RawConnection,
        session_id: str,
        cursor: str | None = None,
        headers: Headers = HANDSHAKE,
    ) -> RawWebSocket:
        target = f"/api/sessions/{session_id}/status/ws" + (f"?last_event_id={cursor}" if cursor else "")
        await connection.send(request_bytes("GET", target, headers=headers))
        response = await connection.read_head()
        assert response.status == 101, response
        assert response.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # section 1.3
        assert "sec-websocket-extensions" not in response.headers
        return cls(connection)

    async def send(self, opcode: int, payload: bytes = b"", **more: bool) -> None:
        await self.connection.send(frame(opcode, payload, **more))

    async def frame(self) -> tuple[int, bytes]:
        """Read a frame: its opcode and payload. It must be final and unmasked."""
        first, size = await self.connection.read_exactly(2)
        assert first & 0xF0 == 0x80
        assert size < 0x80
        if size == 126:
            (size,) = struct.unpack("!H", await self.connection.read_exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.connection.read_exactly(8))
        return first & 0x0F, await self.connection.read_exactly(size)

    async def message(self) -> dict[str, Any] | tuple[int, str]:
        """Read a message, or the code and reason of a close frame, which is sent back."""
        while True:
            opcode, payload = await self.frame()
            if opcode == 1:
                message: dict[str, Any] = json.loads(payload)
                return message
            if opcode == 8:
                await self.send(8, payload)
                return struct.unpack("!H", payload[:2])[0], payload[2:].decode()

    async def messages(self) -> tuple[list[dict[str, Any]], tuple[int, str]]:
        """Read all messages to the end, and the close code and reason."""
        messages = []
        while isinstance(message := await self.message(), dict):
            messages.append(message)
        return messages, message
