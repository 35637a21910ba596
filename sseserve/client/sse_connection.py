"""Watching over Server-Sent Events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import trio

from .. import sse
from .connection import Connection, Place, Terms
from .errors import ConnectionLost, InvalidResponse, error_from_response, translate_httpx_errors
from .messages import ReceivedMessage, decode_json

__all__ = ["open_stream"]


@asynccontextmanager
async def open_stream(url: str, place: Place, terms: Terms) -> AsyncGenerator[Connection]:
    """Connect to a session's event stream; see ``connection.Open``."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
    if place.cursor:
        headers["Last-Event-ID"] = place.cursor
    with translate_httpx_errors():
        async with (
            terms.http() as http,
            http.stream("GET", f"{url}/status/stream", headers=headers) as answer,
        ):
            if answer.status_code == httpx.codes.NO_CONTENT:
                yield _Ended(place)
                return
            if answer.status_code != httpx.codes.OK:
                raise error_from_response(answer.status_code, answer.headers, await answer.aread())
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise InvalidResponse(f"{answer.url} is not an event stream")
            async with _unwound(answer.aiter_bytes()) as chunks:
                yield _Stream(chunks, place)


@asynccontextmanager
async def _unwound(chunks: AsyncIterator[bytes]) -> AsyncGenerator[AsyncIterator[bytes]]:
    """Hand out ``chunks``, and end the chain of generators behind it on leaving.

    Closing the outermost generator would leave the inner ones to the garbage collector, and Trio
    complains of that with good reason; an exception that comes from the socket passes them all.
    """
    try:
        yield chunks
    finally:
        with trio.CancelScope() as scope, suppress(httpx.HTTPError):
            scope.cancel()
            async for _ in chunks:
                pass


class _Stream:
    """A stream that is open."""

    def __init__(self, chunks: AsyncIterator[bytes], place: Place) -> None:
        self._chunks = chunks
        self._place = place
        self._decoder = sse.Decoder(last_event_id=place.cursor, retry=place.retry)

    async def receive(self) -> list[ReceivedMessage] | None:
        chunk = await anext(self._chunks, None)
        if chunk is None:
            raise ConnectionLost("the server ended the stream")
        events = self._decoder.feed(chunk)
        self._place.cursor, self._place.retry = self._decoder.last_event_id, self._decoder.retry
        return [ReceivedMessage(event.id or None, event.event, decode_json(event.data)) for event in events]


class _Ended:
    """204: there was nothing to come back for. Other transports can say so in a message, so this one does."""

    def __init__(self, place: Place) -> None:
        self._messages: list[ReceivedMessage] | None = [
            ReceivedMessage(place.cursor or None, "resume", {"status": "ok", "missed": 0})
        ]

    async def receive(self) -> list[ReceivedMessage] | None:
        messages, self._messages = self._messages, None
        return messages
