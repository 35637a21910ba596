"""A subscriber over a transport: what waits for its client is written as fast as the transport takes it.

A task does that. One connection with many streams (HTTP/2) has a task that writes for all of them, which
takes what waits for each.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import trio

from ..dialects import Encoding
from ..model import EndReason
from .subscriber import EncodedEvents, Owner, Subscriber
from .transport import DISCONNECTED

__all__ = ["ClientTransport", "PushSubscriber", "Source", "send_pages"]

PULL = 16 * 1024  # bytes that are pulled at once, if what waits is in smaller pieces


class Source(Protocol):
    """What has something waiting for a client."""

    def pull(self, limit: int) -> bytes:
        """Return what is to be sent next, at most ``limit`` bytes.

        Empty: do not pull again until the next ``pull_from``. What has more bytes is sent with ``send_all``.
        """
        ...


class ClientTransport(Protocol):
    """What a subscriber needs of what carries its bytes; see ``transport.Transport``."""

    sent: int

    @property
    def immediate(self) -> bool: ...
    @property
    def pending(self) -> bool: ...
    @property
    def tail(self) -> memoryview | None: ...
    def try_send(self, data: bytes) -> bool: ...
    async def send_all(self, data: bytes) -> None: ...
    def pull_from(self, source: Source) -> bool: ...
    def stop_waiting(self) -> None: ...


class PushSubscriber(Subscriber):
    """A subscriber over a transport: a task in ``nursery`` drains its buffer, unless the transport does.

    When it has ended and all is written, ``nursery`` is cancelled: the connection's task goes on from there.
    """

    __slots__ = ("_draining", "_nursery", "_stopped", "_transport", "broken")

    def __init__(
        self, broker: Owner, encoding: Encoding, transport: ClientTransport, nursery: trio.Nursery
    ) -> None:
        super().__init__(broker, encoding)
        self._transport = transport
        self._nursery = nursery
        self._draining = False
        self._stopped = False
        self.broken = False  # not everything could be written
        transport.sent = 0  # before it were other responses

    @property
    def sent_bytes(self) -> int:
        return self._transport.sent

    def fail(self, error: BaseException) -> None:
        """End at once: not everything could be written, because of one of the errors of ``DISCONNECTED``."""
        self.broken = True
        is_slow = isinstance(error, trio.TooSlowError)
        self.abort(EndReason.SEND_TIMEOUT if is_slow else EndReason.CLIENT_LEFT)

    def _send_now(self, encoded: EncodedEvents) -> bool:
        try:
            sent = self._transport.try_send(encoded.data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.broken = True
            self.abort()
            return True
        if self._transport.tail is not None:
            self._notify()
        return sent

    def send_heartbeat(self, data: bytes) -> bool:
        if super().send_heartbeat(data):
            return True
        # Over a stream that is not a socket nothing can be sent without waiting.
        if self._transport.immediate or self._draining or self.has_backlog or self.ending:
            return False
        self.write(data)
        return True

    def _notify(self) -> None:
        if self._draining or self._stopped:
            return
        if not self.broken and (self._buffer is not None or self._transport.pending):
            if not self._transport.pull_from(self):
                self._start_drain()
        elif self.ending:
            self._complete()

    def _start_drain(self) -> None:
        self._draining = True
        self._nursery.start_soon(self._drain)

    def pull(self, limit: int) -> bytes:
        """Take what waits next; a task sends it if it has more than ``limit`` bytes."""
        data = b""
        while self._buffer is not None and not data:  # a dialect may have no use for an event
            if len(self._buffer[0].data) > limit:
                self._start_drain()
                return b""
            data = self._dequeue(min(limit, PULL))
        if data:
            self._transport.sent += len(data)
            self.last_sent_at = trio.current_time()
        if self._buffer is None:
            self._notify()
        return data

    def _complete(self) -> None:
        """Let the connection's task go on: the subscriber has ended, and all is written."""
        self._nursery.cancel_scope.cancel()

    async def _drain(self) -> None:
        try:
            while self._transport.pending or self._buffer is not None:
                # The tail is being sent; what waits after it can still be conflated.
                data = b"" if self._transport.pending else self._dequeue()
                await self._write_bytes(data)
        except DISCONNECTED as error:
            self.fail(error)
        finally:
            self._draining = False
        self._notify()

    async def finish(self, last: bytes, why: EndReason) -> None:
        """Send what waits, then ``last``, and nothing after it; leave the connection to whoever calls this.

        Raises:
            trio.TooSlowError, trio.BrokenResourceError: see ``send``.
        """
        self.end_reason = self.end_reason or why
        self.broker.unsubscribe(self, left=True)
        self.ending = self._stopped = True
        await self.send(last)

    async def send(self, data: bytes) -> None:
        if self._buffer is not None:
            data = b"".join([*iter(self._dequeue, b""), data])
        await self._write_bytes(data)

    async def _write_bytes(self, data: bytes) -> None:
        # A thousand clients that stalled together are not closed in the same moment.
        seconds = self._bounds.send_timeout * random.uniform(0.9, 1)  # noqa: S311 - no secret
        with trio.fail_after(seconds):
            await self._transport.send_all(data)
        self.last_sent_at = trio.current_time()


async def send_pages(
    subscriber: Subscriber, pages: AsyncGenerator[bytes], why: EndReason = EndReason.DRAINED
) -> None:
    """Send a client what a generator yields, at its pace, and end its stream; ``why`` it has ended then.

    Raises:
        trio.TooSlowError, trio.BrokenResourceError: see ``Subscriber.send``.
    """
    async with aclosing(pages):
        async for page in pages:
            if subscriber.ending:
                return
            await subscriber.send(page)
            subscriber.sent += 1
    subscriber.end(why=why)
