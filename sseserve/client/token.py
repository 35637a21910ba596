"""Bearer tokens (RFC 6750): a fresh one for each request, and only for requests to one server.

No error repeats a token.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable

import httpx

from .errors import ClientError, ConnectionLost, describe_cause

__all__ = ["AsyncBearer", "AsyncToken", "Bearer", "Token", "check_token"]

# A token, or a function that returns one that is valid now; it is called for each request.
Token = str | Callable[[], str]
AsyncToken = str | Callable[[], str | Awaitable[str]]

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class Bearer:
    """Adds a token to the requests to one server.

    Args:
        token: the token, or a function that returns it.
        base_url: the server's URL.

    Raises:
        ValueError: it is no token.
    """

    def __init__(self, token: Token, base_url: str) -> None:
        self._token = token if callable(token) else check_token(token)
        self._origin = _origin(base_url)

    def add_to(self, request: httpx.Request) -> None:
        """Add the token to a request.

        Raises:
            ClientError: the function has failed.
        """
        if _is_for(self._origin, request):
            try:
                value = self._token() if callable(self._token) else self._token
            except Exception as error:
                raise _failed(error) from error
            request.headers["Authorization"] = _field(value)


class AsyncBearer:
    """The same for asynchronous programs; the function may be asynchronous."""

    def __init__(self, token: AsyncToken, base_url: str) -> None:
        self._token = token if callable(token) else check_token(token)
        self._origin = _origin(base_url)

    @property
    def is_renewable(self) -> bool:
        """Whether another token can be had."""
        return callable(self._token)

    async def field(self) -> str:
        """Return the header field ``Authorization``.

        Raises:
            ClientError: the function has failed.
        """
        try:
            value = self._token() if callable(self._token) else self._token
            if inspect.isawaitable(value):
                value = await value
        except Exception as error:
            raise _failed(error) from error
        return _field(value)

    async def add_to(self, request: httpx.Request) -> None:
        """Add the token to a request.

        Raises:
            ClientError: the function has failed.
        """
        if _is_for(self._origin, request):
            request.headers["Authorization"] = await self.field()


# Scheme, host and port; None: of the scheme.
_Origin = tuple[str, str, int | None]


def _origin(base_url: str) -> _Origin | None:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        return None  # its requests will fail
    return url.scheme, url.host, url.port


def _is_for(origin: _Origin | None, request: httpx.Request) -> bool:
    """Whether a request is to an origin. If a redirect has led it elsewhere, remove its token."""
    if (request.url.scheme, request.url.host, request.url.port) == origin:
        return True
    request.headers.pop("Authorization", None)
    return False


def _field(value: object) -> str:
    try:
        return f"Bearer {check_token(value)}"
    except ValueError as error:
        raise ClientError(str(error)) from None


def check_token(value: object) -> str:
    """Return a token without white space around it.

    Raises:
        ValueError: it cannot be one.
    """
    token = value.strip() if isinstance(value, str) else ""
    if _TOKEN.fullmatch(token) is None:
        raise ValueError(
            "the token must be one word of letters, digits and -._~+/ (RFC 6750), without 'Bearer' before it"
        )
    return token


def _failed(error: Exception) -> Exception:
    """Return what is raised for an error of the function: it may pass, if it is one of the network."""
    if isinstance(error, ClientError):
        return error
    kind = ConnectionLost if isinstance(error, OSError | httpx.TransportError) else ClientError
    return kind(f"cannot get a token: {describe_cause(error)}")
