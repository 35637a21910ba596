"""The body of one HTTP/2 request, between its connection's reader and the application. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

__all__ = ["RequestBody"]

RELEASE = 16 * 1024  # bytes that are released together


class RequestBody:
    """What has arrived of a body and waits for the application: no more than the stream's window.

    So the reader of a connection never waits for an application that does not read, and with it all other
    streams: what their clients send may be the window that they need.

    Args:
        release: is called with a number of bytes that the client may send again.
    """

    def __init__(self, release: Callable[[int], None]) -> None:
        self._release = release
        self._buffer = bytearray()
        self._consumed = 0  # bytes that have not been released yet
        self._changed = trio.Event()
        self._ends = False  # after what is in the buffer
        self._is_closed = False

    def append(self, data: bytes, size: int) -> None:
        """Note that data has arrived; with its padding it took ``size`` bytes of the window."""
        self._buffer += data
        self._consume(size - len(data))
        self._changed.set()

    def end(self) -> None:
        """Note that all of it has arrived."""
        self._ends = True
        self._changed.set()

    def close(self) -> None:
        """Note that nobody reads it any more: its stream has ended. Releases everything."""
        self._is_closed = True
        self._consumed += len(self._buffer)
        self._buffer.clear()
        if self._consumed:
            self._release(self._consumed)
        self._changed.set()

    def _consume(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= RELEASE:
            self._release(self._consumed)
            self._consumed = 0

    async def receive(self) -> Any:
        """Return the next message for the application, as ASGI has it."""
        await trio.lowlevel.checkpoint()
        while not (self._is_closed or self._buffer or self._ends):
            self._changed = trio.Event()
            await self._changed.wait()
        if self._is_closed:
            return {"type": "http.disconnect"}
        data = bytes(self._buffer)
        self._buffer.clear()
        self._consume(len(data))
        has_ended, self._ends = self._ends, False
        return {"type": "http.request", "body": data, "more_body": not has_ended}
