"""Who may watch, and from where: checked before anything is answered, the same at both doors."""

from __future__ import annotations

from .context import Context
from .errors import SseserveError
from .http import Answer, Request, error_answer
from .routes import Match
from .watching import over

__all__ = ["cursor_of", "opening"]


def cursor_of(request: Request) -> str | None:
    """The cursor that a watcher came with: the header of EventSource's reconnection, else the query's."""
    return request.headers.get("last-event-id") or request.query.get("last_event_id") or None


async def opening(context: Context, request: Request, found: Match) -> Answer | None:
    """Check a watch request. Returns the answer if there is nothing to stream."""
    try:
        session = await context.tracker.get(found.params["id"])
    except SseserveError as error:
        return error_answer(error, request)
    # 204 is what stops an EventSource (HTML Living Standard, section 9.2.3).
    return Answer(204) if over(session, cursor_of(request)) else None
