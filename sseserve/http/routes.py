"""The one table of routes. A row carries its whole contract, and everything else is made from it.

Matching and the handlers, ``/openapi.json``, the table of the architecture page and the tests of all three
read these rows. This is the only module that names the dialects. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..dialects import Dialect, MessageType, PublishBody
from ..dialects.control import CONTROL
from ..dialects.interaction import INTERACTION, InteractionBody
from ..dialects.jobs import JOBS, CreatedJob, Job, JobBody, JobList
from ..dialects.jobs_v1 import JOBS_V1, CreatedJobV1, JobV1, PubsubPush
from ..dialects.sessions import (
    SESSIONS,
    ControlBody,
    CreateBody,
    CreatedSession,
    EventBody,
    ListChanges,
    ListSnapshot,
    ProgressBody,
    ProgressRecord,
    SessionList,
    parse_line,
)
from ..dialects.transcription import TRANSCRIPTION, TranscriptionBody, TranscriptionStatus
from ..errors import (
    BadRequest,
    Conflict,
    EngineUnavailable,
    Forbidden,
    InsufficientStorage,
    Invalid,
    NotFound,
    PayloadTooLarge,
    SessionNotFound,
    SSEDisabled,
    TooManyRequests,
    TooManySessions,
    TooManyStreams,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    UpgradeRequired,
)
from .auth import Action
from .diagnostics import MAX_EVENTS, MAX_INTERVAL, MAX_QUIET, MAX_SIZE, SeenRequest
from .routing import Errors, Kind, Query, Route, Routes
from .schemas import (
    Accepted,
    CreatedTicket,
    Health,
    HistoryPage,
    PubsubAccepted,
    Ready,
    ReceivedParts,
    Refreshed,
    RevocationBody,
    TicketBody,
    Watchers,
)
from .stream_messages import OWN_TYPES, PROBE_MESSAGES, SERVER_MESSAGES

__all__ = ["ROUTES"]


# What rows have in common

_AUTH: Errors = (Unauthorized, Forbidden)
_ALL: Errors = (*_AUTH, EngineUnavailable)
_ONE: Errors = (*_ALL, SessionNotFound)
_BODY: Errors = (BadRequest, PayloadTooLarge, Invalid)
_PUBLISH: Errors = (
    *(*_ONE, *_BODY, Conflict, UnsupportedMediaType),
    *(TooManyRequests, TooManySessions, Unavailable, InsufficientStorage),
)
_OPEN: Errors = (TooManyRequests, TooManyStreams)
_CONTROL: Errors = (*_ONE, *_BODY, Conflict, InsufficientStorage)
_CREATE: Errors = (*_ALL, *_BODY, TooManySessions, Unavailable, InsufficientStorage)

_STATE = Query("state", "Only sessions in this state")
_LIMIT = Query("limit", "At most that many", "integer", 1000)
_NEXT = Query("after", "The next page; from the header Link of the page before")
_WAIT = Query("wait", "Wait that many seconds for something new", "number", 60)
_CURSOR = (
    Query("last_event_id", "Resume after this cursor; the header Last-Event-ID has precedence"),
    Query("lastEventId", "The same, as some clients name it"),
)
_REPLAY = Query("replay", "1: without a cursor, begin with the first event of the log")
_AFTER = Query("after", "Events after this cursor")
_LEASE = Query(
    "lease", "The worker promises to publish that often, in seconds; 30 by default", "number", 86_400
)
_WORKER = Query("worker", "The worker's name, for the log")
_TICKET = Query("ticket", "Instead of a token, which an EventSource or a page's WebSocket cannot send")
_PROBE = Query("name", "Whether a diagnostic stream of that name is open, or the name of this one")
_PROBES = (
    Query("events", "How many", "integer", MAX_EVENTS),
    Query("interval", "Seconds between them", "number", MAX_INTERVAL),
    Query("size", "Of the text in each, in bytes", "integer", MAX_SIZE),
    Query("quiet", "Seconds of silence before the end", "number", MAX_QUIET),
    _PROBE,
)
_SESSION_IDS = Query("session", "A session; up to 50 of them", repeated=True)


_LIST_MESSAGES = (
    MessageType("snapshot", "The list: one message for each page", ListSnapshot),
    MessageType("changes", "What has changed, at most once a second", ListChanges),
    MessageType("server", "What the process is doing", Health),
    *(message for message in SERVER_MESSAGES if message.event in ("degraded", "restored", "expiring")),
)


def _messages(dialect: Dialect) -> tuple[MessageType, ...]:
    """Return what the streams of sessions send: what the dialect has of it, and what comes of the server."""
    own = () if dialect is CONTROL else (OWN_TYPES,)
    return (*dialect.message_types, *own, *SERVER_MESSAGES)


def _stream(
    path: str, name: str, summary: str, dialect: Dialect, *, query: tuple[Query, ...] = (*_CURSOR, _REPLAY)
) -> Route:
    disabled: Errors = (SSEDisabled,) if dialect.can_be_disabled else ()
    return Route(
        "GET",
        path,
        name,
        summary,
        Kind.STREAM,
        dialect,
        Action.WATCH,
        query=(*query, _TICKET),
        responses={200: "text/event-stream", 204: None},
        errors=(*_AUTH, SessionNotFound, Invalid, *_OPEN, *disabled),
        messages=_messages(dialect),
    )


def _socket(path: str, name: str, summary: str, dialect: Dialect) -> Route:
    return Route(
        "GET",
        path,
        name,
        summary,
        Kind.SOCKET,
        dialect,
        Action.WATCH,
        query=(*_CURSOR, _REPLAY, _TICKET),
        responses={101: None},
        errors=(*_ONE, BadRequest, UpgradeRequired, *_OPEN),
        messages=_messages(dialect),
    )


def _publish(
    path: str,
    name: str,
    summary: str,
    dialect: Dialect,
    body: type[Any],
    line: Callable[[bytes], PublishBody] | None = None,
) -> Route:
    return Route(
        "POST",
        path,
        name,
        summary,
        Kind.PUBLISH,
        dialect,
        Action.PUBLISH,
        body=body,
        parse_line=line,
        responses={202: Accepted},
        errors=_PUBLISH,
    )


def _control(path: str, name: str, summary: str, dialect: Dialect, response: type[Any]) -> Route:
    return Route(
        "POST",
        path,
        name,
        summary,
        dialect=dialect,
        action=Action.CONTROL,
        handler=path.rpartition("/")[2],
        body=ControlBody,
        responses={202: response, 204: None},  # 204 to a token that may not watch the session
        errors=_CONTROL,
    )


_SESSION = "/api/sessions/{id}"
_INTERACTION = "/api/interaction/events/{id}"
_JOB = "/api/jobs/{id}"
_JOB_V1 = "/api/v1/jobs/{id}"
_TRANSCRIPTION = "/api/v1/sessions/{id}/status"

ROUTES = Routes(
    (
        Route(
            "POST",
            "/api/sessions",
            "create",
            "Create a session",
            dialect=SESSIONS,
            action=Action.CREATE,
            body=CreateBody,
            responses={201: CreatedSession},
            errors=(*_CREATE, Conflict),
        ),
        Route(
            "GET",
            "/api/sessions",
            "list",
            "List the sessions",
            dialect=SESSIONS,
            action=Action.LIST,
            query=(_STATE, _LIMIT, _NEXT),
            responses={200: SessionList},
            errors=(*_ALL, Invalid),
        ),
        _publish(f"{_SESSION}/progress", "progress", "Publish progress", SESSIONS, ProgressBody),
        _publish(
            f"{_SESSION}/events",
            "events",
            "Publish an event, or many as NDJSON",
            SESSIONS,
            EventBody,
            parse_line,
        ),
        Route(
            "GET",
            f"{_SESSION}/status",
            "status",
            "Snapshot; with wait, as soon as there is a newer one",
            dialect=SESSIONS,
            action=Action.WATCH,
            query=(_WAIT,),
            responses={200: ProgressRecord, 304: None},
            errors=(*_ONE, Invalid, *_OPEN),
            may_wait=True,
        ),
        _stream(f"{_SESSION}/status/stream", "stream", "Watch by Server-Sent Events", SESSIONS),
        _socket(f"{_SESSION}/status/ws", "socket", "Watch by WebSocket", SESSIONS),
        Route(
            "GET",
            f"{_SESSION}/events",
            "history",
            "History; with wait, the long-poll transport",
            dialect=SESSIONS,
            action=Action.WATCH,
            query=(_AFTER, *_CURSOR, _LIMIT, _WAIT),
            responses={200: HistoryPage},
            errors=(*_ONE, Invalid, *_OPEN),
            may_wait=True,
        ),
        _control(f"{_SESSION}/cancel", "cancel", "Ask the worker to cancel", SESSIONS, ProgressRecord),
        _control(f"{_SESSION}/pause", "pause", "Ask the worker to pause", SESSIONS, ProgressRecord),
        _control(f"{_SESSION}/resume", "resume", "Ask the worker to continue", SESSIONS, ProgressRecord),
        Route(
            "DELETE",
            _SESSION,
            "delete",
            "Delete a session; its watchers are told",
            dialect=SESSIONS,
            action=Action.DELETE,
            responses={204: None},
            errors=(*_ONE, InsufficientStorage),
        ),
        Route(
            "GET",
            f"{_SESSION}/watchers",
            "watchers",
            "How many watch, on all instances",
            dialect=SESSIONS,
            action=Action.WATCH,
            responses={200: Watchers},
            errors=_ONE,
        ),
        _stream(f"{_SESSION}/control", "control", "What the watchers ask of a worker", CONTROL),
        _stream(
            "/api/streams",
            "streams",
            "Watch several sessions on one stream",
            SESSIONS,
            query=(_SESSION_IDS, *_CURSOR),
        ),
        Route(
            "GET",
            "/api/streams/sessions",
            "list_stream",
            "Watch the list of sessions",
            Kind.STREAM,
            SESSIONS,
            Action.LIST,
            query=(_TICKET,),
            responses={200: "text/event-stream"},
            errors=(*_AUTH, *_OPEN),
            messages=_LIST_MESSAGES,
        ),
        # Interaction: typed events
        _stream(_INTERACTION, "interaction", "Watch an interaction's events", INTERACTION),
        _publish(_INTERACTION, "interact", "Publish an event", INTERACTION, InteractionBody),
        # Jobs: the video studio
        Route(
            "POST",
            "/api/jobs",
            "create_job",
            "Queue a job; this server runs it",
            dialect=JOBS,
            action=Action.CREATE,
            handler="queue_job",
            any_body=True,
            responses={202: CreatedJob},
            errors=_CREATE,
        ),
        Route(
            "POST",
            "/api/quick/demo",
            "demo",
            "Queue a demonstration job",
            dialect=JOBS,
            action=Action.CREATE,
            handler="queue_demo",
            any_body=True,
            responses={202: CreatedJob},
            errors=_CREATE,
        ),
        Route(
            "GET",
            "/api/jobs",
            "list_jobs",
            "List the jobs",
            dialect=JOBS,
            action=Action.LIST,
            handler="list",
            query=(_STATE, _LIMIT, _NEXT),
            responses={200: JobList},
            errors=(*_ALL, Invalid),
        ),
        Route(
            "GET",
            _JOB,
            "job",
            "One job",
            dialect=JOBS,
            action=Action.WATCH,
            handler="describe",
            responses={200: Job},
            errors=_ONE,
        ),
        Route(
            "POST",
            "/api/claims",
            "claim_job",
            "Take a queued job, as a worker elsewhere; with wait, as soon as there is one",
            dialect=JOBS,
            action=Action.PUBLISH,
            query=(_WAIT, _LEASE, _WORKER),
            responses={200: CreatedJob, 204: None},
            errors=(*_ALL, Invalid, *_OPEN, InsufficientStorage),
            may_wait=True,
        ),
        _stream(f"{_JOB}/events", "job_events", "Watch a job", JOBS),
        _socket(f"{_JOB}/ws", "job_socket", "Watch a job by WebSocket", JOBS),
        _publish(f"{_JOB}/progress", "job_progress", "Publish percent of a stage", JOBS, JobBody),
        _control(f"{_JOB}/cancel", "cancel_job", "Ask a job's worker to cancel", JOBS, Job),
        _control(f"{_JOB}/pause", "pause_job", "Ask a job's worker to pause", JOBS, Job),
        _control(f"{_JOB}/resume", "resume_job", "Ask a job's worker to continue", JOBS, Job),
        # Jobs v1: the podcast generator
        Route(
            "POST",
            "/api/v1/jobs",
            "create_v1",
            "Create a job that services work on",
            dialect=JOBS_V1,
            action=Action.CREATE,
            handler="create_job",
            any_body=True,
            responses={201: CreatedJobV1},
            errors=_CREATE,
        ),
        Route(
            "GET",
            _JOB_V1,
            "job_v1",
            "A job's last status, and how many watch it",
            dialect=JOBS_V1,
            action=Action.WATCH,
            handler="describe",
            responses={200: JobV1},
            errors=_ONE,
        ),
        _stream(f"{_JOB_V1}/events", "job_v1_events", "Watch a job's statuses", JOBS_V1),
        Route(
            "POST",
            "/api/v1/pubsub/push",
            "pubsub",
            "Receive a status from a Pub/Sub push subscription",
            dialect=JOBS_V1,
            action=Action.PUBLISH,
            body=PubsubPush,
            responses={200: PubsubAccepted, 204: None},
            errors=(*_ALL, TooManyRequests, Unavailable, InsufficientStorage),
        ),
        # Transcription: the coaching assistant
        _stream(f"{_TRANSCRIPTION}/stream", "transcription", "Watch a transcription", TRANSCRIPTION),
        Route(
            "GET",
            _TRANSCRIPTION,
            "transcription_poll",
            "A transcription's last status, for polling",
            dialect=TRANSCRIPTION,
            action=Action.WATCH,
            handler="describe",
            responses={200: TranscriptionStatus},
            errors=_ONE,
        ),
        _publish(
            _TRANSCRIPTION, "transcription_status", "Publish a status", TRANSCRIPTION, TranscriptionBody
        ),
        # Tokens
        Route(
            "POST",
            "/api/tickets",
            "ticket",
            "Make a ticket for one stream, for ?ticket= in its address",
            action=Action.TICKET,
            body=TicketBody,
            responses={201: CreatedTicket},
            errors=(*_ALL, *_BODY, Conflict, TooManyRequests),
        ),
        Route(
            "POST",
            "/api/tokens/refresh",
            "refresh",
            "Extend the open streams of a fresh token's subject",
            action=Action.REFRESH,
            responses={200: Refreshed},
            errors=(*_ALL, Conflict, TooManyRequests),
        ),
        Route(
            "POST",
            "/api/revocations",
            "revoke",
            "Revoke a token, or all of a subject, and end their streams",
            action=Action.REVOKE,
            body=RevocationBody,
            responses={204: None},
            errors=(*_ALL, *_BODY, Conflict, InsufficientStorage),
        ),
        # Diagnostics
        Route(
            "GET",
            "/api/diagnostics",
            "diagnose",
            "The request as the server has received it; with wait, later",
            action=Action.DIAGNOSE,
            query=(_WAIT, _PROBE),
            responses={200: SeenRequest},
            errors=(*_AUTH, Invalid, *_OPEN),
            may_wait=True,
        ),
        Route(
            "POST",
            "/api/diagnostics",
            "diagnose_body",
            "When the parts of the request's body have arrived",
            action=Action.DIAGNOSE,
            any_body=True,
            responses={200: ReceivedParts},
            errors=(*_AUTH, BadRequest, PayloadTooLarge),
        ),
        Route(
            "GET",
            "/api/diagnostics/stream",
            "diagnose_stream",
            "Events that say when they were sent",
            Kind.STREAM,
            action=Action.DIAGNOSE,
            query=_PROBES,
            responses={200: "text/event-stream"},
            errors=(*_AUTH, Invalid, *_OPEN),
            messages=PROBE_MESSAGES,
        ),
        Route(
            "GET",
            "/api/diagnostics/ws",
            "diagnose_socket",
            "The same by WebSocket",
            Kind.SOCKET,
            action=Action.DIAGNOSE,
            query=_PROBES,
            responses={101: None},
            errors=(*_AUTH, Invalid, BadRequest, UpgradeRequired, *_OPEN),
            messages=PROBE_MESSAGES,
        ),
        # Pages and operations
        Route(
            "GET",
            "/api/artifacts/{id}/{name}",
            "artifact",
            "Download a file that a demonstration made",
            action=Action.WATCH,
            responses={200: "*/*"},
            errors=(*_ALL, NotFound),
        ),
        Route("GET", "/health", "health", "The process is alive", responses={200: Health}),
        Route(
            "GET",
            "/ready",
            "ready",
            "The server takes new work; 503 while it stops, or cannot store",
            responses={200: Ready},
            errors=(Unavailable,),
        ),
        Route("GET", "/metrics", "metrics", "Prometheus metrics", responses={200: "text/plain"}),
        Route(
            "GET",
            "/openapi.json",
            "openapi",
            "This table as OpenAPI 3.1",
            responses={200: "application/json"},
        ),
        Route(
            "GET",
            "/asyncapi.json",
            "asyncapi",
            "Its streams, and their messages, as AsyncAPI 3.0",
            responses={200: "application/json"},
        ),
        Route(
            "GET",
            "/docs",
            "docs",
            "Page: requests, streams and messages",
            responses={200: "text/html"},
        ),
        Route(
            "GET",
            "/dashboard",
            "dashboard",
            "Page: all sessions, and the state of the server",
            responses={200: "text/html"},
        ),
        Route(
            "GET",
            "/",
            "index",
            "Page: start a job and compare the transports",
            responses={200: "text/html"},
        ),
        Route(
            "GET",
            "/static/{name}",
            "static",
            "A file of the pages",
            responses={200: "*/*", 304: None},
            errors=(NotFound,),
            documented=False,
        ),
    )
)
