"""The records that all other modules use. No I/O, no clock.

All of them are frozen: an event or a progress record never changes once it exists. So none is in a cycle, and
Python's garbage collector need not look at them (``gc=False``).

Times are POSIX seconds, UTC, as floats; on the wire they are RFC 3339 with a ``Z``.
Percentages are 0 to 100. Rates are percent per second, ETAs are seconds.
"""

from __future__ import annotations

import enum
import re
from datetime import UTC, datetime
from typing import Any, Self

import msgspec

from .trace_context import TraceContext

__all__ = [
    "Artifact",
    "Control",
    "Cursor",
    "EndReason",
    "Event",
    "OriginalPayload",
    "Progress",
    "Receipt",
    "Session",
    "State",
    "check_id_type",
    "isotime",
    "state_of",
]


class State(enum.StrEnum):
    """What a session is doing, as the server's rules see it."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def terminal(self) -> bool:
        """Whether nothing may follow."""
        return self in _TERMINAL


_TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.LOST})

_LABELS = {
    State.QUEUED: "queued pending created scheduled waiting accepted new submitted",
    State.PAUSED: "paused suspended on_hold",
    State.SUCCEEDED: "succeeded success successful processed completed complete done finished skipped",
    State.FAILED: "failed failure error errored",
    State.CANCELLED: "cancelled canceled aborted revoked",
    State.LOST: "lost",
}
_STATE_OF = {label: state for state, labels in _LABELS.items() for label in labels.split()}


def state_of(label: str) -> State:
    """Return the state that a publisher's free ``label`` stands for; an unknown label means running."""
    return _STATE_OF.get(label.strip().lower().replace("-", "_").replace(" ", "_"), State.RUNNING)


class Control(enum.StrEnum):
    """What the watchers ask of the worker; the response to its next update tells it."""

    CONTINUE = "continue"
    PAUSE = "pause"
    CANCEL = "cancel"


class EndReason(enum.StrEnum):
    """Why a stream has ended: the first thing that led to it. Every stream ends for one of these."""

    ENDED = "ended"  # the session has ended, and the client was sent all of it
    CLIENT_LEFT = "client_left"  # the client has closed its stream or connection, or its connection was lost
    DRAINED = "drained"  # the server stops
    OVERFLOW = "overflow"  # the client was too slow: its buffer was full
    SEND_TIMEOUT = "send_timeout"  # the client took nothing for ``send_timeout``
    EXPIRED = "expired"  # the token has expired
    REVOKED = "revoked"  # the token was revoked, or its key, or what its role may watch
    MAX_AGE = "max_age"  # the stream was open for as long as its dialect allows
    IDLE = "idle"  # nothing happened for as long as its dialect allows
    DELETED = "deleted"  # the session was deleted, or is not visible to the client any more
    REPLACED = "replaced"  # the session has another log now; the client was asked to come back
    DEGRADED = "degraded"  # the engine could not say whether the client may watch; it was asked to come back
    PROTOCOL_ERROR = "protocol_error"  # the client has broken the protocol of WebSocket
    ERROR = "error"  # an error of the server, which is logged


_CURSOR = re.compile(r"([0-9A-Za-z]{1,32})-(0|[1-9][0-9]{0,17})(?:\.([1-9][0-9]{0,2}))?")


class Cursor(msgspec.Struct, frozen=True, order=True, gc=False):
    """A place in a log, just after the event ``seq``. It is what ``id:`` and ``Last-Event-ID`` carry.

    Where a dialect sends an event as several messages, all but the last have a place within the event:
    after its first ``part`` messages.
    """

    epoch: str
    seq: int
    part: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}.{self.part}" if self.part else f"{self.epoch}-{self.seq}"

    @property
    def complete_seq(self) -> int:
        """The last event that has been seen as a whole."""
        return self.seq - 1 if self.part else self.seq

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the cursor written in ``text``, or None if it is not in a cursor's format."""
        match = _CURSOR.fullmatch(text)
        return cls(match[1], int(match[2]), int(match[3] or 0)) if match else None


