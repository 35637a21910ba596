"""What the connections of a watcher have in common, whatever their transport."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import httpx
import msgspec

from .messages import ReceivedMessage
from .tls import trusted_authorities
from .token import AsyncBearer

__all__ = ["ConnectOptions", "Connection", "OpenConnection", "Position"]


class Position(msgspec.Struct):
    """Where a watcher is in the event log, kept from one connection to the next.

    Attributes:
        cursor: the last cursor received; empty before the first one.
        retry: the reconnection time that the server requested, in milliseconds.
    """

    cursor: str = ""
    retry: int | None = None


class ConnectOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a watcher connects; see ``watch``. Times are in seconds."""

    headers: Mapping[str, str] = {}
    bearer: AsyncBearer | None = None
    connect_timeout: float = 10.0
    idle_timeout: float = 45.0
    authorities: ssl.SSLContext = msgspec.field(default_factory=trusted_authorities)

    def http_client(self) -> httpx.AsyncClient:
        """Return a new HTTP client with these headers and timeouts, which adds the token."""
        timeout = httpx.Timeout(self.idle_timeout, connect=self.connect_timeout, pool=None)
        # A proxy that compresses a stream also buffers it.
        headers = {"Accept-Encoding": "identity", **self.headers}
        hooks = {} if self.bearer is None else {"request": [self.bearer.add_to]}
        return httpx.AsyncClient(
            headers=headers,
            timeout=timeout,
            follow_redirects=True,
            event_hooks=hooks,
            verify=self.authorities,
        )


class Connection(Protocol):
    """One connection to a session's messages. It updates its ``Position`` with every message."""

    async def receive(self) -> list[ReceivedMessage] | None:
        """Return the next messages: an empty list after a heartbeat, None after the session's end.

        Raises:
            ConnectionLost: reconnect with the current position.
            InvalidResponse: the server sent something that is not a message.
        """


class OpenConnection(Protocol):
    """Opens connections to one session over one transport."""

    def __call__(
        self, url: str, position: Position, options: ConnectOptions
    ) -> AbstractAsyncContextManager[Connection]:
        """Connect to the session at ``url`` and resume from ``position``.

        Raises:
            ConnectionLost: trying again may help.
            RequestRejected: the server rejected the request.
            InvalidResponse: it is not an sseserve server.
        """
