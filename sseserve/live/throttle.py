"""Spacing out a flood of progress: which events of a batch are delivered now. Time is an argument.

Of the progress events that change nothing but the amount, the first is delivered at once, then one each
interval, and the last one in any case; one with new data gives way to one with new data only. Every other
event is delivered at once, and in order.
"""

from __future__ import annotations

import math

from ..model import Event, Session

__all__ = ["Throttle"]


class Throttle:
    """The throttled update that waits for its time, and when the last one was delivered."""

    __slots__ = ("has_timer", "last_sent_at", "update")

    def __init__(self) -> None:
        self.update: tuple[Session, Event] | None = None
        self.has_timer = False  # a task waits until the update is due
        self.last_sent_at = -math.inf

    def admit(
        self, session: Session, events: list[Event], interval: float, now: float
    ) -> tuple[list[Event], int]:
        """Return what of a batch is delivered now, and how many events are dropped.

        Args:
            session: the events' session.
            events: the batch, in order.
            interval: seconds between two updates.
            now: the time, in seconds of the same clock each time.
        """
        admitted: list[Event] = []
        dropped = 0
        for event in events:
            waiting, self.update = self.update, None
            if waiting is not None:
                superseded = event.progress is not None and not set(waiting[1].changed) - set(event.changed)
                if superseded:
                    dropped += 1
                else:
                    admitted.append(waiting[1])  # nothing may overtake it
            amount_only = event.conflatable and "large_data" not in event.changed
            if amount_only and now - self.last_sent_at < interval:
                self.update = (session, event)
                continue
            if amount_only:
                self.last_sent_at = now
            admitted.append(event)
        return admitted, dropped

    def take_due(self, interval: float, now: float) -> tuple[Session, Event] | None:
        """Return the waiting update if its time has come."""
        if self.update is None or now < self.last_sent_at + interval:
            return None
        update, self.update = self.update, None
        self.last_sent_at = now
        return update
