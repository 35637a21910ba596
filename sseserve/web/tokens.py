"""Tokens: tickets that stand for them, refreshing and revoking them."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import msgspec

from ..engines.coordination import Coordination
from ..errors import Conflict, Invalid
from ..http.admission import Admission
from ..http.auth import LEEWAY, Action, Grant, Ticket, refusal
from ..http.messages import Request, Response, json_response, read_body
from ..http.refreshes import Refreshes
from ..http.revocations import Revocation
from ..http.routing import Match
from ..http.schemas import CreatedTicket, Refreshed, RevocationBody, TicketBody
from ..http.tickets import Tickets
from ..jsontext import decode
from .dispatch import Handler

__all__ = ["TokenHandlers"]


class TokenHandlers:
    """The handlers of tokens.

    Args:
        admission: says who may watch what.
        tickets: makes them.
        refreshes: extends streams.
        coordination: tells all instances what is revoked.
        wait_revoked: waits until the streams of revoked tokens have ended in this process.
        max_lifetime: of a token, in seconds: for so long a revocation is kept.
        max_body: limit of a request's body, in bytes.
        clock: returns POSIX seconds.
    """

    def __init__(
        self,
        admission: Admission,
        tickets: Tickets,
        refreshes: Refreshes,
        coordination: Coordination,
        *,
        wait_revoked: Callable[[], Awaitable[None]],
        max_lifetime: float,
        max_body: int,
        clock: Callable[[], float],
    ) -> None:
        self._admission = admission
        self._tickets = tickets
        self._refreshes = refreshes
        self._coordination = coordination
        self._wait_revoked = wait_revoked
        self.max_lifetime = max_lifetime
        self._max_body = max_body
        self._clock = clock

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {"ticket": self.make_ticket, "refresh": self.refresh, "revoke": self.revoke}

    async def make_ticket(self, request: Request, _match: Match) -> Response:
        """Make a ticket for sessions that the grant may watch."""
        grant = _grant(request)
        body: TicketBody = decode(await read_body(request, self._max_body), TicketBody)
        if not (body.sessions or body.list):
            raise Invalid('name the sessions that the ticket is for, or {"list": true} for the list of them')
        allowed = [await self._admission.allows(grant, Action.WATCH, name) for name in body.sessions]
        if not all(allowed):
            raise refusal(grant, Action.WATCH)
        ticket, seconds = await self._tickets.make(grant, Ticket(frozenset(body.sessions), body.list))
        return json_response(201, CreatedTicket(ticket, math.floor(seconds)))

    async def refresh(self, request: Request, _match: Match) -> Response:
        """Extend the open streams of the token's subject that it may watch, too."""
        grant = _grant(request)
        await self._refreshes.refresh(grant)
        expires_in = None
        if grant.expires_at is not None:
            expires_in = max(0, math.floor(grant.expires_at - self._clock()))
        return json_response(200, Refreshed(expires_in))

    async def revoke(self, request: Request, _match: Match) -> Response:
        """Revoke one token, or those of a subject that were issued until now."""
        _grant(request)
        body: RevocationBody = decode(await read_body(request, self._max_body), RevocationBody)
        if (body.subject is None) == (body.token_id is None):
            raise Invalid("name what is revoked: either subject or token_id")
        now = self._clock()
        until = now + self.max_lifetime + LEEWAY
        revocation = Revocation(**msgspec.structs.asdict(body), at=now, until=until)
        await self._coordination.store_revocation(msgspec.msgpack.encode(revocation), until)
        await self._wait_revoked()
        return Response(204)


def _grant(request: Request) -> Grant:
    if request.grant is None:
        raise Conflict("there are no tokens: this server runs without authentication (setting jwt_key)")
    return request.grant
