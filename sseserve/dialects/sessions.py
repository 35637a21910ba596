"""Our own dialect, which is also that of the therapy sessions: progress, complete and error events."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import msgspec

from ..jsontext import decode
from ..model import Artifact, Event, Progress, Session, State, isotime
from ..progress.rules import NewEvent, Update
from .base import (
    Dialect,
    Message,
    MessageType,
    Publication,
    PublishBody,
    RedisChannel,
    current_progress,
    custom_event,
    encode_json,
    error_text,
)
from .phases import phase_of

__all__ = [
    "SESSIONS",
    "ControlBody",
    "CreateBody",
    "CreatedSession",
    "EventBody",
    "ListChanges",
    "ListSnapshot",
    "ProgressBody",
    "ProgressRecord",
    "SessionList",
    "parse_line",
]

MAX_ROW_TEXT = 300  # characters of a text in a list of many sessions

# What clients send


class CreateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /api/sessions``.

    ``ttl`` is in seconds, from the session's end. ``lease``, in seconds, is how often the worker promises
    to publish: silent for longer it has stalled, for three times as long it is lost.
    """

    session_id: str | None = None
    owner: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    viewers: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=1000)
    ] = ()
    title: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    ttl: Annotated[float, msgspec.Meta(gt=0, le=31_536_000)] | None = None
    lease: Annotated[float, msgspec.Meta(ge=1, le=86_400)] | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ControlBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a control request; it may be empty. ``force`` cancels without waiting for the worker."""

    force: bool = False


class ProgressBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST .../progress``; ``progress`` is in percent, 0 to 100."""

    status: str | None = None
    progress: float | None = None
    stage: str | None = None
    message: str | None = None
    error: str | dict[str, Any] | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    artifacts: tuple[Artifact, ...] | None = None
    restart: bool = False

    def change(self, _publication: Publication) -> Update:
        """Return the update, member by member."""
        return Update(**msgspec.structs.asdict(self))


