"""Topics, subscribers and fan-out: the live side.

Guarantee: a live subscriber gets every event of its session once and in order, or is cut with a reason
and knows its cursor. A subscriber costs its bound and nothing else: nothing here ever waits for one.

How. A publisher's event goes into its topic's memory channel and the publisher is answered. The topic's
pump, a task that exists while the channel holds something, takes all that waits there (so the busier the
topic, the bigger the batch), encodes the batch once per encoding, and offers the same bytes to every
subscriber. One with nothing waiting gets them on its socket at once, without a task switch; the others in
their bounded buffer, which a task of their own connection drains. A full buffer is conflated: a progress
tick that a newer progress supersedes is dropped and counted, nothing else ever is. Still full, the
subscriber is cut. Fan-out lets other tasks run every ``SLICE`` seconds.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec
import trio

from .dialects import Encoding, Message
from .model import Event, Session
from .transport import Transport

__all__ = ["Broker", "BrokerStatistics", "PullSubscriber", "PushSubscriber", "Subscriber"]

log = logging.getLogger(__name__)

SLICE = 0.0005  # seconds of fan-out between two looks at other tasks
MAX_BATCH = 128  # events in one batch
MAX_BATCH_BYTES = 32 * 1024  # and about as many bytes of their data
MAX_WRITE = 64 * 1024  # bytes that one drain write joins
BACKLOG = 1024  # events waiting in a topic from which on its publishers are answered later
WHEEL = 64  # slots of the heartbeat wheel, a second each


class BrokerStatistics(msgspec.Struct, frozen=True):
    """Counts since the start, but for ``topics`` and ``subscribers``, which are of now.

    ``delivered`` counts an event once for every subscriber that it was offered to; ``conflated`` those
    of them that were dropped again for a newer progress; ``cut`` the subscribers that were too slow.
    """

    topics: int
    subscribers: int
    events: int
    batches: int
    delivered: int
    conflated: int
    cut: int
    heartbeats: int


class Frame(msgspec.Struct, frozen=True):
    """Encoded events. ``parts`` has one item for each of ``events``; ``data`` is all of them joined.

    What is no event (a heartbeat, a farewell) is a part whose event is None.
    """

    events: list[Event | None]
    parts: list[bytes]
    data: bytes

    @classmethod
    def of(cls, events: Sequence[Event], encoding: Encoding, session_id: str, epoch: str) -> Frame:
        parts = [encoding.event(session_id, epoch, event) for event in events]
        return cls(list(events), parts, b"".join(parts))

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
        "broker",
        "close_code",
        "encoding",
        "ending",
        "live",
        "sent_at",
        "seq",
        "slot",
        "topic",
    )

    def __init__(self, broker: Broker, encoding: Encoding) -> None:
        self.broker = broker
        self.encoding = encoding
        self.topic: Topic | None = None
        self.seq = 0
        self.live = False
        self.ending = False
        self.close_code = 1000  # of a WebSocket, RFC 6455, section 7.4.1
        self.sent_at = trio.current_time()
        self.slot = -1
        self._bounds: Bounds = broker.bounds
        self._buffer: deque[Frame] | None = None  # most clients never need one
        self._events = 0
        self._size = 0

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.encoding.protocol} of {self.encoding.dialect.name} seq={self.seq} "
            f"live={self.live} ending={self.ending} waiting={self._events} ({self._size} bytes)>"
        )

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
        if self.ending or (self._buffer is None and self._take(frame)):
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

    def beat(self, data: bytes) -> bool:
        """Pass on a heartbeat if nothing is waiting; returns whether it went out."""
        return self._buffer is None and not self.ending and self._take(Frame.raw(data))

    def cut(self, reason: str) -> None:
        """Give up what is waiting, tell the client why, and end."""
        self.broker.count_cut()
        self._buffer, self._events, self._size = None, 0, 0
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
        self.write(last + self.encoding.close(code, reason))
        self.ending = True
        self._wake()

    def abort(self) -> None:
        """End at once: the client is gone."""
        self.broker.unsubscribe(self)
        self._buffer, self._events, self._size = None, 0, 0
        self.ending = True
        self._wake()

    def _keep(self, frame: Frame) -> None:
        assert self._buffer is not None
        self._buffer.append(frame)
        self._events += len(frame.events)
        self._size += len(frame.data)

    def _conflate(self) -> bool:
        """Drop the ticks that a newer progress supersedes. Returns whether an eighth of the bounds is free.

        Less than an eighth would have us back here with the next few events, for ever.
        """
        assert self._buffer is not None
        kept: list[tuple[Event | None, bytes]] = []
        superseded = False
        for frame in reversed(self._buffer):
            for event, part in zip(reversed(frame.events), reversed(frame.parts), strict=True):
                if superseded and event is not None and event.tick:
                    self.broker.conflated += 1
                    continue
                superseded = superseded or (event is not None and event.progress is not None)
                kept.append((event, part))
        kept.reverse()
        self._buffer.clear()
        self._events = self._size = 0
        # One frame for each, so that a drain write can take as many as it likes.
        for event, part in kept:
            self._keep(Frame([event], [part], part))
        return (
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
        self, broker: Broker, encoding: Encoding, transport: Transport, nursery: trio.Nursery
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
        if self._transport.pending:
            self._wake()
        return taken

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
        with trio.fail_after(self._bounds.send_timeout):
            await self._transport.send_all(data)
        self.sent_at = trio.current_time()


class PullSubscriber(Subscriber):
    """A subscriber whose reader asks for bytes: for responses that another server writes."""

    __slots__ = ("_readable", "_writable")

    def __init__(self, broker: Broker, encoding: Encoding) -> None:
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


class Topic:
    """The live side of one session. ``position`` is the last ``seq`` whose fan-out has begun."""

    __slots__ = (
        "arrivals",
        "backlog",
        "groups",
        "position",
        "publishers",
        "pumping",
        "receive",
        "send",
        "session_id",
    )

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.position = 0
        self.backlog = 0
        self.pumping = False
        self.groups: dict[Encoding, dict[Subscriber, None]] = {}
        self.arrivals = trio.lowlevel.ParkingLot()  # long-pollers
        self.publishers = trio.lowlevel.ParkingLot()
        # Unbounded, as an event that is in the log must not be refused here; ``Broker.room`` is what
        # slows publishers down.
        self.send, self.receive = trio.open_memory_channel[tuple[Session, Event]](math.inf)

    def __repr__(self) -> str:
        watchers = sum(map(len, self.groups.values()))
        return (
            f"<Topic {self.session_id!r} at {self.position}, {self.backlog} waiting, {watchers} subscribers>"
        )

    @property
    def idle(self) -> bool:
        return not (self.groups or self.pumping or self.arrivals or self.publishers)


class Broker:
    """All topics of this process. Its pumps and ticker live in ``nursery``."""

    def __init__(self, nursery: trio.Nursery, bounds: Bounds, *, heartbeat: float | None = None) -> None:
        self.bounds = bounds
        self._nursery = nursery
        self._heartbeat = heartbeat
        self._topics: dict[str, Topic] = {}
        self._wheel: list[set[Subscriber]] = [set() for _ in range(WHEEL)]
        self._subscribers = 0
        self._events = 0
        self._batches = 0
        self._delivered = 0
        self._cut = 0
        self._heartbeats = 0
        self.conflated = 0

    def statistics(self) -> BrokerStatistics:
        """Return the counts of this moment."""
        return BrokerStatistics(
            topics=len(self._topics),
            subscribers=self._subscribers,
            events=self._events,
            batches=self._batches,
            delivered=self._delivered,
            conflated=self.conflated,
            cut=self._cut,
            heartbeats=self._heartbeats,
        )

    def count_cut(self) -> None:
        """Note that a client was cut."""
        self._cut += 1

    # Publishing

    def publish(self, session: Session, events: Sequence[Event]) -> None:
        """Take events that are in the log, in its order. Never waits, so what is logged is delivered."""
        self._events += len(events)
        topic = self._topics.get(session.id)
        if topic is None:
            return
        for event in events:
            topic.send.send_nowait((session, event))
        topic.backlog += len(events)
        topic.arrivals.unpark_all()
        if not topic.pumping:
            topic.pumping = True
            self._nursery.start_soon(self._pump, topic)

    async def room(self, session_id: str) -> None:
        """Wait while a topic is far behind: its publishers are answered at the pace of its fan-out."""
        while (topic := self._topics.get(session_id)) is not None and topic.backlog >= BACKLOG:
            await topic.publishers.park()

    async def arrival(self, session_id: str) -> None:
        """Wait until something is published to the session, or it is deleted, or the server stops."""
        topic = self._topic(session_id)
        try:
            await topic.arrivals.park()
        finally:
            self._forget(topic)

    def wake(self) -> None:
        """Wake everybody who waits for an arrival."""
        for topic in list(self._topics.values()):
            topic.arrivals.unpark_all()

    # Subscribing

    def _topic(self, session_id: str) -> Topic:
        topic = self._topics.get(session_id)
        if topic is None:
            topic = self._topics[session_id] = Topic(session_id)
        return topic

    def subscribe(self, session_id: str, subscriber: Subscriber) -> Topic:
        """Put a subscriber, still quiet, on a session's topic."""
        topic = subscriber.topic = self._topic(session_id)
        topic.groups.setdefault(subscriber.encoding, {})[subscriber] = None
        self._subscribers += 1
        self._schedule(subscriber, trio.current_time())
        return topic

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Take a subscriber off its topic; does nothing the second time."""
        topic = subscriber.topic
        if topic is None:
            return
        subscriber.topic = None
        subscriber.live = False
        self._subscribers -= 1
        self._wheel[subscriber.slot].discard(subscriber)
        group = topic.groups[subscriber.encoding]
        del group[subscriber]
        if not group:
            del topic.groups[subscriber.encoding]
            self._forget(topic)

    def watched(self, session_id: str) -> bool:
        """Whether anybody watches the session now."""
        return session_id in self._topics

    def close(self, session_id: str, farewell: Message) -> None:
        """Tell all subscribers of a session that it is no more, and end them."""
        # Off the table first: a session of the same id that begins now has a topic of its own.
        topic = self._topics.pop(session_id, None)
        if topic is None:
            return
        for encoding, group in list(topic.groups.items()):
            last = encoding.message(farewell)
            for subscriber in list(group):
                subscriber.end(last, reason=farewell.event or "")
        topic.arrivals.unpark_all()

    def subscribers(self) -> list[Subscriber]:
        """All subscribers of all topics."""
        return [s for topic in self._topics.values() for group in topic.groups.values() for s in group]

    def _forget(self, topic: Topic) -> None:
        if topic.idle and self._topics.get(topic.session_id) is topic:
            del self._topics[topic.session_id]

    # Fan-out

    async def _pump(self, topic: Topic) -> None:
        try:
            while batch := self._batch(topic):
                session = batch[-1][0]
                await self._fan_out(topic, session, [event for _, event in batch])
                topic.publishers.unpark_all()
        except Exception:
            # The boundary of a topic: other sessions do not notice. Its watchers have missed something.
            log.exception("fan-out of session %s failed", topic.session_id)
            for group in list(topic.groups.values()):
                for subscriber in list(group):
                    subscriber.cut("the server failed; come back with your cursor")
            topic.publishers.unpark_all()
        finally:
            topic.pumping = False
            self._forget(topic)

    def _batch(self, topic: Topic) -> list[tuple[Session, Event]]:
        batch: list[tuple[Session, Event]] = []
        size = 0
        while len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            try:
                session, event = topic.receive.receive_nowait()
            except trio.WouldBlock:
                break
            batch.append((session, event))
            size += 256 if event.progress is not None else len(event.data)  # type: ignore[arg-type]  # Raw
            topic.backlog -= 1
        return batch

    async def _fan_out(self, topic: Topic, session: Session, events: list[Event]) -> None:
        first, last = events[0].seq, events[-1].seq
        topic.position = last
        final = events[-1].progress
        ended = final is not None and final.state.terminal
        now = trio.current_time()
        until = time.perf_counter() + SLICE
        turns = 0
        # The groups of this moment: who goes live from here on has read the log up to ``position``.
        for encoding, subscribers in [(e, list(group)) for e, group in topic.groups.items()]:
            frame = Frame.of(events, encoding, session.id, session.epoch)
            for subscriber in subscribers:
                if not subscriber.live:
                    continue
                if subscriber.seq < first:
                    subscriber.offer(frame)
                elif subscriber.seq < last:
                    fresh = [event for event in events if event.seq > subscriber.seq]
                    subscriber.offer(Frame.of(fresh, encoding, session.id, session.epoch))
                subscriber.sent_at = now
                if ended:
                    subscriber.end()
                turns += 1
                if not turns & 15 and time.perf_counter() >= until:
                    await trio.lowlevel.checkpoint()
                    until = time.perf_counter() + SLICE
        self._batches += 1
        self._delivered += turns * len(events)
        if not turns:
            await trio.lowlevel.checkpoint()

    # Heartbeats

    def _interval(self, subscriber: Subscriber) -> float:
        return self._heartbeat or subscriber.encoding.dialect.interval

    def _schedule(self, subscriber: Subscriber, now: float) -> None:
        # Jitter spreads the clients of a burst; never later than the interval that they count on.
        interval = self._interval(subscriber)
        due = subscriber.sent_at + interval * random.uniform(0.85, 1.0) - 1  # noqa: S311 - no secret
        subscriber.slot = int(min(max(due, now + 1), now + WHEEL - 2)) % WHEEL
        self._wheel[subscriber.slot].add(subscriber)

    async def tick(self) -> None:
        """Send the heartbeats that are due, for ever. One task, whatever the number of clients."""
        second = int(trio.current_time())
        while True:
            await trio.sleep_until(second + 1)
            second += 1
            now = trio.current_time()
            due, self._wheel[second % WHEEL] = self._wheel[second % WHEEL], set()
            beats: dict[Encoding, bytes] = {}
            for turns, subscriber in enumerate(due):
                if subscriber.topic is None:
                    continue
                if subscriber.live and now - subscriber.sent_at >= self._interval(subscriber) * 0.8 - 1:
                    if (beat := beats.get(subscriber.encoding)) is None:
                        beat = beats[subscriber.encoding] = subscriber.encoding.heartbeat(time.time())
                    self._heartbeats += subscriber.beat(beat)
                    subscriber.sent_at = now
                if subscriber.topic is not None:
                    self._schedule(subscriber, now)
                if turns % 256 == 255:
                    await trio.lowlevel.checkpoint()
