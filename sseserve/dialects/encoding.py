"""How messages are framed: event stream blocks (in HTTP chunks) or WebSocket frames. No I/O, no clock."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal

import msgspec

from .. import sse
from ..model import Event
from .base import Dialect, Message, encode_json

__all__ = [
    "CLOSE",
    "PING",
    "TEXT",
    "BundleEncoding",
    "Encoding",
    "TextMessage",
    "read_frames",
    "text_message",
    "websocket_text",
]

# Opcodes of WebSocket frames (RFC 6455, section 5.2).
TEXT, CLOSE, PING = 0x1, 0x8, 0x9


class TextMessage(msgspec.Struct, frozen=True):
    """A message as WebSocket and long-poll clients get it.

    ``traceparent`` and ``tracestate`` are those of the request that has published the event, if it had any.
    """

    id: str | None
    event: str | None
    data: msgspec.Raw
    retry: int | msgspec.UnsetType = msgspec.UNSET
    traceparent: str | msgspec.UnsetType = msgspec.UNSET
    tracestate: str | msgspec.UnsetType = msgspec.UNSET


class Encoding(msgspec.Struct, frozen=True):
    """A dialect over a protocol: subscribers of one encoding share the same bytes.

    ``sse`` writes event stream blocks, ``ws`` unmasked WebSocket text frames (RFC 6455, section 5.2).
    ``chunked`` puts what is sent at once into a chunk of HTTP/1.1 (RFC 9112, section 7.1), so that the bytes
    can be sent as they are, and a response that was cut off is not taken for a complete one.
    """

    dialect: Dialect
    protocol: Literal["sse", "ws"]
    chunked: bool = False

    def event(self, session_id: str, epoch: str, event: Event) -> bytes:
        """Encode one event of a session, without the chunk that it is sent in."""
        return b"".join(map(self._encode, self.dialect.messages(session_id, epoch, event)))

    def join(self, messages: Iterable[Message]) -> bytes:
        """Encode messages, one after another."""
        return self.chunk(b"".join(map(self._encode, messages)))

    def message(self, message: Message) -> bytes:
        """Encode one message."""
        return self.chunk(self._encode(message))

    def _encode(self, message: Message) -> bytes:
        if self.protocol == "sse":
            return sse.encode(message.data.decode(), event=message.event, id=message.id, retry=message.retry)
        return websocket_text(encode_json(text_message(message)))

    def chunk(self, data: bytes) -> bytes:
        """Put data into a chunk, where the protocol has them."""
        # A chunk without data would be the last one.
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked and data else data

    def heartbeat(self, now: float) -> bytes:
        """Encode what keeps an idle stream open: a comment, or a WebSocket ping. ``now``: POSIX seconds."""
        if self.protocol == "sse":
            return self.chunk(sse.comment(self.dialect.heartbeat(now)))
        return bytes((0x80 | PING, 0))

    def retry(self, milliseconds: int) -> bytes:
        """Encode the reconnection time of an event stream; a WebSocket has none."""
        return self.chunk(sse.retry_line(milliseconds)) if self.protocol == "sse" else b""

    def close(self, code: int, reason: str) -> bytes:
        """Encode the end: a WebSocket close frame (RFC 6455, section 5.5.1), the last chunk, or nothing."""
        if self.protocol == "sse":
            return b"0\r\n\r\n" if self.chunked else b""
        payload = struct.pack("!H", code) + reason.encode()
        return bytes((0x80 | CLOSE, len(payload))) + payload


class BundleEncoding(Encoding, frozen=True):
    """A dialect on an event stream of several sessions; what it encodes is completed for each client.

    Messages name their session, and are without their id and without the chunk that they are sent in.
    """

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, dialect: Dialect) -> BundleEncoding:
        """Return that of a dialect."""
        return cls(dialect, "sse")

    def unfinished(self, session_id: str, message: Message) -> tuple[bytes, bytes | None]:
        """Encode a message of one session up to its id, and its id."""
        data = _bundled_data(self.dialect, session_id, message)
        block = sse.encode(data.decode(), event=message.event, retry=message.retry)
        return block[:-1], None if message.id is None else message.id.encode()


def _bundled_data(dialect: Dialect, session_id: str, message: Message) -> bytes:
    if message.event == "resume":
        result = msgspec.json.decode(message.data)
        return encode_json({"session_id": session_id, **result})
    if message.event == "deleted":
        return encode_json({"session_id": session_id})
    if message.event in dialect.record_events:
        return message.data
    return encode_json({"session_id": session_id, "data": msgspec.Raw(message.data)})


def text_message(message: Message) -> TextMessage:
    """Return a message as WebSocket and long-poll clients get it: ``{"id", "event", "data"}``."""
    retry = msgspec.UNSET if message.retry is None else message.retry
    if message.trace is None:
        return TextMessage(message.id, message.event, msgspec.Raw(message.data), retry)
    parent, state = message.trace.traceparent, message.trace.tracestate or msgspec.UNSET
    return TextMessage(message.id, message.event, msgspec.Raw(message.data), retry, parent, state)


def websocket_text(payload: bytes) -> bytes:
    """Frame one unfragmented, unmasked text message (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | TEXT, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x80 | TEXT, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | TEXT, 127, size) + payload


def read_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Read back whole frames that an ``Encoding`` has written: the opcode and payload of each.

    An ASGI server does its own framing, so what is shared with the other clients is unframed for it.
    """
    at = 0
    while at < len(data):
        opcode, size = data[at] & 0x0F, data[at + 1]
        at += 2
        if size == 126:
            (size,) = struct.unpack_from("!H", data, at)
            at += 2
        elif size == 127:
            (size,) = struct.unpack_from("!Q", data, at)
            at += 8
        yield opcode, data[at : at + size]
        at += size
