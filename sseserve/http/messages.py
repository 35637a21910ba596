"""HTTP messages: requests, responses, errors in one shape, CORS. No sockets, no clock.

HTTP/1.1 (``server/connection.py``) and HTTP/2 (``web/app.py``) read the same ``Request`` and write the same
``Response``, so that a client cannot tell which of them served it.
"""

from __future__ import annotations

import logging
import random
import re
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import parse_qsl, unquote

import msgspec

from ..errors import (
    BadRequest,
    HeadTooLarge,
    Invalid,
    InvalidToken,
    PayloadTooLarge,
    SseserveError,
    TargetTooLong,
)
from ..logs import Levels, Line, RequestIds, current_context
from ..trace_context import TraceContext, parse_trace_context
from .auth import Grant

__all__ = [
    "STREAM_HEADERS",
    "ClientDisconnected",
    "Headers",
    "ReceivedBody",
    "Request",
    "Response",
    "check_head",
    "check_query",
    "cors_headers",
    "error_response",
    "finish_response",
    "http_date",
    "json_response",
    "log_failure",
    "log_response",
    "matches_tag",
    "read_body",
    "request_line",
    "response_head",
]

log = logging.getLogger(__name__)

Headers = tuple[tuple[str, str], ...]

STREAM_HEADERS: Headers = (
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)

_random_bits = random.getrandbits  # an id is no secret, and seeded again in a process that is forked
_ABSOLUTE = re.compile(r"https?://([^/]*)", re.IGNORECASE)
MIN_SECRET = 8  # characters of a credential; a shorter one is no secret
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_EXPOSED = "ETag, Link, Location, Retry-After, X-Correlation-ID, X-Request-ID, X-Total-Count"


class ClientDisconnected(Exception):
    """The client closed its connection in the middle of a request."""


async def _no_body() -> AsyncGenerator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for chunk in nothing:
        yield chunk


def _is_valid() -> None:
    pass


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request. Header names are lower case; ``peer`` is the client's address, and
    ``proxy`` that of the trusted proxy which has named it.

    ``path`` is ``raw_path`` percent-decoded. Routes are matched by the latter, in which an encoded slash does
    not separate segments.

    ``body`` yields the body's bytes as they arrive, at the pace of its reader. It raises ``BadRequest`` if
    they stop arriving or are malformed, ``ClientDisconnected`` if the client leaves. ``grant`` is who makes
    the request, None where authentication is off; ``check_grant`` raises ``Unauthorized`` if that is not
    valid any more.
    """

    method: str
    raw_path: str
    path: str
    query_string: str
    headers: Mapping[str, str]
    id: str
    http_version: str = "1.1"
    peer: str = ""
    proxy: str = ""
    body: AsyncIterator[bytes] = msgspec.field(default_factory=_no_body)
    grant: Grant | None = None
    check_grant: Callable[[], None] = _is_valid

    @classmethod
    def create(
        cls,
        method: str,
        target: str,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        http_version: str = "1.1",
        peer: str = "",
        body: AsyncIterator[bytes] | None = None,
    ) -> Self:
        """Create a request; it has a valid ``X-Request-ID`` as its id, else a random one.

        Args:
            method: in any case; most clients send it in upper case, and servers have accepted others.
            target: in origin or absolute form (RFC 9112, section 3.2), with the query.
            headers: raw names and values.
            http_version: "1.0", "1.1" or "2".
            peer: the client's address.
            body: see ``Request``; None: it has none.
        """
        fields: dict[str, str] = {}
        for raw_name, raw_value in headers:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            if name in fields:
                # A cookie may be a field of its own over HTTP/2 (RFC 9113, section 8.2.3).
                value = f"{fields[name]}{'; ' if name == 'cookie' else ', '}{value}"
            fields[name] = value
        raw_path, mark, query = target.partition("?")
        if raw_path[:1] != "/" and (absolute := _ABSOLUTE.match(raw_path)) is not None:
            target = (raw_path[absolute.end() :] or "/") + mark + query
            fields["host"] = absolute[1]  # whatever the Host field says (RFC 9112, section 3.2.2)
        body = _no_body() if body is None else body
        return cls.of(method.upper(), target, fields, http_version=http_version, peer=peer, body=body)

    @classmethod
    def of(
        cls,
        method: str,
        target: str,
        headers: Mapping[str, str],
        *,
        http_version: str = "1.1",
        peer: str,
        body: AsyncIterator[bytes],
    ) -> Self:
        """Do the same with a method in upper case, a target in origin form, and names in lower case."""
        raw_path, _, query_string = target.partition("?")
        given = headers.get("x-request-id")
        return cls(
            method=method,
            raw_path=raw_path,
            path=unquote(raw_path) if "%" in raw_path else raw_path,
            query_string=query_string,
            headers=headers,
            id=given if given and _REQUEST_ID.fullmatch(given) else f"{_random_bits(64):016x}",
            http_version=http_version,
            peer=peer,
            body=body,
        )

    @property
    def correlation_id(self) -> str:
        """What the request has in common with others: a valid ``X-Correlation-ID``, else its own id."""
        given = self.headers.get("x-correlation-id", "")
        return given if given and _REQUEST_ID.fullmatch(given) else self.id

    @property
    def ids(self) -> RequestIds:
        """What is kept of it as long as its stream, for the log and the traces."""
        return RequestIds(self.id, self.correlation_id, self.trace)

    @property
    def trace(self) -> TraceContext | None:
        """The trace that the request is a part of; None: it says nothing of one, or nothing valid."""
        if (given := self.headers.get("traceparent")) is None:
            return None
        return parse_trace_context(given, self.headers.get("tracestate"))

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of one given twice, the last."""
        return dict(parse_qsl(self.query_string, keep_blank_values=True)) if self.query_string else {}

    @property
    def cursor(self) -> str | None:
        """Where a watcher resumes; None: it does not.

        The header of an EventSource that reconnects is newer than the query of its URL. ``lastEventId`` is
        how clients in place of EventSource spell it, which cannot send headers.
        """
        query = self.query
        return (
            self.headers.get("last-event-id")
            or query.get("last_event_id")
            or query.get("lastEventId")
            or None
        )

    def values(self, name: str) -> list[str]:
        """All values of a query parameter, in their order.

        Raises:
            Invalid: the query is not UTF-8.
        """
        try:
            return [value for key, value in parse_qsl(self.query_string, errors="strict") if key == name]
        except UnicodeDecodeError:
            raise Invalid("the query is not percent-encoded UTF-8") from None

    @property
    def secrets(self) -> list[str]:
        """What may give somebody else the rights of this request, or parts of it."""
        credentials = self.headers.get("authorization", "").split()[-1:]
        cookies = [pair.partition("=")[2].strip() for pair in self.headers.get("cookie", "").split(";")]
        tickets = [value for key, value in parse_qsl(self.query_string) if key == "ticket"]
        secrets = (*credentials, *cookies, *tickets)
        return [secret for secret in secrets if len(secret) >= MIN_SECRET]

    @property
    def log_fields(self) -> dict[str, object]:
        """What every line of the log has that belongs to this request."""
        return {"request_id": self.id, "correlation_id": self.correlation_id}

    @property
    def id_headers(self) -> Headers:
        """The headers by which a response names its request, and what that has in common with others."""
        return (("X-Request-ID", self.id), ("X-Correlation-ID", self.correlation_id))

    @property
    def media_type(self) -> str:
        """The body's media type without its parameters, lower case; empty if there is none."""
        return _media_type(self.headers.get("content-type", ""))


