"""Logs in this process's memory: fast, bounded, gone with the process.

Guarantee: each method is atomic under Trio, as it does not wait, but for those that list or expire sessions:
they let other tasks run in between. A session's log keeps its newest
``history_events`` events (its last event always) and the receipts of its newest 1,000 idempotency keys, of
both at most ``history_bytes`` bytes, and of the receipts a quarter of that; all of it is deleted with the
session.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import trio

from ..config import Settings
from ..model import Event, Receipt, Session
from .base import (
    MAX_RECEIPTS,
    EngineListener,
    Page,
    Repeated,
    may_exceed,
    no_room,
    receipt_size,
    record_size,
    too_many_sessions,
)
from .records import Record, RecordIndex, begins_log

__all__ = ["MemoryEngine"]

EXPIRE_STEP = 128  # sessions that are looked at without letting other tasks run


class _Log(Record):
    """One session's record and events. ``events`` has contiguous ``seq``. Sizes are in bytes."""

    __slots__ = ("events", "receipts", "receipts_size", "size")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.events: list[Event] = []
        self.size = 0
        self.receipts: OrderedDict[str, Receipt] | None = None
        self.receipts_size = 0  # is a part of ``size``

    @property
    def first(self) -> int:
        return self.events[0].seq if self.events else self.session.seq + 1


class MemoryEngine:
    """See the module; see ``Engine`` for the methods."""

    immediate = True

    def __init__(
        self, settings: Settings, listener: EngineListener, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._clock = clock
        self._max_bytes = settings.max_log_bytes or math.inf
        self._logs: RecordIndex[_Log] = RecordIndex(settings)

    @property
    def problem(self) -> str | None:
        return None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def load(self, session_id: str) -> Session | None:
        return self._logs.session(session_id)

    latest = settled = load

    def follow(self, session_id: str) -> None:
        pass  # all events are this instance's own

    unfollow = follow

    async def wait_followed(self, session_id: str) -> None:
        pass

    async def append(
        self,
        session: Session,
        events: Sequence[Event],
        *,
        receipt: tuple[str, Receipt] | None = None,
        replaces: str | None = None,
    ) -> None:
        weight = sum([event.weight for event in events])
        log = self._logs.get(session.id)
        if receipt is not None and log is not None and log.receipts is not None:
            stored = log.receipts.get(receipt[0])
            if stored is not None and stored.count >= receipt[1].count:
                raise Repeated(stored)
        current = None if log is None else log.session
        begins = begins_log(session, len(events), current, replaces)
        if log is None and session.owner is not None:
            limit = self._settings.max_sessions_per_owner
            if limit is not None and self._logs.count_owned(session.owner) >= limit:
                raise too_many_sessions(limit)
        size = record_size(session)
        growth = weight + (0 if receipt is None else receipt_size(*receipt))
        if self._logs.total + growth + size > self._max_bytes:
            self._make_room(session, growth + size - (0 if log is None else log.taken - log.size))
        if begins or log is None:
            replaced, log = log, _Log(session)
            if replaced is not None:
                log.receipts = replaced.receipts
                log.size = log.receipts_size = replaced.receipts_size
        log.events.extend(events)
        log.size += weight
        if receipt is not None:
            self._store_receipt(log, *receipt)
        self._trim(log)
        self._logs.store(log, session, self._clock(), log.size + size)
        self._listener.deliver(session, events)

    def _make_room(self, session: Session, growth: int) -> None:
        """Delete sessions that have ended until there are ``growth`` bytes of room for a session."""
        excess = math.ceil(self._logs.total + growth - self._max_bytes)
        if excess <= 0:
            return
        ended = self._logs.find_ended(excess, session.id.__eq__)
        if ended is not None:
            for log in ended:
                self._remove(log)
        elif not may_exceed(session, self._logs.session(session.id)):
            raise no_room(int(self._max_bytes))

    def _store_receipt(self, log: _Log, key: str, receipt: Receipt) -> None:
        if log.receipts is None:
            log.receipts = OrderedDict()
        change = receipt_size(key, receipt)
        if (earlier := log.receipts.pop(key, None)) is not None:
            change -= receipt_size(key, earlier)
        log.receipts[key] = receipt
        limit = self._settings.history_bytes // 4
        while len(log.receipts) > 1 and (
            len(log.receipts) > MAX_RECEIPTS or log.receipts_size + change > limit
        ):
            change -= receipt_size(*log.receipts.popitem(last=False))
        log.receipts_size += change
        log.size += change

    def _trim(self, log: _Log) -> None:
        excess = len(log.events) - self._settings.history_events
        if excess <= 0 and log.size <= self._settings.history_bytes:
            return
        drop = 0
        while drop < len(log.events) - 1 and (drop < excess or log.size > self._settings.history_bytes):
            log.size -= log.events[drop].weight
            drop += 1
        del log.events[:drop]

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        log = self._logs.get(session_id)
        if log is None:
            return None
        start = max(0, after + 1 - log.first)
        return Page(log.session, log.first, log.events[start : start + limit])

    async def receipt(self, session_id: str, key: str) -> Receipt | None:
        log = self._logs.get(session_id)
        return None if log is None or log.receipts is None else log.receipts.get(key)

    async def sessions(self, newest: int | None = None) -> list[Session]:
        return await self._logs.sessions(newest)

    async def count(self) -> int:
        return len(self._logs)

    async def leased(self) -> list[Session]:
        return await self._logs.leased()

    async def jobs(self) -> list[Session]:
        return await self._logs.jobs()

    async def delete(self, session_id: str, epoch: str) -> bool:
        log = self._logs.get(session_id)
        if log is None or log.session.epoch != epoch:
            return False
        self._remove(log)
        return True

    def _remove(self, log: _Log) -> None:
        self._logs.remove(log)
        self._listener.removed(log.session)

    async def expire(self, watched: Callable[[str], bool]) -> None:
        while (expired := self._logs.take_due(self._clock(), watched, EXPIRE_STEP)) is not None:
            for log in expired:
                self._remove(log)
            await trio.lowlevel.checkpoint()
