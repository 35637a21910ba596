"""The contract of an engine.

An engine keeps sessions and their logs. It decides nothing: the tracker passes it the record after an
update together with the events that the update made, and the engine stores both or neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from ..model import Event, Receipt, Session

__all__ = ["Deliver", "Engine", "Page", "Stale"]

# Called by an engine, synchronously and in log order, for every event it has stored.
Deliver = Callable[[Session, Sequence[Event]], None]


class Stale(Exception):
    """The log has grown since the record was read: read again, decide again."""


class Page(msgspec.Struct, frozen=True):
    """A consistent read of a log: the record, the first ``seq`` that is still kept, some events."""

    session: Session
    first: int
    events: list[Event]


class Engine(Protocol):
    """What the tracker and ``live`` need. Every method is atomic with respect to cancellation."""

    async def load(self, session_id: str) -> Session | None:
        """Return the session's record, None if there is none."""

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
        """

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        """Return at most ``limit`` events after ``after``, oldest first; None if there is no such session."""

    async def receipt(self, session_id: str, key: str) -> Receipt | None:
        """Return the receipt of an earlier request with this idempotency key, None if there is none."""

    async def sessions(self) -> list[Session]:
        """Return all records, the newest first."""

    async def count(self) -> int:
        """Return how many sessions there are."""

    async def leased(self) -> list[Session]:
        """Return the sessions that have not ended and whose producer holds a lease."""

    async def delete(self, session_id: str, epoch: str) -> bool:
        """Delete the session of that id and epoch; return False if there is none."""

    async def expire(self, watched: Callable[[str], bool]) -> list[Session]:
        """Delete the sessions whose retention time is over, and return them.

        One that has not ended is kept while ``watched`` returns True for its id. A jump of the clock of day
        deletes nothing.
        """
