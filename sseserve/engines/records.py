"""The records of an engine that has all of them in memory: by id, lease, job, and when they expire."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

import trio

from ..concurrency import SLICE
from ..config import Settings
from ..model import Session
from .base import Stale

__all__ = ["GRACE", "Record", "RecordIndex", "begins_log"]

SPARE_SECONDS = 1000  # that have no records any more, and are tolerated before a clean-up
LATEST = 1e15  # seconds: what expires later never does
GRACE = 300.0  # seconds that a session is kept after a restart at least, unless its retention time is shorter


def begins_log(session: Session, count: int, current: Session | None, replaces: str | None) -> bool:
    """Return whether an append begins a log.

    Args:
        session: the record after it.
        count: how many events it has.
        current: the record before it; None: there is none.
        replaces: see ``Engine.append``.

    Raises:
        Stale: it does not follow ``current``.
    """
    before = session.seq - count
    if current is None or replaces is not None:
        if before or replaces != (None if current is None else current.epoch):
            raise Stale
        return True
    if (current.epoch, current.seq) != (session.epoch, before):
        raise Stale
    return False


class Record:
    """One session as it is stored. ``touched_at`` is the time of its last event, on the engine's clock.

    ``taken`` is how many bytes it takes in all, ``due`` the second in which it may expire.
    """

    __slots__ = ("due", "session", "taken", "touched_at")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.touched_at = 0.0
        self.taken = 0
        self.due: int | None = None


R = TypeVar("R", bound=Record)


class _Timetable(Generic[R]):
    """Records by the second in which they are due. All costs the same, however many there are."""

    def __init__(self) -> None:
        self._records: dict[int, dict[R, None]] = {}
        self._seconds: list[int] = []  # a heap of those, and of some that have no records any more

    def set(self, record: R, when: float) -> None:
        """Have a record due in the second in which ``when`` is over, and not before."""
        self.discard(record)
        second = record.due = math.ceil(min(when, LATEST))
        if (records := self._records.get(second)) is None:
            records = self._records[second] = {}
            heapq.heappush(self._seconds, second)
            if len(self._seconds) > 2 * len(self._records) + SPARE_SECONDS:
                self._seconds = list(self._records)
                heapq.heapify(self._seconds)
        records[record] = None

    def discard(self, record: R) -> None:
        """Have a record due no more."""
        if record.due is not None:
            records = self._records[record.due]
            del records[record]
            if not records:
                del self._records[record.due]
            record.due = None

    def take(self, now: float, limit: int) -> list[R]:
        """Return at most ``limit`` records that are due, and have them due no more."""
        taken: list[R] = []
        while self._seconds and self._seconds[0] <= now and len(taken) < limit:
            if (records := self._records.get(self._seconds[0])) is None:
                heapq.heappop(self._seconds)
                continue
            for record in list(islice(records, limit - len(taken))):
                self.discard(record)
                taken.append(record)
        return taken


class RecordIndex(Generic[R]):
    """All records, the oldest first. Times are in seconds on the engine's clock, which is monotonic.

    So who sets the clock of day deletes nothing that is to be kept.

    Args:
        settings: have the retention times.
        opened_at: when the records of an earlier process were read, if they were.
    """

    def __init__(self, settings: Settings, opened_at: float = -math.inf) -> None:
        self._ttl = settings.ttl
        self._idle_ttl = settings.idle_ttl
        self._opened_at = opened_at
        self._records: dict[str, R] = {}
        self._due: _Timetable[R] = _Timetable()  # when each may expire; checked again when that time comes
        self._owned: dict[str, int] = {}  # how many sessions each owner has
        self.total = 0  # bytes that all sessions take
        self._ended: dict[str, int] = {}  # bytes of those that have ended, by the time of their end
        self._ended_total = 0
        self._leased: dict[str, None] = {}
        self._jobs: dict[str, None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[R]:
        return iter(self._records.values())

    def get(self, session_id: str) -> R | None:
        """Return the record of that id."""
        return self._records.get(session_id)

    def session(self, session_id: str) -> Session | None:
        """Return the session of that id."""
        record = self._records.get(session_id)
        return None if record is None else record.session

    def count_owned(self, owner: str) -> int:
        """Return how many sessions an owner has."""
        return self._owned.get(owner, 0)

    def _count_owner(self, owner: str | None, change: int) -> None:
        if owner is not None:
            count = self._owned.get(owner, 0) + change
            if count:
                self._owned[owner] = count
            else:
                del self._owned[owner]

    async def sessions(self, newest: int | None = None) -> list[Session]:
        """Return all sessions, or that many of them, the newest first.

        This waits only for other tasks, and only if there are more than ``SLICE``.
        """
        records = list(islice(reversed(self._records.values()), newest))
        sessions: list[Session] = []
        for start in range(0, len(records), SLICE):
            if start:
                await trio.lowlevel.checkpoint()
            sessions += [record.session for record in records[start : start + SLICE]]
        return sessions

    async def leased(self) -> list[Session]:
        """Return the sessions that have not ended and whose producer holds a lease; waits as ``sessions``."""
        return await self._sessions_of(self._leased)

    async def jobs(self) -> list[Session]:
        """Return the sessions that have not ended and whose ``job`` is not None, the oldest first.

        Waits as ``sessions``.
        """
        return await self._sessions_of(self._jobs)

    async def _sessions_of(self, session_ids: dict[str, None]) -> list[Session]:
        sessions: list[Session] = []
        for number, session_id in enumerate(list(session_ids), 1):
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()
            if session_id in session_ids:
                sessions.append(self._records[session_id].session)
        return sessions

    def store(self, record: R, session: Session, now: float, taken: int) -> None:
        """Note that ``session`` is what is stored in ``record`` since ``now``, and takes so many bytes.

        Another record of that id gives its place to this one.
        """
        known = self._records.get(session.id)
        before, has_ended = record.session, session.ended
        # It may expire sooner after its end than by the idle limit that it was added for.
        has_new_end = known is not record or before.epoch != session.epoch or (has_ended and not before.ended)
        self.total += taken - (0 if known is None else known.taken)
        record.taken = taken
        if has_ended:
            self._ended_total += taken - self._ended.get(session.id, 0)
            self._ended[session.id] = taken
        elif session.id in self._ended:
            self._ended_total -= self._ended.pop(session.id)
        owner_before = None if known is None else known.session.owner
        if owner_before != session.owner:
            self._count_owner(owner_before, -1)
            self._count_owner(session.owner, 1)
        record.session = session
        record.touched_at = now
        if known is not None and known is not record:
            self._due.discard(known)
        self._records[session.id] = record
        if has_new_end:
            self._due.set(record, self._end_of_life(record))
        if session.lease is not None and not has_ended:
            self._leased[session.id] = None
        else:
            self._leased.pop(session.id, None)
        if session.job is not None and not has_ended:
            self._jobs[session.id] = None
        else:
            self._jobs.pop(session.id, None)

    def remove(self, record: R) -> None:
        """Forget a record."""
        session_id = record.session.id
        del self._records[session_id]
        self._due.discard(record)
        self._count_owner(record.session.owner, -1)
        self.total -= record.taken
        self._ended_total -= self._ended.pop(session_id, 0)
        self._leased.pop(session_id, None)
        self._jobs.pop(session_id, None)

    def sort_ended(self) -> None:
        """Put the sessions that have ended in the order of their ends, after they were stored in another."""
        self._ended = dict(sorted(self._ended.items(), key=lambda item: self._records[item[0]].touched_at))

    def find_ended(self, size: int, is_kept: Callable[[str], bool]) -> list[R] | None:
        """Return sessions that take ``size`` bytes or more, those first that ended longest ago.

        None: those that have ended do not take so much, without those whose ids ``is_kept`` returns True for.
        """
        found: list[R] = []
        if size > self._ended_total:
            return None
        for session_id, taken in self._ended.items():
            if not is_kept(session_id):
                found.append(self._records[session_id])
                size -= taken
                if size <= 0:
                    return found
        return None

    def take_due(self, now: float, watched: Callable[[str], bool], limit: int) -> list[R] | None:
        """Look at ``limit`` records at most; return those whose retention time is over, None if none is due.

        They are to be removed, or put off. One that has not ended is kept while ``watched`` returns True for
        its id.
        """
        if not (due := self._due.take(now, limit)):
            return None
        expired: list[R] = []
        for record in due:
            session_id, end = record.session.id, self._end_of_life(record)
            if end <= now and not record.session.ended and watched(session_id):
                end = now + self._idle_ttl
            if end > now:
                self._due.set(record, end)
            else:
                expired.append(record)
        return expired

    def put_off(self, record: R, until: float) -> None:
        """Look at a record again then, which has not been removed although it is due."""
        self._due.set(record, until)

    def _end_of_life(self, record: R) -> float:
        session = record.session
        keep = (session.ttl or self._ttl) if session.ended else max(self._idle_ttl, session.ttl or 0)
        return max(record.touched_at + keep, self._opened_at + min(keep, GRACE))