@lru_cache(maxsize=16)
def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def check_head(limit: int, target: str | bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Check that a request's line and header fields have at most ``limit`` bytes, as HTTP/1.1 writes them.

    Raises:
        TargetTooLong: the target alone has more.
        HeadTooLarge: they have more.
    """
    if len(target) > limit:
        raise TargetTooLong(f"the request's target is larger than max_head = {limit} bytes", limit="max_head")
    if len(target) + sum(len(name) + len(value) + 4 for name, value in headers) > limit:
        raise HeadTooLarge(f"the request's head is larger than max_head = {limit} bytes", limit="max_head")


def check_query(request: Request) -> None:
    """Check that a query has no characters that must be percent-encoded; h11 refuses those, too.

    Raises:
        BadRequest: it has.
    """
    if not request.query_string.isascii():
        raise BadRequest("the query has characters that must be percent-encoded")


class ReceivedBody:
    """A body that has arrived with its head, as ``Request.body``.

    Whoever gives it to a request calls ``Broker.flush`` as soon as the response is written, or cannot be.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self) -> bytes:
        """Return what nobody has taken yet."""
        data, self._data = self._data, b""
        return data

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not (data := self.take()):
            raise StopAsyncIteration
        return data


async def read_body(request: Request, limit: int) -> bytes:
    """Read a whole body of at most ``limit`` bytes.

    Raises:
        PayloadTooLarge: it is larger.
        Unauthorized: the token is not valid any more; a body may take many minutes.
    """
    if isinstance(request.body, ReceivedBody):
        received = request.body.take()
        _check_size(len(received), limit)
    else:
        body = bytearray()
        async for chunk in request.body:
            body += chunk
            _check_size(len(body), limit)
        received = bytes(body)
    request.check_grant()
    return received


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise PayloadTooLarge(f"the body is larger than max_body = {limit} bytes", limit="max_body")


class Response(msgspec.Struct, frozen=True):
    """A whole response. ``body`` None: the headers of a response whose length is not known (to a HEAD).

    ``reason`` is the error's message, for the log; a client finds it in the body. ``limit`` is the setting
    whose limit was reached.
    """

    status: int
    body: bytes | None = b""
    headers: Headers = ()
    reason: str = ""
    limit: str | None = None

    def encode(self, *, head_only: bool = False, close: bool = False, date: str | None = None) -> bytes:
        """Write it as HTTP/1.1 (RFC 9112).

        Args:
            head_only: leave the body out, as for a HEAD request (RFC 9110, section 9.3.2).
            close: announce that the connection ends.
            date: the value of the ``Date`` header.
        """
        headers = self.headers
        if date is not None:
            headers += (("Date", date),)
        if self.body is not None and self.status not in _NO_CONTENT:
            headers += (("Content-Length", str(len(self.body))),)
        if close:
            headers += (("Connection", "close"),)
        head = response_head(self.status, headers)
        return head if head_only or not self.body else head + self.body


