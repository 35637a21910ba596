"""How each family of clients sees a session: data and pure functions. No I/O, no clock.

A dialect turns an event into the messages that its clients know. The protocol (SSE or WebSocket)
only decides how those messages are framed, so every transport of a dialect says the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from . import sse
from .model import Artifact, Cursor, Event, Progress, Session, State, isotime

__all__ = ["RESERVED", "SESSIONS", "Dialect", "Encoding", "Message", "snapshot", "websocket_text"]

_json = msgspec.json.Encoder()


class Message(msgspec.Struct, frozen=True):
    """One message to a client: an event name (None: unnamed), a line of JSON, its cursor if it has one.

    Without data it only tells the cursor.
    """

    event: str | None
    data: bytes | None
    id: str | None = None
    retry: int | None = None


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """One family of clients.

    ``messages`` turns an event of a session into messages; ``heartbeat`` writes the comment that keeps
    an idle SSE stream in use, every ``interval`` seconds.
    """

    name: str
    messages: Callable[[str, str, Event], list[Message]]
    heartbeat: Callable[[float], str]
    interval: float


class Payload(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A progress event in the ``sessions`` dialect. Absent members have nothing to say."""

    session_id: str
    status: str
    progress: float
    message: str
    updated_at: str
    state: str
    stage: str | None = None
    phase: str | None = None
    rate: float | None = None
    eta: float | None = None
    error: str | dict[str, Any] | None = None
    artifacts: tuple[Artifact, ...] = ()
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    started_at: str | None = None
    ended_at: str | None = None
    # Only in a snapshot
    id: str | None = None
    title: str | None = None
    control: str | None = None
    created_at: str | None = None


def _payload(session_id: str, progress: Progress, **more: Any) -> Payload:
    return Payload(
        session_id=session_id,
        status=progress.status,
        progress=progress.percent,
        message=progress.message,
        updated_at=isotime(progress.updated_at),
        state=progress.state.value,
        stage=progress.stage,
        phase=progress.phase,
        rate=progress.rate,
        eta=progress.eta,
        error=progress.error,
        artifacts=progress.artifacts,
        data=progress.data,
        started_at=None if progress.started_at is None else isotime(progress.started_at),
        ended_at=None if progress.ended_at is None else isotime(progress.ended_at),
        **more,
    )


def snapshot(session: Session) -> Payload:
    """Describe a session as ``GET .../status`` answers it: its progress, its cursor and what is asked of it."""
    progress = session.progress or Progress(
        status="queued", state=State.QUEUED, updated_at=session.touched_at, data=session.data
    )
    return _payload(
        session.id,
        progress,
        id=str(session.cursor),
        title=session.title,
        control=session.control.value,
        created_at=isotime(session.created_at),
    )


# Names that only the server gives to messages; a publisher cannot use them as event types.
RESERVED = frozenset(
    {"progress", "complete", "resume", "deleted", "overflow", "control", "message", "stalled"}
)


def _sessions_name(event: Event) -> str:
    if event.progress is None:
        # "error" ends a client of this dialect; one that ends nothing is a warning.
        return "warning" if event.type == "error" else event.type
    match event.progress.state:
        case State.SUCCEEDED:
            return "complete"
        case State.FAILED | State.CANCELLED | State.LOST:
            return "error"
        case _:
            return "progress"


def _sessions_messages(session_id: str, epoch: str, event: Event) -> list[Message]:
    progress = event.progress
    data = event.data if progress is None else _payload(session_id, progress)
    return [Message(_sessions_name(event), _json.encode(data), str(Cursor(epoch, event.seq)), event.retry)]


SESSIONS = Dialect(
    name="sessions",
    messages=_sessions_messages,
    heartbeat=lambda _now: "heartbeat",
    interval=15.0,
)


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
        text = _json.encode(text_message(message))
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
