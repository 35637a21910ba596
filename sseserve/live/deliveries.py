"""How long deliveries take, and what waits for clients: what fan-out and the buffers count.

A delivery is what one client is sent of one batch. It takes from the time at which the oldest event of the
batch was recorded, by the clock of the instance that has recorded it, until it is given to the client's
socket, or to the writer of its connection. What waits in a client's buffer is counted when it leaves that.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..metrics import Histogram
from ..model import Event

__all__ = ["Deliveries"]


class Deliveries:
    """The counts of one broker.

    Args:
        clock: returns POSIX seconds.

    ``seconds`` are those of the deliveries; ``buffered``: how many had to wait in a buffer, since the start;
    ``clients``, ``events`` and ``size`` (bytes) are of what waits now.
    """

    __slots__ = ("_clock", "buffered", "clients", "events", "seconds", "size")

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.seconds = Histogram()
        self.buffered = 0
        self.clients = 0
        self.events = 0
        self.size = 0

    def count(self, event: Event, deliveries: int = 1) -> None:
        """Count deliveries of this moment whose oldest event this is."""
        if deliveries:
            seconds = self._clock() - event.at
            self.seconds.observe(seconds if seconds > 0 else 0.0, deliveries)
