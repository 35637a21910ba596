"""What limits the requests and streams of clients. No I/O, no clock."""

from __future__ import annotations

import math

__all__ = ["BodyDeadline"]

MIN_BODY_RATE = 1024  # bytes per second


class BodyDeadline:
    """By when the next bytes of a request's body must arrive.

    A body that needs more than ``timeout`` must arrive at ``MIN_BODY_RATE``: else a client could keep a
    request open for ever with a byte now and then. NDJSON may, as a worker sends its lines as it works.

    Args:
        timeout: how long the next bytes may take, in seconds.
        is_ndjson: there is no minimum rate.
    """

    def __init__(self, timeout: float, *, is_ndjson: bool = False) -> None:
        self._timeout = timeout
        self._latest = math.inf if is_ndjson else None  # set when the first bytes are waited for

    def next(self, now: float) -> float:
        """Return the deadline of the next bytes; ``now`` is in seconds of any clock."""
        if self._latest is None:
            self._latest = now + self._timeout
        return min(now + self._timeout, self._latest)

    def count(self, size: int) -> None:
        """Note that ``size`` bytes have arrived which were waited for."""
        assert self._latest is not None
        self._latest += size / MIN_BODY_RATE
