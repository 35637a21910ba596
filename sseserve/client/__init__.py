"""The Python client: watch sessions, and publish to them, on Trio; and from workers without it.

``watch`` follows a session to its end over SSE, WebSocket or long-poll; ``Publisher`` says how far the
work is. Both come back by themselves when a connection fails, and neither loses or doubles anything.
``StatusPublisher`` is for workers that are not asynchronous.
"""

from __future__ import annotations

from .backoff import Backoff
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
