"""Counters that say when it is enough. They take what they need as arguments; no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import TooManyStreams

__all__ = ["Seats"]


class Seats:
    """How many streams each user has open; ``most`` None is no limit."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._taken: dict[str, int] = {}

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._most is not None

    def check(self, user: str) -> None:
        """Raise TooManyStreams if the user has no seat left."""
        if self._most is not None and self._taken.get(user, 0) >= self._most:
            raise TooManyStreams(f"{self._most} streams are open already")

    @contextmanager
    def take(self, user: str) -> Iterator[None]:
        """Hold a seat of the user for the length of the block."""
        self._taken[user] = self._taken.get(user, 0) + 1
        try:
            yield
        finally:
            self._taken[user] -= 1
            if not self._taken[user]:
                del self._taken[user]
