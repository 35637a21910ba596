"""Watch a session to its end, reconnecting whenever a connection is lost."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import msgspec
import trio

from ..backoff import Backoff
from ..concurrency import require_trio
from ..model import check_id_type
from .connection import ConnectOptions, OpenConnection, Position
from .errors import CannotConnect, ClientError, ConnectionLost, UnknownSession, translate_httpx_errors
from .messages import ReceivedMessage
from .tls import trusted_authorities
from .token import AsyncBearer, AsyncToken

__all__ = ["TRANSPORTS", "Transport", "Watch", "watch"]

Transport = Literal["sse", "ws", "poll"]
TRANSPORTS: tuple[Transport, ...] = ("sse", "ws", "poll")


def watch(
    base_url: str,
    session_id: str,
    *,
    transport: Transport = "sse",
    cursor: str | None = None,
    wait_for_session: bool = False,
    headers: Mapping[str, str] | None = None,
    token: AsyncToken | None = None,
    ca: str | os.PathLike[str] | None = None,
    # Timeouts
    idle_timeout: float = 45.0,
    connect_timeout: float = 10.0,
    retry_timeout: float = 5.0,
    backoff: Backoff | None = None,
    # Callbacks
    on_reconnect: Callable[[ConnectionLost, float], None] | None = None,
) -> Watch:
    """Watch a session::

        async with watch("http://127.0.0.1:8000", "report-42") as messages:
            async for message in messages:
                print(message.event, message.data)

    The iteration ends after the session's final message. If ``cursor`` is already at the end, it yields
    only a ``resume`` message. A lost connection is replaced by a new one that resumes from the cursor, as
    often as necessary: every message is received once and in order, over all three transports alike.
    After each reconnection a ``resume`` message tells whether messages are missing. At most the messages
    of one read from the socket are buffered; a slow consumer slows the reading.

    Args:
        base_url: the server's URL, ``http://`` or ``https://``.
        session_id: the session.
        transport: ``sse``, ``ws`` (WebSocket) or ``poll`` (long-poll).
        cursor: resume after this ``ReceivedMessage.id`` instead of starting with a snapshot.
        wait_for_session: keep trying while the session does not exist yet, with the first delay of
            ``backoff`` between attempts.
        headers: sent with every request.
        token: a bearer token, or a function, which may be asynchronous, that returns one that is valid now,
            and is called for every request. When the server says that the token is about to expire, another
            one extends the stream. Other origins, to which a redirect may lead, get none.
        ca: path of the certificates (PEM) that https servers must be signed by; None: those of the variable
            ``SSL_CERT_FILE``, else those that the system trusts.
        idle_timeout: seconds without any data, heartbeats included, after which a connection counts as
            lost.
        connect_timeout: seconds to wait for a connection to be established.
        retry_timeout: seconds to keep trying to establish the first connection, or to wait for a session
            that is unknown to the server after a reconnection; 0 is one attempt.
        backoff: the delays between attempts.
        on_reconnect: called with the error and the seconds until the next attempt.

    Raises:
        TypeError: ``session_id`` is not a string.
        ValueError: ``transport`` is unknown, ``token`` cannot be a token, or ``ca`` cannot be used.

    The iteration raises:
        CannotConnect: there was no connection within ``retry_timeout``.
        UnknownSession: the session does not exist, without ``wait_for_session``. If it is deleted later, a
            ``deleted`` message ends the iteration.
        RequestRejected: the server rejected the request; its ``status`` is 401 if it was for the token.
        InvalidResponse: it is not an sseserve server.
    """
    check_id_type(session_id)
    if transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}; choose one of {', '.join(TRANSPORTS)}")
    url = f"{base_url.rstrip('/')}/api/sessions/{quote(session_id, safe='')}"
    position = Position(cursor or "")
    options = ConnectOptions(
        headers=headers or {},
        bearer=None if token is None else AsyncBearer(token, base_url),
        connect_timeout=connect_timeout,
        idle_timeout=idle_timeout,
        authorities=trusted_authorities(ca),
    )
    connect = _connector(transport)
    policy = ReconnectPolicy(
        url, position, retry_timeout, backoff or Backoff(), wait_for_session=wait_for_session
    )
    extend = partial(_extend, f"{base_url.rstrip('/')}/api/tokens/refresh", options)
    return Watch(_receive_all(connect, url, position, options, policy, extend), position, on_reconnect)


def _connector(transport: Transport) -> OpenConnection:
    # Each transport needs a library of its own; importing only one shortens the start of a program.
    match transport:
        case "sse":
            from .sse_connection import open_sse_connection

            return open_sse_connection
        case "ws":
            from .websocket_connection import open_websocket_connection

            return open_websocket_connection
        case "poll":
            from .longpoll_connection import open_longpoll_connection

            return open_longpoll_connection


class Reconnecting(msgspec.Struct, frozen=True):
    """A connection was lost; the next attempt is in ``delay`` seconds."""

    error: ConnectionLost
    delay: float


class Watch:
    """An async context manager, and inside it an async iterator of ``ReceivedMessage``.

    ``cursor`` is the id of the last message; another watch can resume from it, over any transport.
    """

    def __init__(
        self,
        items: AbstractAsyncContextManager[
            trio.abc.ReceiveChannel[ReceivedMessage | Reconnecting | ClientError]
        ],
        position: Position,
        on_reconnect: Callable[[ConnectionLost, float], None] | None,
    ) -> None:
        self._items = items
        self._channel: trio.abc.ReceiveChannel[ReceivedMessage | Reconnecting | ClientError] | None = None
        self._on_reconnect = on_reconnect
        self.cursor = position.cursor or None

    async def __aenter__(self) -> Self:
        require_trio("watch")
        self._channel = await self._items.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._items.__aexit__(exc_type, exc, traceback)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ReceivedMessage:
        if self._channel is None:
            raise TypeError(
                "watch() is used as: async with watch(...) as messages: async for message in messages: ..."
            )
        while True:
            try:
                item = await self._channel.receive()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
            if isinstance(item, ReceivedMessage):
                self.cursor = item.id
                return item
            if isinstance(item, ClientError):
                raise item
            if self._on_reconnect is not None:
                self._on_reconnect(item.error, item.delay)


@trio.as_safe_channel
async def _receive_all(
    connect: OpenConnection,
    url: str,
    position: Position,
    options: ConnectOptions,
    policy: ReconnectPolicy,
    extend: Callable[[], Awaitable[None]],
) -> AsyncGenerator[ReceivedMessage | Reconnecting | ClientError]:
    """Connect and reconnect to the session's end. A fatal error is the last item, for ``Watch`` to raise."""
    policy.started_at = trio.current_time()
    while True:
        try:
            async with connect(url, position, options) as connection:
                policy.connected = True
                while (messages := await connection.receive()) is not None:
                    policy.reset(trio.current_time())
                    for message in messages:
                        # While its logs cannot be read the server does not know whether there is a session.
                        is_unknown = message.event in ("degraded", "restored") and not position.cursor
                        policy.connected = not is_unknown
                        if message.event == "overflow":
                            raise ConnectionLost(
                                "the server closed the connection: this client reads too slowly"
                            )
                        if message.event == "expiring":
                            await extend()  # before the caller gets it, who may take long
                        yield message
                        if message.is_final:
                            return
            return
        except ClientError as error:
            item = policy.decide(error, trio.current_time())
        yield item
        if not isinstance(item, Reconnecting):
            return
        await trio.sleep(item.delay)


