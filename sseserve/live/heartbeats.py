"""Heartbeats, and the end of streams that are too old or idle: one task for all clients.

A timer wheel of one-second slots: each second only the subscribers in one slot are looked at. Heartbeats
are jittered, so that clients that came at once are spread, and only an idle stream gets one.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable

import trio

from ..concurrency import VISIT
from ..dialects import Dialect, Encoding
from ..model import EndReason
from .subscriber import Subscriber
from .topic import Topic

__all__ = ["Heartbeats"]

log = logging.getLogger(__name__)

WHEEL = 64  # slots, of a second each
RECONNECT_MS = 1000  # the reconnection time of a stream that has reached its age


class Heartbeats:
    """The schedule of heartbeats.

    Args:
        interval: seconds, instead of each dialect's; None: the dialect's.
        max_age: seconds, instead of that of the dialects that have one; None: the dialect's.
        idle_timeout: likewise.
    """

    def __init__(
        self,
        *,
        interval: float | None = None,
        max_age: float | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        self._interval = interval
        self._max_age = max_age
        self._idle_timeout = idle_timeout
        self._wheel: list[set[Subscriber]] = [set() for _ in range(WHEEL)]
        self._second: int | None = None  # the last one that was visited
        self.sent = 0
        self.on_second: Callable[[float], None] = lambda _now: None  # is called every second with the time

    def interval(self, dialect: Dialect) -> float:
        """Return how long a stream may be idle before it gets a heartbeat, in seconds."""
        return min(self._interval or dialect.heartbeat_interval, dialect.max_heartbeat_interval)

    def schedule(self, subscriber: Subscriber, now: float) -> None:
        """Put a subscriber into the slot in which it is looked at next."""
        # Never later than the interval, which its client counts on.
        interval = self.interval(subscriber.encoding.dialect)
        due = subscriber.last_sent_at + interval * random.uniform(0.85, 1.0) - 1  # noqa: S311 - no secret
        due = min(due, self._end_of_life(subscriber) + 1)
        subscriber.wheel_slot = int(min(max(due, now + 1), now + WHEEL - 2)) % WHEEL
        self._wheel[subscriber.wheel_slot].add(subscriber)

    def discard(self, subscriber: Subscriber) -> None:
        """Take a subscriber out of the schedule."""
        self._wheel[subscriber.wheel_slot].discard(subscriber)

    def _end_of_life(self, subscriber: Subscriber) -> float:
        """Return when a stream is asked to reconnect, because of its age or because nothing happens on it."""
        dialect, topic = subscriber.encoding.dialect, subscriber.topic
        end = math.inf
        if dialect.max_age is not None:
            end = subscriber.joined_at + (self._max_age or dialect.max_age)
        if dialect.idle_timeout is not None and isinstance(topic, Topic):
            idle_since = max(subscriber.joined_at, topic.last_event_at)
            end = min(end, idle_since + (self._idle_timeout or dialect.idle_timeout))
        return end

    async def run(self) -> None:
        """Send the heartbeats that are due, for ever; run again after a failure, go on where it was."""
        if self._second is None:
            self._second = int(trio.current_time())
        while True:
            await trio.sleep_until(self._second + 1)
            self._second += 1
            self.on_second(trio.current_time())
            slot = self._second % WHEEL
            due, self._wheel[slot] = self._wheel[slot], set()
            try:
                await self._visit_all(due, trio.current_time())
            finally:
                self._wheel[(slot + 1) % WHEEL] |= due  # what is left of them

    async def _visit_all(self, due: set[Subscriber], now: float) -> None:
        heartbeats: dict[Encoding, bytes] = {}
        number = 0
        while due:
            subscriber = due.pop()
            if subscriber.topic is not None:
                try:
                    self._visit(subscriber, now, heartbeats)
                except Exception:
                    # The boundary of a subscriber: the others are not affected.
                    log.exception("a heartbeat of %r has failed", subscriber)
                    subscriber.cut("internal server error; resume with your cursor", EndReason.ERROR)
            number += 1
            if number % VISIT == 0:
                await trio.lowlevel.checkpoint()

    def _visit(self, subscriber: Subscriber, now: float, heartbeats: dict[Encoding, bytes]) -> None:
        """Do what is due for a subscriber, and schedule it again; ``heartbeats`` are those of this second."""
        # Whoever comes back while the engine is unavailable cannot resume.
        if subscriber.live and not subscriber.degraded and now >= self._end_of_life(subscriber):
            dialect = subscriber.encoding.dialect
            age = math.inf if dialect.max_age is None else self._max_age or dialect.max_age
            is_old = now >= subscriber.joined_at + age
            subscriber.ask_to_reconnect(RECONNECT_MS, EndReason.MAX_AGE if is_old else EndReason.IDLE)
            return
        encoding = subscriber.encoding
        idle = now - subscriber.last_sent_at
        is_open = subscriber.live or subscriber.degraded  # else nothing has been sent yet, or it is replaying
        if is_open and idle >= self.interval(encoding.dialect) * 0.8 - 1:
            if (heartbeat := heartbeats.get(encoding)) is None:
                heartbeat = heartbeats[encoding] = encoding.heartbeat(time.time())
            self.sent += subscriber.send_heartbeat(heartbeat)
            subscriber.last_sent_at = now
        if subscriber.topic is not None:
            self.schedule(subscriber, now)
