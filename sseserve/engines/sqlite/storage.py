"""The SQL that writes: commits batches of changes, and cleans up in steps. Knows no Trio.

A log's bounds apply as soon as a change is committed, by ``first``; the events before it are deleted later.
"""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from ..base import MAX_RECEIPTS
from ..codec import decode_session
from .changes import Change, Committed, LogState, NewReceipt, StoredSession, place
from .file import check_in_place, connect

__all__ = ["Writer"]

STEP_ROWS = 256  # that one step of the clean-up deletes at most
STEP_BYTES = 2**20  # and about as many bytes of them
STEP_PAGES = 128  # free pages that one step gives back
SPARE_PAGES = 64  # free pages that are kept for what comes next
MOST_FREE = 0.25  # of the pages, from which on the file shrinks
WAL_LIMIT = 64 * 2**20  # bytes of the WAL, from which on a commit waits for a checkpoint
PROBE = 64 * 1024  # bytes that must fit on a disk that is not full any more

WEIGHTS = 64  # events whose weights are read at once


class _Table(NamedTuple):
    """How rows are inserted: the statement around them, and how many columns they have."""

    statement: str
    columns: int
    conflict: str = ""


_EVENTS = _Table("INSERT INTO events VALUES", 3)
_RECEIPTS = _Table("INSERT INTO receipts VALUES", 4)
_SESSIONS = _Table(
    "INSERT INTO sessions VALUES",
    9,
    " ON CONFLICT (position) DO UPDATE SET log = excluded.log, first = excluded.first, size = excluded.size, "
    "receipts = excluded.receipts, receipts_size = excluded.receipts_size, touched = excluded.touched, "
    "record = excluded.record",
)
_SET_CLOCK = "UPDATE clock SET seconds = ?, posix = ?"


@lru_cache(maxsize=32)
def _statement(table: _Table, rows: int) -> str:
    row = f"({', '.join('?' * table.columns)})"
    return f"{table.statement} {', '.join([row] * rows)}{table.conflict}"


def _insert(connection: sqlite3.Connection, table: _Table, rows: Sequence[tuple[object, ...]]) -> None:
    """Insert rows with few statements: with each, this thread may wait for the interpreter's lock."""
    start = 0
    for count in (64, 32, 16, 8, 4, 2, 1):
        while len(rows) - start >= count:
            values = [value for row in rows[start : start + count] for value in row]
            connection.execute(_statement(table, count), values)
            start += count


