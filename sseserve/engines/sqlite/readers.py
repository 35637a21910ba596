"""Reads of the SQLite engine: a few connections, each used by one thread at a time."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec
import trio

from ...errors import EngineUnavailable
from ...model import Event
from ..base import Page, receipt_size
from ..codec import decode_event, decode_receipt, decode_session
from .changes import StoredReceipt, place, seq_of
from .file import check_in_place, connect

__all__ = ["Reader", "Readers"]

T = TypeVar("T")
P = ParamSpec("P")

MOST = 4  # connections


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
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

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
                "SELECT place, body FROM events WHERE place >= ? AND place < ? ORDER BY place LIMIT ?",
                (place(log, max(after + 1, first)), place(log + 1, 0), limit),
            ).fetchall()
        finally:
            connection.execute("COMMIT")
        session = decode_session(record)
        events: list[Event] = [decode_event(seq_of(key), body) for key, body in rows]
        while events and events[-1].seq - events[0].seq >= len(events):
            events.pop()  # the file is damaged, and one before it is missing: the next page says so
        found = events[0].seq if events else session.seq + 1
        if limit and found > max(after + 1, first):
            first = found
        return Page(session, first, events)

    def receipts(self, position: int) -> OrderedDict[str, StoredReceipt]:
        """Return a session's receipts by key, the oldest first."""
        receipts: OrderedDict[str, StoredReceipt] = OrderedDict()
        for key, number, body in self._connection.execute(
            "SELECT key, number, body FROM receipts WHERE position = ? ORDER BY number", (position,)
        ):
            receipt = decode_receipt(body)
            receipts[key] = StoredReceipt(number, receipt_size(key, receipt), receipt)
        return receipts


class Readers:
    """Connections to one file that read; each is opened when it is needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[Reader] = []
        self._limiter = trio.CapacityLimiter(MOST)
        self._is_closed = False

    async def call(self, read: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a method of ``Reader`` returns, called in a thread.

        Raises:
            EngineUnavailable: the file cannot be read, or is closed.
        """
        if self._is_closed:
            raise EngineUnavailable("the server is shutting down")
        try:
            call = partial(self._call, read, *args, **kwargs)
            return await trio.to_thread.run_sync(call, limiter=self._limiter)
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise EngineUnavailable(f"the server's log cannot be read: {error}") from error

    def _call(self, read: Callable[Concatenate[Reader, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        # Each of these is one operation on a list, which threads may do at the same time.
        try:
            reader = self._idle.pop()
        except IndexError:
            check_in_place(self._path)
            reader = Reader(self._path)
        try:
            return read(reader, *args, **kwargs)
        finally:
            self._idle.append(reader)

    async def aclose(self) -> None:
        """Close the connections once nobody uses them."""
        self._is_closed = True
        users = [object() for _ in range(MOST)]
        for user in users:
            await self._limiter.acquire_on_behalf_of(user)
        for reader in self._idle:
            reader.close()
        for user in users:
            self._limiter.release_on_behalf_of(user)
