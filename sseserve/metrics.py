"""What the busy paths count, as plain integers; ``web/metrics.py`` exports them when somebody asks."""

from __future__ import annotations

__all__ = ["Counters"]


class Counters:
    """Counts of one server. ``connections`` is of now, the others since the start."""

    __slots__ = (
        "background_failures",
        "connections",
        "invalid_messages",
        "pubsub_latency",
        "pubsub_messages",
        "refused_connections",
    )

    def __init__(self) -> None:
        self.connections = 0
        self.background_failures: dict[str, int] = {}  # by the name of the service
        self.refused_connections = 0  # because of the connection limit
        self.invalid_messages = 0  # of a Pub/Sub subscription
        self.pubsub_messages = 0  # that were recorded, and say when they were published
        self.pubsub_latency = 0.0  # seconds from there to the record, of all of these together
