"""Whether the engine can store, and what clients are told while it cannot.

Guarantee: a stream stays open while the engine is unavailable, with heartbeats. Its client gets ``degraded``,
with the reason, and ``restored`` when all is well again; neither has a cursor, or comes twice in a row.

So does the stream of a client whose rights cannot be checked: an EventSource that gets a 503 never comes back
(HTML Living Standard, section 9.2.3). It is told nothing else, and asked to reconnect when the engine is
back; that request is checked as any other.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import lru_cache

import msgspec
import trio

from ..backoff import with_jitter
from ..dialects import Encoding, Message
from .subscriber import RECONNECT_WITHIN, EncodedEvents, reconnect_delay

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
        with trio.move_on_after(with_jitter(longest)):
            await self._wakeup.wait()

    async def pages(
        self, encoding: Encoding, problem: str, interval: float, stopping: trio.Event, drain: float
    ) -> AsyncGenerator[bytes]:
        """Yield the stream of a client whose rights cannot be checked, until the engine is back.

        Args:
            encoding: of the event stream.
            problem: why a read has failed, in a sentence, if the engine itself names no problem.
            interval: seconds between two heartbeats.
            stopping: is set when the server begins to stop.
            drain: over how many seconds clients reconnect then.
        """
        yield encode_notice(encoding, self.problem or problem).data
        while not stopping.is_set():
            await self.wait(interval)
            if self.problem is None:
                yield encode_notice(encoding, None).data
                break
            yield encoding.heartbeat(time.time())
        retry = reconnect_delay(drain if stopping.is_set() else RECONNECT_WITHIN)
        yield encoding.retry(retry)
