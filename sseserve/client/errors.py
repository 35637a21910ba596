"""What can go wrong on the client's side.

    ClientError
     +-- CannotConnect          the server could not be reached, and the retries are used up
     +-- ConnectionLost         one connection failed; retried, so callers seldom see it
     +-- InvalidResponse        the response does not follow the protocol
     +-- RequestRejected        the server rejected the request
          +-- UnknownSession      404 session_not_found
          +-- SessionFinished     409 session_ended

Errors of httpx, trio-websocket and the operating system are translated into these where they occur.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import NoReturn

import httpx
import msgspec
import trio

__all__ = [
    "RETRYABLE_STATUSES",
    "CannotConnect",
    "ClientError",
    "ConnectionLost",
    "InvalidResponse",
    "RequestRejected",
    "SessionFinished",
    "UnknownSession",
    "describe_cause",
    "error_from_response",
    "translate_httpx_errors",
    "unwrap_exception_group",
]


class ClientError(Exception):
    """Base of all errors that the client raises on purpose."""


class CannotConnect(ClientError):
    """The server could not be reached, or did not accept the request, within the retry timeout."""


class ConnectionLost(ClientError):
    """A connection failed or was lost. ``retry_after`` is the server's ``Retry-After``, in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InvalidResponse(ClientError):
    """The response does not follow the protocol; most often the URL is another server's."""


class RequestRejected(ClientError):
    """The server rejected the request; trying again would not help.

    Args:
        message: the server's explanation.
        status: the HTTP status code.
        code: the error code, such as ``forbidden``; empty if the body has none.
        request_id: the ``X-Request-ID`` to look for in the server's log.
        line: the first invalid line of NDJSON, from 1.
        applied: how many lines before it were applied.
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
        prefix = "" if self.line is None else f"line {self.line}: "
        return prefix + self.message


class UnknownSession(RequestRejected):
    """The session does not exist, or the caller may not see it."""


class SessionFinished(RequestRejected):
    """The session has its terminal event; nothing can follow it."""


_ERROR_CLASSES: dict[str, type[RequestRejected]] = {
    "session_not_found": UnknownSession,
    "session_ended": SessionFinished,
}

# These are temporary: the server is starting, stopping or overloaded, or cannot store anything now.
RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 507})


class _Detail(msgspec.Struct):
    code: str = ""
    message: str = ""
    request_id: str | None = None
    line: int | None = None
    applied: int = 0


class _Error(msgspec.Struct):
    error: _Detail


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """Return the error that an unsuccessful HTTP response stands for."""
    try:
        detail = msgspec.json.decode(body, type=_Error).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        detail = _Detail()
    message = detail.message or f"HTTP {status} {_phrase(status)}".rstrip()
    if status in RETRYABLE_STATUSES:
        value = headers.get("retry-after", "")
        return ConnectionLost(message, float(value) if value.isascii() and value.isdigit() else None)
    if status < 400:
        return InvalidResponse(f"{message}: not a response of an sseserve server")
    return _ERROR_CLASSES.get(detail.code, RequestRejected)(
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
def translate_httpx_errors() -> Iterator[None]:
    """Raise errors of httpx as ``ConnectionLost`` or ``InvalidResponse``."""
    try:
        yield
    except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError) as error:
        raise ConnectionLost(_describe_httpx_error(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InvalidResponse(_describe_httpx_error(error)) from error


def _describe_httpx_error(error: Exception) -> str:
    match error:
        case httpx.ReadTimeout():
            return "timed out waiting for data from the server"
        case httpx.TimeoutException():
            return "the connection timed out"
        # The words of h11 and httpcore for a connection that ends in the middle of a response, or before it.
        case httpx.RemoteProtocolError() if re.search("closed connection|disconnected", str(error)):
            return "the server closed the connection"
        case _:
            return describe_cause(error)


# Why a certificate is not trusted (openssl-verification-options(1)): self-signed, or by somebody unknown.
_UNKNOWN_AUTHORITY = (18, 19, 20, 21)


def describe_cause(error: BaseException) -> str:
    """Return the operating system's message behind ``error`` if there is one, since it says the most."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "; name its authority with ca= (--ca)" if cause.verify_code in _UNKNOWN_AUTHORITY else ""
            return f"the server's certificate is not trusted: {cause.verify_message}{hint}"
        if isinstance(cause, OSError) and cause.strerror:
            # Trio writes the address into it; these two have numbers of their own.
            if cause.errno is None or isinstance(cause, socket.gaierror | ssl.SSLError):
                return cause.strerror
            return os.strerror(cause.errno)
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


@contextmanager
def unwrap_exception_group() -> Iterator[None]:
    """Raise the only error of a nursery's exception group without the group.

    ``Cancelled`` is ignored, since the error caused it. Two or more errors stay a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [error for error in _flatten(group) if not isinstance(error, trio.Cancelled)]
        if len(errors) != 1:
            raise
        _reraise(errors[0])


def _flatten(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flatten(error)
        else:
            yield error


def _reraise(error: BaseException) -> NoReturn:
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context  # raise has set it to the group
        del error, context
