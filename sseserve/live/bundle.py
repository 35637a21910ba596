"""Several sessions on one stream, with one cursor for all of them: browsers allow six connections a host.

The cursor is that of each session, joined by ``_``; each session's is found by its epoch, so the order does
not matter and sessions may be added: one that the cursor has no place for begins with a snapshot. But if the
cursor has a place that fits no session, one of them may be another log than before, and those without a place
are told ``reset``.

A bundle has no buffer: it reads each log after its cursor, at its client's pace, and what the log no longer
holds is a gap that the client is told. When a session that has failed is tried again while others go on, the
client is told ``reset`` and gets the next attempt too.

Records, which name their session, are as in the dialect. The data of any other event is wrapped in
``{"session_id": ..., "data": ...}``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
import trio

from ..dialects import Encoding, Message
from ..engines import Engine
from ..errors import Unavailable
from ..model import Cursor, Session, State
from .availability import encode_notice
from .broker import Broker, log_departure
from .resume import PAGE, evaluate_cursor, first_messages, read_page
from .subscriber import reconnect_delay

__all__ = ["MAX_SESSIONS", "Bundle", "parse_bundle_cursor"]

MAX_SESSIONS = 50  # in one bundle


def parse_bundle_cursor(text: str | None) -> dict[str, str]:
    """Return the cursors that a bundle's is made of, by epoch; those that are not valid are left out."""
    cursors = [Cursor.parse(part) for part in text.split("_")] if text else []
    return {cursor.epoch: str(cursor) for cursor in cursors if cursor is not None}


