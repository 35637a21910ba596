"""Tokens: who makes a request, read from a JSON Web Token (RFC 7519, with RFC 8725's advice).

Guarantees:

- Which algorithm verifies a token follows from the key, and which key from the settings; nothing in a token
  chooses another one, or says where to find one.
- Only what was signed by a trusted issuer, for this server, and is valid now, gives a grant. Everything else
  is a 401, whatever its bytes are, and no message repeats it.
- A token that was verified once costs a look-up until the keys change. Whether it has expired or was revoked
  is checked for each request, by ``http.open_streams``.

PyJWT, cryptography and httpx are optional (the extra ``auth``): of the server only the modules in here import
them, and these are imported when there is a key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..config import Settings
from ..errors import ConfigError

if TYPE_CHECKING:
    from .authenticator import Authenticator
    from .jwks import RemoteKeys
    from .pubsub import PushAuthenticator

__all__ = ["open_authenticator", "open_push_authenticator"]


def open_authenticator(
    settings: Settings, *, clock: Callable[[], float] = time.time, known: Sequence[RemoteKeys] = ()
) -> Authenticator | None:
    """Return what verifies the tokens of requests; None: the settings name no key.

    Args:
        settings: of the server.
        clock: returns POSIX seconds.
        known: keys that are fetched already, by the one that this one replaces.

    Raises:
        ConfigError: a key cannot be used, or the libraries are not installed.
    """
    is_named = settings.jwt_issuer is not None or settings.jwt_audience is not None
    if is_named and settings.jwt_key is None and settings.jwks_url is None:
        raise ConfigError("jwt_issuer and jwt_audience verify nothing without jwt_key or jwks_url")
    if not settings.has_token_keys:
        return None
    _require_libraries("jwt_key, jwks_url and issuers need")
    from .authenticator import Authenticator
    from .issuers import trusted_issuers
    from .verifier import Verifier

    verifier = Verifier(trusted_issuers(settings, known), settings, clock=clock)
    return Authenticator(verifier, settings)


def open_push_authenticator(
    settings: Settings, *, is_open: bool, clock: Callable[[], float] = time.time
) -> PushAuthenticator | None:
    """Return what verifies the tokens of Pub/Sub; None: it needs a token as everybody else.

    Args:
        settings: of the server.
        is_open: the server runs without authentication.
        clock: returns POSIX seconds.

    Raises:
        ConfigError: only a part of what is needed is set, or the libraries are not installed.
    """
    named = [settings.pubsub_audience, settings.pubsub_email]
    if named == [None, None]:
        return None
    if None in named:
        raise ConfigError("pubsub_audience and pubsub_email are needed both: tokens of others have either")
    if is_open:
        raise ConfigError("pubsub_audience and pubsub_email need authentication: set jwt_key or jwks_url")
    _require_libraries("pubsub_audience and pubsub_email need")
    from .pubsub import PushAuthenticator

    return PushAuthenticator(settings, clock=clock)


def _require_libraries(what: str) -> None:
    try:
        import cryptography  # noqa: F401 - PyJWT would only refuse most algorithms without it
        import httpx  # noqa: F401
        import jwt  # noqa: F401
    except ImportError:
        raise ConfigError(f"{what} PyJWT, cryptography and httpx: pip install 'sseserve[auth]'") from None
