"""The engine: what is being stored, what is stored, and who is told. See the package for its guarantees."""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
import trio

from ...config import Settings
from ...errors import EngineUnavailable
from ...model import Event, Receipt, Session
from ..base import (
    EngineListener,
    Page,
    Repeated,
    may_exceed,
    no_room,
    receipt_size,
    record_size,
    too_many_sessions,
)
from ..batching import Batcher
from ..codec import encode_event, encode_receipt, encode_session
from ..records import RecordIndex, begins_log
from .changes import Change, LogState, NewReceipt, StoredSession
from .cleaning import Checkpoints, Cleaning
from .file import LogFile, boot_id, path_of, refusal, storage_error
from .pending import Pending, PendingChanges
from .readers import Reader, Readers
from .receipts import Log, ReceiptCache
from .storage import Writer

__all__ = ["SqliteEngine"]

logger = logging.getLogger(__name__)

MAX_BATCH = 1000  # appends in one transaction
MAX_BATCH_BYTES = 4 * 2**20
EXPIRE_STEP = 100  # sessions that are deleted at once
RETRY = 1.0  # seconds between two attempts to store something, while that fails
RECEIPT_CACHE = 64 * 2**20  # bytes of receipts that are kept in memory
CLOCK_INTERVAL = 60.0  # seconds after which the time in use is stored, if nothing else is


