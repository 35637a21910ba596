"""Verifies tokens: the issuer, the signature, the times, the audience; then reads the grant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..config import Settings
from ..errors import InvalidToken
from ..http.auth import Grant
from .claims import check_audience, check_times, parse, read_grant
from .issuers import TrustedIssuer
from .jwks import RemoteKeys
from .keys import is_signed_by

__all__ = ["Verifier"]


class Verifier:
    """Verifies the tokens of some issuers.

    Args:
        issuers: those that are trusted, each under a name of its own.
        settings: the names of claims, and how long a token may be valid.
        clock: returns POSIX seconds.
    """

    def __init__(
        self, issuers: Sequence[TrustedIssuer], settings: Settings, *, clock: Callable[[], float]
    ) -> None:
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._trusts = {issuer.issuer: issuer.trust for issuer in issuers}
        self._names = settings.claims
        self._max_lifetime = settings.max_token_lifetime
        self._clock = clock

    def on_change(self, function: Callable[[], None]) -> None:
        """Have a function called whenever keys have changed."""
        for issuer in self._issuers.values():
            issuer.keys.on_change = function

    @property
    def remote_keys(self) -> list[RemoteKeys]:
        """The keys that must be fetched (``run``) as long as tokens are verified."""
        sources = dict.fromkeys(issuer.keys for issuer in self._issuers.values())
        return [keys for keys in sources if isinstance(keys, RemoteKeys)]

    def trusts(self, grant: Grant) -> bool:
        """Return whether a grant could be of a token that is verified here.

        That of a program has no token. What is not remembered of a token is taken to be valid.
        """
        if grant.trust is None:
            return True
        issuer = self._issuers.get(grant.issuer) or self._issuers.get(None)
        return (
            issuer is not None
            and self._trusts[issuer.issuer] == grant.trust
            and (issuer.roles is None or grant.role is None or grant.role in issuer.roles)
            and (issuer.allows_capabilities or not grant.capabilities)
        )

    async def verify(self, token: str) -> tuple[TrustedIssuer, dict[str, Any]]:
        """Return the issuer and the claims of a token that is valid now.

        Raises:
            InvalidToken: it is not.
            Unavailable: the keys could not be fetched yet.
        """
        header, claims = parse(token)
        # What a token says of its issuer only selects the keys that must then have signed it.
        name, key_id = claims.get("iss"), header.get("kid")
        if not isinstance(name, str | None) or not isinstance(key_id, str | None):
            raise InvalidToken("the token's iss and kid must be strings")
        issuer = self._issuers.get(name) or self._issuers.get(None)
        if issuer is None:
            raise InvalidToken("the token's issuer is not one that is trusted here")
        # No await between the keys and their use: they may change.
        if not any(is_signed_by(token, key) for key in await issuer.keys.find(key_id)):
            raise InvalidToken("the token is not signed with a key that is trusted here")
        check_times(claims, self._clock(), self._max_lifetime)
        check_audience(claims, issuer.audience)
        return issuer, claims

    async def grant(self, token: str) -> Grant:
        """Return the grant of a token.

        Raises:
            InvalidToken: it is not valid, or a claim of it is wrong.
            Unavailable: the keys could not be fetched yet.
        """
        issuer, claims = await self.verify(token)
        grant = read_grant(
            claims,
            self._names,
            prefix=issuer.subject_prefix,
            foreign_prefixes=issuer.foreign_prefixes,
            roles=issuer.roles,
            allows_capabilities=issuer.allows_capabilities,
        )
        return msgspec.structs.replace(grant, trust=self._trusts[issuer.issuer])
