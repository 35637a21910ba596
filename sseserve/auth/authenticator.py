"""Finds the token of a request, in ``Authorization`` (RFC 6750, section 2.1) or a cookie (RFC 6265)."""

from __future__ import annotations

import re

from ..config import Settings
from ..errors import ConfigError, Forbidden, InvalidToken, Unauthorized
from ..http.auth import Grant
from ..http.messages import Request
from .verifier import Verifier

__all__ = ["Authenticator", "bearer_token"]

MAX_KNOWN = 4096  # tokens that are remembered
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE)
_COOKIE_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Authenticator:
    """Returns the grants of requests, as ``http.admission.Authenticate``.

    Args:
        verifier: verifies the tokens.
        settings: name the cookie.

    Raises:
        ConfigError: no cookie can have that name.
    """

    def __init__(self, verifier: Verifier, settings: Settings) -> None:
        if not _COOKIE_NAME.fullmatch(settings.cookie):
            raise ConfigError("the setting cookie must be a name, such as __Host-sseserve (RFC 6265, 4.1.1)")
        self._verifier = verifier
        self._cookie = settings.cookie
        self._known: dict[str, Grant] = {}  # by the whole header field
        self.remote_keys = verifier.remote_keys
        self.trusts = verifier.trusts
        verifier.on_change(self._known.clear)

    async def __call__(self, request: Request) -> Grant:
        """Return the grant of a request.

        Raises:
            Unauthorized: it has no token; InvalidToken: it has one that is not valid.
            Forbidden: its token is in a cookie, and it may come from a page of another origin.
            Unavailable: the keys could not be fetched yet.
        """
        field = request.headers.get("authorization")
        if field is None:
            field = self._field_of_cookie(request)
        grant = self._known.get(field)
        if grant is None:
            grant = await self._verify(field)
        return grant

    async def _verify(self, field: str) -> Grant:
        grant = await self._verifier.grant(bearer_token(field))
        while len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[field] = grant
        return grant

    def _field_of_cookie(self, request: Request) -> str:
        """Return what the header would be if it had the cookie's token."""
        values = _cookies(request.headers.get("cookie", ""), self._cookie)
        if not values:
            raise Unauthorized(
                "a token is required: Authorization: Bearer TOKEN; a page's stream or WebSocket has a ticket "
                "instead (POST /api/tickets)"
            )
        if len(values) > 1:
            raise InvalidToken(f"the cookie {self._cookie} is there twice")
        # A browser sends it with the requests of other pages, too. The origin that there is was checked.
        is_socket = request.headers.get("sec-websocket-version") is not None
        if (is_socket or request.method not in _SAFE_METHODS) and "origin" not in request.headers:
            raise Forbidden(
                "a request that changes something needs an Origin if its token is in a cookie; a program "
                "sends the token in the header Authorization instead"
            )
        return f"Bearer {values.pop()}"


def bearer_token(field: str | None) -> str:
    """Return the token in a header ``Authorization``.

    Raises:
        Unauthorized: it has none, or there is no header; InvalidToken: it is malformed.
    """
    if field is None:
        raise Unauthorized("a token is required: Authorization: Bearer TOKEN")
    match = _BEARER.fullmatch(field)
    if match is not None:
        return match[1]
    if field[:6].lower() == "bearer":
        raise InvalidToken("the header must be Authorization: Bearer TOKEN")
    raise Unauthorized("a bearer token is required, not another scheme in the header Authorization")


def _cookies(field: str, name: str) -> set[str]:
    """Return the values of a cookie (RFC 6265, section 4.2.1)."""
    values = set()
    for pair in field.split(";"):
        key, _, value = pair.strip().partition("=")
        if key == name:
            is_quoted = len(value) >= 2 and value[0] == value[-1] == '"'
            values.add(value[1:-1] if is_quoted else value)
    return values
