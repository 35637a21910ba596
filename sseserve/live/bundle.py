"""Several sessions on one stream, with one cursor for all of them: browsers allow six connections a host.

The cursor is that of each session, joined by ``_``; each session's is found by its epoch, so the order does
not matter and sessions may be added: one that the cursor has no place for begins with a snapshot. But if the
cursor has a place that fits no session, one of them may be another log than before, and those without a place
are told ``reset``.

A bundle subscribes to the topic of each of its sessions. An event is encoded once for all bundles; only the
cursors are made for each client. Guarantee: the id of a message names, for each session, what is before it on
the stream, as it is made when the message is passed to the client's subscriber, in that order.

Records, which name their session, are as in the dialect. The data of any other event is wrapped in
``{"session_id": ..., "data": ...}``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Self

import msgspec
import trio

from ..dialects import BundleEncoding, Message
from ..model import Cursor, EndReason, Event, Session, State
from .subscriber import EncodedEvents, Subscriber

__all__ = ["MAX_SESSIONS", "Bundle", "BundledEvents", "Phase", "Subscription", "parse_bundle_cursor"]

MAX_SESSIONS = 50  # in one bundle
MAX_BYTES = 32 * 1024  # that are offered to a client at once, or one event

_TRIED_AGAIN = (State.FAILED, State.LOST)


def parse_bundle_cursor(text: str | None) -> dict[str, str]:
    """Return the cursors that a bundle's is made of, by epoch; those that are not valid are left out."""
    cursors = [Cursor.parse(part) for part in text.split("_")] if text else []
    return {cursor.epoch: str(cursor) for cursor in cursors if cursor is not None}


class BundledEvents(msgspec.Struct, frozen=True):
    """What bundles are sent of one session, without the cursors of the bundles.

    ``parts`` has one item for each of ``events``: its messages up to their id, each with its place in the
    session's log. The place is empty where the cursor stays as it is; None: the message has no id. What is
    not an event is a part whose event is None. ``replaces`` is an epoch whose place is no longer in the
    cursor. ``end`` is the state in which the session has ended with the last event. ``conflatable``
    counts the events that a newer progress may supersede.
    """

    epoch: str
    events: Sequence[Event | None]
    parts: Sequence[Sequence[tuple[bytes, bytes | None]]]
    first_epoch: str = ""
    replaces: str | None = None
    end: State | None = None
    conflatable: int = 0

    @classmethod
    def encode(cls, events: Sequence[Event], encoding: BundleEncoding, session: Session) -> Self:
        """Encode events of one session, in order."""
        epoch = session.epoch
        parts = [
            [encoding.unfinished(session.id, message) for message in messages]
            for messages in (encoding.dialect.messages(session.id, epoch, event) for event in events)
        ]
        progress = events[-1].progress
        end = progress.state if progress is not None and progress.state.terminal else None
        conflatable = sum(event.conflatable for event in events)
        return cls(epoch, events, parts, session.first_epoch, end=end, conflatable=conflatable)

    @classmethod
    def of_messages(
        cls,
        messages: Sequence[Message],
        encoding: BundleEncoding,
        session_id: str,
        epoch: str,
        *,
        replaces: str | None = None,
    ) -> Self:
        """Encode messages of one session that are not events, or not all of an event's."""
        parts = [[encoding.unfinished(session_id, message)] for message in messages]
        return cls(epoch, [None] * len(parts), parts, replaces=replaces)


class Phase(enum.Enum):
    """What a bundle expects of one of its sessions."""

    OPEN = enum.auto()
    FAILED = enum.auto()  # it has ended, but may be tried again
    OVER = enum.auto()  # it has ended, or is gone


