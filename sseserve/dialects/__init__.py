"""How each family of clients sees a session: data and pure functions. No I/O, no clock.

A dialect turns an event into the messages that its clients know. The protocol (SSE or WebSocket)
only decides how those messages are framed, so every transport of a dialect says the same.
"""

from __future__ import annotations

from .base import Dialect, Message
from .control import CONTROL
from .encoding import Encoding, text_message, websocket_text
from .interaction import INTERACTION
from .jobs import JOBS
from .sessions import SESSIONS, Payload, snapshot
from .updates import JOBS_V1, TRANSCRIPTION

__all__ = [
    "CONTROL",
    "INTERACTION",
    "JOBS",
    "JOBS_V1",
    "RESERVED",
    "SESSIONS",
    "TRANSCRIPTION",
    "Dialect",
    "Encoding",
    "Message",
    "Payload",
    "snapshot",
    "text_message",
    "websocket_text",
]

# Names that only the server gives to messages; a publisher cannot use them as event types.
RESERVED = frozenset(
    {
        "complete",
        "control",
        "deleted",
        "ended",
        "job-cancelled",
        "job-completed",
        "job-failed",
        "job-status",
        "message",
        "overflow",
        "progress",
        "resume",
        "stalled",
        "step-progress",
        "step-status",
    }
)
