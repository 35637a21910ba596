"""Our own dialect, which is that of the therapy sessions: progress, complete and error events."""

from __future__ import annotations

from typing import Any

import msgspec

from ..model import Artifact, Event, Progress, Session, State, isotime
from .base import Dialect, Message, raw_json

__all__ = ["SESSIONS", "Payload", "snapshot"]


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
    """Describe a session as ``GET .../status`` answers it: progress, cursor, and what is asked of it."""
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


def _name(event: Event) -> str:
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


def _shape(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    data = event.data if progress is None else _payload(session_id, progress)
    return [Message(_name(event), raw_json(data), retry=event.retry)]


SESSIONS = Dialect(
    name="sessions",
    shape=_shape,
    heartbeat=lambda _now: "heartbeat",
    interval=15.0,
)
