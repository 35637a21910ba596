"""How a watcher joins a session: the resume rules, the same for every transport.

Subscribe, then replay, then go live. Between the last look at the log and going live nothing else can
run, and a batch whose fan-out began meanwhile is noticed by the topic's position; so there is no gap, no
double and no reorder, whatever the engine.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import trio

from ..dialects import Dialect, Message
from ..engines import Engine, Page
from ..errors import SessionNotFound
from ..model import Cursor, Event, Session
from .broker import Broker, Subscriber

__all__ = ["PAGE", "History", "Verdict", "history", "join", "judge", "opening_messages", "over", "read_page"]

PAGE = 128  # events of one replay write
PAGE_BYTES = 64 * 1024  # and about as many bytes of them


class Verdict(msgspec.Struct, frozen=True):
    """How resuming from a cursor went.

    ``missed`` counts the events behind the cursor that will not come: none if ``ok``. After a ``gap`` (the
    log no longer reaches back) and a ``reset`` (it is another log) the current snapshot follows.
    """

    status: Literal["ok", "gap", "reset"]
    missed: int


class History(msgspec.Struct, frozen=True):
    """A piece of a log as messages; ``next`` is the cursor behind it, ``end`` says that nothing follows."""

    resume: Verdict | None
    messages: list[Message]
    next: str
    end: bool


def over(session: Session, cursor: str | None) -> bool:
    """Whether a watcher with this cursor has seen everything there will ever be."""
    return session.ended and cursor == str(session.cursor)


def judge(text: str | None, session: Session, first: int) -> tuple[Verdict | None, int | None]:
    """Judge a cursor against a log kept from ``first`` on, and say where to go on; None: from a snapshot."""
    if not text:
        return None, None
    cursor = Cursor.parse(text)
    if cursor is None or cursor.epoch != session.epoch or cursor.seq > session.seq:
        return Verdict("reset", session.seq), None
    if cursor.complete_seq + 1 < first:
        return Verdict("gap", session.seq - cursor.complete_seq), None
    return Verdict("ok", 0), cursor.complete_seq


def _after(text: str | None) -> int:
    cursor = Cursor.parse(text) if text else None
    return 0 if cursor is None else cursor.complete_seq


def _messages(
    dialect: Dialect, session: Session, events: list[Event], cursor: Cursor | None = None
) -> list[Message]:
    """Say events, but for those messages of the first that are before a cursor within it."""
    messages = [m for event in events for m in dialect.messages(session.id, session.epoch, event)]
    if cursor is not None and cursor.part and events and events[0].seq == cursor.seq:
        first = dialect.messages(session.id, session.epoch, events[0])
        # A cursor of another dialect may be further within the event than ours ever is: say it whole.
        if cursor.part < len(first):
            return messages[cursor.part :]
    return messages


def opening_messages(
    dialect: Dialect, page: Page, verdict: Verdict | None, after: int | None, cursor: str | None
) -> list[Message]:
    """What a watcher gets first: the verdict on its cursor, then the events behind it or a snapshot."""
    messages = [] if verdict is None else [Message("resume", msgspec.json.encode(verdict))]
    if after is None:
        return messages + dialect.snapshot(page.session)
    return messages + _messages(
        dialect, page.session, page.events, None if cursor is None else Cursor.parse(cursor)
    )


async def read_page(engine: Engine, session_id: str, after: int, limit: int) -> Page | None:
    """Read what one write may hold: ``limit`` events, and of large ones not more than ``PAGE_BYTES``."""
    page = await engine.read(session_id, after, limit)
    if page is None:
        return None
    size = 0
    for number, event in enumerate(page.events):
        size += event.weight
        if size > PAGE_BYTES and number:
            return msgspec.structs.replace(page, events=page.events[:number])
    return page


async def join(
    engine: Engine,
    broker: Broker,
    subscriber: Subscriber,
    session_id: str,
    cursor: str | None,
    head: bytes = b"",
    *,
    replay: bool = False,
) -> None:
    """Bring a quiet subscriber to the end of the log and make it live.

    ``head`` goes out before everything. ``replay``: without a cursor the log is sent from its beginning,
    instead of a snapshot. A long replay is sent a page at a time, at the client's pace.

    Raises:
        trio.TooSlowError, trio.BrokenResourceError: see ``Subscriber.send``.
    """
    if subscriber.ending:
        return  # its reader left before we began
    subscriber.opening = head
    topic = broker.subscribe(session_id, subscriber)
    dialect = subscriber.encoding.dialect
    opened = False
    while True:
        page = await read_page(engine, session_id, _after(cursor), PAGE if cursor or replay else 0)
        # From here to ``live`` nothing waits.
        if subscriber.topic is None:
            return  # it has ended while the engine looked
        if page is None and dialect.waits_for_session and not opened:
            if topic.position:
                await trio.lowlevel.checkpoint()
                continue  # it has begun while the engine looked
            resume = Message("resume", msgspec.json.encode(Verdict("reset", 0)))
            subscriber.open(subscriber.encoding.message(resume) if cursor else b"")
            subscriber.live = True
            return
        if page is None:
            subscriber.end(subscriber.encoding.message(deleted()), reason="deleted")
            return
        session = page.session
        if replay and not cursor:
            cursor, opened = str(Cursor(session.epoch, page.first - 1)), True
        verdict, after = judge(cursor, session, page.first)
        if opened and verdict is not None and verdict.status == "ok":
            verdict = None
        out = subscriber.encoding.join(opening_messages(dialect, page, verdict, after, cursor))
        if after is None:
            after = session.seq
        elif page.events:
            after = page.events[-1].seq
        if after >= session.seq and after >= topic.position:
            subscriber.seq = after
            subscriber.open(out)
            subscriber.live = True
            if session.ended:
                subscriber.end()
            return
        out, subscriber.opening = subscriber.opening + out, b""
        if out:
            await subscriber.send(out)
        opened, cursor = True, str(Cursor(session.epoch, after))


def deleted() -> Message:
    """The farewell of a session that is no more."""
    return Message("deleted", b"{}")


async def history(
    engine: Engine,
    broker: Broker,
    dialect: Dialect,
    session_id: str,
    *,
    after: str | None,
    limit: int,
    wait: float,
    stopping: trio.Event,
) -> History:
    """Return the events behind a cursor: at once if there are any, else when one comes or ``wait`` is over.

    Without a cursor it begins where the log does, and does not wait.

    Raises:
        SessionNotFound: there is no such session, or it was deleted meanwhile.
    """
    deadline = trio.current_time() + wait
    while True:
        # The bell hangs before the log is read, so nothing that comes meanwhile is missed.
        with broker.bell(session_id) as bell:
            page = await engine.read(session_id, _after(after), limit)
            if page is None:
                raise SessionNotFound(f"there is no session {session_id!r}")
            session = page.session
            verdict, start = judge(after, session, page.first)
            if not after or page.events or start is None or session.ended or not wait or stopping.is_set():
                break
            with trio.move_on_at(deadline) as scope:
                await bell.wait()
        if scope.cancelled_caught:
            break
    if not after:
        messages = _messages(dialect, session, page.events)
        start = page.first - 1
    else:
        messages = opening_messages(dialect, page, None, start, after)
        start = session.seq if start is None else start
    last = page.events[-1].seq if page.events and start < session.seq else start
    return History(verdict, messages, str(Cursor(session.epoch, last)), session.ended and last >= session.seq)
