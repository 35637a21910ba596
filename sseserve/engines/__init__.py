"""Where logs live, and how several instances hear each other.

An engine keeps sessions and their logs. It decides nothing: ``tracker`` hands it the record after an
update together with the events that the update made, and the engine stores both or neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from ..config import Settings
from ..errors import ConfigError
from ..model import Event, Receipt, Session

__all__ = ["Deliver", "Engine", "Page", "Stale", "open_engine"]

# Called by an engine, synchronously and in log order, for every event it has stored.
Deliver = Callable[[Session, Sequence[Event]], None]


class Stale(Exception):
    """The log has moved on since the record was read: read again, decide again."""


class Page(msgspec.Struct, frozen=True):
    """A consistent look at a log: the record, the first ``seq`` that is still kept, some events."""

    session: Session
    first: int
    events: list[Event]


class Engine(Protocol):
    """What ``tracker`` and ``watching`` need. Every method is atomic with respect to cancellation."""

    async def load(self, session_id: str) -> Session | None:
        """Return the session's record, None if there is none."""

    async def append(
        self,
        session: Session,
        events: Sequence[Event],
        *,
        receipt: tuple[str, Receipt] | None = None,
    ) -> None:
        """Store ``session``, ``events`` and the receipt of an idempotency key together, and deliver.

        A session without a record begins its log. ``session.seq`` is the last event's.

        Raises:
            Stale: the stored log does not end where the first of ``events`` begins.
        """

    async def read(self, session_id: str, after: int, limit: int) -> Page | None:
        """Return at most ``limit`` events behind ``after``, oldest first; None without such a session."""

    async def receipt(self, session_id: str, key: str) -> Receipt | None:
        """Return what an earlier request with this idempotency key was told."""

    async def sessions(self) -> list[Session]:
        """All records, the newest first."""

    async def count(self) -> int:
        """How many sessions there are."""

    async def leased(self) -> list[Session]:
        """The sessions without an end whose producer holds a lease."""

    async def delete(self, session_id: str, epoch: str) -> bool:
        """Forget that life of a session; False if there is none."""

    async def expire(self, now: float, watched: Callable[[str], bool]) -> list[Session]:
        """Forget the sessions whose time is over and return them; one that is watched has no end yet."""


def open_engine(url: str, settings: Settings, deliver: Deliver) -> Engine:
    """Open the engine that a URL names: ``memory:``.

    Raises:
        ConfigError: no such engine.
    """
    from .memory import MemoryEngine

    if url == "memory:":
        return MemoryEngine(settings, deliver)
    raise ConfigError(f"there is no engine for {url!r}")
