"""The methods of an engine, and what it tells its listener. The package's docstring has its guarantees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import trio

from ..errors import InsufficientStorage, TooManySessions
from ..model import Event, Receipt, Session

__all__ = [
    "ALL",
    "MAX_RECEIPTS",
    "Engine",
    "EngineListener",
    "Page",
    "Repeated",
    "Stale",
    "may_exceed",
    "no_room",
    "receipt_size",
    "record_size",
    "too_many_sessions",
]

MAX_RECEIPTS = 1000
ALL = ""  # instead of a session's id, which is never empty: all sessions


class Stale(Exception):
    """The log has grown since the record was read: read again, decide again."""


class Repeated(Exception):
    """A request with this idempotency key is stored already; ``receipt`` is that of it."""

    def __init__(self, receipt: Receipt) -> None:
        super().__init__(receipt)
        self.receipt = receipt


class Page(msgspec.Struct, frozen=True):
    """A consistent read of a log: the record, the first ``seq`` that is still kept, some events."""

    session: Session
    first: int
    events: list[Event]


class EngineListener:
    """What an engine tells the rest of the server. It never waits for a listener; these do nothing."""

    def deliver(self, session: Session, events: Sequence[Event]) -> None:
        """Take events that are in the log, in its order."""

    def removed(self, session: Session, *, own: bool = True) -> None:
        """Take note of a session that was deleted or has expired. ``own``: this instance has removed it."""

    def resync(self, session_id: str) -> None:
        """Take note that what follows of a session does not continue what was delivered before.

        Its log is another one, or lost events that were not delivered: watchers resume with their cursors.
        """

    def received(self, events: Sequence[Event]) -> None:
        """Take note of events that another instance has recorded, before they are delivered."""

    def availability_changed(self, problem: str | None) -> None:
        """Take note that the engine cannot store (the reason, in a sentence), or can again (None)."""


class Engine(Protocol):
    """What the tracker and ``live`` need; the package's docstring has the guarantees."""

    @property
    def problem(self) -> str | None:
        """Why nothing can be stored now, in a sentence; None if all is well."""

    @property
    def immediate(self) -> bool:
        """Whether no method but ``run`` ever waits, or raises ``Unavailable``."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the engine, report that it has started, and serve until cancelled; then close it.

        Raises:
            ConfigError: it cannot be opened.
        """

    async def load(self, session_id: str) -> Session | None:
        """Return the session's record as it is stored, None if there is none."""

    async def latest(self, session_id: str) -> Session | None:
        """Return the record that the next event would follow, as far as this instance knows.

        It may contain what is being stored now, or lack what another instance has stored: ``append`` finds
        that out. Nothing is refused because of it; see ``settled``.
        """

    async def settled(self, session_id: str) -> Session | None:
        """Return the record as it is stored once the appends that have begun here are over."""

    async def append(
        self,
        session: Session,
        events: Sequence[Event],
        *,
        receipt: tuple[str, Receipt] | None = None,
        replaces: str | None = None,
    ) -> None:
        """Store ``session``, ``events`` and the receipt of an idempotency key together, and deliver.

        A session without a record begins its log. ``session.seq`` is the last event's. ``replaces`` is the
        epoch of the log that this one takes the place of; its receipts are kept.

        Raises:
            Stale: the stored log does not end where the first of ``events`` begins, or it is another one
                than that to be replaced.
            Repeated: a receipt with this key is stored whose ``count`` is not smaller.
            TooManySessions: it would begin one more session of its owner than there may be.
            InsufficientStorage: the disk or the memory is full, or the logs take ``max_log_bytes``.
            Unavailable: nothing can be stored now.
        """

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        """Return at most ``limit`` events after ``after``, oldest first; None if there is no such session."""

    async def receipt(self, session_id: str, key: str) -> Receipt | None:
        """Return the receipt of an earlier request with this idempotency key, None if there is none."""

    async def sessions(self, newest: int | None = None) -> list[Session]:
        """Return all records, or that many of them, the newest first."""

    async def count(self) -> int:
        """Return how many sessions there are."""

    async def leased(self) -> list[Session]:
        """Return the sessions that have not ended and whose producer holds a lease."""

    async def jobs(self) -> list[Session]:
        """Return the sessions that have not ended and whose ``job`` is not None, by ``created_at``."""

    async def delete(self, session_id: str, epoch: str) -> bool:
        """Delete the session of that id and epoch, and say so; return False if there is none."""

    async def expire(self, watched: Callable[[str], bool]) -> None:
        """Delete the sessions whose retention time is over, and say so.

        One that has not ended is kept while ``watched`` returns True for its id, on any instance.
        """

    def follow(self, session_id: str) -> None:
        """Begin to deliver what is appended to a session, or to ``ALL``, by any instance."""

    def unfollow(self, session_id: str) -> None:
        """End that."""

    async def wait_followed(self, session_id: str) -> None:
        """Wait until everything that is appended from now on is delivered.

        Raises:
            Unavailable: that cannot be said now.
        """


def record_size(session: Session) -> int:
    """Return about what a session takes besides its events and receipts, in bytes."""
    size = 512 + len(session.id)
    if session.owner is not None:
        size += len(session.owner)
    if session.title is not None:
        size += len(session.title)
    if session.viewers:
        size += sum(map(len, session.viewers))
    if session.data is not msgspec.UNSET:
        size += len(session.data)
    if session.original is not None:
        size += len(session.original.data)
    if (progress := session.progress) is not None:
        size += progress.size
        if progress.data is not msgspec.UNSET:
            size += len(progress.data)
    return size


def may_exceed(session: Session, current: Session | None) -> bool:
    """Return whether a session is stored although there is no room: it ends, and can be deleted then.

    ``current`` is the record before it; None: there is none.
    """
    return session.ended and current is not None and current.epoch == session.epoch


def no_room(limit: int) -> InsufficientStorage:
    """Return why nothing is stored, although there may be space on the disk or in the memory."""
    return InsufficientStorage(
        f"the logs take max_log_bytes = {limit} bytes, and no more sessions that have ended can be deleted: "
        "delete some others, or raise that limit",
        limit="max_log_bytes",
    )


def too_many_sessions(limit: int) -> TooManySessions:
    """Return why no other session of an owner is created."""
    return TooManySessions(
        f"this owner has max_sessions_per_owner = {limit} sessions already: delete some, or wait until those "
        "that have ended expire",
        limit="max_sessions_per_owner",
    )


def receipt_size(key: str, receipt: Receipt) -> int:
    """Return about what a receipt takes, in bytes."""
    return 256 + len(key) + len(receipt.id)
