"""Watch over Server-Sent Events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import trio

from .. import sse
from .connection import Connection, ConnectOptions, Position
from .errors import ConnectionLost, InvalidResponse, error_from_response, translate_httpx_errors
from .messages import ReceivedMessage, decode_json

__all__ = ["open_sse_connection"]


@asynccontextmanager
async def open_sse_connection(
    url: str, position: Position, options: ConnectOptions
) -> AsyncGenerator[Connection]:
    """Connect to a session's event stream; see ``connection.OpenConnection``."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
    if position.cursor:
        headers["Last-Event-ID"] = position.cursor
    with translate_httpx_errors():
        async with (
            options.http_client() as client,
            client.stream("GET", f"{url}/status/stream", headers=headers) as response,
        ):
            if response.status_code == httpx.codes.NO_CONTENT:
                yield _FinishedConnection(position)
                return
            if response.status_code != httpx.codes.OK:
                body = await response.aread()
                raise error_from_response(response.status_code, response.headers, body)
            # The type without its parameters; its case does not matter (RFC 9110, section 8.3.1).
            media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "text/event-stream":
                raise InvalidResponse(f"{response.url} is not an event stream: {media_type or 'no type'}")
            async with _closing_chain(response.aiter_bytes()) as chunks:
                yield _SSEConnection(chunks, position)


@asynccontextmanager
async def _closing_chain(chunks: AsyncIterator[bytes]) -> AsyncGenerator[AsyncIterator[bytes]]:
    """Yield ``chunks``, and on exit close all the generators that it is made of.

    ``aclose`` would close only the outermost one and leave the others to the garbage collector, which
    Trio warns about. An exception raised where the innermost one reads from the socket closes them all.
    """
    try:
        yield chunks
    finally:
        with trio.CancelScope() as scope, suppress(httpx.HTTPError):
            scope.cancel()
            async for _ in chunks:
                pass


class _SSEConnection:
    """An open event stream."""

    def __init__(self, chunks: AsyncIterator[bytes], position: Position) -> None:
        self._chunks = chunks
        self._position = position
        self._decoder = sse.Decoder(last_event_id=position.cursor, retry=position.retry)

    async def receive(self) -> list[ReceivedMessage] | None:
        chunk = await anext(self._chunks, None)
        if chunk is None:
            raise ConnectionLost("the server closed the stream")
        events = self._decoder.feed(chunk)
        self._position.cursor, self._position.retry = self._decoder.last_event_id, self._decoder.retry
        return [ReceivedMessage(event.id or None, event.event, decode_json(event.data)) for event in events]


class _FinishedConnection:
    """The response 204: the cursor is at the session's end.

    The other transports send a ``resume`` message in this case, so this one returns the same.
    """

    def __init__(self, position: Position) -> None:
        self._messages: list[ReceivedMessage] | None = [
            ReceivedMessage(position.cursor or None, "resume", {"status": "ok", "missed": 0})
        ]

    async def receive(self) -> list[ReceivedMessage] | None:
        messages, self._messages = self._messages, None
        return messages
