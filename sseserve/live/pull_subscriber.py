"""A subscriber whose client is written by somebody else, such as an ASGI server."""

from __future__ import annotations

import trio

from ..dialects import Encoding
from .subscriber import EncodedEvents, Owner, Subscriber

__all__ = ["PullSubscriber"]


class PullSubscriber(Subscriber):
    """A subscriber whose reader asks for bytes: for a response that an ASGI server writes."""

    __slots__ = ("_readable", "_received", "_writable")

    def __init__(self, broker: Owner, encoding: Encoding) -> None:
        super().__init__(broker, encoding)
        self._readable = trio.Event()
        self._writable: trio.Event | None = None  # set when what was sent has been written
        self._received = 0  # bytes, by its reader

    @property
    def sent_bytes(self) -> int:
        return self._received

    def _send_now(self, encoded: EncodedEvents) -> bool:  # noqa: ARG002 - everything waits for its reader
        return False

    def send_heartbeat(self, data: bytes) -> bool:
        if self._buffer is not None or self.ending or not data:
            return False
        self.write(data)
        return True

    def _notify(self) -> None:
        self._readable.set()
        if self.ending and self._writable is not None:
            self._writable.set()

    async def send(self, data: bytes) -> None:
        self.write(data)
        self._writable = trio.Event()
        with trio.fail_after(self._bounds.send_timeout):
            await self._writable.wait()

    async def receive(self) -> bytes:
        """Wait for bytes; empty at the end."""
        while not (data := self._dequeue()):
            if self.ending:
                return b""
            # The reader asks again, so it has written everything that it was given.
            if self._writable is not None:
                self._writable.set()
            self._readable = trio.Event()
            await self._readable.wait()
        self.last_sent_at = trio.current_time()
        self._received += len(data)
        return data
