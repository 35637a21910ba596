"""The tokens that Google's Pub/Sub sends with what it pushes (OpenID Connect Core 1.0, section 2)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..config import Claims, Settings
from ..errors import InvalidToken
from ..http.auth import Action, Grant
from ..http.messages import Request
from .authenticator import bearer_token
from .claims import read_grant
from .issuers import TrustedIssuer
from .jwks import RemoteKeys
from .verifier import Verifier

__all__ = ["PushAuthenticator"]

ISSUERS = ("https://accounts.google.com", "accounts.google.com")


class PushAuthenticator:
    """Returns the grants of pushes, which may publish to every session.

    Args:
        settings: name the audience and the service account of the subscription.
        clock: returns POSIX seconds.

    Raises:
        ConfigError: the URL of the keys cannot be used.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float]) -> None:
        keys = RemoteKeys(settings.pubsub_jwks_url, "pubsub_jwks_url")
        issuers = [
            TrustedIssuer(keys=keys, issuer=name, audience=settings.pubsub_audience) for name in ISSUERS
        ]
        self._verifier = Verifier(issuers, settings, clock=clock)
        self._email = settings.pubsub_email
        self.keys = keys

    async def __call__(self, request: Request) -> Grant:
        """Return the grant of a request.

        Raises:
            Unauthorized: it has no token; InvalidToken: not one of this subscription, or not a valid one.
            Unavailable: the keys could not be fetched yet.
        """
        field = request.headers.get("authorization")
        _, claims = await self._verifier.verify(bearer_token(field))
        # Anybody can have Google issue tokens for any audience, of a service account of their own.
        if claims.get("email") != self._email or claims.get("email_verified") is not True:
            raise InvalidToken("the token is not of the service account that the setting pubsub_email names")
        grant = read_grant(claims, Claims())
        return msgspec.structs.replace(
            grant, role=None, patients=frozenset(), capabilities={Action.PUBLISH: ("*",)}
        )
