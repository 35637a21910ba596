"""What a route is, and how a request finds its own. The table itself is in ``routes``. No I/O."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import unquote

import msgspec

from ..dialects import SERVER_EVENTS, Dialect, MessageType, PublishBody
from ..errors import ConfigError, HeadTooLarge, HostNotAllowed, Invalid, SseserveError, TargetTooLong
from .auth import Action
from .messages import Request

__all__ = [
    "COMMON_ERRORS",
    "NDJSON",
    "Errors",
    "Kind",
    "Match",
    "Query",
    "Route",
    "Routes",
    "number_parameter",
]

# Of the routes that are about no session.
NO_DIALECT = Dialect(name="", render=lambda _session_id, _event: [])

# Media types of newline-delimited JSON.
NDJSON = frozenset(
    {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}
)


class Kind(enum.Enum):
    """How a route is served."""

    STREAM = "sse"  # takes the connection over, as an event stream
    SOCKET = "websocket"  # takes it over after a handshake
    PUBLISH = "publish"  # the body is a change to a session
    REQUEST = "request"  # a handler returns a response


class Query(msgspec.Struct, frozen=True):
    """A query parameter. A number is from 0 to ``maximum``."""

    name: str
    description: str
    type: Literal["string", "number", "integer"] = "string"
    maximum: float | None = None
    repeated: bool = False


Errors = tuple[type[SseserveError], ...]

# What every request is checked for.
COMMON_ERRORS: Errors = (TargetTooLong, HostNotAllowed, HeadTooLarge)


class Route(msgspec.Struct, frozen=True):
    """One row of the table.

    Args:
        method, path: what it answers to; ``{id}`` in the path is a session's id.
        name: unique; the operation's id in ``/openapi.json``.
        summary: one line for the README and ``/openapi.json``.
        kind: how it is served.
        dialect: the clients that it is for.
        action: the right that a request needs; None: none.
        handler: the name of the handler of a REQUEST; by default the route's.
        body: the type of the request's body, which is JSON; None: it has none, or any (``any_body``).
        parse_line: reads a line of a body that is NDJSON; None: it takes none.
        query: the parameters.
        responses: successful status -> what the body holds: a type (as JSON), a media type, or None.
        errors: what else it responds with, besides ``COMMON_ERRORS``.
        messages: what a stream sends.
        may_wait: it may respond much later, when there is something new.
        documented: it is listed in the README and ``/openapi.json``.
    """

    method: str
    path: str
    name: str
    summary: str
    kind: Kind = Kind.REQUEST
    dialect: Dialect = NO_DIALECT
    action: Action | None = None
    handler: str = ""
    body: type[Any] | None = None
    any_body: bool = False
    parse_line: Callable[[bytes], PublishBody] | None = None
    query: tuple[Query, ...] = ()
    responses: Mapping[int, Any] = msgspec.field(default_factory=lambda: {200: None})
    errors: Errors = ()
    messages: tuple[MessageType, ...] = ()
    may_wait: bool = False
    documented: bool = True

    def takes_lines(self, request: Request) -> bool:
        """Return whether a request's body is NDJSON, whose lines come when there is something new."""
        return self.parse_line is not None and request.media_type in NDJSON

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the path's parameters."""
        return tuple(segment[1:-1] for segment in self.path.split("/") if segment.startswith("{"))


class Match(msgspec.Struct, frozen=True):
    """A route and the values of its path's parameters, percent-decoded."""

    route: Route
    params: dict[str, str]


def number_parameter(query: dict[str, str], match: Match, name: str, default: float) -> float:
    """Read a query parameter that is a number, within the limits that the route has for it."""
    text = query.get(name)
    parameter = next((parameter for parameter in match.route.query if parameter.name == name), None)
    if text is None or parameter is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    maximum = math.inf if parameter.maximum is None else parameter.maximum
    if not 0 <= value <= maximum:
        raise Invalid(f"{name} must be a number from 0 to {maximum:g}, not {text!r}")
    return value


KNOWN = 4096  # paths whose routes need not be found again
MAX_KNOWN = 256  # characters of one

# segment -> the next level; "{}" is a parameter, "" the routes that end here, by method.
_Tree = dict[str, Any]


class Routes:
    """A table of routes. Adding rows makes another table: ``Routes((*ROUTES, row))``.

    Raises:
        ConfigError: two rows have the same name, or the same method and path; or everybody could watch or
            publish, whatever their rights.
    """

    def __init__(self, rows: Iterable[Route]) -> None:
        self._rows = tuple(rows)
        self._tree: _Tree = {}
        names: set[str] = set()
        for row in self._rows:
            if row.name in names:
                raise ConfigError(f"two routes have the name {row.name!r}")
            names.add(row.name)
            if row.action is None and row.kind is not Kind.REQUEST:
                raise ConfigError(f"the route {row.name!r} needs an action: the right that it requires")
            level = self._tree
            for segment in row.path.split("/")[1:]:
                level = level.setdefault("{}" if segment.startswith("{") else "/" + segment, {})
            if row.method in level.setdefault("", {}):
                raise ConfigError(f"two routes are {row.method} {row.path}")
            level[""][row.method] = (row, row.parameters)
        self._known_rows_at = lru_cache(maxsize=KNOWN)(self._rows_at)  # a publisher has few paths
        # Event types that publishers cannot use.
        self.reserved_events = SERVER_EVENTS.union(*(row.dialect.event_names for row in self._rows))

    def __iter__(self) -> Iterator[Route]:
        return iter(self._rows)

    def __getitem__(self, name: str) -> Route:
        """Return the row of a name; raise KeyError if there is none."""
        for row in self._rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def match(self, method: str, path: str) -> Match | None:
        """Find the route of a method and a raw (percent-encoded) path; None if there is none."""
        rows, values = (self._known_rows_at if len(path) <= MAX_KNOWN else self._rows_at)(path)
        if (entry := rows.get(method)) is None:
            return None
        row, parameters = entry
        return Match(row, dict(zip(parameters, values, strict=True)) if values else {})

    def methods(self, path: str) -> list[str]:
        """The methods that a raw path has routes for; empty if there is no such path."""
        return sorted(self._rows_at(path)[0])

    def _rows_at(self, path: str) -> tuple[dict[str, tuple[Route, tuple[str, ...]]], list[str]]:
        if path[:1] != "/":
            return {}, []
        level, values = self._tree, []
        for segment in path.split("/")[1:]:
            if "%" in segment:
                try:
                    segment = unquote(segment, errors="strict")
                except UnicodeDecodeError:
                    return {}, []  # two of these must not be the same session
            if (below := level.get("/" + segment)) is None:
                if not segment or (below := level.get("{}")) is None:
                    return {}, []
                values.append(segment)
            level = below
        return level.get("", {}), values
