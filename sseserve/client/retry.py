"""Whether and when a publisher retries a request. No I/O, no clock: time is an argument."""

from __future__ import annotations

import math

from ..backoff import Backoff
from .errors import CannotConnect, ClientError, ConnectionLost, RequestRejected

__all__ = ["RetryPolicy"]


class RetryPolicy:
    """Decides after each failed attempt of one call whether there is another one, and when.

    Args:
        url: the request's URL, for the error message.
        retry_timeout: how long to retry after the first failure, in seconds.
        backoff: the delays between attempts.
    """

    def __init__(self, url: str, retry_timeout: float, backoff: Backoff) -> None:
        self._url = url
        self._retry_timeout = retry_timeout
        self._backoff = backoff
        self._failures = 0
        self._first_failure = math.inf
        self._total_delay = 0.0

    def next_delay(self, error: ClientError, now: float) -> float:
        """Return the seconds to wait before the next attempt, after one that failed at ``now`` (seconds).

        Raises:
            CannotConnect: the next attempt would be later than ``retry_timeout`` allows.
            ClientError: ``error`` itself, if a retry would not help.
        """
        lost = _retryable(error)
        if lost is None:
            raise error
        self._first_failure = min(self._first_failure, now)
        delay = self._backoff.delay(self._failures, lost.retry_after)
        # The caller's ``sleep`` may return early, so the delays count even if the clock has not moved.
        self._total_delay += delay
        if max(self._total_delay, now - self._first_failure + delay) >= self._retry_timeout:
            raise CannotConnect(f"cannot publish to {self._url}: {lost}") from lost
        self._failures += 1
        return delay


def _retryable(error: ClientError) -> ConnectionLost | None:
    if isinstance(error, ConnectionLost):
        return error
    # The server is still processing an earlier attempt with this key, one that timed out on this side.
    if isinstance(error, RequestRejected) and error.code == "conflict":
        return ConnectionLost(error.message)
    return None
