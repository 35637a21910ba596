"""Tickets: what a client that cannot send headers, such as EventSource, puts into the address of a stream.

Guarantees:

- A ticket is good for one stream, within ``TICKET_SECONDS``, and allows no more than its maker may watch
  then. It expires, and is revoked, with the token that it was made with.
- Whoever reads what is kept of it cannot use it: that is stored under a SHA-256 of the ticket.
- Tickets that are kept need a bounded memory, for each user and altogether.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter, deque
from collections.abc import Callable

import msgspec
import trio

from ..concurrency import SLICE
from ..engines.coordination import Coordination
from ..errors import InvalidToken, TooManyRequests, Unauthorized
from .auth import LEEWAY, Grant, Ticket

__all__ = ["TICKET_SECONDS", "Tickets"]

TICKET_SECONDS = 60.0
MAX_BYTES = 64 * 2**20  # of all tickets that this process has made in that time
MAX_USER_BYTES = 4 * 2**20  # and of one user's: about 10,000
OVERHEAD = 256  # bytes that a ticket takes besides its grant


class Tickets:
    """Makes tickets and takes them back.

    Args:
        coordination: keeps them, for all instances.
        check: raises Unauthorized if the token of a grant is not valid any more.
        clock: returns POSIX seconds.
    """

    def __init__(
        self, coordination: Coordination, check: Callable[[Grant], None], *, clock: Callable[[], float]
    ) -> None:
        self._coordination = coordination
        self._check = check
        self._clock = clock
        # Until when each is kept, whose it is, and its size; the oldest first. One that was used counts on.
        self._made: deque[tuple[float, tuple[str | None, str], int]] = deque()
        self._sizes = Counter[tuple[str | None, str]]()
        self._size = 0

    async def make(self, grant: Grant, ticket: Ticket) -> tuple[str, float]:
        """Make a ticket; return it, and for how many seconds it is good.

        Args:
            grant: of its maker, who may watch what it is for.
            ticket: what it is for.

        Raises:
            TooManyRequests: too many are kept.
            Unavailable: it cannot be kept now.
        """
        now = self._clock()
        seconds = TICKET_SECONDS
        if grant.expires_at is not None:
            seconds = min(seconds, grant.expires_at + LEEWAY - now)
        value = msgspec.msgpack.encode(msgspec.structs.replace(grant, ticket=ticket))
        await self._drop_expired(now)
        self._count(grant.user, now, len(value) + OVERHEAD)
        text = secrets.token_urlsafe(32)
        await self._coordination.store_ticket(_key(text), value, seconds)
        return text, seconds

    async def _drop_expired(self, now: float) -> None:
        dropped = 0
        while self._made and self._made[0][0] <= now:
            _, whose, freed = self._made.popleft()
            self._size -= freed
            self._sizes[whose] -= freed
            if not self._sizes[whose]:
                del self._sizes[whose]
            dropped += 1
            if dropped % SLICE == 0:
                await trio.lowlevel.checkpoint()

    def _count(self, user: tuple[str | None, str], now: float, size: int) -> None:
        if self._size + size > MAX_BYTES or self._sizes[user] + size > MAX_USER_BYTES:
            raise TooManyRequests(
                "too many tickets were made in the last minute; make each when it is needed",
                retry_after=math.ceil(TICKET_SECONDS),
            )
        self._made.append((now + TICKET_SECONDS, user, size))
        self._size += size
        self._sizes[user] += size

    async def take(self, text: str) -> Grant:
        """Return the grant of a ticket, which nobody can use again.

        Raises:
            InvalidToken: there is none (any more). It is not said why.
            Unavailable: that cannot be said now.
        """
        value = await self._coordination.take_ticket(_key(text))
        if value is not None:
            grant = msgspec.msgpack.decode(value, type=Grant)
            try:
                self._check(grant)
            except Unauthorized:
                pass
            else:
                return grant
        raise InvalidToken("the ticket is not valid: each is good for one stream, for a short time")


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
