"""What publishers send, each in the words of its dialect, and what it does to a session.

A body is read from JSON and published through the tracker; that is all that the two doors need to know.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, Protocol

import msgspec

from .dialects.jobs import overall
from .dialects.updates import StatusUpdate, transcription_word
from .errors import BadRequest, Invalid, InvalidProgress
from .model import Artifact, Published, Receipt, Session, isotime, phase_of, state_of
from .progress.rules import Update
from .progress.tracker import StoreReceipt, Tracker

__all__ = [
    "Body",
    "EventBody",
    "InteractionBody",
    "JobBody",
    "ProgressBody",
    "TranscriptionBody",
    "decode",
    "read",
    "read_line",
    "status_update",
]


def decode(body: bytes, kind: type[Any]) -> Any:
    """Read JSON of a kind.

    Raises:
        BadRequest: it is no JSON.
        Invalid: it is JSON of another kind; InvalidProgress if it is ``progress`` that is wrong.
    """
    try:
        # What is kept as Raw is not looked into by msgspec, and JSON is UTF-8 (RFC 8259, section 8.1).
        body.decode()
        if b"\\u" in body:
            msgspec.json.decode(body)  # half a surrogate pair is no character; many clients stop there
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise (InvalidProgress if str(error).endswith("`$.progress`") else Invalid)(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # NaN and Infinity are no JSON, but what many encoders write for a number that is none.
        constants: list[str] = []
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(body.decode(), parse_constant=constants.append)
        if constants:
            raise InvalidProgress("NaN and Infinity are no numbers in JSON") from None
        raise BadRequest(f"the body is no JSON: {error}") from None


class Body(Protocol):
    """Something that can be published."""

    async def publish(self, tracker: Tracker, session_id: str, receipt: StoreReceipt | None) -> Receipt:
        """Publish it, and store its receipt if there is a key to store it under."""


class ProgressBody(Update, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST .../progress``."""

    async def publish(self, tracker: Tracker, session_id: str, receipt: StoreReceipt | None) -> Receipt:
        """See ``Tracker.apply``."""
        return await tracker.apply(session_id, self, receipt=receipt)


class EventBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST .../events``. ``retry`` is in milliseconds."""

    type: str
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    retry: int | None = None

    async def publish(self, tracker: Tracker, session_id: str, receipt: StoreReceipt | None) -> Receipt:
        """See ``Tracker.emit``."""
        data = None if self.data is msgspec.UNSET else self.data
        return await tracker.emit(session_id, self.type, data, retry=self.retry, receipt=receipt)


class _Processing(msgspec.Struct, frozen=True):
    """What the tracker needs of an interaction's progress; ``progress`` is a fraction."""

    stage: str | None = None
    progress: float | None = None
    message: str | None = None


class _Failure(msgspec.Struct, frozen=True):
    """What the tracker needs of an interaction's error."""

    code: str | None = None
    message: str | None = None
    recoverable: bool = True


