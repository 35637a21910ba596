"""Typed events of an interaction: what is published under a type arrives under it, as it was published.

Progress is the type ``processing`` with a fraction from 0 to 1. A stream may be opened before anything is
published, and gets what was published before it was opened.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import InvalidProgress
from ..jsontext import decode, one_line
from ..model import Event, OriginalPayload, Progress, Session, State
from ..progress.rules import NewEvent, Update
from .base import Dialect, Message, MessageType, Publication, default_snapshot, encode_json, error_text

__all__ = ["INTERACTION", "InteractionBody"]

_NAME = "interaction"
_ERROR_CODES = {State.FAILED: "FAILED", State.CANCELLED: "CANCELLED", State.LOST: "LOST"}


class Processing(msgspec.Struct, frozen=True):
    """The members of progress that the tracker uses; ``progress`` is a fraction."""

    stage: str | None = None
    progress: float | None = None
    message: str | None = None


class Failure(msgspec.Struct, frozen=True):
    """The members of an error that the tracker uses."""

    code: str | None = None
    message: str | None = None
    recoverable: bool = True


class InteractionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /api/interaction/events/{id}``. ``retry`` is in milliseconds.

    ``processing`` is progress within its stage, as a fraction. ``complete``, and an ``error`` that says
    ``"recoverable": false``, end the session. Every other type is an event of its own.
    """

    type: str
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    retry: int | None = None

    def change(self, _publication: Publication) -> Update | NewEvent:
        """Return the update or event; the clients of this dialect get the data as it is.

        Raises:
            InvalidProgress: the fraction is not from 0 to 1.
        """
        data = msgspec.Raw(b"{}") if self.data is msgspec.UNSET else self.data
        original = OriginalPayload(_NAME, one_line(data))
        if self.type == "processing":
            processing: Processing = decode(bytes(data), Processing)
            fraction = processing.progress
            if fraction is not None and not 0 <= fraction <= 1:
                raise InvalidProgress(f"progress must be a fraction from 0 to 1, not {fraction!r}")
            return Update(
                progress=None if fraction is None else round(fraction * 100, 6),
                stage=processing.stage,
                message=processing.message,
                per_stage=True,
                holds_percent=True,
                original=original,
                retry=self.retry,
            )
        if self.type == "complete":
            message = decode(bytes(data), Processing).message
            return Update(status="completed", message=message, original=original, retry=self.retry)
        if self.type == "error" and not (failure := decode(bytes(data), Failure)).recoverable:
            error = {"code": failure.code, "message": failure.message}
            return Update(
                status="failed",
                message=failure.message,
                error={name: text for name, text in error.items() if text is not None} or None,
                original=original,
                retry=self.retry,
            )
        return NewEvent(self.type, None if self.data is msgspec.UNSET else self.data, self.retry)


def _render(_session_id: str, event: Event) -> list[Message]:
    progress = event.progress
    if progress is None:
        return [Message(event.type, encode_json(event.data))]
    failed = progress.state in _ERROR_CODES
    name = "error" if failed else "complete" if progress.state.terminal else "processing"
    if event.original is not None and event.original.dialect == _NAME:
        return [Message(name, _held(event.original.data, progress))]
    data: dict[str, Any] = {
        "stage": progress.stage,
        "progress": progress.percent / 100,
        "message": progress.message,
    }
    if failed:
        data = {"code": _ERROR_CODES[progress.state], "message": error_text(progress), "recoverable": False}
        if isinstance(progress.error, dict):
            data |= {name: value for name, value in progress.error.items() if value not in (None, "")}
    return [Message(name, encode_json(data))]


def _held(data: msgspec.Raw, progress: Progress) -> bytes:
    """Return the data as it was published, but with the record's fraction where that was held."""
    if progress.state.terminal:
        return bytes(data)
    fraction = decode(bytes(data), Processing).progress
    if fraction is None or round(fraction * 100, 6) == progress.percent:
        return bytes(data)
    members = decode(bytes(data), dict[str, Any])
    return encode_json({**members, "progress": progress.percent / 100})


def _render_snapshot(dialect: Dialect, session: Session) -> list[Message]:
    """Render nothing before the first progress: most interactions are about other events."""
    return [] if session.progress is None else default_snapshot(dialect, session)


INTERACTION = Dialect(
    name=_NAME,
    render=_render,
    render_snapshot=_render_snapshot,
    waits_for_session=True,
    warns_unwatched=True,
    replays_log=True,
    message_types=(
        MessageType("processing", "Progress, as it was published", Processing),
        MessageType("complete", "The end, with the data of whoever has published it", Any),
        MessageType("error", "An error; if it is not recoverable, the end", Failure),
    ),
)
