"""What the busy paths count, as plain integers; ``web/metrics.py`` exports them when somebody asks."""

from __future__ import annotations

__all__ = ["LIMITS", "Counters"]

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


class Counters:
    """Counts of one server. ``connections`` is of now, the others since the start."""

    __slots__ = (
        "background_failures",
        "channel_messages",
        "connections",
        "events",
        "finished",
        "invalid_messages",
        "pubsub_latency",
        "pubsub_messages",
        "refused",
        "session_seconds",
    )

    def count_end(self, state: str, seconds: float) -> None:
        """Count a session that has ended in a state, so many seconds after its beginning."""
        self.finished[state] = self.finished.get(state, 0) + 1
        self.session_seconds += seconds

    def count_message(self, system: str, result: str) -> None:
        """Count a message of a system's Redis channels by what became of it."""
        self.channel_messages[system, result] = self.channel_messages.get((system, result), 0) + 1

    def count_refusal(self, limit: str) -> None:
        """Count a connection or a request that was refused because of the limit of a setting."""
        self.refused[limit] += 1

    def __init__(self) -> None:
        self.connections = 0
        self.events = 0  # that this instance has recorded
        self.background_failures: dict[str, int] = {}  # by the name of the service
        self.refused = dict.fromkeys(LIMITS, 0)  # connections and requests, by the setting that they exceed
        self.finished: dict[str, int] = {}  # sessions, by the state in which they have ended
        self.session_seconds = 0.0  # from their beginning to their end, of all of these together
        self.channel_messages: dict[tuple[str, str], int] = {}  # of Redis: by system, and what became of them
        self.invalid_messages = 0  # of a Pub/Sub subscription
        self.pubsub_messages = 0  # that were recorded, and say when they were published
        self.pubsub_latency = 0.0  # seconds from there to the record, of all of these together
