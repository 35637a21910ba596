"""Sessions: create, list, look, poll, control, forget; and publishing when it comes through Hypercorn."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import trio
from quart import g, request

from ..context import Context
from ..dialects import text_message
from ..dialects.sessions import ControlBody, CreateBody
from ..errors import BadRequest, Invalid
from ..http.auth import Action, Grant, may
from ..http.messages import Answer, Request, json_answer
from ..http.publishing import NDJSON, read_body
from ..http.routes import Match
from ..jsontext import decode
from ..live.resume import history as read_history
from ..model import Control, Session, State

__all__ = ["HANDLERS", "control", "filtered", "request_body"]

MAX_WAIT = 60.0
MAX_LIMIT = 1000


async def _chunks(timeout: float) -> AsyncGenerator[bytes]:
    """The request's body as it comes; raises BadRequest if nothing comes for ``timeout`` seconds."""
    chunks = request.body.__aiter__()
    while True:
        try:
            with trio.fail_after(timeout):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except trio.TooSlowError:
            raise BadRequest("the body did not come in time") from None
        yield chunk


async def request_body(context: Context) -> bytes:
    """Read the body of the request that is being served, within the limits."""
    async with aclosing(_chunks(context.settings.request_timeout)) as chunks:
        return await read_body(chunks, context.settings.max_body)


async def create(context: Context, match: Match, _asked: Request) -> Answer:
    body = await request_body(context)
    fields: CreateBody = decode(body, CreateBody) if body.strip() else CreateBody()
    session = await context.tracker.create(
        fields.session_id,
        owner=fields.owner,
        viewers=fields.viewers,
        title=fields.title,
        ttl=fields.ttl,
        lease=fields.lease,
        data=fields.data,
    )
    assert match.route.dialect.describe_created is not None
    path, created = match.route.dialect.describe_created(session)
    return json_answer(201, created, (("Location", path),))


async def filtered(context: Context, asked: Request) -> list[Session]:
    """The sessions that a list's query asks for, the newest first."""
    query = asked.query
    state = query.get("state")
    try:
        wanted = None if state is None else State(state)
    except ValueError:
        raise Invalid(f"there is no state {state!r}; there are {', '.join(State)}") from None
    limit = _number(query, "limit", 100, MAX_LIMIT)
    found = await context.tracker.sessions(wanted)
    grant: Grant | None = g.grant
    if grant is not None:
        found = [session for session in found if may(grant, Action.WATCH, session)]
    return found[: int(limit)]


async def listing(context: Context, match: Match, asked: Request) -> Answer:
    dialect = match.route.dialect
    found = await filtered(context, asked)
    await context.jobs.prune()
    return json_answer(200, dialect.describe_list(dialect, found, context.jobs.waiting))


async def publish(context: Context, match: Match, asked: Request) -> Answer:
    timeout = math.inf if asked.media_type in NDJSON else context.settings.request_timeout
    async with aclosing(_chunks(timeout)) as chunks:
        return await context.publishing.handle(match, asked, chunks)


async def status(context: Context, match: Match, asked: Request) -> Answer:
    """The snapshot; with ``wait``, one that is newer than ``If-None-Match`` (or than now)."""
    session_id = match.params["id"]
    known = asked.headers.get("if-none-match")
    wait = _number(asked.query, "wait", 0, MAX_WAIT)
    session = await context.tracker.get(session_id)
    seen = known if known is not None else _etag(session) if wait else None
    deadline = trio.current_time() + wait
    while seen is not None and _matches(seen, session):
        with context.broker.bell(session_id) as bell:
            session = await context.tracker.get(session_id)
            if session.ended or context.stopping.is_set() or not _matches(seen, session):
                break
            with trio.move_on_at(deadline) as scope:
                await bell.wait()
        if scope.cancelled_caught:
            break
        session = await context.tracker.get(session_id)
    headers = (("ETag", _etag(session)), ("Cache-Control", "no-cache"))
    if known is not None and _matches(known, session):
        return Answer(304, headers=headers)
    return json_answer(200, describe(context, match, session), headers)


def describe(context: Context, match: Match, session: Session) -> Any:
    dialect = match.route.dialect
    return dialect.describe(dialect, session, context.broker.watchers(session.id))


async def get(context: Context, match: Match, _asked: Request) -> Answer:
    session = await context.tracker.get(match.params["id"])
    return json_answer(200, describe(context, match, session), (("Cache-Control", "no-cache"),))


def _etag(session: Session) -> str:
    return f'"{session.cursor}"'


def _matches(condition: str, session: Session) -> bool:
    """Weak comparison of If-None-Match (RFC 9110, section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return "*" in tags or _etag(session) in tags


def _number(query: dict[str, str], name: str, default: float, most: float) -> float:
    """Read a query parameter that is a number from 0 to ``most``."""
    text = query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise Invalid(f"{name} is a number from 0 to {most:g}, not {text!r}")
    return value


async def history(context: Context, match: Match, asked: Request) -> Answer:
    query = asked.query
    limit = int(_number(query, "limit", MAX_LIMIT, MAX_LIMIT))
    if limit < 1:
        raise Invalid("limit is at least 1")
    found = await read_history(
        context.engine,
        context.broker,
        match.route.dialect,
        match.params["id"],
        after=query.get("after") or asked.headers.get("last-event-id"),
        limit=limit,
        wait=_number(query, "wait", 0, MAX_WAIT),
        stopping=context.stopping,
    )
    answer = {
        "session_id": match.params["id"],
        "resume": found.resume,
        "events": [text_message(message) for message in found.messages],
        "next": found.next,
        "end": found.end,
    }
    return json_answer(200, answer, (("Cache-Control", "no-cache"),))


async def control(context: Context, match: Match, _asked: Request) -> Answer:
    body = await request_body(context)
    wish: ControlBody = decode(body, ControlBody) if body.strip() else ControlBody()
    name = match.route.name.removesuffix("_job")
    asked = Control.CONTINUE if name == "resume" else Control(name)
    session = await context.tracker.control(match.params["id"], asked, force=wish.force)
    return json_answer(202, describe(context, match, session))


async def delete(context: Context, match: Match, _asked: Request) -> Answer:
    await context.tracker.delete(match.params["id"])
    return Answer(204)


HANDLERS = {
    "create": create,
    "list": listing,
    "list_jobs": listing,
    "job": get,
    "job_v1": get,
    "transcription_poll": get,
    "cancel_job": control,
    "pause_job": control,
    "resume_job": control,
    "progress": publish,
    "events": publish,
    "interact": publish,
    "job_progress": publish,
    "transcription_status": publish,
    "status": status,
    "history": history,
    "cancel": control,
    "pause": control,
    "resume": control,
    "delete": delete,
}