class SqliteEngine:
    """See the package; see ``Engine`` for the methods.

    Args:
        settings: have the path, the durability and the limits.
        listener: is told all that is stored.
        clock: returns seconds on a monotonic clock.
        posix_clock: returns POSIX seconds. It only says how long the file was not in use.

    Raises:
        ConfigError: the URL has no path.
    """

    immediate = False

    def __init__(
        self,
        settings: Settings,
        listener: EngineListener,
        clock: Callable[[], float] = trio.current_time,
        posix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._clock = clock
        self._posix_clock = posix_clock
        self._path = path_of(settings.engine_url)
        self._logs: RecordIndex[Log] = RecordIndex(settings)
        self._problem: str | None = None
        self._pending = PendingChanges()
        self._batcher: Batcher[Pending] = Batcher(
            self._store, self._pending.withdraw, max_items=MAX_BATCH, max_size=MAX_BATCH_BYTES
        )
        self._is_open = False
        self._last_position = self._last_log = 0
        self._clock_offset = 0.0  # from the engine's clock to that of the file
        self._writing = trio.Lock()
        self._writer: Writer
        self._cleaning: Cleaning
        self._checkpoints: Checkpoints
        self._readers = Readers(self._path)
        # Those of a session that is being changed are needed to note the change.
        self._receipts = ReceiptCache(
            self._readers, RECEIPT_CACHE, in_use=lambda log: log.session.id in self._pending
        )

    @property
    def problem(self) -> str | None:
        return self._problem

    # Opening and closing

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        file = await trio.to_thread.run_sync(LogFile, self._path)
        try:
            self._writer = Writer(
                self._path,
                durability=self._settings.durability,
                history_events=self._settings.history_events,
                history_bytes=self._settings.history_bytes,
            )
            try:
                self._cleaning = Cleaning(self._writer, self._writing)
                self._checkpoints = Checkpoints(self._path, self._writer, self._writing)
                await self._load()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._cleaning.run)
                    nursery.start_soon(self._checkpoints.run)
                    nursery.start_soon(self._watch_problem)
                    self._is_open = True
                    task_status.started()
                    await self._batcher.run()
            finally:
                # Without a deadline: a thread cannot be ended while the system writes for it. Those who wait
                # for a change that others follow cannot be cancelled either.
                with trio.CancelScope(shield=True):
                    await self._batcher.flush()
                    self._is_open = False
                    await self._readers.aclose()
                    await trio.to_thread.run_sync(self._close, self._file_clock())
        finally:
            file.close()

    async def _load(self) -> None:
        try:
            sessions = await trio.to_thread.run_sync(self._read_file)
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise refusal(self._path, error) from error
        now = self._clock()
        self._logs = RecordIndex(self._settings, now)
        seconds, posix = self._writer.load_clock()
        if posix:
            seconds += max(0.0, self._posix_clock() - posix)
        self._clock_offset = seconds - now
        for number, (state, touched, session) in enumerate(sessions, 1):
            taken = state.size + record_size(session)
            self._logs.store(Log(session, state), session, touched - self._clock_offset, taken)
            if number % 1000 == 0:
                await trio.lowlevel.checkpoint()
        self._logs.sort_ended()
        self._cleaning.add(self._writer.load_dropped(), (state for state, _, _ in sessions))

    def _read_file(self) -> list[StoredSession]:
        sessions = self._writer.load_sessions()
        self._last_position, self._last_log = self._writer.last_numbers()
        boot = boot_id()
        if self._writer.begin(boot):
            logger.warning("the computer stopped while %s was open: watchers begin anew", self._path)
            # What was delivered under the old epochs may be lost.
            sessions = [
                stored._replace(session=msgspec.structs.replace(stored.session, epoch=secrets.token_hex(4)))
                for stored in sessions
            ]
            self._writer.renew(((encode_session(s.session), s.state.position) for s in sessions), boot)
        return sessions

    def _close(self, clock: tuple[float, float]) -> None:
        with suppress(sqlite3.Error):
            self._writer.end(clock)
        self._writer.close()

    def _file_clock(self) -> tuple[float, float]:
        return self._clock() + self._clock_offset, self._posix_clock()

    # Records

    async def load(self, session_id: str) -> Session | None:
        return self._logs.session(session_id)

    async def latest(self, session_id: str) -> Session | None:
        if (pending := self._pending.last(session_id)) is not None:
            return pending.session
        return self._logs.session(session_id)

    async def settled(self, session_id: str) -> Session | None:
        if (pending := self._pending.last(session_id)) is not None:
            await pending.wait()
        return self._logs.session(session_id)

    async def sessions(self, newest: int | None = None) -> list[Session]:
        return await self._logs.sessions(newest)

    async def count(self) -> int:
        return len(self._logs)

    async def leased(self) -> list[Session]:
        return await self._logs.leased()

    async def jobs(self) -> list[Session]:
        return await self._logs.jobs()

    def follow(self, session_id: str) -> None:
        pass  # all events are this instance's own

    unfollow = follow

    async def wait_followed(self, session_id: str) -> None:
        pass

    # Appending

    async def append(
        self,
        session: Session,
        events: Sequence[Event],
        *,
        receipt: tuple[str, Receipt] | None = None,
        replaces: str | None = None,
    ) -> None:
        session_id = session.id
        if receipt is not None:
            stored = await self._stored_receipt(session_id, receipt[0])
            if stored is not None and stored.count >= receipt[1].count:
                raise Repeated(stored)
        # Nothing waits from here until the change is among those that are being stored.
        if not self._is_open:
            raise EngineUnavailable("the server is starting or shutting down")
        pending = self._pending.last(session_id)
        known: Log | None
        if pending is not None:
            known, current = pending.log, pending.session
        else:
            known = self._logs.get(session_id)
            current = None if known is None else known.session
        begins = begins_log(session, len(events), current, replaces)
        if current is None:
            self._check_owner(session.owner)
        # Encoded first: what cannot be must leave nothing behind.
        record = encode_session(session)
        rows = [(event.seq, event.weight, encode_event(event)) for event in events]
        growth = record_size(session) - (0 if current is None else record_size(current))
        growth += sum(weight for _, weight, _ in rows) + (0 if receipt is None else receipt_size(*receipt))
        self._make_room(session, current, growth)
        if begins:
            self._last_log += 1
        if current is None or known is None:
            self._last_position += 1
            known = Log(session, LogState(self._last_position, self._last_log))
        change = Change(known.state.position, session_id, self._clock() + self._clock_offset)
        change.record, change.events, change.last_seq = record, rows, session.seq
        if begins:
            change.begins_log = self._last_log
        added = Pending(known, session, change)
        added.events = events
        added.creates = current is None
        added.growth = growth
        if receipt is not None:
            self._add_receipt(added, *receipt)
        self._pending.add(added)
        await self._batcher.submit(added, change.size)

    def _check_owner(self, owner: str | None) -> None:
        limit = self._settings.max_sessions_per_owner
        if owner is None or limit is None:
            return
        if self._logs.count_owned(owner) + self._pending.count_owned(owner) >= limit:
            raise too_many_sessions(limit)

    def _make_room(self, session: Session, current: Session | None, growth: int) -> None:
        """Delete sessions that have ended until there are ``growth`` bytes of room for a session."""
        limit = self._settings.max_log_bytes
        if limit is None or (excess := self._logs.total + self._pending.growth + growth - limit) <= 0:
            return
        ended = self._logs.find_ended(excess, lambda id_: id_ == session.id or id_ in self._pending)
        if ended is not None:
            for known in ended:
                pending = self._add_deletion(known.session.id)
                self._batcher.submit_nowait(pending, pending.change.size)
        elif not may_exceed(session, current):
            raise no_room(limit)

    def _add_receipt(self, pending: Pending, key: str, receipt: Receipt) -> None:
        assert pending.log.receipts is not None
        pending.log.last_receipt += 1
        pending.receipt = key, receipt
        pending.change.receipt = NewReceipt(
            pending.log.last_receipt,
            receipt_size(key, receipt),
            key,
            encode_receipt(receipt),
            pending.log.receipts,
        )

    async def _store(self, batch: Sequence[Pending]) -> Sequence[Exception | None]:
        """Store a batch, and tell the listener."""
        changes = [pending.change for pending in batch]
        states = {pending.change.position: pending.log.state for pending in batch}
        clock = self._file_clock()
        try:
            with trio.CancelScope(shield=True):
                async with self._writing:
                    committed = await trio.to_thread.run_sync(
                        self._writer.commit, changes, states.values(), clock
                    )
                    await self._check_problem()
        except sqlite3.Error as error:
            return self._fail(batch, error)
        for pending in batch:
            position = pending.change.position
            if (state := committed.states.get(position)) is not None:
                pending.log.state = state
            self._finish(pending, committed.evicted.get(position, ()))
        self._cleaning.add(committed.dropped, committed.states.values())
        self._checkpoints.add(len(committed.states))
        return [None] * len(batch)

    def _fail(self, batch: Sequence[Pending], cause: sqlite3.Error) -> Sequence[Exception]:
        """Give up a batch, and what was added meanwhile, since it may build on it."""
        error = storage_error(cause)
        self._set_problem(str(error))
        waiting = self._batcher.take_waiting()
        for pending in [*batch, *waiting]:
            self._pending.end(pending)
        self._batcher.fail(waiting, error)
        return [error] * len(batch)

    def _finish(self, pending: Pending, evicted: Sequence[str]) -> None:
        """Make a change that is committed known. ``evicted`` are keys whose receipts are deleted."""
        known, session = pending.log, pending.session
        if session is None:
            self._logs.remove(known)
            self._receipts.forget(known)
            self._pending.end(pending)
            self._listener.removed(known.session)
            return
        taken = known.state.size + record_size(session)
        self._logs.store(known, session, pending.change.touched - self._clock_offset, taken)
        if pending.receipt is not None and pending.change.receipt is not None:
            self._receipts.note(known, pending.change.receipt, pending.receipt[1], evicted)
        self._pending.end(pending)
        self._listener.deliver(session, pending.events)

    def _set_problem(self, problem: str | None) -> None:
        if problem == self._problem:
            return
        if problem is None:
            logger.info("the engine can store again")
        else:
            logger.error("%s", problem)
        self._problem = problem
        self._listener.availability_changed(problem)

    async def _check_problem(self) -> None:
        """Find out, if nothing could be stored, whether that has changed. The caller holds the lock."""
        if self._problem is None:
            return
        try:
            await trio.to_thread.run_sync(self._writer.probe)
        except sqlite3.Error as error:
            # Something small may fit all the same.
            self._set_problem(str(storage_error(error)))
        else:
            self._set_problem(None)

    async def _watch_problem(self) -> None:
        """Check from time to time whether something can be stored again, and keep the file's clock."""
        stored_at = self._clock()
        while True:
            await trio.sleep(RETRY)
            async with self._writing:
                await self._check_problem()
                if self._clock() >= stored_at + CLOCK_INTERVAL:
                    stored_at = self._clock()
                    with suppress(sqlite3.Error):
                        await trio.to_thread.run_sync(self._writer.store_clock, self._file_clock())

    # Reading

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        known = self._logs.get(session_id)
        if known is None:
            return None
        if limit == 0 or after >= known.session.seq:
            await trio.lowlevel.checkpoint()
            return Page(known.session, known.state.first, [])
        page = await self._readers.call(Reader.read, known.state.position, after, limit)
        pending = self._pending.last(session_id)
        if page is not None and pending is not None and page.session.cursor != known.session.cursor:
            # It may have what is committed but not noted here yet: the next read must not know less.
            await pending.wait()
        return page

    # Receipts

    async def receipt(self, session_id: str, key: str) -> Receipt | None:
        return await self._stored_receipt(session_id, key)

    async def _stored_receipt(self, session_id: str, key: str) -> Receipt | None:
        """Return a receipt; when this returns, the session's receipts are in memory."""
        while True:
            if (pending := self._pending.with_key(session_id, key)) is not None:
                await pending.wait()
                continue
            known = self._logs.get(session_id)
            if (last := self._pending.last(session_id)) is not None:
                # It may be of a new session, or take the place of a deleted one.
                known = None if last.session is None else last.log
            if known is None:
                return None
            if known.receipts is not None:
                return self._receipts.get(known, key)
            await self._receipts.load(known)

    # Deleting

    async def delete(self, session_id: str, epoch: str) -> bool:
        current = await self.latest(session_id)
        if current is None or current.epoch != epoch:
            current = await self.settled(session_id)
            if current is None or current.epoch != epoch or await self.latest(session_id) != current:
                return False
        if not self._is_open:
            raise EngineUnavailable("the server is starting or shutting down")
        pending = self._add_deletion(session_id)
        await self._batcher.submit(pending, pending.change.size)
        return True

    def _add_deletion(self, session_id: str) -> Pending:
        last = self._pending.last(session_id)
        known = self._logs.get(session_id) if last is None else last.log
        assert known is not None
        change = Change(known.state.position, session_id, self._clock() + self._clock_offset)
        pending = Pending(known, None, change)
        pending.growth = -known.taken
        self._pending.add(pending)
        return pending

    async def expire(self, watched: Callable[[str], bool]) -> None:
        while (expired := self._logs.take_due(self._clock(), watched, EXPIRE_STEP)) is not None:
            await trio.lowlevel.checkpoint()
            added = []
            for known in expired:
                if known.session.id in self._pending:
                    self._logs.put_off(known, self._clock() + RETRY)  # it is being changed
                else:
                    added.append(self._add_deletion(known.session.id))
            for pending in added:
                self._batcher.submit_nowait(pending, pending.change.size)
            for pending in added:
                await pending.wait()
            for known in expired:
                if self._logs.get(known.session.id) is known:
                    self._logs.put_off(known, self._clock() + RETRY)  # it could not be deleted
            if self._problem is not None:
                return

    # Revocations of tokens; see coordination.RevocationStore

    async def load_revocations(self) -> list[tuple[bytes, float]]:
        now = self._posix_clock()
        async with self._writing:
            stored = await trio.to_thread.run_sync(self._writer.load_revocations)
        return [(value, until) for value, until in stored if until > now]

    async def store_revocation(self, value: bytes, until: float) -> None:
        if not self._is_open:
            raise EngineUnavailable("the server is starting or shutting down")
        try:
            with trio.CancelScope(shield=True):
                async with self._writing:
                    await trio.to_thread.run_sync(
                        self._writer.store_revocation, value, until, self._posix_clock()
                    )
        except sqlite3.Error as error:
            raise storage_error(error) from error
