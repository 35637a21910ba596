"""The coaching assistant: unnamed messages, so that its clients need only ``onmessage``.

Events of a publisher's own type keep their names, so that those clients do not take them for a status.
"""

from __future__ import annotations

import msgspec

from ..jsontext import decode, one_line
from ..model import Event, OriginalPayload, State, isotime, state_of
from ..progress.rules import Update
from .base import Dialect, Message, Publication, custom_event, encode_json, error_text

__all__ = ["TRANSCRIPTION", "TranscriptionBody", "TranscriptionStatus", "status_label"]

_NAME = "transcription"


class TranscriptionBody(msgspec.Struct, frozen=True):
    """The body of ``POST /api/v1/sessions/{id}/status``; other members are passed on to the clients.

    ``progress`` is in percent, ``timestamp`` is the publisher's own.
    """

    status: str
    progress: float | None = None
    message: str | None = None
    timestamp: str | None = None

    def change(self, publication: Publication) -> Update:
        """Return the update; the clients of this dialect get all of its members."""
        known = {
            "session_id": publication.session_id,
            "status": self.status,
            "progress": self.progress,
            "message": self.message,
            "timestamp": self.timestamp or isotime(publication.now),
        }
        members = decode(publication.raw, dict[str, msgspec.Raw])
        label = status_label(self.status, state_of(self.status))
        payload = {**known, **members, "session_id": publication.session_id, "status": label}
        return Update(
            status=self.status,
            progress=self.progress,
            message=self.message,
            error=self.message if self.status.strip().lower() == "failed" else None,
            original=OriginalPayload(_NAME, one_line(encode_json(payload))),
        )


class TranscriptionStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message to the clients: ``progress`` in percent, ``status`` as the worker calls it."""

    session_id: str
    status: str
    progress: float
    message: str
    timestamp: str


def status_label(status: str, state: State) -> str:
    """Return the status under which clients recognise the end: they stop at ``completed`` and ``failed``."""
    if not state.terminal:
        return status
    return "completed" if state is State.SUCCEEDED else "failed"


def _render(session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return [custom_event(event)]
    if event.original is not None and event.original.dialect == _NAME:
        return [Message(None, bytes(event.original.data))]
    status = TranscriptionStatus(
        session_id,
        status_label(progress.status, progress.state),
        progress.percent,
        error_text(progress),
        isotime(progress.updated_at),
    )
    return [Message(None, encode_json(status))]


TRANSCRIPTION = Dialect(
    name=_NAME,
    render=_render,
    idle_timeout=300.0,
    throttle=0.1,
    can_be_disabled=True,
)
