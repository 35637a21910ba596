"""What the instances of one server share besides the logs.

An instance is a process that serves the sessions of one engine. Where several can, the leader does what must
be done once: it judges leases, and ends the jobs of instances that are gone. Limits of streams hold for all
instances together, and whoever asks who watches a session is told of all.

Guarantee: everything ends in a bounded time. What the other instances do is not known at every moment: then
an instance acts on what it knows itself.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Mapping
from typing import Protocol, runtime_checkable

import trio

from ..concurrency import SLICE
from ..errors import InsufficientStorage

__all__ = [
    "MAX_REVOCATIONS",
    "Coordination",
    "Counts",
    "LocalCoordination",
    "RevocationStore",
    "RevocationTable",
    "Slots",
    "new_instance",
    "too_many_revocations",
]

MAX_REVOCATIONS = 100_000  # that are kept at a time
EXPIRE_INTERVAL = 60.0  # seconds

# How many watch a session, by protocol ("sse" or "ws") and dialect.
Counts = Mapping[tuple[str, str], int]


class Coordination(Protocol):
    """One instance's view of all of them."""

    @property
    def instance(self) -> str:
        """The id of this instance; each start of a process has another one."""

    @property
    def is_leader(self) -> bool:
        """Whether this instance leads now. Two may think so for a moment, which must do no harm."""

    def is_gone(self, instance: str) -> bool:
        """Return whether an instance is known to have stopped. In doubt it has not."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join the other instances, report that it has started, and leave them when cancelled."""

    def announce_job(self) -> None:
        """Let the other instances know that a job waits. Does not wait."""

    async def wait_for_news(self) -> None:
        """Wait until another instance announces a job, or is gone."""

    async def take_slot(self, name: str, limit: int) -> bool:
        """Take one of the ``limit`` slots of that name; return False if all are taken.

        Cancelled, it has taken none.
        """

    def release_slot(self, name: str) -> None:
        """Give a slot back."""

    def note_watchers(self, session_id: str) -> None:
        """Take note that other clients than before watch a session here."""

    async def watchers(self, session_id: str) -> dict[str, Counts]:
        """Return who watches a session, by instance."""

    async def store_ticket(self, key: str, value: bytes, seconds: float) -> None:
        """Keep a value for that many seconds, or until it is taken.

        Raises:
            Unavailable: it cannot be kept now.
        """

    async def take_ticket(self, key: str) -> bytes | None:
        """Return what is kept under a key, and forget it: of all that take it at once one gets it.

        Raises:
            Unavailable: that cannot be said now.
        """

    async def store_revocation(self, value: bytes, until: float) -> None:
        """Keep a revocation until then (POSIX seconds), and have ``on_revocation`` called on all instances.

        It is called before this returns on this instance, and within a second on those that can be reached;
        on the others before they can be, and on those that start later before they serve anything.

        Raises:
            InsufficientStorage: there are ``MAX_REVOCATIONS`` already.
            Unavailable: it cannot be kept now.
        """

    async def broadcast(self, message: bytes) -> None:
        """Have ``on_broadcast`` called on the other instances that can be reached now."""

    # Are set before ``run``; neither waits, or raises an error: another version may have made the bytes.
    on_revocation: Callable[[bytes], None]
    on_broadcast: Callable[[bytes], None]


