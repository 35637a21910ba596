"""A file's sessions as NDJSON, and back; and whether a file is sound. Blocks: for the command line.

The first line, ``{"sseserve_log": 1, "seconds": ..., "posix": ...}``, is the format and the file's clock.
Then come the sessions, the oldest first: ``{"session": RECORD, "touched": SECONDS}``, followed by its events,
``{"seq": 1, "event": EVENT}``, and its receipts, ``{"key": "...", "receipt": RECEIPT}``; then the revocations
of tokens, ``{"revocation": BASE64, "until": POSIX SECONDS}``, without which a token that was revoked would be
valid again. The last line is ``{"sessions": N, "events": N, "receipts": N}``: without it the export is not
complete.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from ...errors import ConfigError, Invalid
from ...model import Cursor, Event, Session
from ..base import receipt_size
from ..codec import decode_event, decode_receipt, decode_session
from .changes import MAX_SEQ, place, seq_of
from .file import LogFile, connect, open_for_reading

__all__ = ["Totals", "check_log", "export_log", "import_log"]

FORMAT = 1


class Totals(msgspec.Struct):
    """How much was exported, imported or checked."""

    sessions: int = 0
    events: int = 0
    receipts: int = 0


class _Head(msgspec.Struct):
    sseserve_log: int
    seconds: float
    posix: float


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """Any line but the first."""

    session: msgspec.Raw = msgspec.Raw()
    touched: float = 0.0
    seq: int = 0
    event: msgspec.Raw = msgspec.Raw()
    key: str = ""
    receipt: msgspec.Raw = msgspec.Raw()
    revocation: bytes | None = None
    until: float = 0.0
    sessions: int | None = None
    events: int = 0
    receipts: int = 0


def export_log(path: Path, output: BinaryIO) -> Totals:
    """Write all sessions of a file, as they are at one moment, also while a server has it open.

    Raises:
        ConfigError: it cannot be opened, or is damaged.
    """
    counts = Totals()
    with _snapshot(path) as connection:
        seconds, posix = connection.execute("SELECT seconds, posix FROM clock").fetchone()
        _write(output, _Head(FORMAT, seconds, posix))
        sessions = connection.execute(
            "SELECT position, log, first, touched, record FROM sessions ORDER BY position"
        )
        for position, log, first, touched, record in sessions:
            decode_session(record)
            counts.sessions += 1
            _write(output, {"session": msgspec.Raw(record), "touched": touched})
            for key, body in connection.execute(
                "SELECT place, body FROM events WHERE place >= ? AND place < ? ORDER BY place",
                (place(log, first), place(log + 1, 0)),
            ):
                seq = seq_of(key)
                decode_event(seq, body)
                counts.events += 1
                _write(output, {"seq": seq, "event": msgspec.Raw(body)})
            for key, body in connection.execute(
                "SELECT key, body FROM receipts WHERE position = ? ORDER BY number", (position,)
            ):
                decode_receipt(body)
                counts.receipts += 1
                _write(output, {"key": key, "receipt": msgspec.Raw(body)})
        for value, until in connection.execute("SELECT value, until FROM revocations ORDER BY value"):
            _write(output, {"revocation": value, "until": until})
        _write(output, counts)
    return counts


def _write(output: BinaryIO, value: object) -> None:
    output.write(msgspec.json.encode(value) + b"\n")


@contextmanager
def _snapshot(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection in a transaction that sees the file as it is now."""
    with closing(open_for_reading(path)) as connection:
        try:
            connection.execute("BEGIN")
            yield connection
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise ConfigError(f"{path} is damaged ({error}): see sseserve log check") from error


def import_log(path: Path, lines: Iterable[bytes]) -> Totals:
    """Store sessions that were exported in a new or empty file: all or nothing.

    Raises:
        ConfigError: the file cannot be used, or has sessions.
        Invalid: a line is wrong; the message has its number.
    """
    is_new = not path.exists()
    with LogFile(path):
        try:
            return _import(path, lines)
        except BaseException:
            if is_new:
                path.unlink(missing_ok=True)
            raise


