"""Brings a client of several sessions from its cursor to the live end of their logs; see ``resume``.

The sessions go live together once all logs have been read, but for those to which something was published
meanwhile; these are read on. One whose log is another one than before is read again: if it had failed and is
tried again, or has lost events, the client is told ``reset`` and gets a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import trio

from ..dialects import Message
from ..engines import Engine, Page
from ..model import Cursor, Session
from .broker import Broker
from .bundle import Bundle, BundledEvents, Phase, Subscription, parse_bundle_cursor
from .resume import PAGE, PAGE_BYTES, ResumeResult, evaluate_cursor, first_messages, read_when_available
from .subscriber import Subscriber
from .topic import Topic

__all__ = ["join_bundle"]


async def join_bundle(
    engine: Engine,
    broker: Broker,
    client: Subscriber,
    session_ids: Sequence[str],
    cursor: str | None,
    *,
    visible: Callable[[Session], bool] | None = None,
) -> None:
    """Send a client several sessions, until it is cancelled or the client has ended.

    Args:
        engine: has the logs.
        broker: has the topics.
        client: is subscribed to nothing yet; it is ended after the last of the sessions.
        session_ids: the sessions, each once.
        cursor: the joined one that the client resumes from; None: it gets snapshots first.
        visible: as for ``resume.join``.

    Raises:
        trio.TooSlowError, trio.BrokenResourceError: see ``Subscriber.send``.
    """
    if client.ending:
        return  # the client left before we began
    broker.resumed += cursor is not None
    bundle = Bundle(client, session_ids, cursor)
    broker.add_bundle(bundle)
    await _BundleJoin(engine, broker, bundle, visible).run(cursor)


class _BundleJoin:
    def __init__(
        self, engine: Engine, broker: Broker, bundle: Bundle, visible: Callable[[Session], bool] | None
    ) -> None:
        self._engine = engine
        self._broker = broker
        self._bundle = bundle
        self._visible = visible
        self._cursors: dict[str, str] = {}  # of the sessions that the client resumes, by their id
        self._size = 0  # bytes that are queued, about

    async def run(self, cursor: str | None) -> None:
        bundle = self._bundle
        if cursor is not None:
            await self._compare(cursor)
        while not bundle.client.ending:
            bundle.rejoin = trio.Event()
            await self._join()
            await bundle.rejoin.wait()

    async def _compare(self, cursor: str) -> None:
        """Find the places of the client's cursor that are those of the sessions."""
        epochs: dict[str, str] = {}
        for subscription in self._bundle.subscriptions:
            page = await self._read_page(subscription, 0, 0)
            if page is not None:
                epochs[subscription.session_id] = page.session.epoch
        known = set(epochs.values())
        places = [Cursor.parse(place) for place in cursor.split("_")]
        is_complete = all(place is not None and place.epoch in known for place in places)
        cursors = parse_bundle_cursor(cursor)
        for session_id, epoch in epochs.items():
            if epoch in cursors:
                self._cursors[session_id] = cursors[epoch]
            elif not is_complete:
                self._cursors[session_id] = "unknown"

    async def _read_page(self, subscription: Subscription, after: int, limit: int) -> Page | None:
        client, session_id = self._bundle.client, subscription.session_id
        return await read_when_available(
            self._engine, self._broker, client, subscription, session_id, after, limit
        )

    async def _join(self) -> None:
        """Read the logs of the sessions that are not live, and make them live."""
        bundle = self._bundle
        while waiting := [s for s in bundle.subscriptions if not (s.live or s.phase is Phase.OVER)]:
            topics: dict[Subscription, Topic] = {}
            for subscription in waiting:
                self._broker.move_to_current(subscription)
                topic = await self._read(subscription)
                if topic is not None:
                    topics[subscription] = topic
                # What comes of the other sessions is sent after what is queued.
                if self._size >= PAGE_BYTES or bundle.client.live:
                    await self._send()
                await trio.lowlevel.checkpoint()
            if bundle.client.ending:
                return
            # Nothing waits from here until the subscriptions are live.
            for subscription, topic in topics.items():
                is_current = subscription.topic is topic and topic.position <= subscription.seq
                subscription.live = is_current and subscription.phase is not Phase.OVER
            if bundle.client.live:
                bundle.flush(trio.current_time())
            else:
                bundle.note_read_all()
                bundle.client.live = True
                bundle.client.write_first(self._take())
                bundle.end_if_complete()

    async def _read(self, subscription: Subscription) -> Topic | None:
        """Queue what a log holds after the client's place; returns its topic, None if the session is gone."""
        bundle, dialect, session_id = self._bundle, self._bundle.encoding.dialect, subscription.session_id
        is_first, cursor = subscription.epoch is None, self._cursors.pop(subscription.session_id, None)
        if subscription.epoch is not None:
            cursor = str(Cursor(subscription.epoch, subscription.seq))
        while True:
            place = Cursor.parse(cursor) if cursor else None
            after = place.complete_seq if place else 0
            page = await self._read_page(subscription, after, PAGE if cursor else 0)
            topic = subscription.topic
            if subscription.ending or not isinstance(topic, Topic):
                return None
            if page is None and dialect.waits_for_session and is_first and not topic.is_closed:
                if cursor:
                    self._broker.resumes["reset"] += 1
                    resume = Message("resume", msgspec.json.encode(ResumeResult("reset", 0)))
                    self._queue(BundledEvents.of_messages([resume], bundle.encoding, session_id, ""))
                return topic
            if page is None or topic.is_closed or not self._continues(subscription, page.session):
                subscription.remove()
                return None
            session = page.session
            if subscription.phase is Phase.FAILED:
                if session.epoch == subscription.epoch:
                    return topic
                subscription.reopen()
            self._broker.note_session(topic, session.epoch)
            result, start = evaluate_cursor(cursor, session, page.first)
            if is_first and result is not None:
                self._broker.resumes[result.status] += 1
            elif result is not None and result.status == "ok":
                result = None
            messages = first_messages(dialect, page, result, start, cursor)
            replaces = None if subscription.epoch == session.epoch else subscription.epoch
            self._queue(
                BundledEvents.of_messages(
                    messages, bundle.encoding, session_id, session.epoch, replaces=replaces
                )
            )
            is_first = False
            subscription.epoch, subscription.first_epoch = session.epoch, session.first_epoch
            subscription.seq = session.seq if start is None or not page.events else page.events[-1].seq
            if subscription.seq >= session.seq:
                if session.ended:
                    assert session.progress is not None
                    subscription.finish(session.progress.state)
                return topic
            cursor = str(Cursor(session.epoch, subscription.seq))
            await self._send()

    def _continues(self, subscription: Subscription, session: Session) -> bool:
        """Whether this is the session that the client watches, and it may watch it."""
        is_same = subscription.epoch is None or session.first_epoch == subscription.first_epoch
        return is_same and (self._visible is None or self._visible(session))

    def _queue(self, encoded: BundledEvents) -> None:
        self._bundle.queue(encoded)
        self._size += sum(len(message) for part in encoded.parts for message, _ in part)

    def _take(self) -> bytes:
        self._size = 0
        return b"".join([encoded.data for encoded in self._bundle.take_queued()])

    async def _send(self) -> None:
        """Send what is queued: to a client that is not live yet at its pace."""
        client = self._bundle.client
        if client.live:
            # Within the bounds, after what waits: of that nothing is kept if the client is cut.
            self._bundle.flush(trio.current_time())
        elif data := self._take():
            data, client.head = client.head + data, b""
            await client.send(data)
