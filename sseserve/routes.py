"""The one table of paths: method and path -> what to do, in which dialect. No I/O.

``server/`` looks here to decide who serves a connection's request, ``web/`` to register its views, and
``/openapi.json`` and the tests of the README to say what there is.
"""

from __future__ import annotations

import enum
from typing import Any
from urllib.parse import unquote

import msgspec

from .dialects import SESSIONS, Dialect

__all__ = ["ROUTES", "Kind", "Match", "Route", "match", "methods"]


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


class Match(msgspec.Struct, frozen=True):
    """A route and the values of its path's parameters."""

    route: Route
    params: dict[str, str]


_SESSION = "/api/sessions/{id}"

ROUTES: tuple[Route, ...] = (
    Route("POST", "/api/sessions", Kind.WEB, "create", "Create a session"),
    Route("GET", "/api/sessions", Kind.WEB, "list", "List the sessions, by state if one is named"),
    Route("POST", f"{_SESSION}/progress", Kind.PUBLISH, "progress", "Publish progress"),
    Route("POST", f"{_SESSION}/events", Kind.PUBLISH, "events", "Publish an event, or many as NDJSON"),
    Route("GET", f"{_SESSION}/status", Kind.WEB, "status", "Snapshot; waits for a newer one with wait"),
    Route("GET", f"{_SESSION}/status/stream", Kind.STREAM, "stream", "Watch by Server-Sent Events"),
    Route("GET", f"{_SESSION}/status/ws", Kind.SOCKET, "socket", "Watch by WebSocket"),
    Route("GET", f"{_SESSION}/events", Kind.WEB, "history", "History, and watching by long-poll"),
    Route("POST", f"{_SESSION}/cancel", Kind.WEB, "cancel", "Ask the worker to cancel"),
    Route("POST", f"{_SESSION}/pause", Kind.WEB, "pause", "Ask the worker to pause"),
    Route("POST", f"{_SESSION}/resume", Kind.WEB, "resume", "Ask the worker to go on"),
    Route("DELETE", _SESSION, Kind.WEB, "delete", "Forget a session; its watchers are told"),
    Route("POST", "/api/quick/demo", Kind.WEB, "demo", "Start a demonstration job"),
    Route("GET", "/api/artifacts/{id}/{name}", Kind.WEB, "artifact", "Download what a demonstration made"),
    Route("GET", "/health", Kind.WEB, "health", "The process is alive"),
    Route("GET", "/ready", Kind.WEB, "ready", "It takes new work; 503 while it stops"),
    Route("GET", "/metrics", Kind.WEB, "metrics", "Prometheus metrics"),
    Route("GET", "/openapi.json", Kind.WEB, "openapi", "This table as OpenAPI 3.1"),
    Route("GET", "/dashboard", Kind.WEB, "dashboard", "All sessions and the server's own state"),
    Route("GET", "/", Kind.WEB, "index", "Start a job and watch it over all three transports"),
)

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
