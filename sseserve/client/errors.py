"""What can go wrong on the client's side.

    ClientError
     +-- CannotConnect       the server could not be reached, and we have given up
     +-- ConnectionLost      one connection failed or was cut; tried again, so seldom seen outside
     +-- BadAnswer           what answered does not speak this protocol
     +-- Refused             the server understood and said no
          +-- SessionNotFound  404 session_not_found
          +-- SessionEnded     409 session_ended

Errors of httpx, trio-websocket and the operating system are translated into these at the edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import NoReturn

import httpx
import msgspec
import trio

__all__ = [
    "BadAnswer",
    "CannotConnect",
    "ClientError",
    "ConnectionLost",
    "Refused",
    "SessionEnded",
    "SessionNotFound",
    "reason",
    "refusal",
    "translated",
    "ungrouped",
]


class ClientError(Exception):
    """Base of all errors that the client raises on purpose."""


class CannotConnect(ClientError):
    """The server could not be reached, or did not take the work, for as long as we were told to try."""


class ConnectionLost(ClientError):
    """A connection failed or was cut. ``retry_after`` is what the server asked us to wait, in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BadAnswer(ClientError):
    """What answered does not speak this protocol; most often the address is another server's."""


class Refused(ClientError):
    """The server understood and said no; trying again would not help.

    ``line`` and ``applied`` are a batch's: the first bad line, and how many lines before it stand.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str = "",
        request_id: str | None = None,
        line: int | None = None,
        applied: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id
        self.line = line
        self.applied = applied

    def __str__(self) -> str:
        where = "" if self.line is None else f"line {self.line}: "
        return where + self.message


class SessionNotFound(Refused):
    """There is no such session, or none that we may see."""


class SessionEnded(Refused):
    """The session has its terminal event; nothing follows it."""


_CLASSES: dict[str, type[Refused]] = {"session_not_found": SessionNotFound, "session_ended": SessionEnded}

# What may be over in a moment: a server that starts, stops or has too much to do.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Detail(msgspec.Struct):
    code: str = ""
    message: str = ""
    request_id: str | None = None
    line: int | None = None
    applied: int = 0


class _Error(msgspec.Struct):
    error: _Detail


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """Make an error of an HTTP answer that is not the one we asked for."""
    try:
        detail = msgspec.json.decode(body, type=_Error).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        detail = _Detail()
    message = detail.message or f"HTTP {status} {_phrase(status)}".rstrip()
    if status in _PASSING:
        wait = headers.get("retry-after", "")
        return ConnectionLost(message, float(wait) if wait.isascii() and wait.isdigit() else None)
    if status < 400:
        return BadAnswer(f"{message}: not what an sseserve server answers")
    return _CLASSES.get(detail.code, Refused)(
        message,
        status=status,
        code=detail.code,
        request_id=detail.request_id,
        line=detail.line,
        applied=detail.applied,
    )


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


@contextmanager
def translated() -> Iterator[None]:
    """Turn errors of httpx into our own."""
    try:
        yield
    except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError) as error:
        raise ConnectionLost(_describe(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BadAnswer(_describe(error)) from error


def _describe(error: Exception) -> str:
    match error:
        case httpx.ReadTimeout():
            return "the server went silent"
        case httpx.TimeoutException():
            return "the connection timed out"
        case _:
            return reason(error)


def reason(error: BaseException) -> str:
    """Find what the operating system said; libraries wrap it in words that say less."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        if isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        else:
            found = found.__cause__ or found.__context__
    return str(error) or type(error).__name__


@contextmanager
def ungrouped() -> Iterator[None]:
    """Take the one error that matters out of the group that a nursery makes of it.

    Cancellations in the group followed from that error. Two errors at once stay a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [error for error in _leaves(group) if not isinstance(error, trio.Cancelled)]
        if len(errors) != 1:
            raise
        _reraise(errors[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _reraise(error: BaseException) -> NoReturn:
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context  # not the group that it has just come out of
        del error, context
