"""How messages are framed: event stream blocks, WebSocket frames, lines of JSON. No I/O, no clock."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Literal

import msgspec

from .. import sse
from ..model import Event
from .base import Dialect, Message, encode_json

__all__ = ["Encoding", "text_message", "websocket_text"]


class _Text(msgspec.Struct, frozen=True):
    """A message as WebSocket and long-poll clients get it."""

    id: str | None
    event: str | None
    data: msgspec.Raw
    retry: int | msgspec.UnsetType = msgspec.UNSET


class Encoding(msgspec.Struct, frozen=True):
    """A dialect over a protocol: what one encoded frame is shared by.

    ``sse`` writes event stream blocks, ``ws`` unmasked WebSocket text frames (RFC 6455, section 5.2),
    and ``text`` the same JSON a line each, for those who frame it themselves.
    """

    dialect: Dialect
    protocol: Literal["sse", "ws", "text"]

    def event(self, session_id: str, epoch: str, event: Event) -> bytes:
        """Encode one event of a session."""
        return self.join(self.dialect.messages(session_id, epoch, event))

    def join(self, messages: Iterable[Message]) -> bytes:
        """Encode messages, one after another."""
        return b"".join(map(self.message, messages))

    def message(self, message: Message) -> bytes:
        """Encode one message."""
        if self.protocol == "sse":
            data = None if message.data is None else message.data.decode()
            return sse.encode(data, event=message.event, id=message.id, retry=message.retry)
        text = encode_json(text_message(message))
        return websocket_text(text) if self.protocol == "ws" else text + b"\n"

    def heartbeat(self, now: float) -> bytes:
        """Encode what keeps an idle stream in use: a comment, a WebSocket ping, or nothing."""
        if self.protocol == "sse":
            return sse.comment(self.dialect.heartbeat(now))
        return b"\x89\x00" if self.protocol == "ws" else b""

    def close(self, code: int, reason: str) -> bytes:
        """Encode the end of a stream: a WebSocket close frame (RFC 6455, section 5.5.1), else nothing."""
        if self.protocol != "ws":
            return b""
        payload = struct.pack("!H", code) + reason.encode()
        return bytes((0x88, len(payload))) + payload


def text_message(message: Message) -> _Text:
    """Shape a message as WebSocket and long-poll clients get it: ``{"id", "event", "data"}``."""
    retry = msgspec.UNSET if message.retry is None else message.retry
    return _Text(message.id, message.event, msgspec.Raw(message.data or b"null"), retry)


def websocket_text(payload: bytes) -> bytes:
    """Frame one unfragmented, unmasked text message (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload
