"""What can go wrong with Redis, and what it means. Pure."""

from __future__ import annotations

import os
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import msgspec
import trio
from anyio import ClosedResourceError, EndOfStream
from coredis import exceptions

from ...errors import EngineUnavailable

__all__ = ["LOST", "CannotConnect", "Refused", "describe", "is_temporary", "reason", "translated"]

P = ParamSpec("P")
T = TypeVar("T")

# What a connection that cannot be opened, breaks or hangs raises
LOST = (exceptions.ConnectionError, trio.TooSlowError, TimeoutError, OSError)

_TEMPORARY = (
    exceptions.BusyLoadingError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
)
_TEMPORARY_CODES = ("MASTERDOWN", "UNBLOCKED", "NOREPLICAS", "BUSY ")


class CannotConnect(exceptions.ConnectionError):
    """The message says why, without the server's address, which is not for everybody."""


class Refused(EngineUnavailable):
    """Redis refuses a command, or what it has is not what this server has stored: no other try helps."""


def translated(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let a method raise ``Refused`` where somebody else has changed permissions or keys of a Redis."""

    @wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except exceptions.ResponseError as error:
            raise Refused(f"Redis refuses a command: {error}") from error
        except (msgspec.DecodeError, RecursionError, IndexError) as error:
            raise Refused(f"Redis has something that sseserve has not stored: {error}") from error

    return call


def is_temporary(response: Exception) -> bool:
    """Return whether a server that responds so will respond otherwise later, or another one instead of it."""
    return isinstance(response, _TEMPORARY) or str(response).startswith(_TEMPORARY_CODES)


def describe(error: Exception) -> str:
    """Return in a sentence that Redis cannot be used, and why."""
    text = reason(error)
    return text if text.startswith("cannot connect") else f"Redis does not respond: {text}"


def reason(error: BaseException) -> str:
    """Return what is wrong, in a few words."""
    if isinstance(error, BaseExceptionGroup):
        return reason(error.exceptions[0])
    if isinstance(error, CannotConnect):
        return str(error)
    if isinstance(error, exceptions.ConnectionError | OSError) and error.__cause__ is not None:
        return reason(error.__cause__)
    if isinstance(error, EndOfStream | ClosedResourceError):
        return "the connection was closed"
    if type(error) is exceptions.ConnectionError and str(error).startswith("Unable to establish"):
        return "no response"  # instead of coredis's message, which has the server's address
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"  # its errno is OpenSSL's
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