class Writer:
    """The connection that writes. One thread at a time may call it.

    All methods raise ``sqlite3.Error``, and have changed nothing then.
    """

    def __init__(
        self,
        path: Path,
        *,
        durability: Literal["full", "normal"],
        history_events: int,
        history_bytes: int,
    ) -> None:
        self._path = path
        self._connection = connect(path, durability)
        self._durability = durability
        self._connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")
        self._connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_LIMIT // 4096}")
        self._history_events = history_events
        self._history_bytes = history_bytes
        self._is_shrinking = False

    def close(self) -> None:
        """Close the connection; what was committed is in the file then, not beside it."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection
        check_in_place(self._path)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def begin(self, boot: str) -> bool:
        """Note under which boot commits are made that a power cut may undo; call it before the first commit.

        Returns whether commits of an earlier boot may have been undone.
        """
        (earlier,) = self._connection.execute("SELECT boot FROM clock").fetchone()
        if earlier is None or earlier == boot:
            self._note_boot(boot)
            return False
        return True

    def renew(self, records: Iterable[tuple[bytes, int]], boot: str) -> None:
        """Store other records of sessions, by position: commits of an earlier boot may have been undone."""
        with self._transaction() as connection:
            connection.executemany("UPDATE sessions SET record = ? WHERE position = ?", records)
        self._note_boot(boot)

    def end(self, clock: tuple[float, float]) -> None:
        """Note that no power cut can undo what was committed, after the last commit."""
        self.store_clock(clock)
        self._note_boot(None)

    def _note_boot(self, boot: str | None) -> None:
        with self._flushed_transaction() as connection:
            boot = boot if self._durability == "normal" else None
            connection.execute("UPDATE clock SET boot = ?", (boot,))

    @contextmanager
    def _flushed_transaction(self) -> Iterator[sqlite3.Connection]:
        """One that is on the disk when it has ended, as are all earlier ones."""
        self._connection.execute("PRAGMA synchronous = FULL")
        try:
            with self._transaction() as connection:
                yield connection
        finally:
            self._connection.execute(f"PRAGMA synchronous = {self._durability}")

    def load_revocations(self) -> list[tuple[bytes, float]]:
        """Return the revocations, and until when each is kept."""
        return self._connection.execute("SELECT value, until FROM revocations").fetchall()

    def store_revocation(self, value: bytes, until: float, now: float) -> None:
        """Keep a revocation, whatever happens next, and delete those that have expired."""
        with self._flushed_transaction() as connection:
            connection.execute("DELETE FROM revocations WHERE until <= ?", (now,))
            connection.execute(
                "INSERT INTO revocations VALUES (?, ?) "
                "ON CONFLICT (value) DO UPDATE SET until = max(until, excluded.until)",
                (value, until),
            )

    def load_clock(self) -> tuple[float, float]:
        """Return for how many seconds the file has been in use, and the POSIX time at which that was so."""
        seconds, posix = self._connection.execute("SELECT seconds, posix FROM clock").fetchone()
        return seconds, posix

    def load_sessions(self) -> list[StoredSession]:
        """Return all sessions, the oldest first.

        Raises:
            msgspec.DecodeError: a record is damaged.
        """
        rows = self._connection.execute(
            "SELECT position, log, first, size, receipts, receipts_size, touched, record "
            "FROM sessions ORDER BY position"
        )
        sessions = []
        for position, log, first, size, receipts, receipts_size, touched, record in rows:
            state = LogState(position, log)
            state.first, state.size = first, size
            state.receipts, state.receipts_size = receipts, receipts_size
            sessions.append(StoredSession(state, touched, decode_session(record)))
        return sessions

    def load_dropped(self) -> list[tuple[int, int | None]]:
        """Return the logs that are still to be deleted, with the position if the session is deleted too."""
        return self._connection.execute("SELECT log, position FROM dropped").fetchall()

    def last_numbers(self) -> tuple[int, int]:
        """Return the highest position and the highest number of a log that are in use."""
        (position, log), (dropped_position, dropped_log) = (
            self._connection.execute(f"SELECT {columns}").fetchone()
            for columns in (
                "ifnull(max(position), 0), ifnull(max(log), 0) FROM sessions",
                "ifnull(max(position), 0), ifnull(max(log), 0) FROM dropped",
            )
        )
        return max(position, dropped_position), max(log, dropped_log)

    def commit(
        self, changes: Sequence[Change], states: Iterable[LogState], clock: tuple[float, float]
    ) -> Committed:
        """Store changes in one transaction.

        Args:
            changes: in their order.
            states: of the sessions that they change, as they are stored.
            clock: for how many seconds the file has been in use, and the POSIX time.
        """
        by_position = {state.position: copy.copy(state) for state in states}
        committed = Committed(by_position, {}, [])
        last: dict[int, Change] = {}
        receipts: dict[int, list[NewReceipt]] = {}
        for change in changes:
            last[change.position] = change
            if change.receipt is not None:
                receipts.setdefault(change.position, []).append(change.receipt)
        with self._transaction() as connection:
            _insert(connection, _EVENTS, self._collect_events(changes, committed))
            if receipts:
                self._store_receipts(connection, receipts, committed)
            # First those, since a new session may have the id of one that is deleted.
            for position, change in last.items():
                if change.record is None:
                    connection.execute("DELETE FROM sessions WHERE position = ?", (position,))
                    del by_position[position]
            connection.executemany("INSERT INTO dropped VALUES (?, ?)", committed.dropped)
            rows = []
            for position, state in by_position.items():
                change = last[position]
                self._trim(connection, state, change.last_seq)
                rows.append(
                    (
                        position,
                        change.session_id,
                        state.log,
                        state.first,
                        state.size,
                        state.receipts,
                        state.receipts_size,
                        change.touched,
                        change.record,
                    )
                )
            _insert(connection, _SESSIONS, rows)
            connection.execute(_SET_CLOCK, clock)
        return committed

    @staticmethod
    def _collect_events(changes: Sequence[Change], committed: Committed) -> list[tuple[int, int, bytes]]:
        """Return the rows of all events, and note them, and the logs that end, in the states."""
        rows = []
        for change in changes:
            state = committed.states[change.position]
            if change.record is None:
                committed.dropped.append((state.log, change.position))
                continue
            if change.begins_log is not None and change.begins_log != state.log:
                committed.dropped.append((state.log, None))
                state.log, state.first, state.size = change.begins_log, 1, state.receipts_size
                state.weights, state.weights_from = [], 0
            for seq, weight, body in change.events:
                rows.append((place(state.log, seq), weight, body))
                state.size += weight
        return rows

    def _store_receipts(
        self,
        connection: sqlite3.Connection,
        receipts: dict[int, list[NewReceipt]],
        committed: Committed,
    ) -> None:
        """Store receipts, and delete those that they replace, and the oldest beyond the bounds."""
        limit = self._history_bytes // 4
        inserted: list[tuple[int, int, str, bytes]] = []
        deleted: list[tuple[int, int]] = []
        for position, added in receipts.items():
            state = committed.states[position]
            stored = added[0].stored
            keys = {receipt.key for receipt in added}
            replaced = [stored[key] for key in keys if key in stored]
            count = state.receipts + len(added) - len(replaced)
            size = state.receipts_size + sum(r.size for r in added) - sum(r.size for r in replaced)
            deleted += [(position, receipt.number) for receipt in replaced]
            oldest = iter(stored.items())
            evicted = committed.evicted[position] = []
            while count > 1 and (count > MAX_RECEIPTS or size > limit):
                key, receipt = next(oldest, (None, None))
                if key is None or receipt is None:
                    # None but new ones are left.
                    new, *added = added
                    key, number, taken = new.key, new.number, new.size
                elif key in keys:
                    continue
                else:
                    number, taken = receipt.number, receipt.size
                    deleted.append((position, number))
                evicted.append(key)
                count -= 1
                size -= taken
            inserted += [(position, receipt.number, receipt.key, receipt.body) for receipt in added]
            state.size += size - state.receipts_size
            state.receipts, state.receipts_size = count, size
        connection.executemany("DELETE FROM receipts WHERE position = ? AND number = ?", deleted)
        _insert(connection, _RECEIPTS, inserted)

    def _trim(self, connection: sqlite3.Connection, state: LogState, last_seq: int) -> None:
        """Move ``first`` on until the log is within its bounds, at most to the last event."""
        newest_first = last_seq - self._history_events + 1
        while state.first < last_seq and (state.first < newest_first or state.size > self._history_bytes):
            if not state.weights_from <= state.first < state.weights_from + len(state.weights):
                # More than needed now: the next appends need them.
                state.weights = [
                    weight
                    for (weight,) in connection.execute(
                        "SELECT weight FROM events WHERE place >= ? AND place < ? ORDER BY place LIMIT ?",
                        (
                            place(state.log, state.first),
                            place(state.log + 1, 0),
                            max(newest_first - state.first, WEIGHTS),
                        ),
                    )
                ]
                state.weights_from = state.first
            if not state.weights:
                break  # the file is damaged
            state.size -= state.weights[state.first - state.weights_from]
            state.first += 1

    def store_clock(self, clock: tuple[float, float]) -> None:
        """Store for how many seconds the file has been in use, and the POSIX time."""
        with self._transaction() as connection:
            connection.execute(_SET_CLOCK, clock)

    def probe(self) -> None:
        """Write something, to find out whether that is possible."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO events VALUES (0, 0, zeroblob(?))", (PROBE,))
        with self._transaction() as connection:
            connection.execute("DELETE FROM events WHERE place = 0")

    def delete_logs(self, items: Sequence[tuple[int, int | None]]) -> int:
        """Delete dropped logs, with the receipts of those that have a position: one step.

        Returns how many of them are deleted, beginning with the first.
        """
        left = STEP_ROWS
        done = 0
        with self._transaction() as connection:
            for log, position in items:
                left -= self._delete_events(connection, log, None, left)
                if position is not None and left > 0:
                    left -= connection.execute(
                        "DELETE FROM receipts WHERE position = ? AND number IN "
                        "(SELECT number FROM receipts WHERE position = ? LIMIT ?)",
                        (position, position, left),
                    ).rowcount
                if left <= 0:
                    break
                connection.execute("DELETE FROM dropped WHERE log = ?", (log,))
                done += 1
        return done

    def delete_events(self, log: int, before: int) -> bool:
        """Delete the events of a log before a ``seq``: one step. Return whether that was all."""
        with self._transaction() as connection:
            return self._delete_events(connection, log, before, STEP_ROWS) < STEP_ROWS

    @staticmethod
    def _delete_events(connection: sqlite3.Connection, log: int, before: int | None, limit: int) -> int:
        """Delete at most ``limit`` events, those before a ``seq`` or any.

        Returns how many, or ``limit`` if there may be more.
        """
        begin = place(log, 0)
        end = place(log + 1, 0) if before is None else place(log, before)
        rows = connection.execute(
            "SELECT place, weight FROM events WHERE place >= ? AND place < ? ORDER BY place LIMIT ?",
            (begin, end, limit),
        ).fetchall()
        size, last = 0, None
        for key, weight in rows:
            size, last = size + weight, key
            if size > STEP_BYTES:
                break
        if last is None:
            return 0
        connection.execute("DELETE FROM events WHERE place >= ? AND place <= ?", (begin, last))
        return len(rows) if last == rows[-1][0] else limit

    def shrink(self) -> bool:
        """Give free pages back to the file system: one step. Return whether that was all."""
        connection = self._connection
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        if not self._is_shrinking and free < max(pages * MOST_FREE, 2 * SPARE_PAGES):
            return True
        self._is_shrinking = free > SPARE_PAGES
        if self._is_shrinking:
            # A page is given back with each row that is read.
            connection.execute(f"PRAGMA incremental_vacuum({min(free - SPARE_PAGES, STEP_PAGES)})").fetchall()
        else:
            self.checkpoint()
        return not self._is_shrinking

    def checkpoint(self) -> None:
        """Copy what was committed from the WAL into the file, so that the WAL begins again."""
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
