"""The one table of paths: method and path -> what to do, in which dialect. No I/O.

``server/`` looks here to decide who serves a connection's request, ``web/`` to register its views, and
``/openapi.json`` and the tests of the README to say what there is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import msgspec

from ..dialects import SERVER_EVENTS, Dialect, PublishBody
from ..dialects.control import CONTROL
from ..dialects.interaction import INTERACTION, InteractionBody
from ..dialects.jobs import JOBS, JobBody
from ..dialects.jobs_v1 import JOBS_V1, PubsubPush
from ..dialects.sessions import SESSIONS, ControlBody, CreateBody, EventBody, ProgressBody, parse_line
from ..dialects.transcription import TRANSCRIPTION, TranscriptionBody
from .auth import Action

__all__ = ["RESERVED_EVENTS", "ROUTES", "Kind", "Match", "Route", "match", "methods"]


class Kind(enum.Enum):
    """Who serves a route when it is the first request of a connection."""

    STREAM = "sse"
    SOCKET = "websocket"
    PUBLISH = "publish"
    WEB = "web"


class Route(msgspec.Struct, frozen=True):
    """One row. ``name`` is what handlers are registered under; ``{id}`` in the path is a session's id."""

    method: str
    path: str
    kind: Kind
    name: str
    summary: str
    dialect: Dialect = SESSIONS
    body: type[Any] | None = None
    parse_line: Callable[[bytes], PublishBody] | None = None

    @property
    def action(self) -> Action | None:
        """What a request of this route wants to do; None: nothing that needs a right."""
        if self.kind is Kind.PUBLISH:
            return Action.PUBLISH
        if self.kind in (Kind.STREAM, Kind.SOCKET):
            return Action.WATCH
        return _ACTIONS.get(self.name)


_ACTIONS = {
    "create": Action.CREATE,
    "create_job": Action.CREATE,
    "create_v1": Action.CREATE,
    "demo": Action.CREATE,
    "list": Action.LIST,
    "list_jobs": Action.LIST,
    "status": Action.WATCH,
    "history": Action.WATCH,
    "job": Action.WATCH,
    "job_v1": Action.WATCH,
    "transcription_poll": Action.WATCH,
    "artifact": Action.WATCH,
    "pubsub": Action.PUBLISH,
    "cancel": Action.CONTROL,
    "cancel_job": Action.CONTROL,
    "pause": Action.CONTROL,
    "pause_job": Action.CONTROL,
    "resume": Action.CONTROL,
    "resume_job": Action.CONTROL,
    "delete": Action.DELETE,
}


class Match(msgspec.Struct, frozen=True):
    """A route and the values of its path's parameters."""

    route: Route
    params: dict[str, str]


_SESSION = "/api/sessions/{id}"
_INTERACTION = "/api/interaction/events/{id}"
_JOB = "/api/jobs/{id}"
_JOB_V1 = "/api/v1/jobs/{id}"
_TRANSCRIPTION = "/api/v1/sessions/{id}/status"

