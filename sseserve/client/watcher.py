"""Watching a session to its end, whatever happens to the connections on the way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import msgspec
import trio

from .backoff import Backoff
from .connection import Open, Place, Terms
from .errors import CannotConnect, ClientError, ConnectionLost, UnknownSession
from .messages import ReceivedMessage

__all__ = ["TRANSPORTS", "Transport", "Watch", "watch"]

Transport = Literal["sse", "ws", "poll"]
TRANSPORTS: tuple[Transport, ...] = ("sse", "ws", "poll")


def watch(
    base_url: str,
    session_id: str,
    *,
    transport: Transport = "sse",
    cursor: str | None = None,
    headers: Mapping[str, str] | None = None,
    # Times
    idle_timeout: float = 45.0,
    connect_timeout: float = 10.0,
    retry_timeout: float = 5.0,
    backoff: Backoff | None = None,
    # Notice
    on_reconnect: Callable[[ConnectionLost, float], None] | None = None,
) -> Watch:
    """Watch a session::

        async with watch("http://127.0.0.1:8000", "report-42") as messages:
            async for message in messages:
                print(message.event, message.data)

    The iteration ends by itself behind the session's last message; for a ``cursor`` that stands there
    already nothing comes but that ``resume`` went well. On the way connections are made anew, with the
    cursor, as often as it takes: every message comes once and in order, over all three transports the
    same. A ``resume`` message behind each says how it went, and whether the server had to leave some out.
    At most what one read from the socket brings is held in advance; a slow consumer slows the reading.

    Args:
        base_url: where the server is, ``http://`` or ``https://``.
        session_id: the session.
        transport: ``sse``, ``ws`` (WebSocket) or ``poll`` (long-poll).
        cursor: go on behind this place (a ``ReceivedMessage.id``) instead of beginning with a snapshot.
        headers: to send with every request.
        idle_timeout: a connection without a byte for that long, heartbeats included, counts as dead.
        connect_timeout: how long to wait for a connection to be made.
        retry_timeout: how long to go on trying if there never was a connection, or if the session is not
            there after a connection was lost; 0 is one attempt.
        backoff: how long to wait between attempts.
        on_reconnect: called with what went wrong and the seconds until the next attempt.

    The iteration raises:
        CannotConnect: there never was a connection.
        UnknownSession: there is no such session. One that goes later ends with a ``deleted`` message.
        RequestRejected: the server said no.
        InvalidResponse: it is no server of ours.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"no such transport: {transport!r}; there are {', '.join(TRANSPORTS)}")
    url = f"{base_url.rstrip('/')}/api/sessions/{quote(session_id, safe='')}"
    place = Place(cursor or "")
    terms = Terms(headers=headers or {}, connect_timeout=connect_timeout, idle_timeout=idle_timeout)
    items = _items(_opener(transport), url, place, terms, retry_timeout, backoff or Backoff())
    return Watch(items, place, on_reconnect)


def _opener(transport: Transport) -> Open:
    # Each needs its own library; who watches over one need not wait for the import of the others.
    match transport:
        case "sse":
            from .sse_connection import open_stream

            return open_stream
        case "ws":
            from .websocket_connection import open_socket

            return open_socket
        case "poll":
            from .longpoll_connection import open_poll

            return open_poll


class _Loss(msgspec.Struct, frozen=True):
    """A connection was lost; the next one is made in ``delay`` seconds."""

    error: ConnectionLost
    delay: float


class Watch:
    """A watch under way: an async context manager, and inside it an async iterator of messages.

    ``cursor`` is where it is; another watch may go on from there, over any transport.
    """

    def __init__(
        self,
        items: AbstractAsyncContextManager[trio.abc.ReceiveChannel[ReceivedMessage | _Loss | ClientError]],
        place: Place,
        on_reconnect: Callable[[ConnectionLost, float], None] | None,
    ) -> None:
        self._items = items
        self._on_reconnect = on_reconnect
        self.cursor = place.cursor or None

    async def __aenter__(self) -> Self:
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
async def _items(
    connect: Open, url: str, place: Place, terms: Terms, retry_timeout: float, backoff: Backoff
) -> AsyncGenerator[ReceivedMessage | _Loss | ClientError]:
    """Connect, again and again. An error that ends it is the last item, to be raised by the iteration."""
    course = _Course(url, place, retry_timeout, backoff, trio.current_time())
    while True:
        try:
            async with connect(url, place, terms) as connection:
                course.connected = True
                while (messages := await connection.receive()) is not None:
                    course.alive()
                    for message in messages:
                        if message.event == "overflow":
                            raise ConnectionLost("the server cut the connection: we were too slow")
                        yield message
                        if message.is_final:
                            return
            return
        except ClientError as error:
            item = course.judge(error, trio.current_time())
        yield item
        if not isinstance(item, _Loss):
            return
        await trio.sleep(item.delay)


class _Course:
    """What to do about what goes wrong. Time is an argument."""

    def __init__(self, url: str, place: Place, retry_timeout: float, backoff: Backoff, now: float) -> None:
        self.connected = False
        self._url = url
        self._place = place
        self._retry_timeout = retry_timeout
        self._backoff = backoff
        self._began = now
        self._missing: float | None = None  # when the session was first found missing
        self._failures = 0

    def alive(self) -> None:
        """There was a sign of life."""
        self._failures, self._missing = 0, None

    def judge(self, error: ClientError, now: float) -> _Loss | ReceivedMessage | ClientError:
        """Return what to do: try again, or end with a message or an error."""
        if isinstance(error, UnknownSession) and self.connected:
            if self._failures == 0:
                # The server is up and knew it a moment ago: it was deleted. A poll learns it so.
                return self._deleted()
            # A server that keeps its logs in memory may have begun anew, and the work may go on there.
            if self._missing is None:
                # Whatever it took to reach the server, this is a new wait, and a short one.
                self._missing, self._failures = now, 1
                self._place.retry = None
            error = ConnectionLost(error.message)
        if not isinstance(error, ConnectionLost):
            return error
        named = error.retry_after
        if named is None and self._place.retry is not None:
            named = self._place.retry / 1000
        delay = self._backoff.delay(self._failures, named)
        self._failures += 1
        if not self.connected and now + delay >= self._began + self._retry_timeout:
            cannot = CannotConnect(f"cannot connect to {self._url}: {error}")
            cannot.__cause__ = error
            return cannot
        if self._missing is not None and now + delay >= self._missing + self._retry_timeout:
            return self._deleted()
        return _Loss(error, delay)

    def _deleted(self) -> ReceivedMessage:
        return ReceivedMessage(self._place.cursor or None, "deleted", {})
