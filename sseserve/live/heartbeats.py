"""Heartbeats, and the end of streams that are too old or idle: one task for all clients.

A timer wheel of one-second slots: each second only the subscribers in one slot are looked at. Heartbeats
are jittered, so that clients that came at once are spread, and only an idle stream gets one.
"""

from __future__ import annotations

import math
import random
import time

import trio

from ..dialects import Dialect, Encoding
from .subscriber import Subscriber
from .topic import Topic

__all__ = ["Heartbeats"]

WHEEL = 64  # slots, of a second each
RECONNECT_MS = 1000  # the reconnection time of a stream that has reached its age


class Heartbeats:
    """The schedule of heartbeats.

    Args:
        interval: seconds, instead of each dialect's; None: the dialect's.
        max_age: seconds, instead of that of the dialects that have one; None: the dialect's.
    """

    def __init__(self, *, interval: float | None = None, max_age: float | None = None) -> None:
        self._interval = interval
        self._max_age = max_age
        self._wheel: list[set[Subscriber]] = [set() for _ in range(WHEEL)]
        self.sent = 0

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
            end = min(end, max(subscriber.joined_at, topic.last_event_at) + dialect.idle_timeout)
        return end

    async def run(self) -> None:
        """Send the heartbeats that are due, for ever."""
        second = int(trio.current_time())
        while True:
            await trio.sleep_until(second + 1)
            second += 1
            now = trio.current_time()
            due, self._wheel[second % WHEEL] = self._wheel[second % WHEEL], set()
            encoded: dict[Encoding, bytes] = {}
            for number, subscriber in enumerate(due):
                if subscriber.topic is None:
                    continue
                if subscriber.live and now >= self._end_of_life(subscriber):
                    subscriber.ask_to_reconnect(RECONNECT_MS)
                    continue
                interval = self.interval(subscriber.encoding.dialect)
                if subscriber.live and now - subscriber.last_sent_at >= interval * 0.8 - 1:
                    if (heartbeat := encoded.get(subscriber.encoding)) is None:
                        heartbeat = subscriber.encoding.heartbeat(time.time())
                        encoded[subscriber.encoding] = heartbeat
                    self.sent += subscriber.send_heartbeat(heartbeat)
                    subscriber.last_sent_at = now
                if subscriber.topic is not None:
                    self.schedule(subscriber, now)
                if number % 256 == 255:
                    await trio.lowlevel.checkpoint()
