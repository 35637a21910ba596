"""The two dialects of unnamed messages, for clients that only know ``onmessage``.

``JOBS_V1`` is the podcast generator's, ``TRANSCRIPTION`` the coaching assistant's. Events of a publisher's
own keep their names, so that those clients do not take them for a status.
"""

from __future__ import annotations

import msgspec

from ..model import Event, State, isotime
from .base import Dialect, Message, raw_json

__all__ = ["JOBS_V1", "TRANSCRIPTION", "StatusUpdate", "TranscriptionStatus", "transcription_word"]


class StatusUpdate(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A message of the podcast generator; it is also what its services publish.

    ``status`` is one of pending, processing, completed and failed, ``progress`` is in percent.
    """

    job_id: str
    status: str | None = None
    progress: float | None = None
    stage: str | None = None
    message: str | None = None
    timestamp: str | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_V1 = {
    State.QUEUED: "pending",
    State.RUNNING: "processing",
    State.PAUSED: "processing",
    State.SUCCEEDED: "completed",
}


def _named(event: Event) -> list[Message]:
    # An EventSource takes "error" for one of its connection.
    return [
        Message("warning" if event.type == "error" else event.type, raw_json(event.data), retry=event.retry)
    ]


def _shape_v1(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return _named(event)
    update = StatusUpdate(
        job_id=session_id,
        status=_V1.get(progress.state, "failed"),
        progress=progress.percent,
        stage=progress.stage or progress.state.value,
        message=_explained(event),
        timestamp=isotime(progress.updated_at),
        data=progress.data,
    )
    return [Message(None, raw_json(update))]


def _explained(event: Event) -> str:
    """The message; of an end that has none, what went wrong."""
    progress = event.progress
    assert progress is not None
    if progress.error is not None and (not progress.message or progress.state is State.FAILED):
        error = progress.error
        return error if isinstance(error, str) else str(error.get("message", error))
    return progress.message


class TranscriptionStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message of the coaching assistant: ``progress`` in percent, ``status`` as its worker calls it."""

    session_id: str
    status: str
    progress: float
    message: str
    timestamp: str


def transcription_word(status: str, state: State) -> str:
    """Say a status so that the coaching assistant's clients know the end: at two words alone they stop."""
    if not state.terminal:
        return status
    return "completed" if state is State.SUCCEEDED else "failed"


def _shape_transcription(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return _named(event)
    if event.published is not None and event.published.dialect == "transcription":
        return [Message(None, bytes(event.published.data))]
    status = transcription_word(progress.status, progress.state)
    said = TranscriptionStatus(
        session_id, status, progress.percent, _explained(event), isotime(progress.updated_at)
    )
    return [Message(None, raw_json(said))]


JOBS_V1 = Dialect(
    name="jobs_v1",
    shape=_shape_v1,
    heartbeat=lambda _now: "heartbeat",
    interval=30.0,
    max_age=3600.0,
)

TRANSCRIPTION = Dialect(
    name="transcription",
    shape=_shape_transcription,
    heartbeat=lambda _now: "heartbeat",
    interval=15.0,
    idle=300.0,
    throttle=0.1,
)
