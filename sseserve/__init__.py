"""sseserve streams the progress of long work to whoever watches it: by SSE, WebSocket and long-poll.

Three lines inside a Trio program::

    async with sseserve.serve(port=8000) as server:
        await server.tracker.update("job-1", progress=40, message="half way, nearly")
"""

from __future__ import annotations

from .config import Settings
from .errors import SseserveError
from .model import Artifact, Control, Cursor, Event, Progress, Receipt, Session, State
from .server import Server, run, serve
from .tracker import Tracker

__all__ = [
    "Artifact",
    "Control",
    "Cursor",
    "Event",
    "Progress",
    "Receipt",
    "Server",
    "Session",
    "Settings",
    "SseserveError",
    "State",
    "Tracker",
    "run",
    "serve",
]
