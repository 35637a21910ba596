"""How each family of clients sees a session, one module each: what it sends, what it receives, its names.

Data and pure functions: no I/O, no clock. A new family is a new module here, its rows in
``http/routes.py``, and its tests.
"""

from __future__ import annotations

from .base import (
    SERVER_EVENTS,
    Dialect,
    Message,
    MessageType,
    Publication,
    PublishBody,
    PushDelivery,
    RedisChannel,
)
from .encoding import BundleEncoding, Encoding, read_frames, text_message, websocket_text

__all__ = [
    "SERVER_EVENTS",
    "BundleEncoding",
    "Dialect",
    "Encoding",
    "Message",
    "MessageType",
    "Publication",
    "PublishBody",
    "PushDelivery",
    "RedisChannel",
    "read_frames",
    "text_message",
    "websocket_text",
]
