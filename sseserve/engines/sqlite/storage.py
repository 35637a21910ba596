"""The SQL of the SQLite engine: commits batches of changes, reads, and cleans up in steps. Knows no Trio.

A log's bounds apply as soon as a change is committed, by ``first``; the events before it are deleted later.
"""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from ...model import Event, Receipt, Session
from ..base import MAX_RECEIPTS, Page, receipt_size
from ..codec import decode_event, decode_receipt, decode_session
from .file import connect

__all__ = ["Change", "LogState", "Reader", "StoredReceipt", "StoredSession", "Writer"]

STEP_ROWS = 256  # that one step of the clean-up deletes at most
STEP_BYTES = 2**20  # and about as many bytes of them
STEP_PAGES = 128  # free pages that one step gives back
SPARE_PAGES = 64  # free pages that are kept for what comes next
MOST_FREE = 0.25  # of the pages, from which on the file shrinks
WAL_LIMIT = 64 * 2**20  # bytes of the WAL, from which on a commit waits for a checkpoint
PROBE_LOG = 0  # belongs to no session
PROBE = 64 * 1024  # bytes that must fit on a disk that is not full any more

_STORE_SESSION = (
    "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (position) DO UPDATE SET "
    "log = excluded.log, first = excluded.first, size = excluded.size, receipts = excluded.receipts, "
    "receipts_size = excluded.receipts_size, touched = excluded.touched, record = excluded.record"
)
_SET_CLOCK = "UPDATE clock SET seconds = ?, posix = ?"


class LogState:
    """What is stored of a session beside its record, see the table sessions. Sizes are in bytes."""

    __slots__ = ("first", "log", "position", "receipts", "receipts_size", "size")

    def __init__(self, position: int, log: int) -> None:
        self.position = position
        self.log = log
        self.first = 1
        self.size = 0
        self.receipts = 0
        self.receipts_size = 0


class StoredReceipt(NamedTuple):
    """A receipt, and its number: a session's newest has the highest."""

    number: int
    receipt: Receipt


class Change:
    """One append, or a deletion (``record`` is None), encoded.

    Args:
        position: of the session.
        session_id: of the session.
        touched: when, on the file's clock.
    """

    __slots__ = (
        "begins_log",
        "events",
        "evicted",
        "last_seq",
        "position",
        "receipt",
        "record",
        "session_id",
        "touched",
    )

    def __init__(self, position: int, session_id: str, touched: float) -> None:
        self.position = position
        self.session_id = session_id
        self.touched = touched
        self.record: bytes | None = None
        self.last_seq = 0
        self.begins_log: int | None = None  # the number of a new log
        self.events: list[tuple[int, int, bytes]] = []  # seq, weight, body
        # number, key, size, body; and the number and the size of an earlier one with this key
        self.receipt: tuple[int, str, int, bytes, tuple[int, int] | None] | None = None
        self.evicted: list[str] = []  # keys whose receipts have made room, as the commit has found

    @property
    def size(self) -> int:
        """About what it takes in the transaction, in bytes."""
        return 512 + len(self.record or b"") + sum(len(body) for _, _, body in self.events)


