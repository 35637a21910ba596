"""The changes that are being stored: what the next change of a session builds on, until they are."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ...model import Event, Receipt, Session
from .changes import Change
from .receipts import Log

__all__ = ["Pending", "PendingChanges"]


class Pending:
    """A change that is being stored. ``session`` is the record after it, None after a deletion."""

    __slots__ = (
        "change",
        "creates",
        "events",
        "finished",
        "growth",
        "is_over",
        "log",
        "previous",
        "receipt",
        "session",
    )

    def __init__(self, log: Log, session: Session | None, change: Change) -> None:
        self.log = log
        self.session = session
        self.change = change
        self.events: Sequence[Event] = ()
        self.creates = False  # there is no such session before it
        self.growth = 0  # how many more bytes the sessions take after it, at most
        self.receipt: tuple[str, Receipt] | None = None
        self.previous: Pending | None = None  # of the same session, if it was being stored too
        self.finished: trio.Event | None = None
        self.is_over = False

    async def wait(self) -> None:
        """Wait until it is stored, or has failed."""
        if not self.is_over:
            if self.finished is None:
                self.finished = trio.Event()
            await self.finished.wait()

    def end(self) -> None:
        """Wake those who wait."""
        self.is_over = True
        self.previous = None
        if self.finished is not None:
            self.finished.set()


class PendingChanges:
    """The last change of each session that is being stored, and all with a receipt by its key."""

    def __init__(self) -> None:
        self._last: dict[str, Pending] = {}
        self._with_key: dict[tuple[str, str], Pending] = {}
        self._owned: dict[str, int] = {}  # how many sessions are being created, by owner
        self.growth = 0  # how many more bytes the sessions take after all of them, at most

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._last

    def last(self, session_id: str) -> Pending | None:
        """Return the last change of a session that is being stored."""
        return self._last.get(session_id)

    def with_key(self, session_id: str, key: str) -> Pending | None:
        """Return the change that has the receipt of an idempotency key."""
        return self._with_key.get((session_id, key))

    def count_owned(self, owner: str) -> int:
        """Return how many sessions of an owner are being created."""
        return self._owned.get(owner, 0)

    def _count_owner(self, pending: Pending, change: int) -> None:
        session = pending.session
        if pending.creates and session is not None and session.owner is not None:
            self._owned[session.owner] = self._owned.get(session.owner, 0) + change
            if not self._owned[session.owner]:
                del self._owned[session.owner]

    def add(self, pending: Pending) -> None:
        """Take note of a change that builds on the last one of its session."""
        session_id = pending.change.session_id
        pending.previous = self._last.get(session_id)
        self._last[session_id] = pending
        self._count_owner(pending, 1)
        self.growth += pending.growth
        if pending.receipt is not None:
            self._with_key[session_id, pending.receipt[0]] = pending

    def withdraw(self, pending: Pending) -> bool:
        """Leave a change out, unless another one builds on it; returns whether it is."""
        session_id = pending.change.session_id
        if self._last.get(session_id) is not pending:
            return False
        previous = pending.previous
        if previous is None or previous.is_over:
            del self._last[session_id]
        else:
            self._last[session_id] = previous
        self.end(pending)
        return True

    def end(self, pending: Pending) -> None:
        """Take note that a change is stored, or never will be."""
        self._count_owner(pending, -1)
        self.growth -= pending.growth
        session_id = pending.change.session_id
        if self._last.get(session_id) is pending:
            del self._last[session_id]
        if pending.receipt is not None:
            self._with_key.pop((session_id, pending.receipt[0]), None)
        pending.end()
