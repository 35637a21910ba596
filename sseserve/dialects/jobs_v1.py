"""The podcast generator: unnamed messages, so that its clients need only ``onmessage``.

Its services publish the same messages through a Pub/Sub subscription, and the clients get them as they were
published. Events of a publisher's own type keep their names, so that those clients do not take them for a
status.
"""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Any
from urllib.parse import quote

import msgspec

from ..errors import BadRequest, Invalid
from ..jsontext import decode, one_line
from ..model import Event, OriginalPayload, Session, State, isotime
from ..progress.rules import Update
from .base import (
    Dialect,
    Message,
    MessageType,
    Publication,
    RedisChannel,
    custom_event,
    encode_json,
    error_text,
)

__all__ = ["JOBS_V1", "CreatedJobV1", "JobV1", "PubsubPush", "StatusUpdate"]

_NAME = "jobs_v1"


class StatusUpdate(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A message to the clients; it is also what the services publish.

    ``status`` is one of pending, processing, completed and failed, ``progress`` is in percent.
    """

    job_id: str
    status: str | None = None
    progress: float | None = None
    stage: str | None = None
    message: str | None = None
    timestamp: str | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    def change(self, publication: Publication) -> Update:
        """Return the update; the clients of this dialect get all of its members."""
        return Update(
            status=self.status,
            progress=self.progress,
            stage=self.stage,
            message=self.message,
            data=self.data,
            holds_percent=True,
            original=OriginalPayload(_NAME, one_line(publication.raw)),
        )


class PubsubMessage(msgspec.Struct, frozen=True, rename="camel"):
    data: str
    message_id: str = ""
    publish_time: Any = None


class PubsubPush(msgspec.Struct, frozen=True):
    """A delivery of a push subscription of Google Cloud Pub/Sub; ``message.data`` is a status in base64."""

    message: PubsubMessage

    @property
    def key(self) -> str | None:
        """The idempotency key: Pub/Sub delivers at least once, with the same message id."""
        return f"pubsub {self.message.message_id}" if self.message.message_id else None

    @property
    def published_at(self) -> float | None:
        """When it was published, in POSIX seconds."""
        try:
            published = msgspec.convert(self.message.publish_time, datetime)
        except msgspec.ValidationError:
            return None
        return None if published.tzinfo is None else published.timestamp()

    def publication(self) -> tuple[str, StatusUpdate, bytes]:
        """Decode the message: the job's id, its status, and the bytes of the latter.

        Raises:
            BadRequest: it is not base64, or not JSON.
            Invalid: it is not a status update, or names no job.
        """
        try:
            data = base64.b64decode(self.message.data, validate=True)
        except (binascii.Error, ValueError):
            raise BadRequest("the message's data is not valid base64") from None
        update: StatusUpdate = decode(data, StatusUpdate)
        if not update.job_id:
            raise Invalid("the status update has no jobId")
        return update.job_id, update, data


class JobV1(StatusUpdate, frozen=True, rename="camel", omit_defaults=True):
    """A job's last status, and how many watch it."""

    connections: int | msgspec.UnsetType = msgspec.UNSET


class CreatedJobV1(msgspec.Struct, frozen=True, rename={"job_id": "jobId", "sse_endpoint": "sseEndpoint"}):
    """A job that was just created, and where its stream is."""

    job_id: str
    status: str
    sse_endpoint: str


_STATUS = {
    State.QUEUED: "pending",
    State.RUNNING: "processing",
    State.PAUSED: "processing",
    State.SUCCEEDED: "completed",
}
_STATUSES = frozenset({*_STATUS.values(), "failed"})
# The members that are the tracker's: it may have held the percentage, for one.
_CHECKED = frozenset({"jobId", "status", "progress"})


def _status(label: str, state: State) -> str:
    """Return one of the four statuses: as published if it is one, else the one of the state."""
    return label if label in _STATUSES else _STATUS.get(state, "failed")


def _render(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return [custom_event(event)]
    members: dict[str, Any] = {
        "jobId": session_id,
        "status": _status(progress.status, progress.state),
        "progress": progress.percent,
        "stage": progress.stage or progress.state.value,
        "message": error_text(progress),
        "timestamp": isotime(progress.updated_at),
    }
    if event.original is not None and event.original.dialect == _NAME:
        published: dict[str, msgspec.Raw] = msgspec.json.decode(
            event.original.data, type=dict[str, msgspec.Raw]
        )
        for name, value in published.items():
            if name not in _CHECKED and not (name in members and bytes(value) == b"null"):
                members[name] = value
    elif "data" in event.changed and progress.data is not msgspec.UNSET:
        members["data"] = progress.data
    return [Message(None, encode_json(members))]


def _describe(dialect: Dialect, session: Session, watchers: int) -> Any:
    status = msgspec.json.decode(dialect.snapshot(session)[-1].data, type=dict[str, msgspec.Raw])
    return {**status, "connections": watchers}


def _describe_created(session: Session) -> tuple[str, CreatedJobV1]:
    path = f"/api/v1/jobs/{quote(session.id, safe='')}"
    return path, CreatedJobV1(session.id, "pending", f"{path}/events")


JOBS_V1 = Dialect(
    name=_NAME,
    render=_render,
    heartbeat_interval=30.0,
    waits_for_session=True,
    max_age=3600.0,
    counts_watchers=True,
    describe=_describe,
    describe_created=_describe_created,
    message_types=(MessageType(None, "The status as it is now, or was published", StatusUpdate),),
    redis_channel=RedisChannel(
        name="job:{id}:updates",
        body=StatusUpdate,
        encode=lambda session_id, event: _render(session_id, event)[0].data,
        instances="job:{id}:instances",
        instance="instance:{instance}:{id}",
    ),
)
