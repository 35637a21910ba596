"""What a dialect is: data and pure functions, in both directions. No I/O, no clock.

A dialect renders events as the messages that its clients know, and reads what its publishers send. The
protocol (SSE or WebSocket) only frames those messages, so every transport of a dialect carries the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ..model import Cursor, Event, Progress, Session, State
from ..progress.rules import Change
from ..trace_context import TraceContext

__all__ = [
    "SERVER_EVENTS",
    "Dialect",
    "Message",
    "MessageType",
    "Publication",
    "PublishBody",
    "PushDelivery",
    "RedisChannel",
    "current_progress",
    "custom_event",
    "default_snapshot",
    "encode_json",
    "error_text",
]

encode_json = msgspec.json.Encoder().encode

# Event names of the server itself, in every dialect. An EventSource calls an unnamed one "message", and fires
# "open" itself, when it has connected.
SERVER_EVENTS = frozenset(
    {
        *("control", "degraded", "deleted", "expiring", "message", "open", "overflow", "restored", "resume"),
        "stalled",
    }
)


class Message(msgspec.Struct, frozen=True):
    """One message to a client: an event name (None: unnamed), a line of JSON, its cursor if it has one.

    ``retry`` is the reconnection time in milliseconds. ``trace`` is the trace that the event is a part of.
    """

    event: str | None
    data: bytes
    id: str | None = None
    retry: int | None = None
    trace: TraceContext | None = None


class MessageType(msgspec.Struct, frozen=True):
    """A kind of message that clients get, for ``/asyncapi.json``: its event name, and its data's type."""

    event: str | None
    summary: str
    data: Any


class Publication(msgspec.Struct, frozen=True):
    """The circumstances of a publish request: the session, the body's bytes, the time (POSIX seconds)."""

    session_id: str
    raw: bytes
    now: float


class PublishBody(Protocol):
    """The decoded body of a publish request."""

    def change(self, publication: Publication, /) -> Change:
        """Return what the body asks the tracker to record.

        Raises:
            Invalid: a member has a value that it cannot have.
        """


class PushDelivery(Protocol):
    """A decoded delivery of a push subscription, which names its session itself."""

    @property
    def key(self) -> str | None:
        """The idempotency key, for a service that delivers at least once; None: it has none."""

    @property
    def published_at(self) -> float | None:
        """When it was published, in POSIX seconds; None: it does not say."""

    def publication(self) -> tuple[str, PublishBody, bytes]:
        """Return the session's id, what to record, and the bytes that it was decoded from.

        Raises:
            BadRequest, Invalid: the delivery is malformed.
        """


class RedisChannel(msgspec.Struct, frozen=True, kw_only=True):
    """Where the programs of one system exchange the progress of a session through Redis.

    In the names ``{id}`` stands for the session's id, and ``{instance}`` for a server's.

    Attributes:
        name: the channel, of Redis's publish and subscribe.
        body: the type of its messages, a ``PublishBody``.
        encode: the message, a JSON object, for a progress event of a session.
        time: the member that says when it was published; equal messages that have it are the same one.
        key: holds the last message of the session; None: no key does.
        instances: the set of the servers on which somebody watches the session; None: there is none.
        instance: the key that says so of one server.
    """

    name: str
    body: type[Any]
    encode: Callable[[str, Event], bytes]
    time: str = "timestamp"
    key: str | None = None
    instances: str | None = None
    instance: str = ""


def default_snapshot(dialect: Dialect, session: Session) -> list[Message]:
    """Render the current progress as an ordinary event that has changed everything."""
    progress = current_progress(session)
    changed: tuple[str, ...] = ("state", "status", "stage")
    if progress.data != session.data:
        changed += ("data",)
    event = Event(session.seq, "progress", progress, session.touched_at, changed, original=session.original)
    return dialect.render(session.id, event)


def _default_describe(dialect: Dialect, session: Session, _watchers: int) -> Any:
    """Describe a session as its stream would."""
    return msgspec.Raw(dialect.snapshot(session)[-1].data)


def _describe_item(dialect: Dialect, session: Session) -> Any:
    return dialect.describe(dialect, session, 0)


def _describe_list(items: list[msgspec.Raw], _queued: int) -> Any:
    return {"sessions": items}


