"""Topics: who subscribes to which session, and what is published to them.

Guarantee: a live subscriber gets every event of its session once and in order, or is cut with a reason
and knows its cursor. A subscriber costs its bound and nothing else: nothing here ever waits for one.

A publisher's event goes into its topic's memory channel, and the publisher gets its response; ``fanout``
takes it from there to the subscribers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import trio

from ..concurrency import VISIT, visit
from ..dialects import Message
from ..engines import Engine
from ..model import EndReason, Event, Session
from ..tracing import Tracing
from .availability import Availability, encode_notice
from .bundle import Bundle, Subscription
from .deliveries import Deliveries
from .fanout import FanOut
from .heartbeats import Heartbeats
from .replays import Replays
from .subscriber import Bounds, Subscriber
from .topic import Group, Member, Topic
from .watchers import WatcherCounts

__all__ = ["Broker", "BrokerStatistics"]

MAX_BACKLOG = 1024  # events waiting in a topic from which on publishers wait


class BrokerStatistics(msgspec.Struct, frozen=True):
    """Counts since the start, but for ``topics`` and ``subscribers``, which are of now.

    ``delivered`` counts an event once for every subscriber that it was offered to; ``conflated`` those
    of them that were dropped again for a newer progress; ``cut`` the subscribers that were too slow,
    ``resumed`` those that came with a cursor.
    """

    topics: int
    subscribers: int
    batches: int
    delivered: int
    conflated: int
    cut: int
    resumed: int
    heartbeats: int


class Broker:
    """All topics of this process.

    Args:
        nursery: runs the pumps of the topics.
        bounds: of each subscriber's buffer.
        heartbeats: the schedule that subscribers are put into.
        throttle: seconds, instead of that of the dialects that have one; None: the dialect's.
        deliveries: counts how long deliveries take; None: by the clock of this machine.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        bounds: Bounds,
        heartbeats: Heartbeats | None = None,
        *,
        throttle: float | None = None,
        deliveries: Deliveries | None = None,
    ) -> None:
        self.bounds = bounds
        self.heartbeats = heartbeats or Heartbeats()
        self._nursery = nursery
        self.replays = Replays()
        self.heartbeats.on_second = self.replays.expire
        self.deliveries = deliveries or Deliveries()
        self._fan_out = FanOut(nursery, self._discard_if_idle, self.deliveries, throttle=throttle)
        # What is published after ``defer`` is delivered by ``flush``, which must be called before any other
        # task runs: so a publisher gets its response first.
        self.defer, self.flush = self._fan_out.defer, self._fan_out.flush
        self._topics: dict[str, Topic] = {}
        self._bundles: dict[Subscriber, Bundle] = {}
        self.on_publish: Callable[[Session, Sequence[Event]], None] | None = None  # is called by ``publish``
        self._engine: Engine | None = None
        self.availability = Availability()  # of the engine
        self._on_subscribe: Callable[[Subscriber], None] | None = None
        self.watchers = WatcherCounts()
        self._cut = 0
        self.conflated = 0
        self.resumed = 0
        self.resumes = {"ok": 0, "gap": 0, "reset": 0}  # of sessions, by how that went

    def trace(self, tracing: Tracing) -> None:
        """Make spans of deliveries from now on."""
        self._fan_out.tracing = tracing

    def statistics(self) -> BrokerStatistics:
        """Return the counts of this moment."""
        return BrokerStatistics(
            topics=len(self._topics),
            subscribers=self.watchers.total,
            batches=self._fan_out.batches,
            delivered=self._fan_out.delivered,
            conflated=self.conflated + self._fan_out.conflated,
            cut=self._cut,
            resumed=self.resumed,
            heartbeats=self.heartbeats.sent,
        )

    def count_cut(self) -> None:
        """Count a client that was cut."""
        self._cut += 1

    # The engine

    def attach(self, engine: Engine) -> None:
        """Have ``engine`` follow the sessions that have a topic, from now on."""
        self._engine = engine

    def resync(self, session_id: str) -> None:
        """Ask everyone who watches a session to come back with their cursor, once they have what is waiting.

        What follows in its log does not continue what was delivered; they are told so when they resume.
        """
        if (topic := self._topics.get(session_id)) is not None:
            self._discard_if_idle(self._replace(topic))

    def set_problem(self, problem: str | None) -> None:
        """Tell everyone who watches that the engine cannot store (the reason), or can again (None)."""
        has_changed = (self.availability.problem is None) != (problem is None)
        self.availability.problem = problem

        def tell(subscriber: Subscriber) -> None:
            # What is true when its turn comes.
            self.tell_availability(subscriber, self.availability.problem)

        if has_changed:
            self._nursery.start_soon(self.visit_subscribers, tell)
            self.notify_all()

    def tell_availability(self, subscriber: Subscriber, problem: str | None) -> None:
        """Send a client ``degraded`` or ``restored``, unless it knows."""
        if subscriber.degraded != (problem is not None):
            subscriber.degraded = problem is not None
            notice = encode_notice(subscriber.encoding, problem)
            if subscriber.live:
                subscriber.offer(notice)
            else:
                subscriber.write_first(notice.data)

    # Publishing

    def publish(self, session: Session, events: Sequence[Event]) -> None:
        """Deliver events that are in the log, in its order. Never waits, so what is logged is delivered."""
        if self.on_publish is not None:
            self.on_publish(session, events)
        topic = self._topics.get(session.id)
        if topic is None:
            return
        if topic.epoch not in (None, session.epoch):
            topic = self._replace(topic)
        if not topic.has_session:
            self.note_session(topic, session.epoch)
        self._notify(topic)
        if self._fan_out.deliver_now(topic, session, events):
            self._discard_if_idle(topic)
        else:
            for event in events:
                topic.send.send_nowait((session, event))
            topic.backlog += len(events)
            self._fan_out.start(topic)

    def _replace(self, topic: Topic) -> Topic:
        """Give a session whose log is another one now a topic of its own; returns it.

        The old one goes on until its subscribers have got what is left. If that is not their end they are
        asked to reconnect. Those that are not live yet find the new log when they read on.
        """
        session_id = topic.session_id
        topic.is_superseded = True
        self._fan_out.start(topic)
        self._remove(topic)
        if topic.has_session:
            topic.has_session = False
            self.watchers.move(session_id, topic.subscriber_count, 0)
        new = self._topic(session_id)
        for member in [m for m in topic.members if not m.live]:
            self.detach_member(member)
            self.attach_member(session_id, member)
        self._notify(topic)
        return new

    async def wait_for_capacity(self, session_id: str) -> None:
        """Wait while a topic has a large backlog: publishers go on at the pace of its fan-out."""
        while (topic := self._topics.get(session_id)) is not None and topic.backlog >= MAX_BACKLOG:
            self.flush()
            await topic.publishers.park()

    @contextmanager
    def wakeup(self, session_id: str) -> Iterator[trio.Event]:
        """Return what is set as soon as something is published to a session.

        It is set too when the session is deleted, and when the server stops.
        """
        wakeup, topic = trio.Event(), self._topic(session_id)
        topic.waiters.add(wakeup)
        try:
            yield wakeup
        finally:
            topic.waiters.discard(wakeup)
            self._discard_if_idle(topic)

    def notify(self, session_id: str) -> None:
        """Wake the tasks that wait for something to be published to a session."""
        if (topic := self._topics.get(session_id)) is not None:
            self._notify(topic)

    def _notify(self, topic: Topic) -> None:
        """Wake the tasks that wait for a topic: at once, or many of them one after another."""
        if len(topic.waiters) <= VISIT:
            topic.notify()
        elif topic.is_waking:
            topic.wakes_again = True
        else:
            topic.is_waking = True
            self._nursery.start_soon(self._wake_many, topic)

    async def _wake_many(self, topic: Topic) -> None:
        try:
            topic.wakes_again = True
            while topic.wakes_again:
                topic.wakes_again = False
                await visit(topic.waiters, trio.Event.set)
        finally:
            topic.is_waking = False

    def notify_all(self) -> None:
        """Wake all tasks that wait for something to be published, or for the engine, one after another."""
        self._nursery.start_soon(visit, self._topics.values(), self._notify)
        self.availability.wake()

    # Subscribing

    def _topic(self, session_id: str) -> Topic:
        topic = self._topics.get(session_id)
        if topic is None:
            topic = self._topics[session_id] = Topic(session_id)
            if self._engine is not None:
                self._engine.follow(session_id)
        return topic

    def _remove(self, topic: Topic) -> None:
        del self._topics[topic.session_id]
        if self._engine is not None:
            self._engine.unfollow(topic.session_id)

    def begin_drain(self, on_subscribe: Callable[[Subscriber], None]) -> None:
        """Call ``on_subscribe`` with everyone who subscribes from now on."""
        self._on_subscribe = on_subscribe

    def subscribe(self, session_id: str, subscriber: Subscriber) -> Topic:
        """Put a subscriber, which is not live yet, on a session's topic."""
        topic = self.attach_member(session_id, subscriber)
        self._add(subscriber)
        return topic

    def add_bundle(self, bundle: Bundle) -> None:
        """Put a client, which is not live yet, on the topics of several sessions."""
        self._bundles[bundle.client] = bundle
        for subscription in bundle.subscriptions:
            self.attach_member(subscription.session_id, subscription)
        bundle.client.topic = bundle
        self._add(bundle.client)

    def _add(self, subscriber: Subscriber) -> None:
        self.watchers.add(subscriber.encoding, 1)
        self.heartbeats.schedule(subscriber, trio.current_time())
        if self._on_subscribe is not None:
            self._on_subscribe(subscriber)

    def attach_member(self, session_id: str, member: Member) -> Topic:
        """Put a subscriber, or the subscription of a bundle, on the topic that a session has now."""
        topic = member.topic = self._topic(session_id)
        if (group := topic.groups.get(member.encoding)) is None:
            group = topic.groups[member.encoding] = Group()
        group.members[member] = None
        self._count(topic, 1)
        return topic

    def unsubscribe(self, subscriber: Subscriber, *, left: bool = False) -> None:
        """Take a subscriber off its topic; does nothing the second time. ``left``: its client has gone."""
        topic = subscriber.topic
        if topic is None:
            return
        if isinstance(topic, Topic):
            sent = subscriber.sent + (max(topic.position - subscriber.seq, 0) if subscriber.live else 0)
            self.detach_member(subscriber)
        else:
            bundle = self._bundles.pop(subscriber)
            sent = subscriber.sent + bundle.sent
            for subscription in bundle.subscriptions:
                self.detach_member(subscription)
            subscriber.topic = None
            subscriber.live = False
        subscriber.sent = sent - subscriber.backlog[0] if left else sent
        self.watchers.add(subscriber.encoding, -1)
        self.heartbeats.discard(subscriber)

    def detach_member(self, member: Member) -> None:
        """Take a subscriber, or the subscription of a bundle, off its topic."""
        topic = member.topic
        assert isinstance(topic, Topic)
        member.topic = None
        member.live = False
        self._count(topic, -1)
        group = topic.groups[member.encoding]
        del group.members[member]
        if not group.members:
            del topic.groups[member.encoding]
            self._discard_if_idle(topic)

    def move_to_current(self, subscription: Subscription) -> None:
        """Move the subscription of a bundle to the topic that its session has now, if that is another one."""
        topic, current = subscription.topic, self._topics.get(subscription.session_id)
        if isinstance(topic, Topic) and topic is not current and not topic.is_closed:
            self.detach_member(subscription)
            self.attach_member(subscription.session_id, subscription)

    def _count(self, topic: Topic, change: int) -> None:
        before, topic.subscriber_count = topic.subscriber_count, topic.subscriber_count + change
        self.watchers.on_watcher(topic.session_id)
        if topic.has_session:
            self.watchers.move(topic.session_id, before, topic.subscriber_count)

    def note_session(self, topic: Topic, epoch: str) -> None:
        """Note that there is a session for a topic, with this epoch, and count its watchers from now on."""
        topic.epoch = topic.epoch or epoch
        if not (topic.has_session or topic.is_closed):
            topic.has_session = True
            self.watchers.move(topic.session_id, 0, topic.subscriber_count)

    def count_watchers(self, session_id: str) -> Counter[tuple[str, str]]:
        """Return how many watch a session, by protocol and dialect."""
        counts = Counter[tuple[str, str]]()
        if (topic := self._topics.get(session_id)) is not None:
            for encoding, group in topic.groups.items():
                counts[encoding.protocol, encoding.dialect.name] += len(group.members)
        return counts

    def is_watched(self, session_id: str) -> bool:
        """Return whether anybody watches the session now."""
        return session_id in self._topics

    def close(self, session_id: str, final: Message) -> None:
        """Send all subscribers of a session a final message, and end them. Does not wait for that."""
        # Off the table first: a session of the same id that is created now has a topic of its own.
        topic = self._topics.get(session_id)
        if topic is None:
            return
        self._remove(topic)
        topic.is_closed = True
        if topic.has_session:
            topic.has_session = False
            self.watchers.move(session_id, topic.subscriber_count, 0)
        encoded = {encoding: encoding.message(final) for encoding in topic.groups}

        def end(member: Member) -> None:
            if isinstance(member, Subscriber):
                member.end(encoded[member.encoding], reason=final.event or "", why=EndReason.DELETED)
            else:
                member.remove()
                member.bundle.flush(trio.current_time())

        self._nursery.start_soon(visit, topic.members, end)
        self._notify(topic)

    async def visit_subscribers(self, function: Callable[[Subscriber], None]) -> None:
        """Call a function with the subscribers of all clients, and let other tasks run in between."""

        def call(member: Member) -> None:
            if isinstance(member, Subscriber) and member.topic is not None:
                function(member)

        topics = list(self._topics.values())
        while topics:
            # Nothing here holds what ends meanwhile.
            await visit(itertools.chain(*(topics.pop().members for _ in topics[:VISIT])), call)
            await trio.lowlevel.checkpoint()
        await visit(self._bundles, function)

    def subscribers(self) -> list[Subscriber]:
        """Return the subscribers of all clients. It takes a while: see ``visit_subscribers``."""
        members = (member for topic in self._topics.values() for member in topic.members)
        return [member for member in members if isinstance(member, Subscriber)] + [*self._bundles]

    def _discard_if_idle(self, topic: Topic) -> None:
        if topic.is_idle and self._topics.get(topic.session_id) is topic:
            self._remove(topic)
