"""The podcast generator: unnamed messages, so that its clients need only ``onmessage``.

Its services publish the same messages, directly or through a Pub/Sub push subscription. Events of a
publisher's own type keep their names, so that those clients do not take them for a status.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any
from urllib.parse import quote

import msgspec

from ..errors import BadRequest, Invalid
from ..jsontext import decode
from ..model import Event, Session, State, isotime
from ..progress.rules import Update
from .base import Dialect, Message, Publication, current_progress, custom_event, encode_json, error_text

__all__ = ["JOBS_V1", "CreatedJobV1", "JobV1", "PubsubPush", "StatusUpdate"]


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

    def change(self, _publication: Publication) -> Update:
        """Return the update."""
        return Update(
            status=self.status,
            progress=self.progress,
            stage=self.stage,
            message=self.message,
            data=self.data,
        )


class _PubsubMessage(msgspec.Struct, frozen=True, rename="camel"):
    data: str
    message_id: str = ""


class PubsubPush(msgspec.Struct, frozen=True):
    """A delivery of a push subscription of Google Cloud Pub/Sub; ``message.data`` is a status in base64."""

    message: _PubsubMessage

    @property
    def key(self) -> str | None:
        """The idempotency key: Pub/Sub delivers at least once, with the same message id."""
        return f"pubsub {self.message.message_id}" if self.message.message_id else None

    def publication(self) -> tuple[str, StatusUpdate]:
        """Decode the message: the job's id, and its status.

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
        return update.job_id, update


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


def _render(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return [custom_event(event)]
    update = StatusUpdate(
        job_id=session_id,
        status=_STATUS.get(progress.state, "failed"),
        progress=progress.percent,
        stage=progress.stage or progress.state.value,
        message=error_text(progress),
        timestamp=isotime(progress.updated_at),
        data=progress.data,
    )
    return [Message(None, encode_json(update))]


def _describe(dialect: Dialect, session: Session, watchers: int) -> Any:
    session = msgspec.structs.replace(session, progress=current_progress(session))
    status = msgspec.json.decode(dialect.snapshot(session)[-1].data or b"{}", type=StatusUpdate)
    return JobV1(**msgspec.structs.asdict(status), connections=watchers)


def _describe_created(session: Session) -> tuple[str, CreatedJobV1]:
    path = f"/api/v1/jobs/{quote(session.id, safe='')}"
    return path, CreatedJobV1(session.id, "pending", f"{path}/events")


JOBS_V1 = Dialect(
    name="jobs_v1",
    render=_render,
    heartbeat_interval=30.0,
    max_age=3600.0,
    describe=_describe,
    describe_created=_describe_created,
)