class Dialect(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One family of clients.

    Streams:
        render: turns an event of a session into messages without cursors; none if its clients have no use
            for it.
        render_snapshot: does so with the session's current state; none only if ``replays_log``.
        heartbeat: writes, for POSIX seconds, the comment that keeps an idle SSE stream open.
        heartbeat_interval: seconds between two of them.
        max_heartbeat_interval: seconds that its clients count on, whatever the setting ``heartbeat`` says.
        waits_for_session: a stream may be opened before its session exists.
        warns_unwatched: publishing to a session that nobody watches is logged as a warning.
        replays_log: a client without a cursor gets the log from its beginning.
        max_age: a stream is asked to reconnect after that many seconds.
        idle_timeout: it is asked to after that many seconds without an event.
        carries_trace: its clients over WebSocket and long-poll get the trace that an event is a part of.
        throttle: at least that many seconds between two progress events that change nothing but the amount;
            of those in between the last one counts.
        can_be_disabled: the setting ``enable_sse`` switches its streams off; its clients then poll.

    Names:
        event_names: that publishers cannot use as event types, besides ``SERVER_EVENTS``.
        record_events: the messages whose data names their session.
        message_types: what its messages are, besides those of the server and of publishers' own types.

    REST:
        counts_watchers: ``describe`` says how many watch.
        describe: the JSON of one session, given how many watch it if ``counts_watchers``, else 0.
        describe_created: the path and the JSON of a session that was just created.
        counts_jobs: ``describe_list`` says how many jobs are queued.
        describe_item: the JSON of one session in a list.
        describe_list: the JSON of a list, given its items, and how many jobs are queued if ``counts_jobs``.
        describe_row: a short JSON of a session, for the stream of the list.

    Redis:
        redis_channel: where its programs exchange progress through Redis; None: they do not.
    """

    name: str
    # Streams
    render: Callable[[str, Event], list[Message]]
    render_snapshot: Callable[[Dialect, Session], list[Message]] = default_snapshot
    heartbeat: Callable[[float], str] = lambda _now: "heartbeat"
    heartbeat_interval: float = 15.0
    max_heartbeat_interval: float = math.inf
    waits_for_session: bool = False
    warns_unwatched: bool = False
    replays_log: bool = False
    max_age: float | None = None
    idle_timeout: float | None = None
    carries_trace: bool = False
    throttle: float = 0.0
    can_be_disabled: bool = False
    # Names
    event_names: frozenset[str] = frozenset()
    record_events: frozenset[str] = frozenset()
    message_types: tuple[MessageType, ...] = ()
    # REST
    counts_watchers: bool = False
    describe: Callable[[Dialect, Session, int], Any] = _default_describe
    describe_created: Callable[[Session], tuple[str, Any]] | None = None
    counts_jobs: bool = False
    describe_item: Callable[[Dialect, Session], Any] = _describe_item
    describe_list: Callable[[list[msgspec.Raw], int], Any] = _describe_list
    describe_row: Callable[[Session], Any] = lambda session: {"session_id": session.id}
    # Redis
    redis_channel: RedisChannel | None = None

    def messages(self, session_id: str, epoch: str, event: Event) -> list[Message]:
        """Render one event. The last message has the event's cursor, those before it places within it.

        The first one has its retry time.
        """
        messages = self.render(session_id, event)
        if messages and event.retry is not None:
            messages = [msgspec.structs.replace(messages[0], retry=event.retry), *messages[1:]]
        if event.trace is not None and self.carries_trace:
            messages = [msgspec.structs.replace(message, trace=event.trace) for message in messages]
        return _numbered(messages, epoch, event.seq)

    def snapshot(self, session: Session) -> list[Message]:
        """Render a session's state, at the end of its log."""
        return _numbered(self.render_snapshot(self, session), session.epoch, session.seq)


def _numbered(messages: list[Message], epoch: str, seq: int) -> list[Message]:
    if len(messages) == 1:  # as most are
        message = messages[0]
        return [Message(message.event, message.data, str(Cursor(epoch, seq)), message.retry, message.trace)]
    parts = [*range(1, len(messages)), 0]
    return [
        msgspec.structs.replace(message, id=str(Cursor(epoch, seq, part)))
        for message, part in zip(messages, parts, strict=False)
    ]


def current_progress(session: Session) -> Progress:
    """Return a session's progress; before the first update it is queued."""
    if session.progress is not None:
        return session.progress
    return Progress(
        status="queued",
        state=State.QUEUED,
        indeterminate=True,
        updated_at=session.touched_at,
        data=session.data,
    )


def custom_event(event: Event) -> Message:
    """Render an event of a publisher's own type. Its ``error`` is a warning: it does not end the session.

    To the clients of most dialects ``error`` is the end, and to an EventSource that of its connection.
    """
    name = "warning" if event.type == "error" else event.type
    return Message(name, encode_json(event.data))


def error_text(progress: Progress) -> str:
    """Return the message; for an end without success, or where there is none, what went wrong."""
    failed = progress.state in (State.FAILED, State.CANCELLED, State.LOST)
    if progress.error is not None and (failed or not progress.message):
        error = progress.error
        if isinstance(error, str):
            return error
        text = error.get("message") or progress.message or error.get("code") or error
        return text if isinstance(text, str) else encode_json(text).decode()
    return progress.message
