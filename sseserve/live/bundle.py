"""Several sessions on one stream, with one cursor for all of them: browsers allow six connections a host.

The cursor is that of each session, joined by ``_``; a session finds its own by the epoch, so the order does
not matter and sessions may be added. A bundle has no buffer: it reads each log behind its cursor, at its
client's pace, and what the log no longer holds is a gap that the client is told.

Progress is as in the ``sessions`` dialect. The data of any other event stands in
``{"session_id": ..., "data": ...}``, since it need not say where it comes from.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator

import msgspec
import trio

from ..dialects import Encoding, Message
from ..engines import Engine
from ..model import Cursor, Session
from .broker import Broker
from .resume import PAGE, judge, opening_messages, read_page

__all__ = ["MAX_SESSIONS", "Bundle"]

MAX_SESSIONS = 50


class Bundle:
    """One client's view of several sessions. ``cursor`` is the joined one that it came with."""

    def __init__(
        self, engine: Engine, broker: Broker, encoding: Encoding, session_ids: list[str], cursor: str | None
    ) -> None:
        self._engine = engine
        self._broker = broker
        self._encoding = encoding
        self._live = dict.fromkeys(session_ids)
        known = [Cursor.parse(text) for text in cursor.split("_")] if cursor else []
        # What the client's cursor is made of, by epoch. It keeps what it came with until we know better.
        self._places = {place.epoch: str(place) for place in known if place is not None}
        self._came_back = cursor is not None
        self._epochs: dict[str, str] = {}  # of the sessions that have been read once

    def over(self, sessions: list[Session]) -> bool:
        """Whether the client has seen everything that there will ever be; ``sessions`` are those left."""
        epochs = {session.epoch for session in sessions}
        if len(sessions) < len(self._live) and not epochs.issuperset(self._places):
            return False  # it has yet to learn of those that are gone
        return all(s.ended and self._places.get(s.epoch) == str(s.cursor) for s in sessions)

    async def pages(self, stopping: trio.Event, drain: float) -> AsyncGenerator[bytes]:
        """Encode what there is, and then what comes, until all sessions have ended or the server stops."""
        interval = self._broker.interval(self._encoding.dialect)
        while self._live and not stopping.is_set():
            some = False
            # The bell hangs before the logs are read, so nothing that comes meanwhile is missed.
            with self._broker.bell(*self._live) as bell:
                for session_id in list(self._live):
                    if data := await self._read(session_id):
                        some = True
                        yield data
                data = b""
                for epoch in self._places.keys() - set(self._epochs.values()):
                    del self._places[epoch]  # of no session that there is any more
                for session_id in [s for s in self._live if s not in self._epochs]:
                    del self._live[session_id]
                    data += self._encode(session_id, [Message("deleted", b"{}", id="-")])
                if not some and not data and self._live:
                    with trio.move_on_after(interval) as quiet:
                        await bell.wait()
                    if quiet.cancelled_caught:
                        data = self._encoding.heartbeat(0)
            if data:
                yield data
        if self._live:
            retry = 500 + int(random.random() * drain * 1000)  # noqa: S311 - spreads those who come back
            yield self._encoding.message(Message(None, None, retry=retry))

    async def _read(self, session_id: str) -> bytes:
        """Encode the next events of a session; take it off at its end, and its epoch if it is no more."""
        epoch = self._epochs.get(session_id)
        first = epoch is None
        text: str | None = None
        if epoch is not None:
            text = self._places[epoch]
        elif self._came_back and (begun := await self._engine.load(session_id)) is not None:
            text = self._places.get(begun.epoch, "unknown")
        place = Cursor.parse(text) if text else None
        page = await read_page(
            self._engine, session_id, place.complete_seq if place else 0, PAGE if text else 0
        )
        if page is None or (epoch is not None and page.session.epoch != epoch):
            self._epochs.pop(session_id, None)
            return b""
        session = page.session
        epoch = self._epochs[session_id] = session.epoch
        verdict, start = judge(text, session, page.first)
        if not first and verdict is not None and verdict.status == "ok":
            verdict = None
        messages = opening_messages(self._encoding.dialect, page, verdict, start, text)
        data = self._encode(session_id, messages)
        done = session.seq if start is None or not page.events else page.events[-1].seq
        self._places[epoch] = str(Cursor(epoch, done))
        if session.ended and done >= session.seq:
            del self._live[session_id]
        return data

    def _encode(self, session_id: str, messages: list[Message]) -> bytes:
        return b"".join([self._encoding.message(self._mine(session_id, message)) for message in messages])

    def _mine(self, session_id: str, message: Message) -> Message:
        """Say where a message comes from, and where it leaves all of the sessions."""
        joined = None
        if message.id is not None:
            if (epoch := self._epochs.get(session_id)) is not None:
                self._places[epoch] = message.id
            joined = "_".join(self._places.values())
        data = message.data
        if message.event == "resume" and data is not None:
            verdict = msgspec.json.decode(data)
            data = msgspec.json.encode({"session_id": session_id, **verdict})
        elif message.event == "deleted":
            data = msgspec.json.encode({"session_id": session_id})
        elif message.event not in self._encoding.dialect.record_events and data is not None:
            data = msgspec.json.encode({"session_id": session_id, "data": msgspec.Raw(data)})
        return msgspec.structs.replace(message, data=data, id=joined)
