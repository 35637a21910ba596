"""What the three transports of a watcher have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import httpx
import msgspec

from .messages import ReceivedMessage

__all__ = ["Connection", "Open", "Place", "Terms"]


class Place(msgspec.Struct):
    """Where a watcher is, kept from one connection to the next.

    ``cursor`` is empty before there is one; ``retry`` is the reconnection time that the server named,
    in milliseconds.
    """

    cursor: str = ""
    retry: int | None = None


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How a watcher connects. Times are seconds."""

    headers: Mapping[str, str] = {}
    connect_timeout: float = 10.0
    idle_timeout: float = 45.0

    def http(self) -> httpx.AsyncClient:
        """Make an HTTP client; one that hears nothing for ``idle_timeout`` gives its connection up."""
        timeout = httpx.Timeout(self.idle_timeout, connect=self.connect_timeout, pool=None)
        # A proxy that compresses a stream also holds it back.
        headers = {"Accept-Encoding": "identity", **self.headers}
        return httpx.AsyncClient(headers=headers, timeout=timeout, follow_redirects=True)


class Connection(Protocol):
    """One connection to a session's messages. It moves its ``Place`` on with every message."""

    async def receive(self) -> list[ReceivedMessage] | None:
        """Return the next messages; none of them after a sign of life, None at the session's end.

        Raises:
            ConnectionLost: come back, with the cursor.
        """


class Open(Protocol):
    """Opens connections to one session, over one transport."""

    def __call__(self, url: str, place: Place, terms: Terms) -> AbstractAsyncContextManager[Connection]:
        """Connect to the session at ``url`` and go on from ``place``.

        Raises:
            ConnectionLost: try again.
            RequestRejected: the server does not let us.
            InvalidResponse: it is no server of ours.
        """
