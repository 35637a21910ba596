"""Watch by long-poll, for networks that block both event streams and WebSockets."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import trio

from .connection import Connection, ConnectOptions, Position
from .errors import InvalidResponse, error_from_response, translate_httpx_errors
from .messages import ReceivedMessage

__all__ = ["open_longpoll_connection"]

_MAX_WAIT = 25.0  # seconds for which the server may hold a request
_MIN_INTERVAL = 1.0  # seconds between two requests if the server does not hold them

# A cursor of no log: the response is a ``reset`` and a snapshot, as on a new stream. Without a cursor
# it would be the whole log from its first event.
_UNKNOWN_CURSOR = "0-0"


@asynccontextmanager
async def open_longpoll_connection(
    url: str, position: Position, options: ConnectOptions
) -> AsyncGenerator[Connection]:
    """Start to poll a session; see ``connection.OpenConnection``. The first poll is done on return."""
    with translate_httpx_errors():
        async with options.http_client() as client:
            max_wait = min(_MAX_WAIT, options.idle_timeout / 2)
            connection = _LongPollConnection(client, f"{url}/events", position, max_wait)
            await connection.start()
            yield connection


class _Event(msgspec.Struct):
    id: str | None
    event: str | None
    data: Any
    retry: int | None = None


class _Page(msgspec.Struct):
    """A page of the event history, as the server sends it."""

    events: list[_Event]
    next: str
    resume: dict[str, Any] | None = None
    end: bool = False


_decoder = msgspec.json.Decoder(_Page)


class _LongPollConnection:
    """One poll after another."""

    def __init__(self, client: httpx.AsyncClient, url: str, position: Position, max_wait: float) -> None:
        self._client = client
        self._url = url
        self._position = position
        self._max_wait = max_wait
        self._first_messages: list[ReceivedMessage] = []
        self._ended = False

    async def start(self) -> None:
        """Poll once without waiting, so that an unreachable server fails the connection attempt."""
        cursor = self._position.cursor
        self._first_messages = await self._poll(
            cursor or _UNKNOWN_CURSOR, wait=0.0, report_resume=bool(cursor)
        )

    async def receive(self) -> list[ReceivedMessage] | None:
        if self._first_messages:
            messages, self._first_messages = self._first_messages, []
            return messages
        if self._ended:
            return None
        started_at = trio.current_time()
        messages = await self._poll(self._position.cursor, wait=self._max_wait)
        if not messages and not self._ended:
            await trio.sleep(max(0.0, started_at + _MIN_INTERVAL - trio.current_time()))
        return messages

    async def _poll(
        self, cursor: str, *, wait: float, report_resume: bool | None = None
    ) -> list[ReceivedMessage]:
        """Return the messages after ``cursor``.

        Args:
            wait: how long the server may wait for the next event, in seconds.
            report_resume: whether to return the resume result as a message; None: only if it is not ``ok``.
        """
        response = await self._client.get(self._url, params={"after": cursor, "wait": f"{wait:g}"})
        if response.status_code != httpx.codes.OK:
            raise error_from_response(response.status_code, response.headers, response.content)
        try:
            page = _decoder.decode(response.content)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidResponse(f"{self._url} is not the event history of a session: {error}") from error
        messages = []
        if page.resume is not None:
            if report_resume is None:
                report_resume = page.resume.get("status") != "ok"
            if report_resume:
                messages.append(ReceivedMessage(cursor, "resume", page.resume))
        for event in page.events:
            cursor = event.id or cursor
            if event.retry is not None:
                self._position.retry = event.retry
            if event.event is not None or event.data is not None:
                messages.append(ReceivedMessage(cursor, event.event or "message", event.data))
        self._position.cursor, self._ended = page.next, page.end
        return messages