class StoredSession(NamedTuple):
    """A row of the table sessions."""

    state: LogState
    touched: float
    session: Session


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
        self._connection = connect(path, durability)
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
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

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

    def last_numbers(self) -> tuple[int, int, int]:
        """Return the highest position, number of a log, and number of a receipt that are in use."""
        (position, log), (dropped_position, dropped_log), (receipt,) = (
            self._connection.execute(f"SELECT {columns}").fetchone()
            for columns in (
                "ifnull(max(position), 0), ifnull(max(log), 0) FROM sessions",
                "ifnull(max(position), 0), ifnull(max(log), 0) FROM dropped",
                "ifnull(max(number), 0) FROM receipts",
            )
        )
        return max(position, dropped_position), max(log, dropped_log), receipt

    def commit(
        self, changes: Sequence[Change], states: Iterable[LogState], clock: tuple[float, float]
    ) -> tuple[dict[int, LogState], list[tuple[int, int | None]]]:
        """Store changes in one transaction.

        Args:
            changes: in their order.
            states: of the sessions that they change, as they are stored.
            clock: for how many seconds the file has been in use, and the POSIX time.

        Returns:
            The new states by position, and the logs that are to be deleted, with the position if the session
            is deleted too.
        """
        by_position = {state.position: copy.copy(state) for state in states}
        last: dict[int, Change] = {}
        dropped: list[tuple[int, int | None]] = []
        with self._transaction() as connection:
            self._insert_events(connection, changes, by_position, dropped)
            for change in changes:
                last[change.position] = change
                if change.receipt is not None:
                    self._store_receipt(connection, change, by_position[change.position])
            # First those, since a new session may have the id of one that is deleted.
            deleted = [(position,) for position, change in last.items() if change.record is None]
            if deleted:
                connection.executemany("DELETE FROM sessions WHERE position = ?", deleted)
            if dropped:
                connection.executemany("INSERT INTO dropped VALUES (?, ?)", dropped)
            rows = []
            for position, change in last.items():
                if change.record is None:
                    del by_position[position]
                    continue
                state = by_position[position]
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
            connection.executemany(_STORE_SESSION, rows)
            connection.execute(_SET_CLOCK, clock)
        return by_position, dropped

    @staticmethod
    def _insert_events(
        connection: sqlite3.Connection,
        changes: Sequence[Change],
        states: dict[int, LogState],
        dropped: list[tuple[int, int | None]],
    ) -> None:
        events = []
        for change in changes:
            state = states[change.position]
            if change.record is None:
                dropped.append((state.log, change.position))
                continue
            if change.begins_log is not None and change.begins_log != state.log:
                dropped.append((state.log, None))
                state.log, state.first, state.size = change.begins_log, 1, state.receipts_size
            for seq, weight, body in change.events:
                events.append((state.log, seq, weight, body))
                state.size += weight
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", events)

    def _store_receipt(self, connection: sqlite3.Connection, change: Change, state: LogState) -> None:
        assert change.receipt is not None
        number, key, size, body, earlier = change.receipt
        taken = size
        state.receipts += 1
        if earlier is not None:
            connection.execute(
                "DELETE FROM receipts WHERE position = ? AND number = ?", (state.position, earlier[0])
            )
            state.receipts -= 1
            taken -= earlier[1]
        connection.execute("INSERT INTO receipts VALUES (?, ?, ?, ?)", (state.position, number, key, body))
        limit = self._history_bytes // 4
        while state.receipts > 1 and (state.receipts > MAX_RECEIPTS or state.receipts_size + taken > limit):
            oldest, old_key, old_body = connection.execute(
                "SELECT number, key, body FROM receipts WHERE position = ? ORDER BY number LIMIT 1",
                (state.position,),
            ).fetchone()
            connection.execute(
                "DELETE FROM receipts WHERE position = ? AND number = ?", (state.position, oldest)
            )
            change.evicted.append(old_key)
            state.receipts -= 1
            taken -= receipt_size(old_key, decode_receipt(old_body))
        state.receipts_size += taken
        state.size += taken

    def _trim(self, connection: sqlite3.Connection, state: LogState, last_seq: int) -> None:
        """Move ``first`` on until the log is within its bounds, at most to the last event."""
        newest_first = last_seq - self._history_events + 1
        while state.first < last_seq and (state.first < newest_first or state.size > self._history_bytes):
            rows = connection.execute(
                "SELECT weight FROM events WHERE log = ? AND seq >= ? AND seq < ? ORDER BY seq LIMIT ?",
                (state.log, state.first, last_seq, max(newest_first - state.first, 16)),
            ).fetchall()
            if not rows:
                break  # the file is damaged
            for (weight,) in rows:
                if state.first >= newest_first and state.size <= self._history_bytes:
                    break
                state.size -= weight
                state.first += 1

    def store_clock(self, clock: tuple[float, float]) -> None:
        """Store for how many seconds the file has been in use, and the POSIX time."""
        with self._transaction() as connection:
            connection.execute(_SET_CLOCK, clock)

    def probe(self) -> None:
        """Write something, to find out whether that is possible."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO events VALUES (?, 0, 0, zeroblob(?))", (PROBE_LOG, PROBE)
            )
        with self._transaction() as connection:
            connection.execute("DELETE FROM events WHERE log = ?", (PROBE_LOG,))

    def delete_logs(self, items: Sequence[tuple[int, int | None]]) -> int:
        """Delete dropped logs, with the receipts of those that have a position: one step.

        Returns how many of them are deleted, beginning with the first.
        """
        left = STEP_ROWS
        done = 0
        with self._transaction() as connection:
            for log, position in items:
                left -= self._delete_events(connection, log, 2**62, left)
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
    def _delete_events(connection: sqlite3.Connection, log: int, before: int, limit: int) -> int:
        """Delete at most ``limit`` events; return how many, or ``limit`` if there may be more."""
        rows = connection.execute(
            "SELECT seq, weight FROM events WHERE log = ? AND seq < ? ORDER BY seq LIMIT ?",
            (log, before, limit),
        ).fetchall()
        size, last = 0, None
        for seq, weight in rows:
            size, last = size + weight, seq
            if size > STEP_BYTES:
                break
        if last is None:
            return 0
        connection.execute("DELETE FROM events WHERE log = ? AND seq <= ?", (log, last))
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
        _checkpoint(self._connection)


def _checkpoint(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


class Reader:
    """A connection that reads, also while another writes. One thread at a time may call it.

    All methods raise ``sqlite3.Error``, or ``msgspec.DecodeError`` for a damaged record.
    """

    def __init__(self, path: Path) -> None:
        self._connection = connect(path)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def checkpoint(self) -> None:
        """Copy what was committed from the WAL into the file."""
        _checkpoint(self._connection)

    def read(self, position: int, after: int, limit: int) -> Page | None:
        """Return a page of a session's log; None if it is deleted."""
        connection = self._connection
        connection.execute("BEGIN")
        try:
            row = connection.execute(
                "SELECT log, first, record FROM sessions WHERE position = ?", (position,)
            ).fetchone()
            if row is None:
                return None
            log, first, record = row
            rows = connection.execute(
                "SELECT seq, body FROM events WHERE log = ? AND seq >= ? ORDER BY seq LIMIT ?",
                (log, max(after + 1, first), limit),
            ).fetchall()
        finally:
            connection.execute("COMMIT")
        events: list[Event] = [decode_event(seq, body) for seq, body in rows]
        return Page(decode_session(record), first, events)

    def receipts(self, position: int) -> dict[str, StoredReceipt]:
        """Return a session's receipts by key, the oldest first."""
        rows = self._connection.execute(
            "SELECT key, number, body FROM receipts WHERE position = ? ORDER BY number", (position,)
        )
        return {key: StoredReceipt(number, decode_receipt(body)) for key, number, body in rows}
