"""The Python client: watch sessions and publish to them, on Trio or from synchronous workers.

``watch`` follows a session to its end over SSE, WebSocket or long-poll; ``Publisher`` publishes progress
and events. Both reconnect when a connection fails, without losing or duplicating anything.
``StatusPublisher`` is for synchronous workers. This package never imports the server.
"""

from __future__ import annotations

from ..backoff import Backoff
from ..extras import required_by

with required_by("the client", "client"):
    from .errors import (
        CannotConnect,
        ClientError,
        ConnectionLost,
        InvalidResponse,
        RequestRejected,
        SessionFinished,
        UnknownSession,
    )
    from .messages import PublishResult, ReceivedMessage
    from .publisher import Publisher
    from .status_publisher import StatusPublisher
    from .watcher import TRANSPORTS, Transport, Watch, watch

__all__ = [
    "TRANSPORTS",
    "Backoff",
    "CannotConnect",
    "ClientError",
    "ConnectionLost",
    "InvalidResponse",
    "PublishResult",
    "Publisher",
    "ReceivedMessage",
    "RequestRejected",
    "SessionFinished",
    "StatusPublisher",
    "Transport",
    "UnknownSession",
    "Watch",
    "watch",
]