class Subscription:
    """One session of a bundle, on the session's topic. What it is offered waits in the bundle's queue.

    ``seq`` is where it joined; ``epoch`` and ``first_epoch`` are the session's, once it has been read.
    """

    __slots__ = ("bundle", "epoch", "first_epoch", "live", "phase", "seq", "session_id", "topic")

    def __init__(self, bundle: Bundle, session_id: str) -> None:
        self.bundle = bundle
        self.session_id = session_id
        self.topic: object | None = None  # the broker's Topic
        self.seq = 0
        self.live = False
        self.phase = Phase.OPEN
        self.epoch: str | None = None
        self.first_epoch = ""

    def __repr__(self) -> str:
        return f"<Subscription to {self.session_id!r} {self.phase.name} seq={self.seq} live={self.live}>"

    @property
    def encoding(self) -> BundleEncoding:
        """That of its bundle."""
        return self.bundle.encoding

    @property
    def ending(self) -> bool:
        """Whether nothing is accepted any more."""
        return self.phase is Phase.OVER or self.bundle.client.ending

    def offer(self, encoded: BundledEvents) -> None:
        """Queue events until the next ``Bundle.flush``."""
        if self.epoch is None:  # there was no session yet
            self.epoch, self.first_epoch = encoded.epoch, encoded.first_epoch
        self.bundle.queue(encoded)
        if encoded.end is not None:
            self.finish(encoded.end)

    def finish(self, state: State) -> None:
        """Note that the session has ended; its last event is queued."""
        self._leave(Phase.FAILED if state in _TRIED_AGAIN else Phase.OVER)

    def remove(self) -> None:
        """Tell the client that the session was deleted, unless it has ended before."""
        was_open = self.phase is Phase.OPEN
        self._leave(Phase.OVER)
        if was_open:
            self.bundle.tell_deleted(self)

    def _leave(self, phase: Phase) -> None:
        if self.phase is Phase.OPEN:
            self.bundle.open_sessions -= 1
        self.phase = phase
        if phase is Phase.OVER:
            self.live = False

    def cut(self, reason: str, why: EndReason) -> None:
        """Cut the client: events of this session may be missing."""
        self.bundle.client.cut(reason, why)

    def resume(self) -> None:
        """Have the log read from the client's place on: what follows was not delivered to this topic."""
        if self.live:
            self.bundle.flush(trio.current_time())
            self.seq = self.bundle.seq(self)
            self.live = False
            self.bundle.rejoin.set()

    def reopen(self) -> None:
        """Expect events again: the session that had failed is tried again."""
        if self.phase is Phase.FAILED:
            self.phase = Phase.OPEN
            self.bundle.open_sessions += 1


