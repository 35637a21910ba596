"""The stream of a client of which nothing is known yet, as the engine is unavailable.

An EventSource that gets a 503 never comes back (HTML Living Standard, section 9.2.3). So its stream is opened
although its rights cannot be checked: it says nothing but how the engine is, and asks the client to reconnect
when it is back. That request is checked as any other.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import trio

from ..dialects import Encoding
from .availability import encode_notice
from .broker import Broker
from .subscriber import RECONNECT_WITHIN, reconnect_delay

__all__ = ["wait_pages"]


async def wait_pages(
    broker: Broker, encoding: Encoding, problem: str, stopping: trio.Event, drain: float
) -> AsyncGenerator[bytes]:
    """Yield ``degraded``, heartbeats, ``restored`` and the time to reconnect in.

    Args:
        broker: knows when the engine is back.
        encoding: of the event stream.
        problem: why a read has failed, in a sentence, if the engine itself names no problem.
        stopping: is set when the server begins to stop.
        drain: over how many seconds clients reconnect then.
    """
    availability = broker.availability
    yield encode_notice(encoding, availability.problem or problem).data
    while not stopping.is_set():
        await availability.wait(broker.heartbeats.interval(encoding.dialect))
        if availability.problem is None:
            yield encode_notice(encoding, None).data
            break
        yield encoding.heartbeat(time.time())
    within = drain if stopping.is_set() else RECONNECT_WITHIN
    retry = reconnect_delay(within)
    yield encoding.retry(retry) + encoding.close(1000, "ended")
