"""One client's bounded buffer.

Guarantee: what is waiting for a client never exceeds its bounds, but for events encoded together that exceed
them by themselves. A full buffer is conflated: progress that changes nothing but the amount, and that a newer
progress supersedes, is dropped and counted; nothing else ever is. If the buffer is still full, the client is
cut with a reason that it can see. None of the broker's calls ever waits.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec
import trio

from ..dialects import Encoding, Message
from ..model import EndReason, Event
from .deliveries import Deliveries

__all__ = [
    "RECONNECT_WITHIN",
    "TOO_SLOW",
    "UNAUTHORIZED",
    "Bounds",
    "EncodedEvents",
    "Owner",
    "Subscriber",
    "reconnect_delay",
]

RECONNECT_WITHIN = 2.0  # seconds over which clients come back while the server goes on
MAX_WRITE = 64 * 1024  # bytes that one drain write joins
TOO_SLOW = 1013  # closes a WebSocket whose client was cut: try again later (registered with IANA)
UNAUTHORIZED = 3000  # closes a WebSocket whose token is not valid any more (registered with IANA)


def reconnect_delay(within: float, slot: float | None = None) -> int:
    """Return when a client whose stream ends reconnects, in milliseconds.

    Args:
        within: seconds over which clients are spread.
        slot: from 0 to 1, this client's place within them; None: a random one.
    """
    slot = random.random() if slot is None else slot  # noqa: S311 - spreads the clients
    return 500 + int(within * 1000 * slot)


class EncodedEvents(msgspec.Struct, frozen=True):
    """Events of one topic in one encoding. ``parts`` has one item for each, ``data`` is a chunk of them all.

    What is not an event (a heartbeat, a final message) is a part whose event is None, and has its chunk.
    ``conflatable`` counts the events that a newer progress may supersede. ``epochs``: in a bundle, the log
    that each is of, empty if it is of none.
    """

    events: list[Event | None]
    parts: list[bytes]
    data: bytes
    conflatable: int = 0
    epochs: list[str] | None = None

    @classmethod
    def encode(
        cls, events: Sequence[Event], encoding: Encoding, session_id: str, epoch: str
    ) -> EncodedEvents:
        """Encode events of one session, in order."""
        parts = [encoding.event(session_id, epoch, event) for event in events]
        data = encoding.chunk(b"".join(parts))
        return cls(list(events), parts, data, sum([event.conflatable for event in events]))

    @classmethod
    def raw(cls, data: bytes) -> EncodedEvents:
        """Return bytes that are not an event."""
        return cls([None], [data], data)


class Bounds(Protocol):
    """The settings that a subscriber needs; see ``config.Settings``."""

    @property
    def buffer_events(self) -> int: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def send_timeout(self) -> float: ...


class Owner(Protocol):
    """What a subscriber needs of the broker."""

    bounds: Bounds
    conflated: int
    deliveries: Deliveries

    def count_cut(self) -> None: ...
    def unsubscribe(self, subscriber: Subscriber, /, *, left: bool = False) -> None: ...


class Subscriber:
    """One client's bounded buffer on a topic.

    ``resume.join`` brings it up to the end of the log and makes it live; ``seq`` is where it joined. The
    bounds do not apply to what is passed to ``write``: that is what the client has asked for.
    """

    __slots__ = (
        "_bounds",
        "_buffer",
        "_conflatable",
        "_deliveries",
        "_events",
        "_size",
        "_waiting_head",
        "broker",
        "close_code",
        "degraded",
        "encoding",
        "end_reason",
        "ending",
        "head",
        "joined_at",
        "last_sent_at",
        "live",
        "sent",
        "seq",
        "topic",
        "wheel_slot",
    )

    def __init__(self, broker: Owner, encoding: Encoding) -> None:
        self.broker = broker
        self.encoding = encoding
        self.topic: object | None = None  # the broker's Topic
        self.seq = 0
        self.sent = 0  # events before it was live, a snapshot counting as one; at its end, all events
        self.live = False
        self.degraded = False  # it has been told that the engine is unavailable
        self.ending = False
        self.end_reason: EndReason | None = None  # the first one
        self.head = b""  # is sent before anything else
        self._waiting_head = b""  # of what waits in the buffer
        self.close_code = 1000  # of a WebSocket, RFC 6455, section 7.4.1
        self.joined_at = self.last_sent_at = trio.current_time()
        self.wheel_slot = -1
        self._bounds: Bounds = broker.bounds
        self._deliveries = broker.deliveries
        self._buffer: deque[EncodedEvents] | None = None  # most clients never need one
        self._events = 0
        self._size = 0
        self._conflatable = 0

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.encoding.protocol} of {self.encoding.dialect.name} seq={self.seq} "
            f"live={self.live} ending={self.ending} waiting={self._events} ({self._size} bytes)>"
        )

    @property
    def has_backlog(self) -> bool:
        """Whether anything is waiting."""
        return self._buffer is not None

    @property
    def backlog(self) -> tuple[int, int]:
        """How many events and bytes are in the buffer."""
        return self._events, self._size

    # What each kind of subscriber implements

    def _send_now(self, encoded: EncodedEvents) -> bool:
        """Send encoded events at once, if that is possible. Returns whether they were sent."""
        raise NotImplementedError

    def _notify(self) -> None:
        """React to the buffer holding something, or to the end."""
        raise NotImplementedError

    async def send(self, data: bytes) -> None:
        """Send ``data`` after everything before it, and wait until the client can take more.

        Raises:
            trio.TooSlowError: it could not within ``send_timeout``.
            trio.BrokenResourceError: it has disconnected.
        """
        raise NotImplementedError

    # What the broker calls

    def offer(self, encoded: EncodedEvents) -> None:
        """Send encoded events without waiting, or buffer them within the bounds, or cut the client."""
        if self.ending or not encoded.data or (self._buffer is None and self._send_now(encoded)):
            return
        self._deliveries.buffered += 1
        if self._buffer is None:
            self._begin_buffer()
        elif self._buffer and (
            self._events + len(encoded.events) > self._bounds.buffer_events
            or self._size + len(encoded.data) > self._bounds.buffer_bytes
        ):
            self._enqueue(encoded)
            if not self._conflate():
                self.cut("too slow: the buffer is full; resume with your cursor")
            return
        self._enqueue(encoded)
        self._notify()

    def write(self, data: bytes) -> None:
        """Send or buffer bytes without waiting, whatever the bounds."""
        if not data or self.ending:
            return
        encoded = EncodedEvents.raw(data)
        if self._buffer is not None or not self._send_now(encoded):
            if self._buffer is None:
                self._begin_buffer()
            self._enqueue(encoded)
            self._notify()

    def write_first(self, data: bytes = b"") -> None:
        """``write`` the head if it has not been sent yet, and ``data`` after it."""
        head, self.head = self.head, b""
        self.write(head + data)
        if self._buffer is not None:
            self._waiting_head += head

    def send_heartbeat(self, data: bytes) -> bool:
        """Send a heartbeat if nothing is waiting; returns whether it was sent."""
        return self._buffer is None and not self.ending and self._send_now(EncodedEvents.raw(data))

    @property
    def sent_bytes(self) -> int:
        """How many bytes were sent, with all that frames them."""
        raise NotImplementedError

    def cut(self, reason: str, why: EndReason = EndReason.OVERFLOW) -> None:
        """Drop what is waiting, tell the client why, and end.

        The response is left incomplete where its framing shows that: some clients resume after an error only.
        """
        self.broker.count_cut()
        self.sent -= self._events
        for encoded in self._drop_buffer():
            # What it was sent first, before all events; it may even be the head of the response.
            if encoded.events == [None] and encoded.epochs is None:
                self.write(encoded.data)
        overflow = self.encoding.message(Message("overflow", msgspec.json.encode({"reason": reason})))
        closing = self.encoding.close(TOO_SLOW, "too slow") if self.encoding.protocol == "ws" else b""
        self._end(overflow + closing, code=TOO_SLOW, why=why)

    def end(
        self,
        last: bytes = b"",
        *,
        code: int = 1000,
        reason: str = "ended",
        why: EndReason = EndReason.ENDED,
    ) -> None:
        """Complete the response after what is waiting and ``last``; a WebSocket with ``code`` and ``reason``.

        Nothing is accepted afterwards. ``why`` is for the log and the metrics.
        """
        self._end(last + self.encoding.close(code, reason), code=code, why=why)

    def _end(self, last: bytes, *, code: int, why: EndReason) -> None:
        if self.ending:
            return
        self.end_reason = why
        self.broker.unsubscribe(self)
        self.close_code = code
        self.write_first(last)
        self.ending = True
        self._notify()

    def ask_to_reconnect(self, retry: int, why: EndReason = EndReason.DRAINED) -> None:
        """Ask the client to reconnect, over SSE in ``retry`` milliseconds, and end."""
        if self.encoding.protocol == "sse":
            self.end(self.encoding.retry(retry), why=why)
        else:
            self.end(code=1012, reason="restart", why=why)

    def expiring(self, seconds: float) -> None:
        """Tell the client that its token ends, and its stream then, in that many seconds."""
        notice = Message("expiring", msgspec.json.encode({"expires_in": round(seconds)}))
        # Not before the head of the response.
        self.write_first(self.encoding.message(notice))

    def expire(self, reason: str, why: EndReason) -> None:
        """End now, without what is waiting: the client's token is not valid any more."""
        if self.ending:
            self.abort()
            return
        self.sent -= self._events
        self._drop_buffer()
        self.head += self._waiting_head
        self.end(code=UNAUTHORIZED, reason=reason, why=why)

    def abort(self, why: EndReason = EndReason.CLIENT_LEFT) -> None:
        """End at once: the client has disconnected."""
        self.end_reason = self.end_reason or why
        self.broker.unsubscribe(self, left=True)
        self._drop_buffer()
        self.ending = True
        self._notify()

    def _begin_buffer(self) -> None:
        self._buffer = deque()
        self._deliveries.clients += 1

    def _end_buffer(self) -> None:
        self._buffer = None
        self._deliveries.clients -= 1

    def _drop_buffer(self) -> Sequence[EncodedEvents]:
        """Empty the buffer; returns what was in it."""
        if (waiting := self._buffer) is None:
            return ()
        self._end_buffer()
        self._empty_buffer()
        return waiting

    def _empty_buffer(self) -> None:
        self._deliveries.events -= self._events
        self._deliveries.size -= self._size
        self._events = self._size = self._conflatable = 0

    def _enqueue(self, encoded: EncodedEvents) -> None:
        assert self._buffer is not None
        self._buffer.append(encoded)
        self._count(len(encoded.events), len(encoded.data))
        self._conflatable += encoded.conflatable

    def _count(self, events: int, size: int) -> None:
        """Count so many more events and bytes in the buffer."""
        self._events += events
        self._size += size
        self._deliveries.events += events
        self._deliveries.size += size

    def _conflate(self) -> bool:
        """Drop progress that a newer one supersedes. Returns whether an eighth of the bounds is free.

        With less free than that, every few events would lead here again. That costs nothing if only one
        event is left, which may wait whatever its size.
        """
        assert self._buffer is not None
        if not self._conflatable:
            return len(self._buffer) == 1  # a thousand of these may come in one batch
        kept: list[tuple[Event | None, bytes, str | None]] = []
        newer: set[str | None] = set()  # the logs of which what is kept has progress, and new data
        newer_data: set[str | None] = set()
        for encoded in reversed(self._buffer):
            epochs: Sequence[str | None] = encoded.epochs or [None] * len(encoded.events)
            for event, part, epoch in zip(
                reversed(encoded.events), reversed(encoded.parts), reversed(epochs), strict=True
            ):
                if event is not None:
                    if event.conflatable and epoch in (newer_data if event.changed else newer):
                        self.broker.conflated += 1
                        continue
                    if event.progress is not None:
                        newer.add(epoch)
                        if "data" in event.changed:
                            newer_data.add(epoch)
                kept.append((event, part, epoch))
        kept.reverse()
        self._buffer.clear()
        self._empty_buffer()
        # Each by itself, so that a drain write can take as many as it likes.
        for event, part, epoch in kept:
            has_chunk = event is None and epoch is None
            data = part if has_chunk else self.encoding.chunk(part)
            conflatable = int(event is not None and event.conflatable)
            self._enqueue(
                EncodedEvents([event], [part], data, conflatable, None if epoch is None else [epoch])
            )
        return len(kept) == 1 or (
            self._events * 8 <= self._bounds.buffer_events * 7
            and self._size * 8 <= self._bounds.buffer_bytes * 7
        )

    def _dequeue(self, limit: int = MAX_WRITE) -> bytes:
        """Take at most ``limit`` bytes from the buffer, or the first item if that alone has more.

        Empty if nothing is waiting, or if what was taken has no data.
        """
        self._waiting_head = b""
        if self._buffer is None:
            return b""
        taken: list[bytes] = []
        events = size = 0
        while self._buffer and (not taken or size + len(self._buffer[0].data) <= limit):
            encoded = self._buffer.popleft()
            taken.append(encoded.data)
            size += len(encoded.data)
            events += len(encoded.events)
            self._conflatable -= encoded.conflatable
            if (oldest := encoded.events[0]) is not None:
                self._deliveries.count(oldest)
        self._count(-events, -size)
        if not self._buffer:
            self._end_buffer()
        return taken[0] if len(taken) == 1 else b"".join(taken)
