"""From a cursor to the live end of a log: the resume rules, the same for every transport.

Subscribe, then replay, then go live. Between the last read of the log and going live no other task runs,
and a batch whose fan-out began in between is noticed by the topic's position. So no event is missing,
doubled or reordered, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import trio

from ..dialects import Dialect, Message
from ..engines import Engine, Page
from ..errors import SessionNotFound, Unavailable
from ..model import Cursor, EndReason, Event, Session
from .broker import Broker
from .replays import Place, Replay
from .subscriber import Subscriber
from .topic import Member, Topic

__all__ = [
    "PAGE",
    "PAGE_BYTES",
    "History",
    "ResumeResult",
    "deleted_message",
    "evaluate_cursor",
    "first_messages",
    "is_complete",
    "join",
    "read_history",
    "read_page",
    "read_when_available",
]

PAGE = 128  # events of one write of a replay
PAGE_BYTES = 64 * 1024  # and about as many bytes
EPOCH_TIMEOUT = 1.0  # seconds to wait for what is delivered to reach the log that was read


class ResumeResult(msgspec.Struct, frozen=True):
    """How resuming from a cursor went.

    ``missed`` counts the events after the cursor that are not sent: none if ``ok``. After a ``gap`` (the log
    no longer reaches back) and a ``reset`` (it is another log) the current snapshot follows.
    """

    status: Literal["ok", "gap", "reset"]
    missed: int


class History(msgspec.Struct, frozen=True):
    """A part of a log as messages; ``next`` is the cursor after it, ``end`` says that nothing follows."""

    resume: ResumeResult | None
    messages: list[Message]
    next: str
    end: bool


def is_complete(session: Session, cursor: str | None) -> bool:
    """Return whether a watcher with this cursor has seen everything that there will ever be."""
    return session.ended and cursor == str(session.cursor)


def evaluate_cursor(text: str | None, session: Session, first: int) -> tuple[ResumeResult | None, int | None]:
    """Compare a cursor with a log that is kept from the event ``first`` on.

    Returns how resuming goes (None without a cursor), and the ``seq`` to continue after (None: begin with a
    snapshot).
    """
    if not text:
        return None, None
    cursor = Cursor.parse(text)
    if cursor is None or cursor.epoch != session.epoch or cursor.seq > session.seq:
        return ResumeResult("reset", session.seq), None
    if cursor.complete_seq + 1 < first:
        return ResumeResult("gap", session.seq - cursor.complete_seq), None
    return ResumeResult("ok", 0), cursor.complete_seq


def _after(text: str | None) -> int:
    cursor = Cursor.parse(text) if text else None
    return 0 if cursor is None else cursor.complete_seq


def _messages(
    dialect: Dialect, session: Session, events: list[Event], cursor: Cursor | None = None
) -> list[Message]:
    """Render events, without those messages of the first event that are before a cursor within it."""
    messages = [m for event in events for m in dialect.messages(session.id, session.epoch, event)]
    if cursor is not None and cursor.part and events and events[0].seq == cursor.seq:
        first = dialect.messages(session.id, session.epoch, events[0])
        # The cursor may be of another dialect, which has more messages for it: send the whole event.
        if cursor.part < len(first):
            return messages[cursor.part :]
    return messages


def first_messages(
    dialect: Dialect, page: Page, result: ResumeResult | None, after: int | None, cursor: str | None
) -> list[Message]:
    """Return what a watcher gets first: how resuming went, then the events after its cursor or a snapshot."""
    messages = [] if result is None else [Message("resume", msgspec.json.encode(result))]
    if after is None:
        if not (snapshot := dialect.snapshot(page.session)) and messages:
            messages = [msgspec.structs.replace(messages[0], id=str(page.session.cursor))]
        return messages + snapshot
    return messages + _messages(
        dialect, page.session, page.events, None if cursor is None else Cursor.parse(cursor)
    )


async def read_page(
    engine: Engine, session_id: str, after: int, limit: int, max_bytes: int = PAGE_BYTES
) -> Page | None:
    """Read what one write may hold: ``limit`` events, and about ``max_bytes`` of them, but always one."""
    page = await engine.read(session_id, after, limit)
    if page is None:
        return None
    size = 0
    for number, event in enumerate(page.events):
        size += event.weight
        if size > max_bytes and number:
            return msgspec.structs.replace(page, events=page.events[:number])
    return page


async def read_when_available(
    engine: Engine,
    broker: Broker,
    client: Subscriber,
    subscriber: Member,
    session_id: str,
    after: int,
    limit: int,
) -> Page | None:
    """Read a page after which all events are delivered to the subscriber's topic; None once it has ended.

    What the client, which is the subscriber or has it in its bundle, is told of the engine is up to date on
    return.
    """
    while not subscriber.ending:
        topic = subscriber.topic
        try:
            await engine.wait_followed(session_id)
            page = await read_page(engine, session_id, after, limit)
        except Unavailable as error:
            broker.tell_availability(client, broker.availability.problem or str(error))
            await broker.availability.wait()
            continue
        broker.tell_availability(client, broker.availability.problem)
        if subscriber.topic is not topic:
            # The log is another one now, or was read before events that were not delivered.
            await trio.lowlevel.checkpoint()
        elif page is None or not isinstance(topic, Topic) or topic.epoch in (None, page.session.epoch):
            return page
        else:
            # The log is another one, which the topic learns when what is before it has been delivered.
            with broker.wakeup(session_id) as wakeup, trio.move_on_after(EPOCH_TIMEOUT):
                await wakeup.wait()
    return None


async def join(
    engine: Engine,
    broker: Broker,
    subscriber: Subscriber,
    session_id: str,
    cursor: str | None,
    *,
    replay: bool = False,
    visible: Callable[[Session], bool] | None = None,
) -> None:
    """Bring a subscriber up to the end of the log and make it live.

    Args:
        engine: has the log.
        broker: has the topic.
        subscriber: is not on a topic yet.
        session_id: the session.
        cursor: where the client resumes; None: it gets a snapshot first.
        replay: without a cursor, send the log from its beginning instead of a snapshot.
        visible: whether the client may watch the session that is read: it may be another one than the one
            for which that was checked. None: it may watch all.

    A long replay is sent a page at a time, at the client's pace. While the engine is unavailable the client
    is told so and waits.

    Raises:
        trio.TooSlowError, trio.BrokenResourceError: see ``Subscriber.send``.
    """
    if subscriber.ending:
        return  # the client left before we began
    broker.resumed += cursor is not None
    broker.subscribe(session_id, subscriber)
    encoding, replays = subscriber.encoding, broker.replays
    started = False
    while True:
        place = Place(encoding, session_id, cursor, started, replay)
        prepared = replays.get(place)
        limit = PAGE if prepared is None and (cursor or replay) else 0
        page = await read_when_available(
            engine, broker, subscriber, subscriber, session_id, _after(cursor), limit
        )
        # Nothing waits from here until the subscriber is live.
        topic = subscriber.topic
        if not isinstance(topic, Topic):
            return  # it was ended while the engine read
        if page is None and encoding.dialect.waits_for_session and not (started or topic.is_closed):
            if topic.position:
                await trio.lowlevel.checkpoint()
                continue  # the session was created while the engine read
            resume = Message("resume", msgspec.json.encode(ResumeResult("reset", 0)))
            broker.resumes["reset"] += bool(cursor)
            subscriber.write_first(encoding.message(resume) if cursor else b"")
            subscriber.live = True
            return
        if page is None or topic.is_closed or not (visible is None or visible(page.session)):
            deleted = encoding.message(deleted_message())
            subscriber.end(deleted, reason="deleted", why=EndReason.DELETED)
            return
        session = page.session
        broker.note_session(topic, session.epoch)
        if prepared is None or not prepared.holds_for(session):
            if prepared is not None and (cursor or replay):
                replays.discard(place)
                continue  # the events have not been read
            prepared = _prepare(place, page)
            replays.put(place, prepared)
        subscriber.sent += prepared.count
        if prepared.resume is not None and not started:
            broker.resumes[prepared.resume] += 1
        if prepared.seq >= session.seq and prepared.seq >= topic.position:
            subscriber.seq = prepared.seq
            subscriber.write_first(prepared.data)
            subscriber.live = True
            if session.ended:
                subscriber.end()
            return
        out, subscriber.head = subscriber.head + prepared.data, b""
        if out:
            await subscriber.send(out)
        started, cursor = True, str(Cursor(session.epoch, prepared.seq))


def _prepare(place: Place, page: Page) -> Replay:
    """Encode what a client that is at a place is sent of the page behind it."""
    session, cursor, started = page.session, place.cursor, place.started
    if place.replay and not cursor:
        cursor, started = str(Cursor(session.epoch, page.first - 1)), True
    result, after = evaluate_cursor(cursor, session, page.first)
    if started and result is not None and result.status == "ok":
        result = None
    data = place.encoding.join(first_messages(place.encoding.dialect, page, result, after, cursor))
    status = None if result is None else result.status
    if after is None:
        return Replay(session, data, session.seq, 1, status)
    seq = page.events[-1].seq if page.events else after
    return Replay(session, data, seq, len(page.events), status)


def deleted_message() -> Message:
    """Return the final message of a session that was deleted."""
    return Message("deleted", b"{}")


async def read_history(
    engine: Engine,
    broker: Broker,
    dialect: Dialect,
    session_id: str,
    *,
    after: str | None,
    limit: int,
    max_bytes: int,
    wait: float,
    stopping: trio.Event,
    visible: Callable[[Session], bool] | None = None,
) -> History:
    """Return the events after a cursor: at once if there are any, else when one comes or time is over.

    Args:
        engine: has the log.
        broker: knows when something is published.
        dialect: renders the events.
        session_id: the session.
        after: the cursor; None: begin where the log does, and do not wait.
        limit: at most that many events.
        max_bytes: about that many bytes of them, but always one.
        wait: seconds to wait for an event.
        stopping: ends the wait when it is set.
        visible: as for ``join``.

    Raises:
        SessionNotFound: there is no such session, or it was deleted meanwhile.
    """
    deadline = trio.current_time() + wait
    while True:
        # Registered before the log is read, so that nothing published in between is missed.
        with broker.wakeup(session_id) as wakeup:
            await engine.wait_followed(session_id)
            page = await read_page(engine, session_id, _after(after), limit, max_bytes)
            if page is None or not (visible is None or visible(page.session)):
                raise SessionNotFound(f"there is no session {session_id!r}")
            session = page.session
            result, start = evaluate_cursor(after, session, page.first)
            if not after or page.events or start is None or session.ended or not wait or stopping.is_set():
                break
            with trio.move_on_at(deadline) as scope:
                await wakeup.wait()
        if scope.cancelled_caught:
            break
    if not after:
        messages = _messages(dialect, session, page.events)
        start = page.first - 1
    else:
        messages = first_messages(dialect, page, None, start, after)
        start = session.seq if start is None else start
    last = page.events[-1].seq if page.events and start < session.seq else start
    return History(result, messages, str(Cursor(session.epoch, last)), session.ended and last >= session.seq)
