"""What limits the requests and streams of clients. No I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager

from ..engines.coordination import Coordination
from ..errors import TooManyStreams

__all__ = ["MAX_HEAD_BYTES", "BodyDeadline", "StreamSlots"]

MAX_HEAD_BYTES = 32 * 1024  # of a request's line and header fields
MIN_BODY_RATE = 1024  # bytes per second


class BodyDeadline:
    """By when the next bytes of a request's body must arrive.

    A body that needs more than ``timeout`` must arrive at ``MIN_BODY_RATE``: else a client could keep a
    request open for ever with a byte now and then. NDJSON may, as a worker sends its lines as it works.

    Args:
        timeout: how long the next bytes may take, in seconds.
        is_ndjson: there is no minimum rate.
    """

    def __init__(self, timeout: float, *, is_ndjson: bool = False) -> None:
        self._timeout = timeout
        self._latest = math.inf if is_ndjson else None  # set when the first bytes are waited for

    def next(self, now: float) -> float:
        """Return the deadline of the next bytes; ``now`` is in seconds of any clock."""
        if self._latest is None:
            self._latest = now + self._timeout
        return min(now + self._timeout, self._latest)

    def count(self, size: int) -> None:
        """Note that ``size`` bytes have arrived which were waited for."""
        assert self._latest is not None
        self._latest += size / MIN_BODY_RATE


class StreamSlots:
    """Limits the open streams of each user, and of each session, on all instances together.

    Args:
        coordination: counts them.
        per_user: at most that many streams of one user; None: as many as they like.
        per_session: at most that many streams of one session.
    """

    def __init__(
        self, coordination: Coordination, per_user: int | None = None, per_session: int | None = None
    ) -> None:
        self._coordination = coordination
        self._per_user = per_user
        self._per_session = per_session

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return (self._per_user, self._per_session) != (None, None)

    async def take(self, user: str, session_ids: Collection[str]) -> AbstractContextManager[None]:
        """Take the slots of a stream, for the length of the block that begins at once with what is returned.

        Raises:
            TooManyStreams: there is no slot left.
        """
        taken: list[str] = []
        try:
            if self._per_user is not None:
                await self._take(f"user {user}", self._per_user, taken, "of this user")
            if self._per_session is not None:
                for session_id in session_ids:
                    name = f"session {session_id}"
                    await self._take(name, self._per_session, taken, f"of {session_id!r}")
        except BaseException:
            self._release(taken)
            raise
        return self._hold(taken)

    async def _take(self, name: str, limit: int, taken: list[str], whose: str) -> None:
        if not await self._coordination.take_slot(name, limit):
            raise TooManyStreams(f"{limit} streams {whose} are open already, which is the limit")
        taken.append(name)

    @contextmanager
    def _hold(self, taken: list[str]) -> Iterator[None]:
        try:
            yield
        finally:
            self._release(taken)

    def _release(self, taken: list[str]) -> None:
        for name in taken:
            self._coordination.release_slot(name)
