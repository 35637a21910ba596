"""What the busy paths count, as plain integers; ``web/metrics.py`` exports them when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

__all__ = ["LIMITS", "Counters", "Histogram"]

BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

# The settings that requests and connections are refused by.
LIMITS = (
    "connect_rate",
    "max_body",
    "max_connections",
    "max_connections_per_address",
    "max_event",
    "max_head",
    "max_log_bytes",
    "max_sessions",
    "max_sessions_per_owner",
    "max_streams",
    "max_streams_per_address",
    "max_streams_per_session",
    "max_streams_per_user",
    "max_waiting_jobs",
    "publish_rate",
    "request_timeout",
    "ticket_rate",
)


class Histogram:
    """How many observations were at most how large: a histogram of Prometheus, without its locks.

    ``total`` is the sum of the observed values, in seconds.
    """

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a value, or as many equal ones."""
        self._counts[bisect_left(BUCKETS, seconds)] += times
        self.total += seconds * times

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Yield the upper bound of each bucket, as Prometheus writes it, and how many values are below it."""
        return zip([*map(str, BUCKETS), "+Inf"], accumulate(self._counts), strict=True)


class Counters:
    """Counts of one server. ``connections`` is of now, the others since the start."""

    __slots__ = (
        "background_failures",
        "channel_messages",
        "connections",
        "events",
        "finished",
        "invalid_messages",
        "loop_lag",
        "pubsub_latency",
        "pubsub_messages",
        "redis_lag",
        "refused",
        "responses",
        "session_seconds",
        "stream_seconds",
        "streams_closed",
    )

    def count_end(self, state: str, seconds: float) -> None:
        """Count a session that has ended in a state, so many seconds after its beginning."""
        self.finished[state] = self.finished.get(state, 0) + 1
        self.session_seconds += seconds

    def count_stream(self, transport: str, dialect: str, reason: str, seconds: float) -> None:
        """Count a stream that has ended for a reason, so many seconds after its beginning."""
        closed, label = (transport, dialect, reason), (transport, dialect)
        self.streams_closed[closed] = self.streams_closed.get(closed, 0) + 1
        count, total = self.stream_seconds.get(label, (0, 0.0))
        self.stream_seconds[label] = (count + 1, total + seconds)

    def count_message(self, system: str, result: str) -> None:
        """Count a message of a system's Redis channels by what became of it."""
        self.channel_messages[system, result] = self.channel_messages.get((system, result), 0) + 1

    def count_refusal(self, limit: str) -> None:
        """Count a connection or a request that was refused because of the limit of a setting."""
        self.refused[limit] += 1

    def __init__(self) -> None:
        self.connections = 0
        self.events = 0  # that this instance has recorded
        self.redis_lag = Histogram()  # of events, until they came from the instance that has recorded them
        self.responses: dict[int, int] = {}  # by their status
        self.loop_lag = Histogram()  # how much later than it wanted to a task of the event loop has run
        self.background_failures: dict[str, int] = {}  # by the name of the service
        self.refused = dict.fromkeys(LIMITS, 0)  # connections and requests, by the setting that they exceed
        self.finished: dict[str, int] = {}  # sessions, by the state in which they have ended
        self.streams_closed: dict[tuple[str, str, str], int] = {}  # by transport, dialect and reason
        # How many have ended, and how many seconds they were open together, by transport and dialect.
        self.stream_seconds: dict[tuple[str, str], tuple[int, float]] = {}
        self.session_seconds = 0.0  # from their beginning to their end, of all of these together
        self.channel_messages: dict[tuple[str, str], int] = {}  # of Redis: by system, and what became of them
        self.invalid_messages = 0  # of a Pub/Sub subscription
        self.pubsub_messages = 0  # that were recorded, and say when they were published
        self.pubsub_latency = 0.0  # seconds from there to the record, of all of these together
