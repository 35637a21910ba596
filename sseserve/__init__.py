"""sseserve streams the progress of long-running work over SSE, WebSocket and long-poll.

Three lines inside a Trio program::

    async with sseserve.serve(port=8000) as server:
        await server.tracker.update("job-1", progress=40, message="almost half way")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import Settings
from .errors import SseserveError, Unauthorized
from .http.admission import Authenticate
from .http.auth import Action, Grant
from .http.messages import Request
from .model import Artifact, Control, Cursor, Event, Progress, Receipt, Session, State
from .progress.queue import JobError, JobValidationError, ProviderError, Runner
from .progress.tracker import Tracker

if TYPE_CHECKING:
    from .server import Server, run, serve

__all__ = [
    "Action",
    "Artifact",
    "Authenticate",
    "Control",
    "Cursor",
    "Event",
    "Grant",
    "JobError",
    "JobValidationError",
    "Progress",
    "ProviderError",
    "Receipt",
    "Request",
    "Runner",
    "Server",
    "Session",
    "Settings",
    "SseserveError",
    "State",
    "Tracker",
    "Unauthorized",
    "run",
    "serve",
]


_SERVER_NAMES = frozenset({"Server", "run", "serve"})

if not TYPE_CHECKING:  # with it, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import the server on first use: most of the time that a client needs to start is its libraries'."""
        if name in _SERVER_NAMES:
            from . import server

            return getattr(server, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
