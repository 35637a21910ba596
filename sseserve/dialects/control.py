"""What a worker listens to: what its watchers ask, and the end. Everything else is passed over."""

from __future__ import annotations

from ..model import Event, Session
from .base import Dialect, Message, raw_json

__all__ = ["CONTROL"]


def _end(status: str) -> Message:
    return Message("ended", raw_json({"status": status}))


def _shape(_session_id: str, event: Event) -> list[Message]:
    if event.type == "control":
        return [Message("control", raw_json(event.data))]
    progress = event.progress
    return [_end(progress.status)] if progress is not None and progress.state.terminal else []


def _look(_dialect: Dialect, session: Session) -> list[Message]:
    if session.ended and session.progress is not None:
        return [_end(session.progress.status)]
    return [Message("control", raw_json({"control": session.control}))]


CONTROL = Dialect(
    name="control",
    shape=_shape,
    look=_look,
    heartbeat=lambda _now: "heartbeat",
    interval=15.0,
)
