"""Whether the engine can store, and what clients are told while it cannot.

Guarantee: a stream stays open while the engine is unavailable, with heartbeats. Its client gets ``degraded``,
with the reason, and ``restored`` when all is well again; neither has a cursor, or comes twice in a row.
"""

from __future__ import annotations

import random
from functools import lru_cache

import msgspec
import trio

from ..dialects import Encoding, Message
from .subscriber import EncodedEvents

__all__ = ["Availability", "encode_notice"]

RETRY = 1.0  # seconds until a read that has failed is tried again
LONGEST_RETRY = 5.0  # seconds, while the engine says that it has a problem


@lru_cache(maxsize=64)
def encode_notice(encoding: Encoding, problem: str | None) -> EncodedEvents:
    """Encode ``degraded``, or ``restored`` if there is no problem."""
    message = Message("restored", b"{}")
    if problem is not None:
        message = Message("degraded", msgspec.json.encode({"reason": problem}))
    return EncodedEvents.raw(encoding.message(message))


class Availability:
    """Why the engine cannot store (``problem``; None: it can), for those who wait until it can."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._wakeup = trio.Event()

    def wake(self) -> None:
        """Wake those who wait."""
        self._wakeup.set()
        self._wakeup = trio.Event()

    async def wait(self, at_most: float = LONGEST_RETRY) -> None:
        """Wait before reading again from an engine that has not answered: until it can, but not for long.

        Args:
            at_most: seconds.
        """
        longest = min(at_most, RETRY if self.problem is None else LONGEST_RETRY)
        with trio.move_on_after(longest * random.uniform(0.5, 1)):  # noqa: S311 - spreads the readers
            await self._wakeup.wait()
