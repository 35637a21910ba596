"""Who may watch, and from where: checked before anything is answered, the same at both doors."""

from __future__ import annotations

import base64
import binascii

import msgspec

from .context import Context
from .errors import BadRequest, SseserveError, UpgradeRequired
from .http import Answer, Request, error_answer
from .routes import Match
from .watching import over

__all__ = ["cursor_of", "opening", "shaking"]

_UPGRADE = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))


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


def shaking(request: Request) -> Answer | None:
    """Check a WebSocket's opening handshake (RFC 6455, section 4.2.1). Returns the answer to a bad one."""
    headers = request.headers
    tokens = [token.strip() for token in headers.get("connection", "").lower().split(",")]
    error: SseserveError
    if headers.get("upgrade", "").lower() != "websocket" or "upgrade" not in tokens:
        error = UpgradeRequired("this is a WebSocket")
    elif headers.get("sec-websocket-version") != "13":
        error = UpgradeRequired("this is a WebSocket of version 13")
    else:
        try:
            if len(base64.b64decode(headers.get("sec-websocket-key", ""), validate=True)) == 16:
                return None
        except (binascii.Error, ValueError):
            pass
        error = BadRequest("a Sec-WebSocket-Key is 16 bytes in base64")
    answer = error_answer(error, request)
    if error.status == UpgradeRequired.status:
        answer = msgspec.structs.replace(answer, headers=(*answer.headers, *_UPGRADE))
    return answer
