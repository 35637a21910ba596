"""One client's bounded buffer, and how it gets into the client's socket.

Guarantee: what is waiting for a client never exceeds its bounds, but for one frame that is larger than them
by itself. A full buffer is conflated: a progress tick that a newer progress supersedes is dropped and
counted, nothing else ever is. Still full, the client is cut with a reason that it can see. None of the
broker's calls ever waits.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio

from ..dialects import Encoding, Message
from ..model import Event
from .transport import Transport

if TYPE_CHECKING:
    from .broker import Topic

__all__ = ["Bounds", "Frame", "Owner", "PullSubscriber", "PushSubscriber", "Subscriber"]

MAX_WRITE = 64 * 1024  # bytes that one drain write joins


class Frame(msgspec.Struct, frozen=True):
    """Encoded events. ``parts`` has one item for each of ``events``; ``data`` is all of them joined.

    What is no event (a heartbeat, a farewell) is a part whose event is None. ``ticks`` counts the events
    that a newer progress may supersede.
    """

    events: list[Event | None]
    parts: list[bytes]
    data: bytes
    ticks: int = 0

    @classmethod
    def of(cls, events: Sequence[Event], encoding: Encoding, session_id: str, epoch: str) -> Frame:
        parts = [encoding.event(session_id, epoch, event) for event in events]
        return cls(list(events), parts, b"".join(parts), sum(event.conflatable for event in events))

    @classmethod
    def raw(cls, data: bytes) -> Frame:
        return cls([None], [data], data)


class Bounds(Protocol):
    """What of the settings a subscriber needs."""

    @property
    def buffer_events(self) -> int: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def send_timeout(self) -> float: ...


class Owner(Protocol):
    """What of the broker a subscriber needs."""

    bounds: Bounds
    conflated: int

    def count_cut(self) -> None: ...
    def unsubscribe(self, subscriber: Subscriber, /) -> None: ...


class Subscriber:
    """One client's bounded buffer on a topic.

    It begins quiet; ``watching`` brings it up to the log's end and makes it live. ``seq`` is where it
    joined. What is ``write``\\ n is not bounded by the buffer: it is for what its reader has asked for.
    """

    __slots__ = (
        "_bounds",
        "_buffer",
        "_events",
        "_size",
        "_ticks",
        "broker",
        "close_code",
        "encoding",
        "ending",
        "joined_at",
        "live",
        "opening",
        "sent_at",
        "seq",
        "slot",
        "topic",
    )

    def __init__(self, broker: Owner, encoding: Encoding) -> None:
        self.broker = broker
        self.encoding = encoding
        self.topic: Topic | None = None
        self.seq = 0
        self.live = False
        self.ending = False
        self.opening = b""  # goes out before anything else
        self.close_code = 1000  # of a WebSocket, RFC 6455, section 7.4.1
        self.joined_at = self.sent_at = trio.current_time()
        self.slot = -1
        self._bounds: Bounds = broker.bounds
        self._buffer: deque[Frame] | None = None  # most clients never need one
        self._events = 0
        self._size = 0
        self._ticks = 0

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.encoding.protocol} of {self.encoding.dialect.name} seq={self.seq} "
            f"live={self.live} ending={self.ending} waiting={self._events} ({self._size} bytes)>"
        )

    @property
    def behind(self) -> bool:
        """Whether anything is waiting."""
        return self._buffer is not None

    @property
    def waiting(self) -> tuple[int, int]:
        """Events and bytes in the buffer."""
        return self._events, self._size

    # What a kind of subscriber is made of

    def _take(self, frame: Frame) -> bool:
        """Pass a frame on at once, if nothing is waiting. Returns whether it is gone."""
        raise NotImplementedError

    def _wake(self) -> None:
        """Something is waiting or the end has come: see to it."""
        raise NotImplementedError

    async def send(self, data: bytes) -> None:
        """Pass on ``data`` behind everything before it, and wait until the client can take more.

        Raises:
            trio.TooSlowError: it did not within ``send_timeout``.
            trio.BrokenResourceError: it is gone.
        """
        raise NotImplementedError

    # What the broker does with it

    def offer(self, frame: Frame) -> None:
        """Pass on a frame without waiting, or keep it within the bounds, or cut the client."""
        if self.ending or not frame.data or (self._buffer is None and self._take(frame)):
            return
        if self._buffer is None:
            self._buffer = deque()
        elif self._buffer and (
            self._events + len(frame.events) > self._bounds.buffer_events
            or self._size + len(frame.data) > self._bounds.buffer_bytes
        ):
            self._keep(frame)
            if not self._conflate():
                self.cut("too slow: the buffer is full; come back with your cursor")
            return
        self._keep(frame)
        self._wake()

    def write(self, data: bytes) -> None:
        """Pass on bytes without waiting, whatever the bounds."""
        if not data or self.ending:
            return
        frame = Frame.raw(data)
        if self._buffer is not None or not self._take(frame):
            if self._buffer is None:
                self._buffer = deque()
            self._keep(frame)
            self._wake()

    def open(self, data: bytes = b"") -> None:
        """``write`` what goes out before anything else, and ``data`` behind it."""
        opening, self.opening = self.opening, b""
        self.write(opening + data)

    def beat(self, data: bytes) -> bool:
        """Pass on a heartbeat if nothing is waiting; returns whether it went out."""
        return self._buffer is None and not self.ending and self._take(Frame.raw(data))

    def cut(self, reason: str) -> None:
        """Give up what is waiting, tell the client why, and end."""
        self.broker.count_cut()
        waiting, self._buffer = self._buffer, None
        self._events = self._size = self._ticks = 0
        for frame in waiting or ():
            # What it joined with, before all events; it may even be the head of the response.
            if frame.events == [None]:
                self.write(frame.data)
        data = msgspec.json.encode({"reason": reason})
        self.end(self.encoding.message(Message("overflow", data)), code=1013, reason="too slow")

    def end(self, last: bytes = b"", *, code: int = 1000, reason: str = "ended") -> None:
        """End behind what is waiting and ``last``; a WebSocket with ``code`` and ``reason``.

        Nothing is taken afterwards.
        """
        if self.ending:
            return
        self.broker.unsubscribe(self)
        self.close_code = code
        self.open(last + self.encoding.close(code, reason))
        self.ending = True
        self._wake()

    def dismiss(self, retry: int) -> None:
        """Tell the client to come back, over SSE in ``retry`` milliseconds, and end."""
        if self.encoding.protocol == "sse":
            self.end(self.encoding.message(Message(None, None, retry=retry)))
        else:
            self.end(code=1012, reason="restart")

    def abort(self) -> None:
        """End at once: the client is gone."""
        self.broker.unsubscribe(self)
        self._buffer, self._events, self._size, self._ticks = None, 0, 0, 0
        self.ending = True
        self._wake()

    def _keep(self, frame: Frame) -> None:
        assert self._buffer is not None
        self._buffer.append(frame)
        self._events += len(frame.events)
        self._size += len(frame.data)
        self._ticks += frame.ticks

    def _conflate(self) -> bool:
        """Drop the ticks that a newer progress supersedes. Returns whether an eighth of the bounds is free.

        Less than an eighth would have us back here with the next few events, for ever. That costs nothing
        if but one event is left, which may wait whatever its size.
        """
        assert self._buffer is not None
        if not self._ticks:
            return len(self._buffer) == 1  # a thousand of these may come in one batch
        kept: list[tuple[Event | None, bytes]] = []
        superseded = False
        for frame in reversed(self._buffer):
            for event, part in zip(reversed(frame.events), reversed(frame.parts), strict=True):
                if superseded and event is not None and event.conflatable:
                    self.broker.conflated += 1
                    continue
                superseded = superseded or (event is not None and event.progress is not None)
                kept.append((event, part))
        kept.reverse()
        self._buffer.clear()
        self._events = self._size = self._ticks = 0
        # One frame for each, so that a drain write can take as many as it likes.
        for event, part in kept:
            self._keep(Frame([event], [part], part, int(event is not None and event.conflatable)))
        return len(kept) == 1 or (
            self._events * 8 <= self._bounds.buffer_events * 7
            and self._size * 8 <= self._bounds.buffer_bytes * 7
        )

    def _next(self) -> bytes:
        """Take what one write can join from the buffer, empty if nothing is waiting."""
        if self._buffer is None:
            return b""
        taken: list[bytes] = []
        size = 0
        while self._buffer and (not taken or size + len(self._buffer[0].data) <= MAX_WRITE):
            frame = self._buffer.popleft()
            taken.append(frame.data)
            size += len(frame.data)
            self._events -= len(frame.events)
            self._ticks -= frame.ticks
        self._size -= size
        if not self._buffer:
            self._buffer = None
        return taken[0] if len(taken) == 1 else b"".join(taken)


class PushSubscriber(Subscriber):
    """A subscriber over a transport: its buffer is drained by a task in the connection's nursery.

    When it has ended and all is written, ``nursery`` is cancelled: the connection's task goes on from there.
    """

    __slots__ = ("_draining", "_nursery", "_transport", "broken")

    def __init__(
        self, broker: Owner, encoding: Encoding, transport: Transport, nursery: trio.Nursery
    ) -> None:
        super().__init__(broker, encoding)
        self._transport = transport
        self._nursery = nursery
        self._draining = False
        self.broken = False  # not everything could be written

    def _take(self, frame: Frame) -> bool:
        try:
            taken = self._transport.try_send(frame.data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.broken = True
            self.abort()
            return True
        if self._transport.tail is not None:
            self._wake()
        return taken

    def beat(self, data: bytes) -> bool:
        if super().beat(data):
            return True
        # Over a stream that is no socket nothing ever goes out at once.
        if self._transport.immediate or self._draining or self.behind or self.ending:
            return False
        self.write(data)
        return True

    def _wake(self) -> None:
        if self._draining:
            return
        if not self.broken and (self._buffer is not None or self._transport.pending):
            self._draining = True
            self._nursery.start_soon(self._drain)
        elif self.ending:
            self._nursery.cancel_scope.cancel()

    async def _drain(self) -> None:
        try:
            while self._transport.pending or self._buffer is not None:
                # The tail is on its way already; what waits behind it can still be conflated.
                data = b"" if self._transport.pending else self._next()
                await self.send(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            self.broken = True
            self.abort()
        finally:
            self._draining = False
        self._wake()

    async def send(self, data: bytes) -> None:
        # A thousand clients that stalled together are not given up in the same moment.
        seconds = self._bounds.send_timeout * random.uniform(0.9, 1)  # noqa: S311 - no secret
        with trio.fail_after(seconds):
            await self._transport.send_all(data)
        self.sent_at = trio.current_time()


class PullSubscriber(Subscriber):
    """A subscriber whose reader asks for bytes: for responses that another server writes."""

    __slots__ = ("_readable", "_writable")

    def __init__(self, broker: Owner, encoding: Encoding) -> None:
        super().__init__(broker, encoding)
        self._readable = trio.Event()
        self._writable = trio.Event()

    def _take(self, frame: Frame) -> bool:  # noqa: ARG002 - everything waits for its reader
        return False

    def beat(self, data: bytes) -> bool:
        if self._buffer is not None or self.ending or not data:
            return False
        self.write(data)
        return True

    def _wake(self) -> None:
        self._readable.set()
        if self.ending:
            self._writable.set()

    async def send(self, data: bytes) -> None:
        self.write(data)
        self._writable = trio.Event()
        with trio.fail_after(self._bounds.send_timeout):
            await self._writable.wait()

    async def receive(self) -> bytes:
        """Wait for bytes; empty at the end."""
        while not (data := self._next()):
            if self.ending:
                return b""
            # The reader is back, so it has taken all that it was given.
            self._writable.set()
            self._readable = trio.Event()
            await self._readable.wait()
        self.sent_at = trio.current_time()
        return data
