"""The coaching assistant: unnamed messages, so that its clients need only ``onmessage``.

Its worker publishes the same messages, with members of its own; the clients get them as they were published.
Events of a publisher's own type keep their names, so that those clients do not take them for a status.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..jsontext import decode, one_line
from ..model import Event, OriginalPayload, State, isotime
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

__all__ = ["TRANSCRIPTION", "TranscriptionBody", "TranscriptionStatus", "status_label"]

_NAME = "transcription"
_KNOWN = frozenset({"session_id", "status", "progress", "message", "timestamp"})


class TranscriptionBody(msgspec.Struct, frozen=True):
    """The body of ``POST /api/v1/sessions/{id}/status``, and a message of the Redis channel.

    Other members are passed on to the clients.

    ``progress`` is in percent, ``timestamp`` is the publisher's own. What is absent or null is as it was.
    """

    status: str | None = None
    progress: float | None = None
    message: str | None = None
    timestamp: str | None = None

    def change(self, publication: Publication) -> Update:
        """Return the update; its other members are the data of the clients of other dialects.

        A task that has failed and is tried again publishes to the same session.
        """
        members = decode(publication.raw, dict[str, msgspec.Raw])
        others = {name: value for name, value in members.items() if name not in _KNOWN}
        return Update(
            status=self.status,
            progress=self.progress,
            message=self.message,
            data=msgspec.Raw(one_line(encode_json(others))) if others else msgspec.UNSET,
            holds_percent=True,
            retries_failure=True,
            original=OriginalPayload(_NAME, one_line(publication.raw)),
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
    members: dict[str, Any] = {
        "session_id": session_id,
        "status": status_label(progress.status, progress.state),
        "progress": progress.percent,
        "message": error_text(progress),
        "timestamp": isotime(progress.updated_at),
    }
    if event.original is not None and event.original.dialect == _NAME:
        published = decode(bytes(event.original.data), dict[str, msgspec.Raw])
        for name, value in published.items():
            # The record knows better: the percentage may have been held.
            checked = name in ("session_id", "status") or (
                name == "progress" and msgspec.json.decode(value) != progress.percent
            )
            if not (checked or (name in members and bytes(value) == b"null")):
                members[name] = value
    return [Message(None, encode_json(members))]


TRANSCRIPTION = Dialect(
    name=_NAME,
    render=_render,
    idle_timeout=300.0,
    throttle=0.1,
    can_be_disabled=True,
    message_types=(MessageType(None, "The status as it is now, or was published", TranscriptionStatus),),
    redis_channel=RedisChannel(
        name="transcription:status:{id}",
        body=TranscriptionBody,
        encode=lambda session_id, event: _render(session_id, event)[0].data,
    ),
)