class Slots:
    """How many slots of each name are taken in this instance; of the others there is no entry."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def add(self, name: str, change: int) -> int:
        """Count slots more or less; return how many there are."""
        count = self.taken.get(name, 0) + change
        if count:
            self.taken[name] = count
        else:
            del self.taken[name]
        return count


class RevocationTable:
    """The revocations that an instance knows, each until it may be forgotten (POSIX seconds).

    Args:
        on_revocation: is called with each when it becomes known.
    """

    def __init__(self, on_revocation: Callable[[bytes], None]) -> None:
        self._on_revocation = on_revocation
        self._until: dict[bytes, float] = {}
        self._expired_at = -math.inf

    def add(self, value: bytes, until: float) -> None:
        """Take note of a revocation."""
        known = self._until.get(value)
        self._until[value] = until if known is None else max(until, known)
        if known is None:
            self._on_revocation(value)

    def items(self) -> ItemsView[bytes, float]:
        """Return all, and until when each is kept."""
        return self._until.items()

    def has_space(self, now: float) -> bool:
        """Return whether another one may be added."""
        self.expire(now)
        return len(self._until) < MAX_REVOCATIONS

    def expire(self, now: float) -> None:
        """Forget those that have expired, at times."""
        if (
            len(self._until) >= MAX_REVOCATIONS
            or not self._expired_at <= now < self._expired_at + EXPIRE_INTERVAL
        ):
            self._expired_at = now
            self._until = {value: until for value, until in self._until.items() if until > now}


@runtime_checkable
class RevocationStore(Protocol):
    """Keeps revocations beyond the process; raises ``Unavailable`` or ``InsufficientStorage``."""

    async def load_revocations(self) -> list[tuple[bytes, float]]:
        """Return all that are kept, and until when each is."""

    async def store_revocation(self, value: bytes, until: float) -> None:
        """Keep one."""


class LocalCoordination:
    """The coordination of an engine that only one instance can use.

    Args:
        count_watchers: returns who watches a session here.
        store: keeps the revocations; None: they end with this process.
        clock: returns POSIX seconds.
    """

    is_leader = True

    def __init__(
        self,
        count_watchers: Callable[[str], Counts] = lambda _session_id: {},
        *,
        store: RevocationStore | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.instance = new_instance()
        self._store = store
        self._clock = clock
        self._revocations = RevocationTable(lambda value: self.on_revocation(value))
        self.slots = Slots()
        self._count_watchers = count_watchers
        # Until when each is kept, the oldest first
        self._tickets: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.on_revocation: Callable[[bytes], None] = lambda _value: None
        self.on_broadcast: Callable[[bytes], None] = lambda _message: None

    def is_gone(self, instance: str) -> bool:
        return instance != self.instance

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if self._store is not None:
            for value, until in await self._store.load_revocations():
                self._revocations.add(value, until)
        task_status.started()
        await trio.sleep_forever()

    def announce_job(self) -> None:
        pass

    async def wait_for_news(self) -> None:
        await trio.sleep_forever()

    async def take_slot(self, name: str, limit: int) -> bool:
        if self.slots.taken.get(name, 0) >= limit:
            return False
        self.slots.add(name, 1)
        return True

    def release_slot(self, name: str) -> None:
        self.slots.add(name, -1)

    def note_watchers(self, session_id: str) -> None:
        pass

    async def watchers(self, session_id: str) -> dict[str, Counts]:
        return {self.instance: self._count_watchers(session_id)}

    async def store_ticket(self, key: str, value: bytes, seconds: float) -> None:
        now = trio.current_time()
        dropped = 0
        while self._tickets and next(iter(self._tickets.values()))[0] <= now:
            self._tickets.popitem(last=False)
            dropped += 1
            if dropped % SLICE == 0:
                await trio.lowlevel.checkpoint()
        self._tickets[key] = now + seconds, value

    async def take_ticket(self, key: str) -> bytes | None:
        until, value = self._tickets.pop(key, (0.0, None))
        return value if trio.current_time() < until else None

    async def store_revocation(self, value: bytes, until: float) -> None:
        if not self._revocations.has_space(self._clock()):
            raise too_many_revocations()
        if self._store is not None:
            await self._store.store_revocation(value, until)
        self._revocations.add(value, until)

    async def broadcast(self, message: bytes) -> None:
        pass


def too_many_revocations() -> InsufficientStorage:
    """Return why no other revocation can be kept."""
    return InsufficientStorage(
        f"{MAX_REVOCATIONS} revocations are kept already, which is the limit, each until its tokens have "
        "expired; to revoke all tokens at once use another key"
    )


def new_instance() -> str:
    """Return an id for an instance."""
    return secrets.token_hex(4)