async def _extend(url: str, options: ConnectOptions) -> None:
    """Let the open stream go on by a fresh token, if there is one. Otherwise it ends, and is opened again."""
    if options.bearer is None or not options.bearer.is_renewable:
        return
    with trio.move_on_after(options.connect_timeout), suppress(ClientError), translate_httpx_errors():
        async with options.http_client() as client:
            await client.post(url)


class ReconnectPolicy:
    """Decides what follows an error of a connection. No I/O, no clock: time is an argument, in seconds.

    ``started_at`` is to be set before the first attempt, ``connected`` once the session is known to exist.
    """

    def __init__(
        self,
        url: str,
        position: Position,
        retry_timeout: float,
        backoff: Backoff,
        *,
        wait_for_session: bool = False,
    ) -> None:
        self.started_at = 0.0
        self.connected = False
        self._url = url
        self._position = position
        self._retry_timeout = retry_timeout
        self._backoff = backoff
        self._wait_for_session = wait_for_session
        self._unknown_since: float | None = None  # the session was known before and is unknown since then
        self._failures = 0

    def reset(self, now: float) -> None:
        """Forget earlier failures: the connection works."""
        self._failures, self._unknown_since = 0, None
        if not self.connected:
            self.started_at = now

    def decide(self, error: ClientError, now: float) -> Reconnecting | ReceivedMessage | ClientError:
        """Return what follows ``error``: a reconnection, or the final message or error."""
        if isinstance(error, UnknownSession) and not self.connected and self._wait_for_session:
            self.started_at, self._failures = now, 0  # the server is there
            return Reconnecting(ConnectionLost(error.message), self._backoff.delay(0))
        if isinstance(error, UnknownSession) and self.connected:
            if self._failures == 0:
                # The server knew the session a moment ago, so it was deleted. Only a long-poll gets here.
                return self._deleted()
            # A server with its logs in memory may have restarted, and the work may continue there.
            if self._unknown_since is None:
                # This wait is independent of how long the server was down, and starts with short delays.
                self._unknown_since, self._failures = now, 1
                self._position.retry = None
            error = ConnectionLost(error.message)
        if not isinstance(error, ConnectionLost):
            return error
        requested = error.retry_after
        if requested is None and self._position.retry is not None:
            requested = self._position.retry / 1000
        delay = self._backoff.delay(self._failures, requested)
        self._failures += 1
        if not self.connected and now + delay >= self.started_at + self._retry_timeout:
            failure = CannotConnect(f"cannot connect to {self._url}: {error}")
            failure.__cause__ = error
            return failure
        if self._unknown_since is not None and now + delay >= self._unknown_since + self._retry_timeout:
            return self._deleted()
        return Reconnecting(error, delay)

    def _deleted(self) -> ReceivedMessage:
        return ReceivedMessage(self._position.cursor or None, "deleted", {})
