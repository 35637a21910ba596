"""The delays between attempts: to connect, to send, to store. Pure: randomness is an argument."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

__all__ = ["Backoff", "with_jitter"]

_MINIMUM = 0.05  # seconds; applies to delays that a server requests


def with_jitter(seconds: float, rand: Callable[[], float] = random.random) -> float:
    """Return a random time from half of it to all of it, so that what failed together is spread."""
    return seconds * (0.5 + rand() / 2)


class Backoff(msgspec.Struct, frozen=True):
    """Exponential backoff with jitter, from ``initial`` up to ``maximum`` seconds."""

    initial: float = 1.0
    maximum: float = 30.0

    def delay(
        self,
        failures: int,
        requested: float | None = None,
        rand: Callable[[], float] = random.random,
    ) -> float:
        """Return the seconds to wait before the next attempt.

        The first delay is exactly what the server requested: a server that shuts down gives each client a
        different time, so that they do not all reconnect at once. After that it is the lower bound.

        Args:
            failures: how many attempts in a row failed before the one that has just failed.
            requested: the delay that the server requested, in seconds.
            rand: returns a random number from 0 to 1.
        """
        if failures == 0 and requested is not None:
            return max(requested, _MINIMUM)
        base = max(self.initial, requested or 0.0)
        delay = min(base * 2.0 ** min(failures, 32), max(self.maximum, base))
        return with_jitter(delay, rand)
