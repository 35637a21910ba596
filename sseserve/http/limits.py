"""Counters that limit what one client may take. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import TooManyStreams

__all__ = ["MAX_HEAD_BYTES", "StreamSlots"]

MAX_HEAD_BYTES = 32 * 1024  # of a request's line and header fields


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