ROUTES: tuple[Route, ...] = (
    Route("POST", "/api/sessions", Kind.WEB, "create", "Create a session", body=CreateBody),
    Route("GET", "/api/sessions", Kind.WEB, "list", "List the sessions, by state if one is named"),
    Route("POST", f"{_SESSION}/progress", Kind.PUBLISH, "progress", "Publish progress", body=ProgressBody),
    Route(
        "POST",
        f"{_SESSION}/events",
        Kind.PUBLISH,
        "events",
        "Publish an event, or many as NDJSON",
        body=EventBody,
        parse_line=parse_line,
    ),
    Route("GET", f"{_SESSION}/status", Kind.WEB, "status", "Snapshot; waits for a newer one with wait"),
    Route("GET", f"{_SESSION}/status/stream", Kind.STREAM, "stream", "Watch by Server-Sent Events"),
    Route("GET", f"{_SESSION}/status/ws", Kind.SOCKET, "socket", "Watch by WebSocket"),
    Route("GET", f"{_SESSION}/events", Kind.WEB, "history", "History, and watching by long-poll"),
    Route("POST", f"{_SESSION}/cancel", Kind.WEB, "cancel", "Ask the worker to cancel", body=ControlBody),
    Route("POST", f"{_SESSION}/pause", Kind.WEB, "pause", "Ask the worker to pause", body=ControlBody),
    Route("POST", f"{_SESSION}/resume", Kind.WEB, "resume", "Ask the worker to go on", body=ControlBody),
    Route("DELETE", _SESSION, Kind.WEB, "delete", "Forget a session; its watchers are told"),
    Route("GET", f"{_SESSION}/control", Kind.STREAM, "control", "What the watchers ask of a worker", CONTROL),
    Route("GET", "/api/streams", Kind.STREAM, "streams", "Watch several sessions on one stream"),
    # Interaction: typed events
    Route("GET", _INTERACTION, Kind.STREAM, "interaction", "Watch an interaction's events", INTERACTION),
    Route("POST", _INTERACTION, Kind.PUBLISH, "interact", "Publish an event", INTERACTION, InteractionBody),
    # Jobs: the video studio
    Route("POST", "/api/jobs", Kind.WEB, "create_job", "Queue a job; this server runs it", JOBS),
    Route("POST", "/api/quick/demo", Kind.WEB, "demo", "Queue a demonstration job; always works", JOBS),
    Route("GET", "/api/jobs", Kind.WEB, "list_jobs", "The jobs, by state if one is named", JOBS),
    Route("GET", _JOB, Kind.WEB, "job", "One job", JOBS),
    Route(
        "GET", f"{_JOB}/events", Kind.STREAM, "job_events", "Watch a job; replay=1 from its beginning", JOBS
    ),
    Route(
        "POST", f"{_JOB}/progress", Kind.PUBLISH, "job_progress", "Publish percent of a stage", JOBS, JobBody
    ),
    Route(
        "POST", f"{_JOB}/cancel", Kind.WEB, "cancel_job", "Ask a job's worker to cancel", JOBS, ControlBody
    ),
    Route("POST", f"{_JOB}/pause", Kind.WEB, "pause_job", "Ask a job's worker to pause", JOBS, ControlBody),
    Route("POST", f"{_JOB}/resume", Kind.WEB, "resume_job", "Ask a job's worker to go on", JOBS, ControlBody),
    # Jobs v1: the podcast generator
    Route("POST", "/api/v1/jobs", Kind.WEB, "create_v1", "Create a job that services work on", JOBS_V1),
    Route("GET", _JOB_V1, Kind.WEB, "job_v1", "Its last status, and how many watch it", JOBS_V1),
    Route("GET", f"{_JOB_V1}/events", Kind.STREAM, "job_v1_events", "Watch a job's statuses", JOBS_V1),
    Route(
        "POST",
        "/api/v1/pubsub/push",
        Kind.WEB,
        "pubsub",
        "Statuses from a Pub/Sub push subscription",
        JOBS_V1,
        PubsubPush,
    ),
    # Transcription: the coaching assistant
    Route(
        "GET",
        f"{_TRANSCRIPTION}/stream",
        Kind.STREAM,
        "transcription",
        "Watch a transcription",
        TRANSCRIPTION,
    ),
    Route(
        "GET", _TRANSCRIPTION, Kind.WEB, "transcription_poll", "Its last status, for polling", TRANSCRIPTION
    ),
    Route(
        "POST",
        _TRANSCRIPTION,
        Kind.PUBLISH,
        "transcription_status",
        "Publish a status",
        TRANSCRIPTION,
        TranscriptionBody,
    ),
    # Pages and operations
    Route("GET", "/api/artifacts/{id}/{name}", Kind.WEB, "artifact", "Download what a demonstration made"),
    Route("GET", "/health", Kind.WEB, "health", "The process is alive"),
    Route("GET", "/ready", Kind.WEB, "ready", "It takes new work; 503 while it stops"),
    Route("GET", "/metrics", Kind.WEB, "metrics", "Prometheus metrics"),
    Route("GET", "/openapi.json", Kind.WEB, "openapi", "This table as OpenAPI 3.1"),
    Route("GET", "/dashboard", Kind.WEB, "dashboard", "All sessions and the server's own state"),
    Route("GET", "/", Kind.WEB, "index", "Start a job and watch it over all three transports"),
)

# Event types that publishers cannot use.
RESERVED_EVENTS = SERVER_EVENTS.union(*(route.dialect.event_names for route in ROUTES))

# segment -> the next level; "{}" is a parameter, "" the routes that end here, by method.
_Tree = dict[str, Any]


def _grow(routes: tuple[Route, ...]) -> _Tree:
    tree: _Tree = {}
    for route in routes:
        level = tree
        for segment in route.path.split("/")[1:]:
            level = level.setdefault("{}" if segment.startswith("{") else "/" + segment, {})
        names = tuple(s[1:-1] for s in route.path.split("/") if s.startswith("{"))
        level.setdefault("", {})[route.method] = (route, names)
    return tree


_TREE = _grow(ROUTES)


def _leaves(path: str) -> tuple[dict[str, tuple[Route, tuple[str, ...]]], list[str]]:
    level, values = _TREE, []
    for segment in path.split("/")[1:]:
        if (below := level.get("/" + segment)) is None:
            if not segment or (below := level.get("{}")) is None:
                return {}, []
            values.append(unquote(segment))
        level = below
    return level.get("", {}), values


def match(method: str, path: str) -> Match | None:
    """Find the route of a method and a raw (percent-encoded) path; None if there is none."""
    leaves, values = _leaves(path)
    if (found := leaves.get(method)) is None:
        return None
    route, names = found
    return Match(route, dict(zip(names, values, strict=True)))


def methods(path: str) -> list[str]:
    """The methods that a raw path answers to, for ``Allow``; empty if there is no such path."""
    return sorted(_leaves(path)[0])
