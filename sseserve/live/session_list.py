"""The list of sessions as a stream: a snapshot, then at most once a second what has changed.

Guarantee: while nobody watches, an update costs nothing here. While somebody does, it costs one entry in a
dictionary; what has changed is encoded once for all watchers, when the first of them sends it, and so is the
snapshot of those who may see all. A watcher has no buffer: it takes the batches at its client's pace, and one
that was too slow for those that are kept gets a snapshot again. There are no cursors either, so a client that
reconnects begins with the snapshot.

Messages: ``snapshot`` (in pages, the last of them ``complete``), ``changes`` and ``server`` (what the process
is doing). Who may not watch a session learns nothing of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import trio

from ..concurrency import select, visit
from ..dialects import Dialect, Encoding, Message
from ..dialects.base import encode_json
from ..engines import ALL, Engine
from ..errors import Unavailable
from ..model import Event, Session
from .availability import encode_notice
from .broker import Broker
from .subscriber import reconnect_delay

__all__ = ["SessionList"]

PERIOD = 1.0  # seconds between two batches of changes
QUIET = 5.0  # seconds without changes after which ``server`` is sent all the same: it is the heartbeat, too
MAX_LISTED = 1000  # sessions in a snapshot: the newest
MAX_CHANGED = 1000  # sessions in a batch; if more have changed, everybody gets the snapshot again
MAX_BATCHES = 32  # are kept for watchers that are slow
PAGE = 100  # sessions in one message

# Returns whether a watcher may see a session. None instead of it: it may see all.
Visible = Callable[[Session], bool]


class _Page(msgspec.Struct):
    """Some of the changes of a batch. They are encoded when the first watcher sends them."""

    sessions: tuple[Session, ...] = ()
    created: frozenset[str] = frozenset()
    removed: tuple[Session, ...] = ()
    rows: list[msgspec.Raw] | None = None
    data: dict[Encoding, bytes] = msgspec.field(default_factory=dict)  # for those who may see all

    def encode(self, encoding: Encoding, visible: Visible | None) -> bytes:
        """Encode what a watcher may see of it; empty if that is nothing."""
        if visible is None and (data := self.data.get(encoding)) is not None:
            return data
        if self.rows is None:
            self.rows = [_row(encoding.dialect, session) for session in self.sessions]
        rows = [
            (session.id, row)
            for session, row in zip(self.sessions, self.rows, strict=True)
            if visible is None or visible(session)
        ]
        removed = [session.id for session in self.removed if visible is None or visible(session)]
        if not rows and not removed:
            return b""
        changes = {
            "removed": removed,
            "created": [session_id for session_id, _ in rows if session_id in self.created],
            "sessions": [row for _, row in rows],
        }
        data = encoding.message(Message("changes", encode_json(changes)))
        if visible is None:
            self.data[encoding] = data
        return data


class _Snapshot(msgspec.Struct):
    """The newest sessions after a batch, and how many there are. Encoded like a ``_Page``."""

    number: int
    taken_at: float
    sessions: list[Session]
    total: int
    pages: dict[tuple[Encoding, int], bytes] = msgspec.field(default_factory=dict)

    def encode(self, encoding: Encoding, start: int) -> bytes:
        """Encode a page."""
        if (data := self.pages.get((encoding, start))) is None:
            page = {
                "total": self.total,
                "complete": start + PAGE >= len(self.sessions),
                "sessions": [
                    _row(encoding.dialect, session) for session in self.sessions[start : start + PAGE]
                ],
            }
            data = encoding.message(Message("snapshot", encode_json(page)))
            self.pages[encoding, start] = data
        return data


class SessionList:
    """The list of one server's sessions, for those who watch it.

    Args:
        engine: has the sessions.
        broker: says what is published, and wakes who waits.
        describe_server: returns what the process is doing.
    """

    def __init__(self, engine: Engine, broker: Broker, describe_server: Callable[[], Awaitable[Any]]) -> None:
        self._engine = engine
        self._broker = broker
        self._describe_server = describe_server
        self._server: tuple[float, bytes] | None = None  # when it was described, and the description
        self._watchers = 0
        self._number = 0  # of the last batch
        self._next_at = 0.0  # when the next one may be made
        self._snapshot: _Snapshot | None = None  # the last one of those who may see all
        self._batches: deque[list[_Page] | None] = deque(maxlen=MAX_BATCHES)  # None: too many changes
        self._clear()

    def _clear(self) -> None:
        self._changed: dict[str, Session] = {}
        self._created: set[str] = set()
        self._removed: list[Session] = []
        self._too_many = False

    @property
    def _has_changes(self) -> bool:
        return bool(self._changed or self._removed or self._too_many)

    # What has changed

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Collect changes for the length of the block."""
        self._watchers += 1
        self._broker.on_publish = self._note_published
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._broker.on_publish = None
                self._batches.clear()
                self._snapshot = None
                self._clear()

    def _note_published(self, session: Session, events: Sequence[Event]) -> None:
        is_first = not self._has_changes
        self._changed[session.id] = session
        if events and events[0].seq == 1 and session.attempt == 1:
            self._created.add(session.id)
        self._noted(is_first)

    def resync(self) -> None:
        """Give everybody a snapshot again: what has changed was not delivered."""
        if self._watchers:
            is_first = not self._has_changes
            self._clear()
            self._too_many = True
            if is_first:
                self._broker.notify(ALL)

    def note_removed(self, session: Session) -> None:
        """Note that a session was deleted or has expired."""
        if not self._watchers:
            return
        is_first = not self._has_changes
        self._changed.pop(session.id, None)
        if session.id in self._created:
            self._created.discard(session.id)  # nobody has seen it
        else:
            self._removed.append(session)
            self._noted(is_first)

    def _noted(self, is_first: bool) -> None:
        if len(self._changed) + len(self._removed) > MAX_CHANGED:
            self._clear()
            self._too_many = True
        if is_first:
            self._broker.notify(ALL)

    def _make_batch(self) -> None:
        if self._too_many:
            self._batches.append(None)
        else:
            changed, created = list(map(_small, self._changed.values())), frozenset(self._created)
            parts = [tuple(changed[start : start + PAGE]) for start in range(0, len(changed), PAGE)]
            # What was removed comes first: a session may have been deleted and created again.
            pages = [_Page(removed=tuple(map(_small, self._removed)))] if self._removed else []
            self._batches.append(pages + [_Page(part, created) for part in parts])
        self._clear()
        self._number += 1
        self._next_at = trio.current_time() + PERIOD

    def _pages_after(self, position: int) -> list[_Page] | None:
        """Return the changes after a batch; None if they are not kept, and a snapshot is needed."""
        count = self._number - position
        if count > len(self._batches):
            return None
        pages: list[_Page] = []
        for batch in list(self._batches)[len(self._batches) - count :]:
            if batch is None:
                return None
            pages += batch
        return pages

    # What watchers get

    async def pages(
        self,
        encoding: Encoding,
        visible: Callable[[], Visible | None],
        stopping: trio.Event,
        drain: float,
    ) -> AsyncGenerator[bytes]:
        """Yield encoded messages until the server stops.

        Args:
            encoding: of an event stream; its dialect describes the sessions.
            visible: returns whether the watcher may see a session now; None: it may see all.
            stopping: is set when the server begins to stop.
            drain: over how many seconds clients reconnect then.
        """
        availability = self._broker.availability
        degraded = False  # the client has been told that the engine is unavailable
        # As long as somebody waits for them, the changes of all instances are delivered.
        with self._watch(), self._broker.wakeup(ALL):
            position = -1
            while not stopping.is_set():
                problem, failed = availability.problem, False
                if (changes := self._pages_after(position)) is not None:
                    position = self._number
                    for page in changes:
                        if data := page.encode(encoding, visible()):
                            yield data
                        else:
                            await trio.lowlevel.checkpoint()
                else:
                    try:
                        snapshot = await self._take_snapshot(visible())
                    except Unavailable as error:
                        failed, problem = True, problem or str(error)
                    else:
                        position = snapshot.number
                        for start in range(0, len(snapshot.sessions) or 1, PAGE):
                            yield snapshot.encode(encoding, start)
                        del snapshot
                if degraded != (problem is not None):
                    degraded = problem is not None
                    yield encode_notice(encoding, problem).data
                yield await self._encode_server(encoding)
                if failed:
                    await availability.wait()
                else:
                    await self._wait_for_batch(position, stopping, degraded=degraded)
        retry = reconnect_delay(drain)
        yield encoding.retry(retry)

    async def _take_snapshot(self, visible: Visible | None) -> _Snapshot:
        """Return what a watcher gets first. Those who may see all share one for ``PERIOD``."""
        now, last = trio.current_time(), self._snapshot
        is_recent = last is not None and now < last.taken_at + PERIOD
        if visible is None and last and is_recent and self._pages_after(last.number) is not None:
            return last
        if self._has_changes:
            self._make_batch()  # the snapshot has these changes
        number = self._number
        await self._engine.wait_followed(ALL)
        if visible is None:
            sessions, total = await self._engine.sessions(MAX_LISTED), await self._engine.count()
        else:
            sessions = await select(await self._engine.sessions(), visible)
            total = len(sessions)
        small: list[Session] = []
        await visit(sessions[:MAX_LISTED], lambda session: small.append(_small(session)))
        snapshot = _Snapshot(number, now, small, total)
        if visible is None:
            self._snapshot = snapshot
        return snapshot

    async def _encode_server(self, encoding: Encoding) -> bytes:
        now = trio.current_time()
        if self._server is None or now >= self._server[0] + PERIOD:
            self._server = now, encode_json(await self._describe_server())
        return encoding.message(Message("server", self._server[1]))

    async def _wait_for_batch(self, position: int, stopping: trio.Event, *, degraded: bool) -> None:
        """Wait until there is a batch after ``position``, but not for longer than ``QUIET``.

        It ends too when the engine is not ``degraded`` any more, or is so now.
        """
        with trio.move_on_after(QUIET):
            with self._broker.wakeup(ALL) as wakeup:
                is_same = degraded == (self._broker.availability.problem is not None)
                if self._number == position and not self._has_changes and is_same and not stopping.is_set():
                    await wakeup.wait()
            if self._number == position:
                with trio.move_on_at(self._next_at):
                    await stopping.wait()
        # The first watcher that is awake makes the batch, and the others find it.
        if self._has_changes and trio.current_time() >= self._next_at:
            self._make_batch()


def _row(dialect: Dialect, session: Session) -> msgspec.Raw:
    return msgspec.Raw(encode_json(dialect.describe_row(session)))


def _small(session: Session) -> Session:
    """Return a session without what may be large and no row shows: slow watchers keep old ones in memory."""
    progress = session.progress
    if progress is not None:
        progress = msgspec.structs.replace(progress, data=msgspec.UNSET, artifacts=())
    return msgspec.structs.replace(session, data=msgspec.UNSET, original=None, progress=progress)
