"""Topics, subscribers and fan-out: the live side.

Guarantee: a live subscriber gets every event of its session once and in order, or is cut with a reason
and knows its cursor. A subscriber costs its bound and nothing else: nothing here ever waits for one.

How. A publisher's event goes into its topic's memory channel and the publisher is answered. The topic's
pump, a task that exists while the channel holds something, takes all that waits there (so the busier the
topic, the bigger the batch), encodes the batch once per encoding, and offers the same bytes to every
subscriber. One with nothing waiting gets them on its socket at once, without a task switch; the others in
their bounded buffer (see ``subscribers``). Fan-out lets other tasks run every ``SLICE`` seconds, and up to
``LONGEST_SLICE`` apart while nothing new comes: looking is not free, and delays who is still to be served.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import msgspec
import trio

from ..dialects import Dialect, Encoding, Message
from ..model import Event, Session
from .subscriber import Bounds, Frame, PullSubscriber, PushSubscriber, Subscriber

__all__ = ["Broker", "BrokerStatistics", "PullSubscriber", "PushSubscriber", "Subscriber"]

log = logging.getLogger(__name__)

SLICE = 0.0005  # seconds of fan-out between two looks at other tasks
LONGEST_SLICE = 0.004
MAX_BATCH = 128  # events in one batch
MAX_BATCH_BYTES = 32 * 1024  # and about as many bytes of their data
BACKLOG = 1024  # events waiting in a topic from which on its publishers are answered later
WHEEL = 64  # slots of the heartbeat wheel, a second each

_behind = attrgetter("behind")


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


class Group:
    """The subscribers of a topic that share an encoding, and the tick that their throttle holds back."""

    __slots__ = ("held", "members", "sent_at", "timed")

    def __init__(self) -> None:
        self.members: dict[Subscriber, None] = {}
        self.held: tuple[Session, Event] | None = None
        self.timed = False  # a task waits for the held tick's time
        self.sent_at = -math.inf  # when the last tick went out

    def admit(
        self, session: Session, events: list[Event], throttle: float, now: float
    ) -> tuple[list[Event], int]:
        """Pick what of a batch goes out now, and count the ticks that do not at all.

        The first tick of a flood goes out at once, then one each ``throttle`` seconds, and the last one in
        any case. What is no tick goes out at once, behind the tick before it unless it is progress itself.
        """
        out: list[Event] = []
        dropped = 0
        for event in events:
            held, self.held = self.held, None
            if held is not None and event.progress is None:
                out.append(held[1])
            elif held is not None:
                dropped += 1
            if event.conflatable and now - self.sent_at < throttle:
                self.held = (session, event)
                continue
            if event.conflatable:
                self.sent_at = now
            out.append(event)
        return out, dropped


class Topic:
    """The live side of one session. ``position`` is the last ``seq`` whose fan-out has begun."""

    __slots__ = (
        "arrivals",
        "backlog",
        "groups",
        "moved_at",
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
        self.groups: dict[Encoding, Group] = {}
        self.moved_at = trio.current_time()  # when the last event came
        self.arrivals: set[trio.Event] = set()  # bells that ring when something comes
        self.publishers = trio.lowlevel.ParkingLot()
        # Unbounded, as an event that is in the log must not be refused here; ``Broker.room`` is what
        # slows publishers down.
        self.send, self.receive = trio.open_memory_channel[tuple[Session, Event]](math.inf)

    def __repr__(self) -> str:
        watchers = sum(len(group.members) for group in self.groups.values())
        return (
            f"<Topic {self.session_id!r} at {self.position}, {self.backlog} waiting, {watchers} subscribers>"
        )

    def ring(self) -> None:
        """Wake those who wait for something to come."""
        for bell in self.arrivals:
            bell.set()

    @property
    def idle(self) -> bool:
        return not (self.groups or self.pumping or self.arrivals or self.publishers)


class Broker:
    """All topics of this process. Its pumps and ticker live in ``nursery``."""

    def __init__(
        self,
        nursery: trio.Nursery,
        bounds: Bounds,
        *,
        # Each instead of what the dialects say, if they say anything
        heartbeat: float | None = None,
        max_age: float | None = None,
        throttle: float | None = None,
    ) -> None:
        self.bounds = bounds
        self._nursery = nursery
        self._heartbeat = heartbeat
        self._max_age = max_age
        self._settings_throttle = throttle
        self._topics: dict[str, Topic] = {}
        self._farewell: Callable[[Subscriber], None] | None = None
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
        topic.ring()
        self._start(topic)

    def _start(self, topic: Topic) -> None:
        if not topic.pumping:
            topic.pumping = True
            self._nursery.start_soon(self._pump, topic)

    async def room(self, session_id: str) -> None:
        """Wait while a topic is far behind: its publishers are answered at the pace of its fan-out."""
        while (topic := self._topics.get(session_id)) is not None and topic.backlog >= BACKLOG:
            await topic.publishers.park()

    @contextmanager
    def bell(self, *session_ids: str) -> Iterator[trio.Event]:
        """Hang up an event that is set as soon as something is published to one of the sessions.

        It is set too when one of them is deleted, and when the server stops.
        """
        bell = trio.Event()
        topics = [self._topic(session_id) for session_id in session_ids]
        for topic in topics:
            topic.arrivals.add(bell)
        try:
            yield bell
        finally:
            for topic in topics:
                topic.arrivals.discard(bell)
                self._forget(topic)

    def wake(self) -> None:
        """Ring all bells."""
        for topic in self._topics.values():
            topic.ring()

    # Subscribing

    def _topic(self, session_id: str) -> Topic:
        topic = self._topics.get(session_id)
        if topic is None:
            topic = self._topics[session_id] = Topic(session_id)
        return topic

    def drain(self, farewell: Callable[[Subscriber], None]) -> list[Subscriber]:
        """Say ``farewell`` to whoever subscribes from now on; returns those who are here."""
        self._farewell = farewell
        return self.subscribers()

    def subscribe(self, session_id: str, subscriber: Subscriber) -> Topic:
        """Put a subscriber, still quiet, on a session's topic."""
        topic = subscriber.topic = self._topic(session_id)
        if (group := topic.groups.get(subscriber.encoding)) is None:
            group = topic.groups[subscriber.encoding] = Group()
        group.members[subscriber] = None
        self._subscribers += 1
        self._schedule(subscriber, trio.current_time())
        if self._farewell is not None:
            self._farewell(subscriber)
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
        del group.members[subscriber]
        if not group.members:
            del topic.groups[subscriber.encoding]
            self._forget(topic)

    def watchers(self, session_id: str) -> int:
        """How many subscribers a session has."""
        topic = self._topics.get(session_id)
        return 0 if topic is None else sum(len(group.members) for group in topic.groups.values())

    def busiest(self, most: int) -> dict[str, int]:
        """The sessions with the most subscribers, and how many these are."""
        counts = {session_id: self.watchers(session_id) for session_id in self._topics}
        return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])

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
            for subscriber in list(group.members):
                subscriber.end(last, reason=farewell.event or "")
        topic.ring()

    def subscribers(self) -> list[Subscriber]:
        """All subscribers of all topics."""
        return [
            s for topic in self._topics.values() for group in topic.groups.values() for s in group.members
        ]

    def _forget(self, topic: Topic) -> None:
        if topic.idle and self._topics.get(topic.session_id) is topic:
            del self._topics[topic.session_id]

    # Fan-out

    async def _pump(self, topic: Topic) -> None:
        try:
            while True:
                try:
                    if batch := self._batch(topic):
                        session = batch[-1][0]
                        await self._fan_out(topic, session, [event for _, event in batch])
                    elif not await self._release(topic):
                        break
                except Exception:
                    # The boundary of a batch: no other session notices, but these watchers have missed it.
                    log.exception("fan-out of session %s failed", topic.session_id)
                    for group in list(topic.groups.values()):
                        for subscriber in list(group.members):
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
            size += event.weight
            topic.backlog -= 1
        return batch

    async def _fan_out(self, topic: Topic, session: Session, events: list[Event]) -> None:
        topic.position = events[-1].seq
        now = topic.moved_at = trio.current_time()
        self._batches += 1
        # The groups of this moment: who goes live from here on has read the log up to ``position``.
        for encoding, group, members in [(e, g, list(g.members)) for e, g in topic.groups.items()]:
            admitted = events
            if throttle := self._throttle(encoding):
                admitted, dropped = group.admit(session, events, throttle, now)
                self.conflated += dropped * len(members)
                if group.held is not None and not group.timed:
                    group.timed = True
                    self._nursery.start_soon(self._resume, topic, group, throttle)
            if admitted:
                await self._deliver(topic, session, admitted, encoding, members)
        await trio.lowlevel.checkpoint()

    async def _deliver(
        self,
        topic: Topic,
        session: Session,
        events: list[Event],
        encoding: Encoding,
        members: list[Subscriber],
    ) -> None:
        """Offer the same bytes to all members of a group."""
        first, last = events[0].seq, events[-1].seq
        final = events[-1].progress
        ended = final is not None and final.state.terminal
        frame = Frame.of(events, encoding, session.id, session.epoch)
        now = trio.current_time()
        pause = SLICE
        until = time.perf_counter() + pause
        # Who keeps up comes first, so that those who do not take their time from nobody.
        if any(map(_behind, members)):
            members.sort(key=_behind)
        for turn, subscriber in enumerate(members, 1):
            if not subscriber.live:
                continue
            if subscriber.seq < first:
                subscriber.offer(frame)
            elif subscriber.seq < last:
                fresh = [event for event in events if event.seq > subscriber.seq]
                subscriber.offer(Frame.of(fresh, encoding, session.id, session.epoch))
            if frame.data:
                subscriber.sent_at = now
            if ended:
                subscriber.end()
            if not turn & 15 and time.perf_counter() >= until:
                await trio.lowlevel.checkpoint()
                pause = SLICE if topic.backlog else min(2 * pause, LONGEST_SLICE)
                until = time.perf_counter() + pause
        self._delivered += len(members) * len(events)

    def _throttle(self, encoding: Encoding) -> float:
        throttle = encoding.dialect.throttle
        return throttle if self._settings_throttle is None or not throttle else self._settings_throttle

    async def _resume(self, topic: Topic, group: Group, throttle: float) -> None:
        """Wake the topic's pump when a held tick is due: it alone delivers, so nothing is reordered."""
        # Meanwhile a tick may have gone out and another be held, which is due later.
        while trio.current_time() < (due := group.sent_at + throttle):  # noqa: ASYNC110 - a time that moves
            await trio.sleep_until(due)
        group.timed = False
        self._start(topic)

    async def _release(self, topic: Topic) -> bool:
        """Deliver the held ticks whose time has come; returns whether there were any."""
        now = trio.current_time()
        found = False
        for encoding, group in list(topic.groups.items()):
            if group.held is not None and now >= group.sent_at + self._throttle(encoding):
                (session, event), group.held = group.held, None
                group.sent_at = now
                found = True
                await self._deliver(topic, session, [event], encoding, list(group.members))
        return found

    # Heartbeats

    def interval(self, dialect: Dialect) -> float:
        """How long a stream may be idle before it gets a heartbeat, in seconds."""
        return self._heartbeat or dialect.heartbeat_interval

    def _interval(self, subscriber: Subscriber) -> float:
        return self.interval(subscriber.encoding.dialect)

    def _end_of_life(self, subscriber: Subscriber) -> float:
        """When a stream is told to come back: it is too old, or nothing has happened on it for too long."""
        dialect, topic = subscriber.encoding.dialect, subscriber.topic
        end = math.inf
        if dialect.max_age is not None:
            end = subscriber.joined_at + (self._max_age or dialect.max_age)
        if dialect.idle_timeout is not None and topic is not None:
            end = min(end, max(subscriber.joined_at, topic.moved_at) + dialect.idle_timeout)
        return end

    def _schedule(self, subscriber: Subscriber, now: float) -> None:
        # Jitter spreads the clients of a burst; never later than the interval that they count on.
        interval = self._interval(subscriber)
        due = subscriber.sent_at + interval * random.uniform(0.85, 1.0) - 1  # noqa: S311 - no secret
        due = min(due, self._end_of_life(subscriber) + 1)
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
                if subscriber.live and now >= self._end_of_life(subscriber):
                    subscriber.dismiss(1000)
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
