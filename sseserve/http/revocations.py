"""Which tokens were revoked. No I/O, no clock: times are POSIX seconds."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..concurrency import visit
from .auth import Grant

__all__ = ["Revocation", "Revocations"]


class Revocation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Revokes one token, or those of a subject that were issued before, by that issuer or by any.

    ``until`` is when all of them have expired.
    """

    subject: str | None = None
    issuer: str | None = None
    token_id: str | None = None
    at: float
    until: float

    def applies(self, grant: Grant) -> bool:
        """Return whether it revokes the token of a grant."""
        if self.issuer is not None and self.issuer != grant.issuer:
            return False
        if self.token_id is not None:
            return grant.token_id == self.token_id
        # The claim iat is in whole seconds, so one of the same second may have been issued before.
        return grant.subject == self.subject and (grant.issued_at is None or grant.issued_at <= self.at)


class Revocations:
    """Those that hold now, as far as this instance knows."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str], list[Revocation]] = {}
        self.on_revoked: Callable[[Revocation], None] = lambda _revocation: None

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    def add(self, revocation: Revocation) -> None:
        """Take note of a revocation; one that is known already changes nothing."""
        known = self._by_key.setdefault(_key(revocation), [])
        if revocation in known:
            return
        # A later one of the same issuer revokes what this one does, and more.
        known[:] = [other for other in known if other.issuer != revocation.issuer or other.at > revocation.at]
        known.append(revocation)
        self.on_revoked(revocation)

    def is_revoked(self, grant: Grant) -> bool:
        """Return whether the token of a grant was revoked."""
        if not self._by_key:
            return False
        known = list(self._by_key.get(("subject", grant.subject), ()))
        if grant.token_id is not None:
            known += self._by_key.get(("token_id", grant.token_id), ())
        return any(revocation.applies(grant) for revocation in known)

    async def expire(self, now: float) -> None:
        """Forget those whose tokens have expired."""

        def expire(key: tuple[str, str]) -> None:
            if kept := [revocation for revocation in self._by_key[key] if revocation.until > now]:
                self._by_key[key] = kept
            else:
                del self._by_key[key]

        await visit(self._by_key, expire)


def _key(revocation: Revocation) -> tuple[str, str]:
    if revocation.token_id is not None:
        return "token_id", revocation.token_id
    assert revocation.subject is not None
    return "subject", revocation.subject
