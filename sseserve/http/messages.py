"""What both doors say in HTTP: requests, answers, errors in their one shape, CORS. No I/O, no clock.

The direct path of ``server/`` and the Quart app of ``web/`` read the same ``Request`` and write the same
``Answer``, so that a client cannot tell which of them served it.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from ..errors import Forbidden, SseserveError

__all__ = [
    "STREAM_HEADERS",
    "Answer",
    "Request",
    "cors",
    "error_answer",
    "foreign",
    "json_answer",
    "log_answer",
]

log = logging.getLogger(__name__)

Headers = tuple[tuple[str, str], ...]

STREAM_HEADERS: Headers = (
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request's head. Header names are lower case; ``path`` is percent-decoded."""

    method: str
    path: str
    query_string: str
    headers: Mapping[str, str]
    id: str

    @classmethod
    def make(
        cls, method: str, path: str, query_string: str, headers: Iterable[tuple[bytes, bytes]]
    ) -> Request:
        """Build one from raw headers; takes over a sound ``X-Request-ID``, else makes an id."""
        fields: dict[str, str] = {}
        for raw_name, raw_value in headers:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        given = fields.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        return cls(method=method, path=path, query_string=query_string, headers=fields, id=request_id)

    @property
    def correlation_id(self) -> str:
        """What the request has in common with others: a sound ``X-Correlation-ID``, else its own id."""
        given = self.headers.get("x-correlation-id", "")
        return given if _REQUEST_ID.fullmatch(given) else self.id

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of one given twice, the last."""
        return dict(parse_qsl(self.query_string, keep_blank_values=True)) if self.query_string else {}

    def values(self, name: str) -> list[str]:
        """All values of a query parameter, in their order."""
        return [value for key, value in parse_qsl(self.query_string) if key == name]

    @property
    def line(self) -> str:
        """Method and path on one line of a log, whatever they hold."""
        return f"{self.method} {self.path}".encode("unicode_escape").decode()

    @property
    def media_type(self) -> str:
        """The body's media type without its parameters, lower case; empty if none is named."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class Answer(msgspec.Struct, frozen=True):
    """A whole response."""

    status: int
    body: bytes = b""
    headers: Headers = ()

    def encode(self, *, request: Request, more: Headers = (), close: bool = False) -> bytes:
        """Write it as HTTP/1.1 (RFC 9112); ``close`` announces the connection's end."""
        headers = [*self.headers, *more, ("X-Request-ID", request.id)]
        if self.status != HTTPStatus.NO_CONTENT:
            headers.append(("Content-Length", str(len(self.body))))
        if close:
            headers.append(("Connection", "close"))
        return head(self.status, headers) + (b"" if request.method == "HEAD" else self.body)


def head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """Write a status line and header fields, with the empty line behind them."""
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


def json_answer(status: int, value: Any, headers: Headers = ()) -> Answer:
    """Answer with JSON."""
    return Answer(status, msgspec.json.encode(value), (("Content-Type", "application/json"), *headers))


def error_answer(error: BaseException, request: Request) -> Answer:
    """Answer an error in its one shape. One that we did not raise on purpose is logged and says nothing."""
    if isinstance(error, SseserveError):
        status, code, message, details = error.status, error.code, str(error), error.details
    else:
        log.error("request %s failed: %s", request.id, request.line, exc_info=error)
        status, code, message = 500, "internal_error", "the server failed; its log has the reason"
        details = {}
    headers = (("WWW-Authenticate", "Bearer"),) if status == 401 else ()
    value = {"error": {"code": code, "message": message, **details, "request_id": request.id}}
    return json_answer(status, value, headers)


def log_answer(request: Request, status: int) -> None:
    """Note what was answered, with the request's id: at level info if it was refused, else at debug."""
    level = logging.INFO if status >= 400 else logging.DEBUG
    if log.isEnabledFor(level):
        log.log(level, "request %s: %s -> %d", request.id, request.line, status)


def cors(origins: tuple[str, ...], request: Request) -> Headers:
    """Return the CORS headers for a request's ``Origin`` (Fetch Standard, section 3.2).

    An origin that is listed may send credentials; ``*`` lets all others read without any.
    """
    origin = request.headers.get("origin")
    if origin is None or not origins:
        return ()
    if origin in origins:
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Credentials", "true"),
            ("Access-Control-Expose-Headers", "ETag, Location, X-Correlation-ID, X-Request-ID"),
            ("Vary", "Origin"),
        )
    if "*" in origins:
        return (
            ("Access-Control-Allow-Origin", "*"),
            ("Access-Control-Expose-Headers", "ETag, Location, X-Correlation-ID, X-Request-ID"),
        )
    return (("Vary", "Origin"),)


def foreign(origins: tuple[str, ...], request: Request) -> Answer | None:
    """Refuse a WebSocket that a page of another origin opens, unless that is listed. None: it is not to be.

    CORS does not hold for a WebSocket: any page can open one with the cookies of whoever looks at it, and
    read it (RFC 6455, section 10.2). ``*`` lists nobody here, as it lets nobody read with credentials. A
    program sends no ``Origin``.
    """
    origin = request.headers.get("origin")
    if origin is None or origin in origins or _same_host(origin, request.headers.get("host", "")):
        return None
    return error_answer(
        Forbidden(f"pages of {origin} may not watch here; cors_origins lists who may"), request
    )


def _same_host(origin: str, host: str) -> bool:
    """Whether an origin has this ``Host``. A proxy may have taken the TLS off, so the scheme says nothing."""
    try:
        page, ours = urlsplit(origin), urlsplit(f"{origin.partition(':')[0]}://{host}")
        default = {"http": 80, "https": 443}.get(page.scheme)
        return bool(page.hostname) and (page.hostname, page.port or default) == (
            ours.hostname,
            ours.port or default,
        )
    except ValueError:
        return False