class InteractionBody(EventBody, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /api/interaction/events/{id}``.

    ``processing`` is progress, as a fraction of its stage: another stage may be less far, and the same one
    may begin again, at 0, with the next recording. ``complete`` and an ``error`` that says
    ``"recoverable": false`` end the session. All else is an event of its own.
    """

    async def publish(self, tracker: Tracker, session_id: str, receipt: StoreReceipt | None) -> Receipt:
        """Publish it; the clients of this dialect get the data as it is."""
        data = msgspec.Raw(b"{}") if self.data is msgspec.UNSET else self.data
        published = Published("interaction", _one_line(data))
        if self.type == "processing":
            said: _Processing = decode(bytes(data), _Processing)
            if said.progress is not None and not 0 <= said.progress <= 1:
                raise InvalidProgress(f"progress is a fraction from 0 to 1 here, not {said.progress!r}")

            def update(session: Session) -> Update:
                before = session.progress
                percent = None if said.progress is None else round(said.progress * 100, 6)
                back = before is not None and percent is not None and percent < before.percent
                another = before is not None and said.stage not in (None, before.stage)
                again = back and (another or percent == 0)
                return Update(progress=percent, stage=said.stage, message=said.message, restart=again)

            return await tracker.apply(session_id, update, receipt=receipt, published=published)
        if self.type == "complete":
            end = Update(status="completed", message=decode(bytes(data), _Processing).message)
            return await tracker.apply(session_id, end, receipt=receipt, published=published)
        if self.type == "error" and not (failure := decode(bytes(data), _Failure)).recoverable:
            error = {"code": failure.code, "message": failure.message}
            end = Update(status="failed", message=failure.message, error=error)
            return await tracker.apply(session_id, end, receipt=receipt, published=published)
        # Not super(): a struct made anew for its slots has none.
        return await EventBody.publish(self, tracker, session_id, receipt)


class JobBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /api/jobs/{id}/progress``; ``progress`` is in percent of its stage."""

    status: str | None = None
    stage: str | None = None
    progress: float | None = None
    message: str | None = None
    error: str | dict[str, Any] | None = None
    artifacts: tuple[Artifact, ...] | None = None

    async def publish(self, tracker: Tracker, session_id: str, receipt: StoreReceipt | None) -> Receipt:
        """Publish it as progress of the whole."""
        if self.progress is not None and not 0 <= self.progress <= 100:
            raise InvalidProgress(
                f"progress is in percent of the stage, from 0 to 100, not {self.progress!r}"
            )

        def update(session: Session) -> Update:
            before = session.progress
            stage = self.stage or (None if before is None else before.stage)
            percent = None
            if self.progress is not None:
                percent = overall(stage, self.progress)
            elif before is not None and self.stage is not None and phase_of(self.stage) != before.phase:
                # A phase that begins has the phases before it behind it.
                percent = max(before.percent, overall(stage, 0))
            return Update(
                status=self.status,
                progress=percent,
                stage=self.stage,
                message=self.message,
                error=self.error,
                artifacts=self.artifacts,
            )

        return await tracker.apply(session_id, update, receipt=receipt)


class _Transcription(msgspec.Struct, frozen=True):
    """What the tracker needs of a transcription's status; the rest is for its clients."""

    status: str
    progress: float | None = None
    message: str | None = None
    timestamp: str | None = None


class TranscriptionBody(msgspec.Struct, frozen=True):
    """The body of ``POST /api/v1/sessions/{id}/status``, with whatever else the worker adds."""

    said: _Transcription
    fields: dict[str, msgspec.Raw]

    async def publish(self, tracker: Tracker, session_id: str, receipt: StoreReceipt | None) -> Receipt:
        """Publish it; the clients of this dialect get all of its members."""
        said = self.said
        known = {
            "session_id": session_id,
            "status": said.status,
            "progress": said.progress,
            "message": said.message,
            "timestamp": said.timestamp or isotime(tracker.clock()),
        }
        status = transcription_word(said.status, state_of(said.status))
        whole = {**known, **self.fields, "session_id": session_id, "status": status}
        published = Published("transcription", _one_line(msgspec.json.encode(whole)))
        failed = said.status.strip().lower() == "failed"
        update = Update(
            status=said.status,
            progress=said.progress,
            message=said.message,
            error=said.message if failed else None,
        )
        return await tracker.apply(session_id, update, receipt=receipt, published=published)


def status_update(said: StatusUpdate) -> Update:
    """Read a podcast service's status update as progress."""
    return Update(
        status=said.status, progress=said.progress, stage=said.stage, message=said.message, data=said.data
    )


def read(route: str, body: bytes) -> Body:
    """Read the body of a publish route, by the route's name. Raises as ``decode`` does."""
    found: Body
    if route == "transcription_status":
        return TranscriptionBody(decode(body, _Transcription), decode(body, dict[str, msgspec.Raw]))
    found = decode(body, _KINDS[route])
    return found


def read_line(text: bytes) -> Body:
    """Read a line of a batch: an event if it has a type, else progress."""
    fields = decode(text, dict[str, msgspec.Raw])
    found: Body = decode(text, EventBody if "type" in fields else ProgressBody)
    return found


_KINDS: dict[str, type[Any]] = {
    "progress": ProgressBody,
    "events": EventBody,
    "interact": InteractionBody,
    "job_progress": JobBody,
}


def _one_line(data: bytes | msgspec.Raw) -> msgspec.Raw:
    """Take the line ends out of JSON that may have been indented."""
    text = bytes(data)
    return msgspec.Raw(msgspec.json.format(text, indent=-1) if b"\n" in text or b"\r" in text else text)
