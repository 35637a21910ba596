"""What requests and responses hold that belong to no dialect. No I/O, no clock."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..dialects.encoding import TextMessage
from ..live.bundle import MAX_SESSIONS
from ..live.resume import ResumeResult
from ..model import Control
from .diagnostics import SeenRequest

__all__ = [
    "Accepted",
    "CreatedTicket",
    "Error",
    "ErrorDetail",
    "Health",
    "HistoryPage",
    "PubsubAccepted",
    "Ready",
    "ReceivedParts",
    "Refreshed",
    "RevocationBody",
    "TicketBody",
    "Watchers",
]

Name = Annotated[str, Meta(min_length=1, max_length=1024)]


class Accepted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a publisher gets: the cursor of its event, and what the watchers ask of it.

    ``applied`` counts the lines of NDJSON; ``id`` is the cursor after the last one. ``created``: there was no
    such session before.
    """

    applied: int | msgspec.UnsetType = msgspec.UNSET
    id: str
    control: Control
    created: bool = False


class Watchers(msgspec.Struct, frozen=True):
    """How many clients watch a session, over SSE ("sse") and WebSocket ("ws"), on all instances together.

    Also by protocol, by dialect and by instance of the server.
    """

    session_id: str
    total: int
    by_protocol: dict[str, int]
    by_dialect: dict[str, int]
    by_instance: dict[str, int]


class PubsubAccepted(msgspec.Struct, frozen=True):
    """The cursor of the event that a Pub/Sub delivery became."""

    id: str


class ReceivedParts(msgspec.Struct, frozen=True):
    """When the parts of a body have arrived, in seconds after its head, and their sizes in bytes."""

    parts: list[tuple[float, int]]
    request: SeenRequest


class TicketBody(msgspec.Struct, frozen=True):
    """What a ticket is for: watching these sessions, and with ``list`` the list of sessions."""

    sessions: Annotated[tuple[Name, ...], Meta(max_length=MAX_SESSIONS)] = ()
    list: bool = False


class CreatedTicket(msgspec.Struct, frozen=True):
    """A ticket, for the query parameter ``ticket``. ``expires_in`` is in seconds."""

    ticket: str
    expires_in: int


class Refreshed(msgspec.Struct, frozen=True):
    """In how many seconds the streams end that were extended; null: never."""

    expires_in: int | None


class RevocationBody(msgspec.Struct, frozen=True):
    """What is revoked: the token of that id, or those of a subject that were issued until now.

    With ``issuer`` only those of that issuer.
    """

    subject: Name | None = None
    token_id: Name | None = None
    issuer: Name | None = None


class HistoryPage(msgspec.Struct, frozen=True):
    """Events of a session after a cursor.

    ``next`` is the cursor after the last one, ``end`` says that nothing follows, and ``resume`` how resuming
    from the cursor went (null without one).
    """

    session_id: str
    resume: ResumeResult | None
    events: list[TextMessage]
    next: str
    end: bool


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is doing; ``instance`` is its id among those that share an engine.

    ``uptime`` is in seconds. While the engine is unavailable ``sessions`` is what it was before, or null.
    """

    status: Literal["ok"] = "ok"
    version: str
    instance: str
    uptime: float
    connections: int
    streams: int
    sockets: int
    sessions: int | None
    connections_per_job: dict[str, int] | msgspec.UnsetType = msgspec.UNSET


class Ready(msgspec.Struct, frozen=True):
    """The server takes new work."""

    status: Literal["ready"] = "ready"


class ErrorDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """``code`` is for programs, ``message`` for people. ``line`` and ``applied`` are of NDJSON.

    ``line`` is the first bad one, counted from 1; ``applied`` is how many before it stand.
    """

    code: str
    message: str
    request_id: str
    line: int | msgspec.UnsetType = msgspec.UNSET
    applied: int | msgspec.UnsetType = msgspec.UNSET


class Error(msgspec.Struct, frozen=True):
    """The one shape of all errors."""

    error: ErrorDetail