def _import(path: Path, lines: Iterable[bytes]) -> Totals:
    with closing(connect(path, "full")) as connection:
        (sessions,) = connection.execute("SELECT count(*) FROM sessions").fetchone()
        if sessions:
            raise ConfigError(f"{path} has {sessions} sessions already: import into a new file")
        number = 0
        try:
            connection.execute("BEGIN IMMEDIATE")
            importer = _Importer(connection)
            for line in lines:
                number += 1
                importer.take(line)
            number += 1
            importer.finish()
            connection.execute("COMMIT")
        except (msgspec.DecodeError, Invalid, RecursionError) as error:
            raise Invalid(f"line {number}: {error}; nothing was imported") from error
        except sqlite3.IntegrityError as error:
            raise Invalid(f"line {number}: it is there twice ({error}); nothing was imported") from error
        except sqlite3.Error as error:
            raise ConfigError(f"cannot write {path}: {error}; nothing was imported") from error
    return importer.counts


class _Importer:
    """Stores one line after another."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.counts = Totals()
        self._has_head = False
        self._is_complete = False
        self._session: Session | None = None
        self._first = self._seq = self._size = self._receipts = self._receipts_size = 0

    def take(self, line: bytes) -> None:
        if self._is_complete:
            raise Invalid("it follows the last one")
        if not self._has_head:
            self._take_head(line)
            return
        value = msgspec.json.decode(line, type=_Line)
        if bytes(value.session):
            self._end_session()
            self._begin_session(bytes(value.session), value.touched)
        elif value.sessions is not None:
            self._end_session()
            counts = Totals(value.sessions, value.events, value.receipts)
            if counts != self.counts:
                raise Invalid(f"there should be {counts}, but there are {self.counts}")
            self._is_complete = True
        elif value.revocation is not None:
            self._connection.execute("INSERT INTO revocations VALUES (?, ?)", (value.revocation, value.until))
        elif self._session is None:
            raise Invalid("a session must come first")
        elif bytes(value.event):
            self._take_event(decode_event(value.seq, bytes(value.event)), bytes(value.event))
        elif bytes(value.receipt):
            self._take_receipt(value.key, bytes(value.receipt))
        else:
            raise Invalid("it is no session, event, receipt or revocation")

    def finish(self) -> None:
        if not self._is_complete:
            raise Invalid("the last line is missing: the export is not complete")

    def _take_head(self, line: bytes) -> None:
        try:
            head = msgspec.json.decode(line, type=_Head)
        except msgspec.DecodeError:
            raise Invalid("it is not what sseserve log export writes") from None
        if head.sseserve_log != FORMAT:
            raise Invalid(f"the format {head.sseserve_log} is of another sseserve, this one reads {FORMAT}")
        self._connection.execute("UPDATE clock SET seconds = ?, posix = ?", (head.seconds, head.posix))
        self._has_head = True

    def _begin_session(self, record: bytes, touched: float) -> None:
        self._session = session = decode_session(record)
        if not session.id or Cursor.parse(str(session.cursor)) != session.cursor:
            raise Invalid(f"no session can have the id {session.id!r} and the cursor {str(session.cursor)!r}")
        self.counts.sessions += 1
        self._first = self._seq = self._size = self._receipts = self._receipts_size = 0
        number = self.counts.sessions
        self._connection.execute(
            "INSERT INTO sessions VALUES (?, ?, ?, 0, 0, 0, 0, ?, ?)",
            (number, session.id, number, touched, record),
        )

    def _take_event(self, event: Event, body: bytes) -> None:
        if not 0 < event.seq <= MAX_SEQ:
            raise Invalid(f"there is no event {event.seq}")
        if self._seq and event.seq != self._seq + 1:
            raise Invalid(f"event {event.seq} follows event {self._seq}")
        self._first = self._first or event.seq
        self._seq = event.seq
        self._size += event.weight
        self.counts.events += 1
        self._connection.execute(
            "INSERT INTO events VALUES (?, ?, ?)",
            (place(self.counts.sessions, event.seq), event.weight, body),
        )

    def _take_receipt(self, key: str, body: bytes) -> None:
        size = receipt_size(key, decode_receipt(body))
        self._receipts += 1
        self._receipts_size += size
        self.counts.receipts += 1
        self._connection.execute(
            "INSERT INTO receipts VALUES (?, ?, ?, ?)",
            (self.counts.sessions, self.counts.receipts, key, body),
        )

    def _end_session(self) -> None:
        if (session := self._session) is None:
            return
        if not self._seq or self._seq != session.seq:
            raise Invalid(f"the events of {session.id!r} before it end at {self._seq}, not at {session.seq}")
        self._connection.execute(
            "UPDATE sessions SET first = ?, size = ?, receipts = ?, receipts_size = ? WHERE position = ?",
            (
                self._first,
                self._size + self._receipts_size,
                self._receipts,
                self._receipts_size,
                self.counts.sessions,
            ),
        )


_UNKNOWN_LOGS = (
    "SELECT DISTINCT place >> 32 FROM events WHERE place != 0 AND place >> 32 NOT IN "  # 0: see Writer.probe
    "(SELECT log FROM sessions UNION SELECT log FROM dropped)"
)
_UNKNOWN_POSITIONS = (
    "SELECT DISTINCT position FROM receipts WHERE position NOT IN "
    "(SELECT position FROM sessions UNION SELECT position FROM dropped WHERE position IS NOT NULL)"
)


def check_log(path: Path, problems: list[str]) -> Totals:
    """Check a file, as it is at one moment, also while a server has it open.

    Args:
        path: of the file.
        problems: gets a sentence for each problem.

    Raises:
        ConfigError: it cannot be opened.
    """
    counts = Totals()
    with closing(open_for_reading(path)) as connection:
        try:
            connection.execute("BEGIN")
            found = [text for (text,) in connection.execute("PRAGMA integrity_check")]
            if found != ["ok"]:
                problems += [f"SQLite: {text}" for text in found]
            positions = connection.execute("SELECT position FROM sessions ORDER BY position").fetchall()
            for (position,) in positions:
                _check_session(connection, position, counts, problems)
            for what, query in (
                ("events of log", _UNKNOWN_LOGS),
                ("receipts of position", _UNKNOWN_POSITIONS),
            ):
                unknown = connection.execute(query).fetchall()
                problems += [f"the {what} {number} belong to no session" for (number,) in unknown]
        except sqlite3.Error as error:
            problems.append(f"SQLite: {error}")
    return counts


def _check_session(
    connection: sqlite3.Connection, position: int, counts: Totals, problems: list[str]
) -> None:
    session_id, log, first, size, receipts, receipts_size, record = connection.execute(
        "SELECT id, log, first, size, receipts, receipts_size, record FROM sessions WHERE position = ?",
        (position,),
    ).fetchone()
    counts.sessions += 1

    def problem(text: str) -> None:
        problems.append(f"session {session_id!r}: {text}")

    try:
        session = decode_session(record)
    except msgspec.DecodeError as error:
        problem(f"its record cannot be read: {error}")
        return
    if session.id != session_id:
        problem(f"its record is that of {session.id!r}")
    expected, found_size, last_progress = first, 0, None
    for key, weight, body in connection.execute(
        "SELECT place, weight, body FROM events WHERE place >= ? AND place < ? ORDER BY place",
        (place(log, first), place(log + 1, 0)),
    ):
        seq = seq_of(key)
        counts.events += 1
        if seq != expected:
            problem(f"the events {expected} to {seq - 1} are missing")
        expected = seq + 1
        found_size += weight
        try:
            event = decode_event(seq, body)
        except msgspec.DecodeError as error:
            problem(f"event {seq} cannot be read: {error}")
            continue
        if event.weight != weight:
            problem(f"event {seq} takes {event.weight} bytes, not {weight}")
        last_progress = event.progress or last_progress
    if expected != session.seq + 1:
        problem(f"its events end at {expected - 1}, its record is at {session.seq}")
    if last_progress is not None and (
        session.progress is None or last_progress.state is not session.progress.state
    ):
        problem(f"its last progress is {last_progress.state}, its record says otherwise")
    found, found_receipts_size = 0, 0
    for key, body in connection.execute("SELECT key, body FROM receipts WHERE position = ?", (position,)):
        found += 1
        counts.receipts += 1
        try:
            found_receipts_size += receipt_size(key, decode_receipt(body))
        except msgspec.DecodeError as error:
            problem(f"the receipt of {key!r} cannot be read: {error}")
    if (found, found_receipts_size) != (receipts, receipts_size):
        problem(f"{found} receipts of {found_receipts_size} bytes, not {receipts} of {receipts_size} bytes")
    if found_size + found_receipts_size != size:
        problem(f"it takes {found_size + found_receipts_size} bytes, not {size}")
