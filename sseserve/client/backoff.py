"""How long to wait before the next attempt. Pure: chance comes in as an argument."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

__all__ = ["Backoff"]

_FLOOR = 0.05  # whatever a server asks for, we do not hammer it


class Backoff(msgspec.Struct, frozen=True):
    """Exponential backoff with jitter, from ``first`` up to ``most`` seconds."""

    first: float = 1.0
    most: float = 30.0

    def delay(
        self,
        failures: int,
        named: float | None = None,
        draw: Callable[[], float] = random.random,
    ) -> float:
        """Return the seconds to wait after ``failures`` attempts in a row have failed before this one.

        A time that the server ``named`` is kept to the letter at first: a server that stops gives each
        client its own, so that they do not all come back at once. From then on it is the least.
        """
        if failures == 0 and named is not None:
            return max(named, _FLOOR)
        least = max(self.first, named or 0.0)
        ceiling = min(least * 2.0 ** min(failures, 32), max(self.most, least))
        return ceiling * (0.5 + draw() / 2)