class Bundle:
    """One client's view of several sessions.

    Args:
        engine: has the logs.
        broker: knows when something is published.
        encoding: of the event stream.
        session_ids: the sessions.
        cursor: the joined one that the client resumes from.
        visible: as for ``resume.join``.
    """

    def __init__(
        self,
        engine: Engine,
        broker: Broker,
        encoding: Encoding,
        session_ids: list[str],
        cursor: str | None,
        *,
        visible: Callable[[Session], bool] | None = None,
    ) -> None:
        self._visible = visible
        self._engine = engine
        self._broker = broker
        self._encoding = encoding
        self._live = dict.fromkeys(session_ids)
        self._cursor = cursor  # until its places have been compared with the logs
        broker.resumed += cursor is not None
        self._cursors = parse_bundle_cursor(cursor)  # by epoch; replaced as each session is read
        self._has_unknown_place = False  # the cursor has a place that is no session's
        self._sent = 0  # messages
        self._epochs: dict[str, str] = {}  # of the sessions that have been read once
        self._first_epochs: dict[str, str] = {}  # of these; a session of the same id may be another one
        self._failed: dict[str, None] = {}  # those that may be tried again

    async def pages(self, stopping: trio.Event, drain: float) -> AsyncGenerator[bytes]:
        """Yield encoded events: what the logs hold, then what comes, until all have ended."""
        session_ids, began = list(self._live), trio.current_time()
        try:
            with self._broker.watchers.count_reader(session_ids, self._encoding):
                async with aclosing(self._pages(stopping, drain)) as pages:
                    async for page in pages:
                        yield page
        finally:
            seconds = trio.current_time() - began
            self._broker.watchers.note_end(self._encoding, seconds)
            if self._live and not stopping.is_set():
                log_departure(session_ids, self._encoding, seconds, self._sent)

    async def _pages(self, stopping: trio.Event, drain: float) -> AsyncGenerator[bytes]:
        availability = self._broker.availability
        interval = self._broker.heartbeats.interval(self._encoding.dialect)
        degraded = False  # the client has been told that the engine is unavailable
        unread: set[str] | None = None  # the sessions whose log may go on; None: all
        while self._live and not stopping.is_set():
            failed, problem = False, availability.problem
            more: set[str] = set()
            # Registered before the logs are read, so that nothing published in between is missed.
            with self._broker.wakeup(*self._live, *self._failed) as wakeup:
                try:
                    await self._prepare(unread)
                    for session_id in [s for s in self._live if unread is None or s in unread]:
                        if data := await self._read(session_id):
                            more.add(session_id)
                            yield data
                except Unavailable as error:
                    failed, problem = True, problem or str(error)
                data = b"" if failed else self._remove_deleted()
                if degraded != (problem is not None):
                    degraded = problem is not None
                    data += encode_notice(self._encoding, problem).data
                if not more and not data and self._live:
                    if failed:
                        await availability.wait(interval)
                        data = self._encoding.heartbeat(0)
                    else:
                        with trio.move_on_after(interval) as quiet:
                            await wakeup.wait()
                        if quiet.cancelled_caught:
                            data = self._encoding.heartbeat(0)
                unread = more | wakeup.sessions
            if data:
                yield data
                unread = None  # nothing was noted meanwhile
        if self._live:
            retry = reconnect_delay(drain)
            yield self._encoding.retry(retry)

    async def _prepare(self, unread: set[str] | None) -> None:
        """Have all events delivered from now on, and find which logs are to be read."""
        for session_id in (*self._live, *self._failed):
            await self._engine.wait_followed(session_id)
        if self._cursor:
            sessions = [await self._engine.load(session_id) for session_id in self._live]
            epochs = {session.epoch for session in sessions if session is not None}
            places = [Cursor.parse(place) for place in self._cursor.split("_")]
            self._has_unknown_place = any(place is None or place.epoch not in epochs for place in places)
            self._cursor = None
        # Those that had failed, and are tried again.
        for session_id in [s for s in self._failed if unread is None or s in unread]:
            session = await self._engine.load(session_id)
            if session is not None and session.epoch == self._epochs[session_id]:
                continue
            del self._failed[session_id]
            if session is not None and session.first_epoch == self._first_epochs[session_id]:
                self._live[session_id] = None

    def _remove_deleted(self) -> bytes:
        """Remove the sessions that no longer exist, once all have been read; encode what is said of them."""
        for epoch in self._cursors.keys() - set(self._epochs.values()):
            del self._cursors[epoch]
        data = b""
        for session_id in [s for s in self._live if s not in self._epochs]:
            del self._live[session_id]
            data += self._encode(session_id, [Message("deleted", b"{}", id="-")])
        return data

    async def _read(self, session_id: str) -> bytes:
        """Encode the next events of a session; remove it at its end, and its epoch if it was deleted."""
        epoch = self._epochs.get(session_id)
        first = epoch is None
        text: str | None = None
        if epoch is not None:
            text = self._cursors[epoch]
        elif (session := await self._engine.load(session_id)) is not None:
            text = self._cursors.get(session.epoch, "unknown" if self._has_unknown_place else None)
        cursor = Cursor.parse(text) if text else None
        page = await read_page(
            self._engine, session_id, cursor.complete_seq if cursor else 0, PAGE if text else 0
        )
        if page is None or not (self._visible is None or self._visible(page.session)):
            self._epochs.pop(session_id, None)
            return b""
        session = page.session
        if epoch is not None and session.epoch != epoch:
            if session.first_epoch != self._first_epochs[session_id]:  # it was deleted; this is another one
                del self._epochs[session_id]
                return b""
            del self._cursors[epoch]  # of the attempt before, or of a log that has lost events
        epoch = self._epochs[session_id] = session.epoch
        self._first_epochs[session_id] = session.first_epoch
        result, start = evaluate_cursor(text, session, page.first)
        if not first and result is not None and result.status == "ok":
            result = None
        messages = first_messages(self._encoding.dialect, page, result, start, text)
        data = self._encode(session_id, messages)
        seq = session.seq if start is None or not page.events else page.events[-1].seq
        self._cursors[epoch] = str(Cursor(epoch, seq))
        if session.ended and seq >= session.seq:
            del self._live[session_id]
            assert session.progress is not None
            if session.progress.state in (State.FAILED, State.LOST):
                self._failed[session_id] = None
        return data

    def _encode(self, session_id: str, messages: list[Message]) -> bytes:
        self._sent += len(messages)
        return self._encoding.join([self._wrap(session_id, message) for message in messages])

    def _wrap(self, session_id: str, message: Message) -> Message:
        """Name the session that a message is about, and set the cursor of the whole bundle."""
        joined = None
        if message.id is not None:
            if (epoch := self._epochs.get(session_id)) is not None:
                self._cursors[epoch] = message.id
            joined = "_".join(self._cursors.values())
        data = message.data
        if message.event == "resume" and data is not None:
            result = msgspec.json.decode(data)
            data = msgspec.json.encode({"session_id": session_id, **result})
        elif message.event == "deleted":
            data = msgspec.json.encode({"session_id": session_id})
        elif message.event not in self._encoding.dialect.record_events and data is not None:
            data = msgspec.json.encode({"session_id": session_id, "data": msgspec.Raw(data)})
        return msgspec.structs.replace(message, data=data, id=joined)
