"""What a dialect is: data and pure functions. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..model import Cursor, Event, Session

__all__ = ["Dialect", "Message", "raw_json"]

raw_json = msgspec.json.Encoder().encode


class Message(msgspec.Struct, frozen=True):
    """One message to a client: an event name (None: unnamed), a line of JSON, its cursor if it has one.

    Without data it only tells the cursor.
    """

    event: str | None
    data: bytes | None
    id: str | None = None
    retry: int | None = None


def _snapshot(dialect: Dialect, session: Session) -> list[Message]:
    """The current progress, as an ordinary event that has changed everything."""
    if session.progress is None:
        return []
    changed = ("state", "status", "stage")
    event = Event(
        session.seq, "progress", session.progress, session.touched_at, changed, published=session.published
    )
    return dialect.shape(session.id, event)


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """One family of clients.

    ``shape`` turns an event of a session into messages without cursors, none if this family has no use for
    it; ``look`` does so with the session's current state. ``heartbeat`` writes the comment that keeps an
    idle SSE stream in use, every ``interval`` seconds.

    ``waits``: a stream may wait for a session that does not exist yet. ``replays``: a client without a
    cursor gets the log from its beginning. ``max_age``: a stream is told to come back after that many
    seconds; ``idle``: after that many without an event. ``throttle``: progress ticks are at least that many
    seconds apart, of those in between the last one counts.
    """

    name: str
    shape: Callable[[str, Event], list[Message]]
    heartbeat: Callable[[float], str]
    interval: float
    look: Callable[[Dialect, Session], list[Message]] = _snapshot
    waits: bool = False
    replays: bool = False
    max_age: float | None = None
    idle: float | None = None
    throttle: float = 0.0

    def messages(self, session_id: str, epoch: str, event: Event) -> list[Message]:
        """Say one event. The last message has the event's cursor, those before it places within it."""
        return _numbered(self.shape(session_id, event), epoch, event.seq)

    def snapshot(self, session: Session) -> list[Message]:
        """Say where a session stands, at the end of its log; without anything to say, only the cursor."""
        messages = self.look(self, session)
        return _numbered(messages or [Message(None, None)], session.epoch, session.seq)


def _numbered(messages: list[Message], epoch: str, seq: int) -> list[Message]:
    parts = [*range(1, len(messages)), 0]
    return [
        msgspec.structs.replace(message, id=str(Cursor(epoch, seq, part)))
        for message, part in zip(messages, parts, strict=False)
    ]
