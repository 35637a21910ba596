"""Who may watch, and from where: checked before anything is answered, the same at both doors."""

from __future__ import annotations

import base64
import binascii
import logging

import msgspec

from ..context import Context
from ..dialects import Dialect, Encoding
from ..errors import (
    BadRequest,
    Forbidden,
    Invalid,
    SessionNotFound,
    SSEDisabled,
    SseserveError,
    UpgradeRequired,
)
from ..live.bundle import MAX_SESSIONS, Bundle
from ..live.resume import over
from ..model import Session
from .auth import Grant, may
from .messages import Answer, Request, error_answer
from .routes import Kind, Match

__all__ = ["authorize", "cursor_of", "opening", "replay_of", "sessions_of", "shaking", "user_of"]

log = logging.getLogger(__name__)

_UPGRADE = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))


def cursor_of(request: Request) -> str | None:
    """The cursor that a watcher came with: the header of EventSource's reconnection, else the query's."""
    return request.headers.get("last-event-id") or request.query.get("last_event_id") or None


def user_of(context: Context, request: Request, peer: str) -> str:
    """Whose streams are counted together: those of a token that was looked at, else of an address."""
    known = context.authenticate is not None
    return (request.headers.get("authorization") if known else None) or peer


def replay_of(request: Request, found: Match) -> bool:
    """Whether a watcher without a cursor gets the log from its beginning."""
    return found.route.dialect.replays_log or request.query.get("replay") == "1"


def sessions_of(request: Request, found: Match) -> list[str]:
    """The sessions that a request is about, each once.

    Raises:
        Invalid: it names none, or too many.
    """
    if "id" in found.params:
        return [found.params["id"]]
    named = list(dict.fromkeys(request.values("session")))
    if not 1 <= len(named) <= MAX_SESSIONS:
        raise Invalid(f"name 1 to {MAX_SESSIONS} sessions: ?session=a&session=b")
    return named


async def authorize(context: Context, request: Request, found: Match) -> Grant | None:
    """Check that a request may do what its route does. Returns its grant, None where nobody asks for one.

    Raises:
        Unauthorized: it has no grant.
        Forbidden: its grant does not allow it; whether the session exists it does not learn.
    """
    action = found.route.action
    if context.authenticate is None or action is None:
        return None
    try:
        grant = await context.authenticate(request)
    except SseserveError:
        raise
    except Exception as error:
        # The program's own code: what goes wrong in there says nothing of our connection.
        log.exception("request %s: authenticate failed", request.id)
        raise SseserveError("the server failed; its log has the reason") from error
    if found.route.kind is not Kind.STREAM and "id" not in found.params:
        allowed = may(grant, action, None)
    else:
        sessions = [await context.engine.load(session_id) for session_id in sessions_of(request, found)]
        allowed = all(may(grant, action, session) for session in sessions)
    if not allowed:
        raise Forbidden(f"this grant may not {action} here")
    return grant


async def opening(context: Context, request: Request, found: Match, peer: str = "") -> Answer | None:
    """Check a watch request. Returns the answer if there is nothing to stream.

    Whether the user may have another stream is looked at last: nothing waits between that and the answer,
    so whoever takes the seat at once is sure to get it.
    """
    dialect = found.route.dialect
    try:
        if dialect.can_be_disabled and not context.settings.enable_sse:
            raise SSEDisabled("streaming is switched off (ENABLE_SSE); poll the status instead")
        await authorize(context, request, found)
        named = sessions_of(request, found)
        cursor = cursor_of(request)
        sessions = await _sessions(context, named, dialect, came_back=cursor is not None)
        done = bool(sessions) and over(sessions[0], cursor)
        if "id" not in found.params:
            bundle = Bundle(context.engine, context.broker, Encoding(dialect, "sse"), named, cursor)
            done = bundle.over(sessions)
        if done:
            # This is what stops an EventSource (HTML Living Standard, section 9.2.3).
            return Answer(204)
        if found.route.kind is Kind.STREAM:
            context.seats.check(user_of(context, request, peer))
    except SseserveError as error:
        return error_answer(error, request)
    return None


async def _sessions(
    context: Context, named: list[str], dialect: Dialect, *, came_back: bool
) -> list[Session]:
    """Look up what is to be watched. Who comes back is told on the stream which of several are gone.

    Raises:
        SessionNotFound: there is no such session, and the dialect does not wait for one.
    """
    found: list[Session] = []
    missing: SessionNotFound | None = None
    for session_id in named:
        try:
            found.append(await context.tracker.get(session_id))
        except SessionNotFound as error:
            missing = missing or error
    if missing is not None and not dialect.waits_for_session and not (came_back and found):
        raise missing
    return found


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
