"""Counters that limit what one client may take. No I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

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
    """How many streams each user has open; ``limit`` None: as many as they like."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._taken: dict[str, int] = {}

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit is not None

    def check(self, user: str) -> None:
        """Raise TooManyStreams if the user has no slot left."""
        if self._limit is not None and self._taken.get(user, 0) >= self._limit:
            raise TooManyStreams(f"{self._limit} streams are open already, which is the limit")

    @contextmanager
    def take(self, user: str) -> Iterator[None]:
        """Take a slot of the user for the length of the block."""
        self._taken[user] = self._taken.get(user, 0) + 1
        try:
            yield
        finally:
            self._taken[user] -= 1
            if not self._taken[user]:
                del self._taken[user]
