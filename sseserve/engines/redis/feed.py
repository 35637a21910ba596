"""Delivers what any instance appends: in order, once, and without a gap.

An instance knows for each session that it follows the place up to which it has delivered. Its own appends
and the messages of the session's channel are delivered if they continue at this place, and dropped if they
are before it. Anything else means that something is missing: it is read from the log. What cannot be
read there, because it was trimmed or the log is another one, is a ``resync``.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

import msgspec
import trio

from ...errors import EngineUnavailable
from ...model import Event, Session
from ..base import ALL, EngineListener
from .client import RedisClient
from .messages import Appended, Renewed, decode_message
from .places import Delivery, Place, Reading
from .scripts import ChannelNames
from .subscriptions import Subscriptions

__all__ = ["Feed"]

LINGER = 5.0  # seconds for which a channel stays subscribed to: whoever polls comes back
FOLLOW_TIMEOUT = 3.0  # seconds
MAX_HELD = 1000  # messages of a session that wait for what comes before them
MAX_PLACES = 10_000  # of sessions that are followed because all are
PAGE = 128  # events that are read at once
MAX_READING = 64  # sessions that are read at once
MISSING = 5.0  # seconds after which a log is taken for deleted
RETRY = 0.2  # seconds until what could not be read is read again
REPORT_INTERVAL = 60.0  # seconds between two warnings that others use the channels of this engine

log = logging.getLogger(__name__)
_replace = msgspec.structs.replace


class Feed:
    """See the module.

    Args:
        client: of the Redis.
        listener: gets what is delivered.
        instance: the name of this instance, which is in its messages.
        read: reads a page of a log.
        is_under_way: returns whether this instance is appending to a session.
        on_record: is called with each record that another instance has stored, and its nonce.
        on_change: is called with a session that was deleted, or whose log has another epoch.
        on_loss: is called with a session, and the epoch, ``seq`` and nonce of an event that was delivered and
            is not in the log any more. It renews the epoch.
    """

    def __init__(
        self,
        client: RedisClient,
        listener: EngineListener,
        instance: str,
        *,
        read: Callable[[str, int, int], Awaitable[Reading | None]],
        is_under_way: Callable[[str], bool],
        on_record: Callable[[Session, str], None],
        on_change: Callable[[str], None],
        on_loss: Callable[[str, str, int, str], Awaitable[None]],
    ) -> None:
        self._client = client
        self._listener = listener
        self._instance = instance
        self._read = read
        self._is_under_way = is_under_way
        self._on_record = on_record
        self._on_change = on_change
        self._on_loss = on_loss
        self._reading = trio.CapacityLimiter(MAX_READING)
        self._nursery: trio.Nursery | None = None
        self._places: dict[str, Place] = {}  # of the sessions that are followed, or were until recently
        self._other_places: OrderedDict[str, Place] = OrderedDict()  # of others, while all are followed
        self._all = Place()
        self._channels = ChannelNames(client.address.db)
        self._ids: dict[str, str] = {}  # by channel
        self._reported_at = -math.inf
        self.subscriptions = Subscriptions(client, self._receive, self._on_subscribed, self._on_lost)

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self.subscriptions.run)
            try:
                while True:
                    await trio.sleep(LINGER / 2)
                    self._forget_unfollowed()
            finally:
                self._nursery = None  # an append that is over later has nobody to deliver to

    # Following

    def follow(self, session_id: str) -> None:
        """Begin to deliver a session, or ``ALL``."""
        if session_id == ALL:
            self._all.is_followed = True
            if self._client.is_cluster:
                self.subscriptions.add(self._channels.all)
            else:
                self.subscriptions.add(self._channels.pattern, pattern=True)
            return
        place = self._places.get(session_id)
        if place is None:
            place = self._places[session_id] = Place()
            name = self._channels.of(session_id)
            self._ids[name] = session_id
            self.subscriptions.add(name, sharded=True)
        elif not place.is_followed and not place.ready.is_set():
            place.is_known = False  # nobody has been told anything yet
        place.is_followed = True

    def unfollow(self, session_id: str) -> None:
        """End that."""
        if session_id == ALL:
            self._all = Place()
            self._other_places.clear()
            self.subscriptions.remove(self._channels.all)
            self.subscriptions.remove(self._channels.pattern)
        elif (place := self._places.get(session_id)) is not None:
            place.is_followed = False
            place.unfollowed_at = trio.current_time()

    def _forget_unfollowed(self) -> None:
        until = trio.current_time() - LINGER
        for session_id, place in list(self._places.items()):
            if not place.is_followed and place.unfollowed_at <= until:
                name = self._channels.of(session_id)
                del self._places[session_id], self._ids[name]
                self.subscriptions.remove(name)

    async def wait_followed(self, session_id: str) -> None:
        """Wait until everything that is appended to a session from now on is delivered."""
        place = self._all if session_id == ALL else self._places.get(session_id)
        if place is None:
            raise RuntimeError(f"the session {session_id!r} is not followed")
        if place.ready.is_set():
            return
        with trio.move_on_after(FOLLOW_TIMEOUT):
            await place.ready.wait()
            return
        raise EngineUnavailable(self._client.problem or "Redis did not subscribe in time; try again")

    # Delivering

    def append(
        self,
        session: Session,
        events: Sequence[Event],
        replaces: str | None,
        nonce: str,
        after: tuple[int, str],
    ) -> None:
        """Deliver what this instance has appended; ``after`` is the event before, ``seq`` and nonce."""
        place = self._place(session.id)
        if place is None:
            self._listener.deliver(session, events)
            return
        first = session.seq - len(events) + 1
        delivery = Delivery(
            session.epoch,
            first,
            session.seq,
            replaces or "",
            nonce,
            after,
            lambda: (session, events),
            is_own=True,
        )
        self._offer(session.id, place, delivery)

    def read_on(self, session_id: str) -> None:
        """Find out whether an append has been stored that was not confirmed."""
        place = self._places.get(session_id) or self._other_places.get(session_id)
        if place is not None and place.is_known:
            place.must_read = True
            self._catch_up_soon(session_id, place)

    def remove(self, session_id: str, epoch: str) -> None:
        """Take note that this instance has deleted a session."""
        place = self._places.get(session_id) or self._other_places.get(session_id)
        if place is not None and place.epoch == epoch:
            place.move(None, 0, "")

    def _place(self, session_id: str) -> Place | None:
        """Return the place in a session whose events are to be delivered in order; None: in any order."""
        place = self._places.get(session_id)
        if place is None and self._all.is_followed:
            place = self._other_places.get(session_id)
            if place is None:
                place = self._other_places[session_id] = Place()
                if len(self._other_places) > MAX_PLACES:
                    self._other_places.popitem(last=False)
            else:
                self._other_places.move_to_end(session_id)
        return place

    def _receive(self, name: str, payload: bytes) -> None:
        """Take a message of a channel."""
        try:
            message = decode_message(payload)
        except msgspec.DecodeError:
            self._report_foreign_message(name, payload)
            return
        place = self._place(message.id)
        if place is None:
            return
        if isinstance(message, Appended):
            is_own = message.instance == self._instance
            if is_own and not message.record and self._is_under_way(message.id):
                return  # it is delivered when it is confirmed
            delivery = Delivery(
                message.epoch,
                message.first,
                message.last,
                message.replaces,
                message.nonce,
                (message.after, message.after_nonce),
                message.content,
                is_own=is_own,
            )
            self._offer(message.id, place, delivery)
        elif isinstance(message, Renewed):
            self._on_change(message.id)
            if place.epoch == message.former:
                place.move(message.epoch, message.seq, message.nonce)
                self._resync(message.id, place)
        elif message.instance != self._instance:
            self._on_change(message.id)
            if not place.is_known or place.epoch == message.epoch:
                place.move(None, 0, "")
                if self._is_wanted(place):
                    self._listener.removed(_replace(message.record, epoch=message.epoch), own=False)

    def _report_foreign_message(self, name: str, payload: bytes) -> None:
        now = trio.current_time()
        level = logging.WARNING if now >= self._reported_at + REPORT_INTERVAL else logging.DEBUG
        log.log(level, "a message on the Redis channel %s is not one of sseserve: %.100r", name, payload)
        if level == logging.WARNING:
            self._reported_at = now

    def _is_wanted(self, place: Place) -> bool:
        return place.is_followed or self._all.is_followed

    def _resync(self, session_id: str, place: Place) -> None:
        if self._is_wanted(place):
            self._listener.resync(session_id)

    def _offer(self, session_id: str, place: Place, delivery: Delivery) -> None:
        """Deliver an append if it is the next; otherwise read what is missing."""
        if not place.is_catching_up and self._deliver(place, delivery):
            return
        place.held.append(delivery)
        if len(place.held) > MAX_HELD:
            del place.held[:-1]  # the last one shows that something is missing
        self._catch_up_soon(session_id, place)

    def _deliver(self, place: Place, delivery: Delivery) -> bool:
        """Deliver an append if it is the next; returns False if something is missing before it."""
        if place.is_past(delivery):
            return True
        if place.is_known and not place.is_before(delivery):
            return False
        content = delivery.content()
        if content is None:
            if not place.is_known:  # what follows it was not delivered here
                epoch = delivery.replaces or (None if delivery.first == 1 else delivery.epoch)
                place.move(epoch, *delivery.after)
            return False
        place.move(delivery.epoch, delivery.last, delivery.nonce)
        if not delivery.is_own:
            self._on_record(content[0], delivery.nonce)
            self._listener.received(content[1])
        if delivery.is_own or self._is_wanted(place):
            self._listener.deliver(*content)
        return True

    # Catching up

    def _catch_up_soon(self, session_id: str, place: Place) -> None:
        if not place.is_catching_up and self._nursery is not None:
            place.is_catching_up = True
            self._nursery.start_soon(self._catch_up, session_id, place)

    async def _catch_up(self, session_id: str, place: Place) -> None:
        """Deliver what is held back, and what is missing before it."""
        # Responses to appends of this instance may be told in another order than that of the log.
        await trio.lowlevel.checkpoint()
        is_reported = False
        while not self._release(place) or place.must_read:
            place.must_read = False
            # All that is held back now is in the log, so it is read too.
            held, place.held = place.held, []
            try:
                async with self._reading:
                    await self._read_on(session_id, place)
            except EngineUnavailable as error:
                if place not in (self._places.get(session_id), self._other_places.get(session_id)):
                    return  # it is not followed any more
                if self._client.problem is None and not is_reported:
                    is_reported = True
                    log.warning("the session %s cannot be read, trying again: %s", session_id, error)
                place.held, place.must_read = held + place.held, True
                await trio.sleep(RETRY)
        place.is_catching_up = False
        if self.subscriptions.is_subscribed(self._channels.of(session_id)):
            place.ready.set()

    def _release(self, place: Place) -> bool:
        """Deliver what is held back and is the next; returns whether that was all."""
        place.held.sort(key=lambda delivery: delivery.first)
        before = None
        while place.held and len(place.held) != before:
            before = len(place.held)
            place.held = [delivery for delivery in place.held if not self._deliver(place, delivery)]
        return not place.held

    async def _read_on(self, session_id: str, place: Place) -> None:
        """Deliver what the log has after the place."""
        while True:
            reading = await self._read(session_id, place.seq, PAGE if self._is_wanted(place) else 0)
            if reading is None:
                self._note_missing_log(session_id, place)
                return
            session, events = reading.page.session, reading.page.events
            if not place.is_known:
                place.move(session.epoch, session.seq, reading.nonce)
            elif place.epoch is None and reading.page.first == 1:
                place.move(session.epoch, 0, "")
            elif session.epoch != place.epoch or reading.page.first > place.seq + 1:
                place.move(session.epoch, session.seq, reading.nonce)
                self._resync(session_id, place)
            elif (place.seq and reading.nonce_before not in (place.nonce, "")) or session.seq < place.seq:
                await self._on_loss(session_id, place.epoch, place.seq, place.nonce)
            elif events:
                place.move(session.epoch, events[-1].seq, reading.nonces[-1])
                self._on_record(session, reading.nonce)
                self._listener.deliver(session, events)
            else:
                place.move(session.epoch, session.seq, reading.nonce)
            if (place.epoch, place.seq) == (session.epoch, session.seq):
                return

    def _note_missing_log(self, session_id: str, place: Place) -> None:
        """Take note of a log that was deleted, or that Redis has lost: publishers soon begin another one."""
        epoch = place.epoch
        if epoch is None or self._nursery is None:
            place.move(None, 0, "")
            return

        async def end() -> None:
            await trio.sleep(MISSING)
            with suppress(EngineUnavailable):  # then it is read again when Redis is back
                if await self._read(session_id, 0, 0) is None and place.epoch == epoch:
                    place.move(None, 0, "")
                    self._resync(session_id, place)

        self._nursery.start_soon(end)

    def _on_subscribed(self, names: Collection[str]) -> None:
        """Find out what was appended before the channels were subscribed to."""
        for name in names:
            if (session_id := self._ids.get(name)) is not None:
                place = self._places[session_id]
                place.must_read = True
                self._catch_up_soon(session_id, place)
            else:
                if self._all.is_known:
                    self._other_places.clear()
                    self._listener.resync(ALL)
                self._all.is_known = True
                self._all.ready.set()

    def reopen(self) -> None:
        """Subscribe again, and find out what was appended meanwhile."""
        self._on_lost()
        self.subscriptions.reopen()

    async def wait_caught_up(self) -> None:
        """Wait until everything is delivered that was appended to what is followed."""
        for place in [self._all, *self._places.values()]:
            if place.is_followed:
                await place.ready.wait()

    def _on_lost(self) -> None:
        for place in (self._all, *self._places.values()):
            if place.ready.is_set():
                place.ready = trio.Event()
