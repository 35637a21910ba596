"""Jobs, in the two dialects that create them: the video studio's and the podcast generator's."""

from __future__ import annotations

import logging
import random

import msgspec

from ..context import Context
from ..dialects import Publication
from ..dialects.jobs_v1 import PubsubPush
from ..errors import SseserveError, Unavailable
from ..http.messages import Answer, Request, json_answer
from ..http.routes import Match
from ..jsontext import decode
from ..model import Receipt, Session
from .sessions import request_body

__all__ = ["HANDLERS"]

log = logging.getLogger(__name__)


async def _begin(context: Context, asked: Request, *, title: str | None = None) -> Session:
    """Create the session of a job from a request's body, which is the runner's to understand."""
    body = await request_body(context)
    fields: dict[str, msgspec.Raw] = decode(body, dict[str, msgspec.Raw]) if body.strip() else {}
    given = decode(bytes(fields["title"]), str) if "title" in fields else title
    return await context.tracker.create(
        title=given,
        correlation_id=asked.correlation_id,
        data=msgspec.Raw(msgspec.json.format(body, indent=-1)) if body.strip() else msgspec.UNSET,
    )


async def create_job(context: Context, match: Match, asked: Request) -> Answer:
    async with context.jobs.place():
        session = await _begin(context, asked)
        context.jobs.submit(session)
    return _created(match, asked, session, 202)


async def quick_demo(context: Context, match: Match, asked: Request) -> Answer:
    """Demo Mode, whatever the configuration; a film of its own for everybody who asks for nothing."""
    async with context.jobs.place():
        session = await _begin(context, asked, title="Demonstration")
        if session.data is msgspec.UNSET:
            seed = msgspec.Raw(str(random.getrandbits(32)).encode())
            session = msgspec.structs.replace(session, data=seed)
        context.jobs.submit(session, context.demo_mode)
    return _created(match, asked, session, 202)


async def create_v1(context: Context, match: Match, asked: Request) -> Answer:
    """Create a job for services elsewhere to work on; they publish to it."""
    return _created(match, asked, await _begin(context, asked), 201)


def _created(match: Match, asked: Request, session: Session, status: int) -> Answer:
    assert match.route.dialect.describe_created is not None
    path, created = match.route.dialect.describe_created(session)
    headers = (("Location", path), ("X-Correlation-ID", asked.correlation_id))
    return json_answer(status, created, headers)


async def pubsub(context: Context, _match: Match, asked: Request) -> Answer:
    """Take a status update from a push subscription.

    Only what may succeed later is refused: any other answer than a success is delivered again, for ever.
    """
    try:
        receipt = await _push(context, await request_body(context))
    except Unavailable:
        raise
    except SseserveError as error:
        context.bad_messages += 1
        log.warning("request %s: a bad Pub/Sub message is dropped: %s", asked.id, error)
        return Answer(204)
    return json_answer(200, {"id": receipt.id})


async def _push(context: Context, body: bytes) -> Receipt:
    push: PubsubPush = decode(body, PubsubPush)
    update, key = push.status_update(), push.key
    if key is not None and (known := await context.engine.receipt(update.job_id, key)) is not None:
        return known
    change = update.change(Publication(update.job_id, body, context.tracker.clock()))
    store = None if key is None else lambda receipt: (key, receipt)
    receipt = await context.tracker.apply(update.job_id, change, store_receipt=store)
    await context.broker.room(update.job_id)
    return receipt


HANDLERS = {"create_job": create_job, "demo": quick_demo, "create_v1": create_v1, "pubsub": pubsub}