class Artifact(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """A file that the work produced. ``size_bytes`` is in bytes, ``type`` a media type (RFC 6838)."""

    name: str
    type: str | None = None
    url: str | None = None
    path: str | None = None
    size_bytes: int | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The state record of a session after one update.

    Every progress event carries the whole record, so a newer one supersedes all older ones. Until its
    publisher gives a percentage it is ``indeterminate``, and ``percent`` is 0.
    """

    status: str
    state: State
    percent: int | float = 0  # a whole number is an int, also after it was stored: 40 is not written 40.0
    indeterminate: bool = False
    stage: str | None = None
    message: str = ""
    error: str | dict[str, Any] | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    artifacts: tuple[Artifact, ...] = ()
    started_at: float | None = None
    updated_at: float = 0.0
    ended_at: float | None = None
    rate: float | None = None
    eta: float | None = None
    # What the estimate continues from; see ``progress.rules``.
    last_advance_at: float | None = None
    weight: float = 0.0
    smoothed: float = 0.0

    @property
    def size(self) -> int:
        """About what it takes without its ``data``, in memory and on the wire, in bytes."""
        size = 384 + len(self.status) + len(self.stage or "") + len(self.message)
        if self.error is not None or self.artifacts:
            size += len(msgspec.json.encode((self.error, self.artifacts)))
        return size


class OriginalPayload(msgspec.Struct, frozen=True, gc=False):
    """A payload as it was published in one dialect; the clients of that dialect get it back unchanged."""

    dialect: str
    data: msgspec.Raw


# What may have changed in an event that a newer one supersedes; see ``Event.changed``.
_CONFLATABLE = frozenset({"data", "large_data"})


class Event(msgspec.Struct, frozen=True, gc=False):
    """One immutable entry of a session's log.

    ``data`` is the ``Progress`` record of a progress event, and one line of JSON for any other.
    ``changed`` names what a progress event changes besides the amount: state, status, stage, error,
    artifacts, that it restarts, or that its update had ``data`` or ``large_data``, which no later event
    repeats. ``retry`` is in milliseconds and asks the client to wait that long before it reconnects.
    ``trace`` is the trace that it is a part of.
    """

    seq: int
    type: str
    data: Progress | msgspec.Raw
    at: float
    changed: tuple[str, ...] = ()
    retry: int | None = None
    original: OriginalPayload | None = None
    trace: TraceContext | None = None

    @property
    def weight(self) -> int:
        """About what it takes in memory, and on the wire, in bytes."""
        size = 128 if self.original is None else 256 + len(self.original.data)
        if not isinstance(self.data, Progress):
            return size + len(self.data)
        progress = self.data
        size += progress.size
        if progress.data is not msgspec.UNSET:
            size += len(progress.data)
        return size

    @property
    def conflatable(self) -> bool:
        """Whether this is progress that changes nothing but the amount, or data, and sets no retry time.

        Only these events may be dropped for a slow client: when a newer progress waits in its buffer, and for
        data one that has new data too.
        """
        return (
            self.retry is None and isinstance(self.data, Progress) and _CONFLATABLE.issuperset(self.changed)
        )

    @property
    def progress(self) -> Progress | None:
        """The record of a progress event, None for any other event."""
        return self.data if isinstance(self.data, Progress) else None


class Session(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One piece of work that somebody watches, as an engine keeps it. ``seq`` is its log's last."""

    id: str
    epoch: str
    first_epoch: str = ""  # of its first log: a later session of the same id has another one
    seq: int = 0
    attempt: int = 1  # each has a log of its own; see ``progress.rules``
    owner: str | None = None
    viewers: tuple[str, ...] = ()
    title: str | None = None
    ttl: float | None = None
    lease: float | None = None
    correlation_id: str | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    created_at: float = 0.0
    touched_at: float = 0.0
    producer_seq: int = 0  # of the last event that was the producer's own, which has renewed its lease
    stalled: bool = False
    progress: Progress | None = None
    original: OriginalPayload | None = None  # the payload of the last progress, as it was published
    control: Control = Control.CONTINUE
    # Of a job that waits in the server's queue, or is run from it: the runner that it names.
    job: str | None = None
    instance: str | None = None  # the instance of the server that runs it

    @property
    def cursor(self) -> Cursor:
        """The place after the newest event."""
        return Cursor(self.epoch, self.seq)

    @property
    def ended(self) -> bool:
        """Whether the log ends with a terminal event."""
        return self.progress is not None and self.progress.state.terminal

    @property
    def is_waiting(self) -> bool:
        """Whether this is a job that waits in the server's queue."""
        return self.job is not None and self.instance is None and not self.ended


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What a publisher gets back: the cursor of its event, and what the watchers ask of it.

    ``created``: there was no such session before. ``count`` and ``digest`` say how much of a request with an
    ``Idempotency-Key`` has been applied.
    """

    id: str
    control: Control
    count: int = 1
    digest: bytes = b""
    created: bool = False


def check_id_type(session_id: object) -> None:
    """Raise a TypeError if a session id is not a string: it may be a number or a UUID."""
    if not isinstance(session_id, str):
        raise TypeError(f"the session id must be a str, not {session_id!r}; use str() if it is one of yours")


def isotime(at: float) -> str:
    """Format POSIX seconds as RFC 3339 in UTC, to the millisecond: ``2026-01-02T03:04:05.678Z``."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