class TrackedProgress(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a program publishes through Redis; other members are ignored. ``progress`` is in percent.

    A percentage that falls is held, since nobody would learn that it was refused.
    """

    status: str
    progress: float | None = None
    message: str | None = None
    error: str | dict[str, Any] | None = None
    updated_at: str | None = None

    def change(self, _publication: Publication) -> Update:
        """Return the update, without its time."""
        return Update(
            status=self.status,
            progress=self.progress,
            message=self.message,
            error=self.error,
            holds_percent=True,
        )


class EventBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST .../events``. ``retry`` is in milliseconds."""

    type: str
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    retry: int | None = None

    def change(self, _publication: Publication) -> NewEvent:
        """Return the event; without data it has null."""
        return NewEvent(self.type, None if self.data is msgspec.UNSET else self.data, self.retry)


def parse_line(line: bytes) -> PublishBody:
    """Decode a line of NDJSON: an event if it has a type, else progress. Raises as ``decode`` does."""
    members = decode(line, dict[str, msgspec.Raw])
    body: PublishBody = decode(line, EventBody if "type" in members else ProgressBody)
    return body


# What clients get


class ProgressRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data of a progress event, and a snapshot. Members without a value are absent.

    ``indeterminate``: no percentage was published yet, and ``progress`` is 0. ``traceparent`` is that of the
    request that has published the event, if it had one.
    """

    session_id: str
    status: str
    progress: float
    message: str
    updated_at: str
    state: str
    indeterminate: bool = False
    stage: str | None = None
    phase: str | None = None
    rate: float | None = None
    eta: float | None = None
    error: str | dict[str, Any] | None = None
    artifacts: tuple[Artifact, ...] = ()
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    started_at: str | None = None
    ended_at: str | None = None
    traceparent: str | None = None
    # Only in a snapshot
    id: str | None = None
    title: str | None = None
    control: str | None = None
    created_at: str | None = None


class CreatedSession(ProgressRecord, frozen=True, kw_only=True, omit_defaults=True):
    """A session that was just created, and where everything about it is."""

    links: dict[str, str]


class SessionList(msgspec.Struct, frozen=True):
    """Sessions without their ``data``, which may be as large as a request body."""

    sessions: list[ProgressRecord]


class ListSnapshot(msgspec.Struct, frozen=True):
    """A page of the newest sessions, and how many there are. ``complete``: it is the last page."""

    total: int
    complete: bool
    sessions: list[ProgressRecord]


class ListChanges(msgspec.Struct, frozen=True):
    """What has changed since the message before: ids of removed and of new sessions, and the sessions."""

    removed: list[str]
    created: list[str]
    sessions: list[ProgressRecord]


def _record(session_id: str, progress: Progress, **more: Any) -> ProgressRecord:
    return ProgressRecord(
        session_id=session_id,
        status=progress.status,
        progress=progress.percent,
        message=progress.message,
        updated_at=isotime(progress.updated_at),
        state=progress.state.value,
        indeterminate=progress.indeterminate,
        stage=progress.stage,
        phase=None if progress.stage is None else phase_of(progress.stage),
        rate=progress.rate,
        eta=progress.eta,
        error=progress.error,
        artifacts=progress.artifacts,
        data=progress.data,
        started_at=None if progress.started_at is None else isotime(progress.started_at),
        ended_at=None if progress.ended_at is None else isotime(progress.ended_at),
        **more,
    )


def _event_name(event: Event) -> str:
    assert event.progress is not None
    match event.progress.state:
        case State.SUCCEEDED:
            return "complete"
        case State.FAILED | State.CANCELLED | State.LOST:
            return "error"
        case _:
            return "progress"


def _render(session_id: str, event: Event) -> list[Message]:
    if event.progress is None:
        return [custom_event(event)]
    trace = None if event.trace is None else event.trace.traceparent
    return [Message(_event_name(event), encode_json(_record(session_id, event.progress, traceparent=trace)))]


def _describe(_dialect: Dialect, session: Session, _watchers: int) -> ProgressRecord:
    return _record(
        session.id,
        current_progress(session),
        id=str(session.cursor),
        title=session.title,
        control=session.control.value,
        created_at=isotime(session.created_at),
    )


def _describe_created(session: Session) -> tuple[str, CreatedSession]:
    path = f"/api/sessions/{quote(session.id, safe='')}"
    links = {"self": path, "status": f"{path}/status", "stream": f"{path}/status/stream"}
    links |= {"ws": f"{path}/status/ws", "events": f"{path}/events", "progress": f"{path}/progress"}
    links |= {name: f"{path}/{name}" for name in ("control", "cancel", "pause", "resume")}
    members = msgspec.structs.asdict(_describe(SESSIONS, session, 0))
    return links["status"], CreatedSession(**members, links=links)


def _describe_item(dialect: Dialect, session: Session) -> ProgressRecord:
    return msgspec.structs.replace(_describe(dialect, session, 0), data=msgspec.UNSET)


def _describe_row(session: Session) -> ProgressRecord:
    """Describe a session for a list of many: nothing that may be large, and texts are cut."""
    progress = current_progress(session)
    record = _record(
        session.id,
        msgspec.structs.replace(progress, data=msgspec.UNSET, artifacts=()),
        title=session.title and _cut(session.title),
        created_at=isotime(session.created_at),
    )
    error = (
        None if progress.error is None else _cut(error_text(msgspec.structs.replace(progress, message="")))
    )
    return msgspec.structs.replace(record, message=_cut(progress.message), error=error)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_ROW_TEXT else text[: MAX_ROW_TEXT - 1] + "…"


def _encode_tracked(_session_id: str, event: Event) -> bytes:
    assert event.progress is not None
    progress = event.progress
    at = isotime(progress.updated_at)
    return encode_json(
        TrackedProgress(progress.status, progress.percent, error_text(progress), progress.error, at)
    )


SESSIONS = Dialect(
    name="sessions",
    render=_render,
    carries_trace=True,
    event_names=frozenset({"complete", "progress"}),
    record_events=frozenset({"complete", "error", "progress"}),
    message_types=(
        MessageType("progress", "The progress as it is now", ProgressRecord),
        MessageType("complete", "The end: the session has succeeded", ProgressRecord),
        MessageType("error", "The end: the session has failed, was cancelled or is lost", ProgressRecord),
    ),
    describe=_describe,
    describe_created=_describe_created,
    describe_item=_describe_item,
    describe_row=_describe_row,
    redis_channel=RedisChannel(
        name="session:{id}:updates",
        body=TrackedProgress,
        encode=_encode_tracked,
        time="updated_at",
        key="session:{id}:progress",
    ),
)