class Bundle:
    """What one client watches on one stream, and where it is in each of the sessions.

    Args:
        client: is sent the events.
        session_ids: the sessions.
        cursor: the joined one that the client resumes from.
    """

    __slots__ = (
        "_deleted",
        "_index",
        "_places",
        "_queue",
        "client",
        "encoding",
        "has_read_all",
        "is_scheduled",
        "open_sessions",
        "rejoin",
        "sent",
        "subscriptions",
    )

    def __init__(self, client: Subscriber, session_ids: Sequence[str], cursor: str | None) -> None:
        self.client = client
        self.encoding = BundleEncoding.of(client.encoding.dialect)
        self.subscriptions = [Subscription(self, session_id) for session_id in session_ids]
        self.open_sessions = len(self.subscriptions)
        self.has_read_all = False  # the places of the client's cursor have been compared with the logs
        self.is_scheduled = False  # ``flush`` is called soon
        self.rejoin = trio.Event()  # a session is to be read again
        self.sent = 0  # messages, also those that wait in the client's buffer
        # The parts of the cursor, and which of them is the place in the log of which epoch.
        self._places: list[bytes] = []
        self._index: dict[str, int] = {}
        for epoch, place in parse_bundle_cursor(cursor).items():
            self._set_place(epoch, place.encode())
        self._deleted: list[Subscription] = []  # the client is told when all logs have been read
        self._queue: list[BundledEvents] = []

    def __repr__(self) -> str:
        return (
            f"<Bundle of {len(self.subscriptions)} sessions, {self.open_sessions} open, for {self.client!r}>"
        )

    def seq(self, subscription: Subscription) -> int:
        """Return where the client is in the log of a session, before what is queued."""
        index = self._index.get(subscription.epoch or "")
        cursor = None if index is None else Cursor.parse(self._places[index].decode())
        return subscription.seq if cursor is None else cursor.complete_seq

    def _set_place(self, epoch: str, place: bytes) -> None:
        if (index := self._index.get(epoch)) is None:
            self._index[epoch] = len(self._places)
            self._places.append(place)
        else:
            self._places[index] = place

    def _remove_place(self, epoch: str) -> None:
        if (index := self._index.pop(epoch, None)) is not None:
            del self._places[index]
            self._index = {other: at - (at > index) for other, at in self._index.items()}

    def queue(self, encoded: BundledEvents) -> None:
        """Have ``flush`` send something. The queue is bounded by who calls it."""
        self._queue.append(encoded)

    def tell_deleted(self, subscription: Subscription) -> None:
        """Queue what the client is told of a session that is gone, once all logs have been read."""
        if not self.has_read_all:
            self._deleted.append(subscription)
            return
        messages = [Message("deleted", b"{}", id="")]
        epoch = subscription.epoch or ""
        self.queue(
            BundledEvents.of_messages(
                messages, self.encoding, subscription.session_id, epoch, replaces=subscription.epoch
            )
        )

    def note_read_all(self) -> None:
        """Note that all logs have been read once: places that fit none of them are of no use any more."""
        self.has_read_all = True
        epochs = {s.epoch for s in self.subscriptions if s not in self._deleted}
        for epoch in self._index.keys() - epochs:
            self._remove_place(epoch)
        deleted, self._deleted = self._deleted, []
        for subscription in deleted:
            self.tell_deleted(subscription)

    def take_queued(self) -> list[EncodedEvents]:
        """Take what is queued, with the cursors that it has when it is sent at once."""
        queue, self._queue = self._queue, []
        taken: list[EncodedEvents] = []
        events: list[Event | None] = []
        parts: list[bytes] = []
        epochs: list[str] = []
        size = conflatable = 0
        for encoded in queue:
            if encoded.replaces is not None:
                self._remove_place(encoded.replaces)
            for messages in encoded.parts:
                part = b""
                for message, place in messages:
                    if place is None:
                        part += message + b"\n"
                        continue
                    if place:
                        self._set_place(encoded.epoch, place)
                    part += b"%bid: %b\n\n" % (message, b"_".join(self._places))
                parts.append(part)
                size += len(part)
            events += encoded.events
            epochs += [encoded.epoch] * len(encoded.events)
            conflatable += encoded.conflatable
            if size >= MAX_BYTES:
                taken.append(self._complete(events, parts, epochs, conflatable))
                events, parts, epochs, size, conflatable = [], [], [], 0, 0
        if parts:
            taken.append(self._complete(events, parts, epochs, conflatable))
        return taken

    def _complete(
        self, events: list[Event | None], parts: list[bytes], epochs: list[str], conflatable: int
    ) -> EncodedEvents:
        self.sent += len(parts)
        data = self.client.encoding.chunk(b"".join(parts))
        return EncodedEvents(events, parts, data, conflatable, epochs)

    def flush(self, now: float) -> None:
        """Offer the client what is queued, and end it after its last session. Does not wait.

        Does nothing before the client is live: what is queued is sent then, and after the response's head.

        Args:
            now: the time on Trio's clock, in seconds.
        """
        if not self.client.live:
            return
        if self._queue:
            deliveries = self.client.broker.deliveries
            for encoded in self.take_queued():
                buffered = deliveries.buffered
                self.client.offer(encoded)
                if (oldest := encoded.events[0]) is not None and buffered == deliveries.buffered:
                    deliveries.count(oldest)
            self.client.last_sent_at = now
        self.end_if_complete()

    def end_if_complete(self) -> None:
        """End the client if nothing more will come of any session."""
        if not self.open_sessions and self.has_read_all and not self._queue:
            self.client.end()