# Responses that have neither a body nor a Content-Length (RFC 9110, section 8.6).
_NO_CONTENT = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}" for status in HTTPStatus}


def response_head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """Write a status line and header fields, with the empty line after them."""
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return f"{_STATUS_LINES[status]}\r\n{fields}\r\n".encode("latin-1")


@lru_cache(maxsize=2)
def http_date(seconds: int) -> str:
    """Format POSIX seconds as an HTTP date (RFC 9110, section 5.6.7)."""
    return formatdate(seconds, usegmt=True)


def matches_tag(condition: str, tag: str) -> bool:
    """Return whether an ``If-None-Match`` names a tag, compared weakly (RFC 9110, section 13.1.2)."""
    tags = [each.strip().removeprefix("W/") for each in condition.split(",")]
    return "*" in tags or tag in tags


def json_response(status: int, value: Any, headers: Headers = ()) -> Response:
    """Respond with JSON."""
    return Response(status, msgspec.json.encode(value), (("Content-Type", "application/json"), *headers))


def error_response(error: BaseException, request: Request) -> Response:
    """Respond with an error in its one shape. An unexpected one is logged, and its text is not shown."""
    headers: Headers = ()
    limit = None
    if isinstance(error, SseserveError):
        limit = error.limit
        if error.retry_after is not None:
            headers = (("Retry-After", str(error.retry_after)),)
        status, code, message, details = error.status, error.code, str(error), error.details
    else:
        log_failure(request, "request failed", error)
        status, code, message = 500, "internal_error", "internal server error; see the server log"
        details = {}
    if status == 401:
        # An error code only if a token was presented (RFC 6750, section 3.1).
        challenge = 'Bearer error="invalid_token"' if isinstance(error, InvalidToken) else "Bearer"
        headers = (("WWW-Authenticate", challenge),)
    value = {"error": {"code": code, "message": message, **details, "request_id": request.id}}
    return msgspec.structs.replace(json_response(status, value, headers), reason=message, limit=limit)


def log_failure(request: Request, message: str, error: BaseException) -> None:
    """Log an unexpected error, with its traceback but without what is secret of the request.

    An embedding program's error may well repeat a token: a dictionary's names the key that it has not.
    """
    line = request_line(request, message)
    trace = "".join(traceback.format_exception(error))
    if any(secret in trace for secret in request.secrets):
        for secret in request.secrets:
            trace = trace.replace(secret, "[removed]")
        line.trace = trace
        log.error(line)
    else:
        log.error(line, exc_info=error)


def log_response(request: Request, status: int, reason: str = "", body: bytes | None = None) -> None:
    """Log a response: an error at level info and with its reason; others too with the setting ``access_log``.

    ``body``: of a response that is not a stream.

    The script of a page cannot read the response to its WebSocket handshake or to a request of another
    origin, so the log is where an operator learns why it was refused.
    """
    level = logging.INFO if status >= 400 else Levels.access
    if log.isEnabledFor(level):
        context = current_context()
        line = request_line(
            request,
            "request",
            status=status,
            ms=None if context is None else context.elapsed(),
            bytes=None if body is None else len(body),
            user=None if context is None else context.user,
            address=request.peer or None,
            error=reason or None,
        )
        log.log(level, line)


def request_line(request: Request, message: str, **fields: object) -> Line:
    """Return a line of the log about a request, without its query, which may have a ticket."""
    head = {"method": request.method, "path": request.path} if request.method else {}
    return Line(message, **head, **fields, **request.log_fields)


def cors_headers(origins: tuple[str, ...], request: Request) -> Headers:
    """Return the CORS headers for a request's ``Origin`` (Fetch Standard, section 3.2).

    An origin that is listed may send credentials; ``*`` lets all others read without any.
    """
    if not origins:
        return ()
    # Every response has it, as a cache may have stored the one to a request without an ``Origin``.
    vary: Headers = (("Vary", "Origin"),) if set(origins) - {"*"} else ()
    origin = request.headers.get("origin")
    if origin is not None and origin != "*" and origin in origins:
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Credentials", "true"),
            ("Access-Control-Expose-Headers", _EXPOSED),
            *vary,
        )
    if "*" in origins:
        return (("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", _EXPOSED), *vary)
    return vary


def finish_response(request: Request, response: Response, cors_origins: tuple[str, ...] = ()) -> Response:
    """Add the headers that every response has: the request's ids, CORS, and whether it may be stored.

    Only what says so may be (RFC 9111, section 5.2.2.5): a stored 204 would keep late watchers from the end.
    """
    headers = (*response.headers, *cors_headers(cors_origins, request), *request.id_headers)
    if "Cache-Control" not in dict(response.headers):
        headers += (("Cache-Control", "no-store"),)
    return Response(response.status, response.body, headers)
