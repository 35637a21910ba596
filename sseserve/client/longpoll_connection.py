"""Watching by long-poll, for where neither streams nor sockets get through."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import trio

from .connection import Connection, Place, Terms
from .errors import InvalidResponse, error_from_response, translate_httpx_errors
from .messages import ReceivedMessage

__all__ = ["open_poll"]

_WAIT = 25.0  # how long the server may hold a question, seconds
_PACE = 1.0  # a server that does not hold it is not asked more often than this, seconds

# A place in no log. Who comes with it is told so and given a snapshot, where who comes with none would
# get the log from its beginning; so a newcomer begins here as on a stream.
_NOWHERE = "0-0"


@asynccontextmanager
async def open_poll(url: str, place: Place, terms: Terms) -> AsyncGenerator[Connection]:
    """Begin to poll a session; see ``connection.Open``. There is an answer before this returns."""
    with translate_httpx_errors():
        async with terms.http() as http:
            poll = _Poll(http, f"{url}/events", place, min(_WAIT, terms.idle_timeout / 2))
            await poll.begin()
            yield poll


class _Text(msgspec.Struct):
    id: str | None
    event: str | None
    data: Any
    retry: int | None = None


class _Page(msgspec.Struct):
    """An answer of the event history."""

    events: list[_Text]
    next: str
    resume: dict[str, Any] | None = None
    end: bool = False


_decoder = msgspec.json.Decoder(_Page)


class _Poll:
    """One answer after the other."""

    def __init__(self, http: httpx.AsyncClient, url: str, place: Place, wait: float) -> None:
        self._http = http
        self._url = url
        self._place = place
        self._wait = wait
        self._first: list[ReceivedMessage] = []
        self._ended = False

    async def begin(self) -> None:
        """Get the first answer, so that a server that is not there is noticed while connecting."""
        came_with = self._place.cursor
        self._first = await self._page(came_with or _NOWHERE, wait=0.0, verdict=bool(came_with))

    async def receive(self) -> list[ReceivedMessage] | None:
        if self._first:
            first, self._first = self._first, []
            return first
        if self._ended:
            return None
        asked = trio.current_time()
        messages = await self._page(self._place.cursor, wait=self._wait)
        if not messages and not self._ended:
            await trio.sleep(max(0.0, asked + _PACE - trio.current_time()))
        return messages

    async def _page(self, cursor: str, *, wait: float, verdict: bool | None = None) -> list[ReceivedMessage]:
        """Get what is behind ``cursor``; ``verdict``: pass on the one on it? None: if it is bad."""
        answer = await self._http.get(self._url, params={"after": cursor, "wait": f"{wait:g}"})
        if answer.status_code != httpx.codes.OK:
            raise error_from_response(answer.status_code, answer.headers, answer.content)
        try:
            page = _decoder.decode(answer.content)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidResponse(f"{self._url} is not the history of a session: {error}") from error
        messages = []
        if page.resume is not None:
            if verdict is None:
                verdict = page.resume.get("status") != "ok"
            if verdict:
                messages.append(ReceivedMessage(cursor, "resume", page.resume))
        for text in page.events:
            cursor = text.id or cursor
            if text.retry is not None:
                self._place.retry = text.retry
            if text.event is not None or text.data is not None:
                messages.append(ReceivedMessage(cursor, text.event or "message", text.data))
        self._place.cursor, self._ended = page.next, page.end
        return messages
