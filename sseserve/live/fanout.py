"""Fan-out: takes what waits in a topic's memory channel to its subscribers.

Guarantee: nothing here ever waits for a subscriber, and each gets the events in the order of the log.

What is published to a topic with few subscribers, for which nothing waits, is delivered at once. Any other
topic has a pump, a task that exists while the channel holds something. It takes all that waits there (so the
busier the topic, the bigger the batch), encodes the batch once per encoding, and offers the same bytes to
every subscriber. One with nothing waiting gets them on its socket at once, without a task switch; the others
in their bounded buffer (see ``subscriber``). Other tasks run every ``SLICE`` seconds, and up to
``LONGEST_SLICE`` apart while nothing new comes: a switch costs time, and delays the remaining clients.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TypeVar, cast

import trio

from ..concurrency import visit
from ..dialects import BundleEncoding, Encoding
from ..model import EndReason, Event, Session
from ..tracing import Tracing
from .bundle import Bundle, BundledEvents, Subscription
from .deliveries import Deliveries
from .subscriber import RECONNECT_WITHIN, EncodedEvents, Subscriber, reconnect_delay
from .throttle import Throttle
from .topic import Member, Topic

__all__ = ["FanOut"]

log = logging.getLogger(__name__)

SLICE = 0.0005  # seconds of fan-out between two switches to other tasks
LONGEST_SLICE = 0.004
FEW = 4  # subscribers that are delivered to without a pump
MAX_AT_ONCE = 32  # deliveries without a pump that may follow each other
MAX_BATCH = 128  # events in one batch
MAX_BATCH_BYTES = 32 * 1024  # and about as many bytes of their data
FAILED = "internal server error; resume with your cursor"

_has_backlog = attrgetter("has_backlog")
_is_slow = attrgetter("client.has_backlog")
_Member = TypeVar("_Member", bound=Member)


def _cut_after_error(member: Member) -> None:
    if not member.ending:
        member.cut(FAILED, EndReason.ERROR)


def _leave_old_log(member: Member) -> None:
    if isinstance(member, Subscriber):
        member.ask_to_reconnect(reconnect_delay(RECONNECT_WITHIN), EndReason.REPLACED)
    else:
        member.resume()


def _offer(
    subscribers: list[Subscriber],
    at: int,
    encoded: EncodedEvents,
    events: Sequence[Event],
    session: Session,
    now: float,
    pause: float,
    deliveries: Deliveries,
) -> int:
    """Offer encoded events to subscribers from one on, for ``pause`` seconds; returns where to go on."""
    first, last = events[0].seq, events[-1].seq
    final = events[-1].progress
    ended = final is not None and final.state.terminal
    until = time.perf_counter() + pause
    others = at - deliveries.buffered  # those that get nothing now
    for number, subscriber in enumerate(subscribers[at:] if at else subscribers, at + 1):
        if not subscriber.live:
            others += 1
            continue
        if subscriber.seq < first:
            subscriber.offer(encoded)
        elif subscriber.seq < last:
            unseen = [event for event in events if event.seq > subscriber.seq]
            subscriber.offer(EncodedEvents.encode(unseen, subscriber.encoding, session.id, session.epoch))
        else:
            others += 1
        if encoded.data:
            subscriber.last_sent_at = now
        if ended:
            subscriber.end()
        if not number & 15 and time.perf_counter() >= until:
            break
    else:
        number = len(subscribers)
    if encoded.data:
        deliveries.count(events[0], number - others - deliveries.buffered)
    return number


class FanOut:
    """The pumps of one broker's topics.

    ``batches``, ``delivered`` and ``conflated`` are as in ``BrokerStatistics``.

    Args:
        nursery: runs the pumps.
        ended: is called with a topic whose pump has ended.
        deliveries: counts how long deliveries take.
        throttle: seconds, instead of that of the dialects that have one; None: the dialect's.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        ended: Callable[[Topic], None],
        deliveries: Deliveries,
        *,
        throttle: float | None,
    ) -> None:
        self._nursery = nursery
        self._deliveries = deliveries
        self._ended = ended
        self._throttle = throttle
        self._queued: list[Bundle] = []  # those in which events were queued
        self._unflushed = trio.lowlevel.ParkingLot()  # the pumps that have queued it
        self._has_flusher = False
        self.tracing: Tracing | None = None
        self._is_deferring = False
        self._deferred: list[tuple[Topic, Session, Sequence[Event]]] = []
        self._at_once = 0  # deliveries without a pump since the last one that a pump has made
        self.batches = 0
        self.delivered = 0
        self.conflated = 0

    def deliver_now(self, topic: Topic, session: Session, events: Sequence[Event]) -> bool:
        """Deliver events without a pump, where that is sooner done; returns whether it does.

        It is for a few subscribers, which nothing waits for. Publishers that come together, as those do whose
        events an engine has stored together, must not hold up everybody else for long: from the
        ``MAX_AT_ONCE``th on topics get pumps, until one of those has run.
        """
        if topic.subscriber_count > FEW or topic.has_pump or self._at_once >= MAX_AT_ONCE:
            return False
        for encoding in topic.groups:
            if isinstance(encoding, BundleEncoding) or self._throttle_interval(encoding):
                return False
        self._at_once += 1
        if self._is_deferring:
            self._deferred.append((topic, session, events))
        else:
            deliver = self._deliver_at_once if self.tracing is None else self._deliver_traced
            deliver(topic, session, events)
        return True

    def defer(self) -> None:
        """Have ``deliver_now`` wait for ``flush``, which must be called before any other task runs."""
        self._is_deferring = True

    def flush(self) -> None:
        """Deliver what was deferred."""
        if self._is_deferring:
            self._is_deferring = False
            deferred, self._deferred = self._deferred, []
            for topic, session, events in deferred:
                deliver = self._deliver_at_once if self.tracing is None else self._deliver_traced
                deliver(topic, session, events)

    def _deliver_traced(self, topic: Topic, session: Session, events: Sequence[Event]) -> None:
        assert self.tracing is not None
        with self.tracing.delivery(session.id, [event.trace for event in events]):
            self._deliver_at_once(topic, session, events)

    def _deliver_at_once(self, topic: Topic, session: Session, events: Sequence[Event]) -> None:
        topic.position = events[-1].seq
        now = topic.last_event_at = trio.current_time()
        self.batches += 1
        try:
            for encoding, group in [*topic.groups.items()]:
                subscribers = cast("list[Subscriber]", [*group.members])
                encoded = EncodedEvents.encode(events, encoding, session.id, session.epoch)
                _offer(subscribers, 0, encoded, events, session, now, math.inf, self._deliveries)
                self.delivered += len(subscribers) * len(events)
        except Exception:
            # The boundary of a batch, as in a pump.
            log.exception("fan-out of session %s failed", topic.session_id)
            for member in topic.members:
                _cut_after_error(member)

    def start(self, topic: Topic) -> None:
        """Have a topic's events delivered: start its pump, if it has none."""
        if not topic.has_pump:
            topic.has_pump = True
            self._nursery.start_soon(self._pump, topic)

    async def _pump(self, topic: Topic) -> None:
        try:
            while True:
                self._at_once = 0
                try:
                    if batch := self._next_batch(topic):
                        session = batch[-1][0]
                        events = [event for _, event in batch]
                        if self.tracing is None:
                            await self._fan_out(topic, session, events)
                        else:
                            with self.tracing.delivery(session.id, [event.trace for event in events]):
                                await self._fan_out(topic, session, events)
                    elif not await self._deliver_throttled(topic):
                        if not topic.is_superseded:
                            break
                        topic.is_superseded = False
                        await visit(topic.members, _leave_old_log)
                except Exception:
                    # The boundary of a batch: other sessions are not affected, but these watchers missed it.
                    log.exception("fan-out of session %s failed", topic.session_id)
                    await visit(topic.members, _cut_after_error)
                topic.publishers.unpark_all()
        finally:
            topic.has_pump = False
            self._ended(topic)

    def _next_batch(self, topic: Topic) -> list[tuple[Session, Event]]:
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
        now = topic.last_event_at = trio.current_time()
        self.batches += 1
        # The groups of this moment: a subscriber that goes live later has read the log up to ``position``.
        has_bundles = False
        for encoding, group, members in [(e, g, list(g.members)) for e, g in topic.groups.items()]:
            has_bundles = has_bundles or isinstance(encoding, BundleEncoding)
            admitted = events
            if interval := self._throttle_interval(encoding):
                throttle = group.throttle = group.throttle or Throttle()
                admitted, dropped = throttle.admit(session, events, interval, now)
                self.conflated += dropped * len(members)
                if throttle.update is not None and not throttle.has_timer:
                    throttle.has_timer = True
                    self._nursery.start_soon(self._wait_for_throttle, topic, throttle, interval)
            if admitted:
                await self._deliver(topic, session, admitted, encoding, members)
        if has_bundles and self._has_flusher:
            await self._unflushed.park()  # so that publishers go on at the pace of these clients too
        else:
            await trio.lowlevel.checkpoint()

    async def _deliver(
        self,
        topic: Topic,
        session: Session,
        events: list[Event],
        encoding: Encoding,
        members: list[Member],
    ) -> None:
        """Offer the same bytes to all members of a group."""
        if isinstance(encoding, BundleEncoding):
            subscriptions = cast("list[Subscription]", members)
            await self._deliver_to_bundles(session, events, encoding, subscriptions)
            return
        subscribers = cast("list[Subscriber]", members)
        encoded = EncodedEvents.encode(events, encoding, session.id, session.epoch)
        # Clients that keep up come first, so that the others do not delay them.
        if any(map(_has_backlog, subscribers)):
            subscribers.sort(key=_has_backlog)
        now = trio.current_time()
        pause = SLICE
        at = _offer(subscribers, 0, encoded, events, session, now, pause, self._deliveries)
        while at < len(subscribers):
            await trio.lowlevel.checkpoint()
            pause = SLICE if topic.backlog else min(2 * pause, LONGEST_SLICE)
            at = _offer(subscribers, at, encoded, events, session, now, pause, self._deliveries)
        self.delivered += len(members) * len(events)

    async def _deliver_to_bundles(
        self,
        session: Session,
        events: list[Event],
        encoding: BundleEncoding,
        subscriptions: list[Subscription],
    ) -> None:
        """Queue what is encoded once in all bundles, and have each client offered what is queued for it.

        One task does so for all topics, so that what waits is joined in one write for each client, whatever
        its topic. After each round publishers get as much time as it took, up to ``LONGEST_SLICE``.
        """
        first, last = events[0].seq, events[-1].seq
        encoded = BundledEvents.encode(events, encoding, session)
        for number, subscription in enumerate(subscriptions, 1):
            if subscription.live:
                bundle = subscription.bundle
                if not bundle.is_scheduled:
                    bundle.is_scheduled = True
                    self._queued.append(bundle)
                if subscription.seq < first:
                    subscription.offer(encoded)
                elif subscription.seq < last:
                    unseen = [event for event in events if event.seq > subscription.seq]
                    subscription.offer(BundledEvents.encode(unseen, encoding, session))
            if not number & 1023:
                await trio.lowlevel.checkpoint()
        self.delivered += len(subscriptions) * len(events)
        if not self._has_flusher:
            self._has_flusher = True
            self._nursery.start_soon(self._flush_queued)

    async def _flush_queued(self) -> None:
        """Offer the clients of bundles what is queued for them; a task, as long as something is."""
        try:
            next_at = 0.0
            while self._queued or self._unflushed:
                await trio.sleep_until(next_at)
                bundles, self._queued = self._queued, []
                topics, self._unflushed = self._unflushed, trio.lowlevel.ParkingLot()
                if any(map(_is_slow, bundles)):
                    bundles.sort(key=_is_slow)
                began = trio.current_time()
                await self._flush(bundles)
                topics.unpark_all()
                ended = trio.current_time()
                next_at = ended + min(ended - began, LONGEST_SLICE)
        finally:
            self._has_flusher = False

    async def _flush(self, bundles: list[Bundle]) -> None:
        now = trio.current_time()
        pause = SLICE
        until = time.perf_counter() + pause
        for number, bundle in enumerate(bundles, 1):
            bundle.is_scheduled = False
            try:
                bundle.flush(now)
            except Exception:
                # The boundary of a client: what is queued for the others is sent.
                log.exception("sending to %r failed", bundle)
                bundle.client.cut(FAILED, EndReason.ERROR)
            if not number & 3 and time.perf_counter() >= until:
                await trio.lowlevel.checkpoint()
                pause = SLICE if self._queued else min(2 * pause, LONGEST_SLICE)
                until = time.perf_counter() + pause

    def _throttle_interval(self, encoding: Encoding) -> float:
        throttle = encoding.dialect.throttle
        return throttle if self._throttle is None or not throttle else self._throttle

    async def _wait_for_throttle(self, topic: Topic, throttle: Throttle, interval: float) -> None:
        """Start the topic's pump when a throttled update is due: it alone delivers, so order is kept."""
        # In the meantime another update may have been sent, and one be held back that is due later.
        while trio.current_time() < (due := throttle.last_sent_at + interval):  # noqa: ASYNC110 - it moves
            await trio.sleep_until(due)
        throttle.has_timer = False
        self.start(topic)

    async def _deliver_throttled(self, topic: Topic) -> bool:
        """Deliver the throttled updates that are due; returns whether there were any."""
        now = trio.current_time()
        delivered = False
        for encoding, group in list(topic.groups.items()):
            if group.throttle is None:
                continue
            if (update := group.throttle.take_due(self._throttle_interval(encoding), now)) is not None:
                delivered = True
                session, event = update
                await self._deliver(topic, session, [event], encoding, list(group.members))
        return delivered
