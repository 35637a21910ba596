"""What a change makes of a session: its record afterwards, and the event. Pure: time is an argument.

A step is a function of the session as it is and the time (POSIX seconds), so that it can be decided again
when another change was stored first. What an update does to the progress is in ``rules``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection
from functools import lru_cache

import msgspec

from .. import sse
from ..errors import Conflict, Invalid, PayloadTooLarge, SessionEnded
from ..jsontext import to_raw
from ..model import Control, Event, Progress, Session, State, check_id_type
from .rules import Change, NewEvent, Update, advance, begins_attempt, changed_fields, event_record

__all__ = [
    "Step",
    "apply_change",
    "apply_claim",
    "apply_control",
    "apply_loss",
    "apply_update",
    "begin_session",
    "check_data",
    "check_session_id",
    "queued_progress",
]

_new = msgspec.structs.replace

# Given a session and the time: the session after one event and that event, None to change nothing.
Step = Callable[[Session, float], tuple[Session, Event] | None]


def check_session_id(session_id: str) -> str:
    """Return ``session_id``; raise Invalid if it cannot be one, TypeError if it is not a string."""
    check_id_type(session_id)
    bad = session_id in {".", ".."}  # clients remove these from a path (RFC 3986, section 5.2.4)
    bad = bad or not session_id.isprintable() or bool(set(session_id) & set(' /\\?#%"'))
    if 1 <= len(session_id) <= 128 and not bad:
        return session_id
    raise Invalid('a session id has 1 to 128 printable characters, without space, / \\ ? # % and "')


def begin_session(session_id: str, now: float) -> Session:
    """Return a new session, whose log is empty. Raises as ``check_session_id``."""
    check_session_id(session_id)
    epoch = _new_epoch()
    return Session(id=session_id, epoch=epoch, first_epoch=epoch, created_at=now, touched_at=now)


def queued_progress(data: msgspec.Raw | msgspec.UnsetType, now: float) -> Progress:
    """Return the progress of a session that waits to be worked on."""
    return Progress(status="queued", state=State.QUEUED, indeterminate=True, data=data, updated_at=now)


def _new_epoch() -> str:
    return secrets.token_hex(4)


def apply_update(session: Session, update: Update, now: float) -> tuple[Session, Event]:
    """Return what an update makes of a session.

    Raises:
        SessionEnded, InvalidProgress, Invalid: see ``rules.advance``.
    """
    progress = advance(session.progress, update, now)
    changed = changed_fields(session.progress, progress, update)
    record = event_record(progress, update)
    event = Event(session.seq + 1, "progress", record, now, changed, update.retry, update.original)
    return _new(session, progress=progress, original=update.original), event


def check_data(data: msgspec.Raw, limit: float) -> None:
    """Check that the data of an event has at most so many bytes.

    Raises:
        PayloadTooLarge: it has more.
    """
    if (size := len(data)) > limit:
        raise PayloadTooLarge(
            f"the data of one event has at most max_event = {limit} bytes of JSON, not {size}",
            limit="max_event",
        )


def apply_change(change: Change, reserved: Collection[str], max_data: float = math.inf) -> Step:
    """Return the step of a publisher's change.

    Args:
        change: what it is.
        reserved: event types that only the server uses.
        max_data: limit of an event's data, in bytes.

    Raises:
        PayloadTooLarge: the data is larger.
        Invalid: the event type is empty, too long or reserved, or something cannot be written as JSON.
    """
    if isinstance(change, NewEvent):
        return _append_event(change, reserved, max_data)

    def step(session: Session, now: float) -> tuple[Session, Event]:
        update = change if isinstance(change, Update) else change(session)
        _check_retry(update.retry)
        if update.data is not msgspec.UNSET:
            data = to_raw(update.data)
            check_data(data, max_data)
            update = _new(update, data=data)
        if update.original is not None:
            check_data(update.original.data, max_data)
        if begins_attempt(session.progress, update):
            session = _next_attempt(session, now)
        return apply_update(session, update, now)

    return step


def _next_attempt(session: Session, now: float) -> Session:
    """Return the session at the beginning of another attempt, whose log is empty."""
    return _new(
        session,
        epoch=_new_epoch(),
        seq=0,
        attempt=session.attempt + 1,
        progress=queued_progress(session.data, now),
        original=None,
        control=Control.CONTINUE,
        job=None,  # whoever tries again has not asked the server to
        instance=None,
    )


@lru_cache(maxsize=1024)
def _check_event_type(event_type: str) -> None:
    if not event_type or len(event_type) > 128 or not sse.valid_field(event_type):
        raise Invalid("an event type has 1 to 128 characters, none of them CR, LF or NUL")
    to_raw(event_type)


def _append_event(new: NewEvent, reserved: Collection[str], max_data: float) -> Step:
    _check_event_type(new.type)
    if new.type in reserved:
        raise Invalid(
            f"the event type {new.type!r} is reserved: the server, or a browser's EventSource itself, "
            "fires it; choose another"
        )
    _check_retry(new.retry)
    raw = to_raw(new.data)
    check_data(raw, max_data)

    def step(session: Session, now: float) -> tuple[Session, Event]:
        _check_not_ended(session)
        return session, Event(session.seq + 1, new.type, raw, now, retry=new.retry)

    return step


def apply_control(command: Control, *, force: bool) -> Step:
    """Return the step of a watcher's request; see ``Tracker.control``."""

    def step(session: Session, now: float) -> tuple[Session, Event] | None:
        _check_not_ended(session)
        if command is Control.CANCEL and (force or _is_queued(session)):
            session, event = apply_update(session, Update(status="cancelled"), now)
            return _new(session, control=command), event
        if session.control is command:
            return None
        if session.control is Control.CANCEL:
            raise Conflict("a cancel request cannot be withdrawn")
        event = Event(session.seq + 1, "control", to_raw({"control": command.value}), now)
        return _new(session, control=command), event

    return step


def apply_claim(claimed: Session, lease: float | None, instance: str | None) -> Step:
    """Return the step that starts a queued session; see ``Tracker.claim``."""

    def step(session: Session, now: float) -> tuple[Session, Event] | None:
        is_same = session.epoch == claimed.epoch
        if is_same and instance is not None and session.instance == instance and not session.ended:
            return None
        if not (is_same and _is_queued(session) and session.instance is None):
            raise Conflict(f"the session {session.id!r} is not queued any more")
        session, event = apply_update(session, Update(status="running"), now)
        return _new(session, instance=instance, lease=session.lease if lease is None else lease), event

    return step


def apply_loss(lost: Session, reason: str) -> Step:
    """Return the step that ends a session whose instance has stopped; see ``Tracker.end_as_lost``."""

    def step(session: Session, now: float) -> tuple[Session, Event] | None:
        if session.ended or (session.epoch, session.instance) != (lost.epoch, lost.instance):
            return None
        return apply_update(session, Update(status="lost", error=reason), now)

    return step


def _is_queued(session: Session) -> bool:
    return session.progress is not None and session.progress.state is State.QUEUED


def _check_retry(retry: int | None) -> None:
    if retry is not None and not 0 <= retry <= 86_400_000:
        raise Invalid("retry is in milliseconds, from 0 to 86400000")


def _check_not_ended(session: Session) -> None:
    if session.ended:
        raise SessionEnded(f"the session has ended: {session.progress and session.progress.status}")
