"""Jobs, in the two dialects that create them: the video studio's and the podcast generator's."""

from __future__ import annotations

import base64
import binascii
import logging
import random
from typing import Any
from urllib.parse import quote

import msgspec

from ..bodies import decode, status_update
from ..context import Context
from ..dialects.jobs import job
from ..dialects.updates import StatusUpdate
from ..errors import BadRequest, Invalid, SseserveError, Unavailable
from ..http.messages import Answer, Request, json_answer
from ..http.routes import Match
from ..model import Progress, Receipt, Session, State
from .sessions import control, filtered, request_body

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


def _made(asked: Request, session: Session, base: str) -> Answer:
    made = {
        **job(session),
        "links": {
            "self": base,
            "events": f"{base}/events",
            "progress": f"{base}/progress",
            "cancel": f"{base}/cancel",
            "status": f"/api/sessions/{quote(session.id, safe='')}/status",
        },
    }
    made["session_id"] = session.id
    return json_answer(202, made, (("Location", base), ("X-Correlation-ID", asked.correlation_id)))


async def create_job(context: Context, _match: Match, asked: Request) -> Answer:
    async with context.jobs.place():
        session = await _begin(context, asked)
        context.jobs.submit(session)
    return _made(asked, session, f"/api/jobs/{quote(session.id, safe='')}")


async def quick_demo(context: Context, _match: Match, asked: Request) -> Answer:
    """Demo Mode, whatever the configuration; a film of its own for everybody who asks for nothing."""
    async with context.jobs.place():
        session = await _begin(context, asked, title="Demonstration")
        if session.data is msgspec.UNSET:
            seed = msgspec.Raw(str(random.getrandbits(32)).encode())
            session = msgspec.structs.replace(session, data=seed)
        context.jobs.submit(session, context.demo_mode)
    return _made(asked, session, f"/api/jobs/{quote(session.id, safe='')}")


async def list_jobs(context: Context, _match: Match, asked: Request) -> Answer:
    """The jobs without their ``request``, which may be as large as a body."""
    found = [job(session) for session in await filtered(context, asked)]
    for one in found:
        del one["request"]
    await context.jobs.prune()
    return json_answer(200, {"jobs": found, "waiting": context.jobs.waiting})


async def get_job(context: Context, match: Match, _asked: Request) -> Answer:
    session = await context.tracker.get(match.params["id"])
    return json_answer(200, job(session), (("Cache-Control", "no-cache"),))


async def control_job(context: Context, match: Match, asked: Request) -> Answer:
    answer = await control(context, match, asked)
    session = await context.tracker.get(match.params["id"])
    return json_answer(answer.status, job(session))


async def create_v1(context: Context, _match: Match, asked: Request) -> Answer:
    """Create a job for services elsewhere to work on; they publish to it."""
    session = await _begin(context, asked)
    where = f"/api/v1/jobs/{quote(session.id, safe='')}"
    made = {"jobId": session.id, "status": "pending", "sseEndpoint": f"{where}/events"}
    return json_answer(201, made, (("Location", where),))


def _status(match: Match, session: Session) -> bytes:
    """Say where a session stands as its stream would; before any progress it is queued."""
    if session.progress is None:
        queued = Progress(status="queued", state=State.QUEUED, updated_at=session.touched_at)
        session = msgspec.structs.replace(session, progress=queued)
    data = match.route.dialect.snapshot(session)[-1].data
    assert data is not None
    return data


async def get_v1(context: Context, match: Match, _asked: Request) -> Answer:
    session = await context.tracker.get(match.params["id"])
    status: dict[str, Any] = msgspec.json.decode(_status(match, session))
    status |= {"jobId": session.id, "connections": context.broker.watchers(session.id)}
    return json_answer(200, status, (("Cache-Control", "no-cache"),))


class PubsubMessage(msgspec.Struct, frozen=True, rename="camel"):
    """The message of a push delivery, as far as it matters here; ``data`` is base64."""

    data: str
    message_id: str = ""


class PubsubPush(msgspec.Struct, frozen=True):
    """What a push subscription of Google Cloud Pub/Sub delivers."""

    message: PubsubMessage


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
    try:
        data = base64.b64decode(push.message.data, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest("the message's data is no base64") from None
    said: StatusUpdate = decode(data, StatusUpdate)
    if not said.job_id:
        raise Invalid("the update names no job")
    # Pub/Sub delivers at least once; its message id tells a second time from another message.
    key = f"pubsub {push.message.message_id}" if push.message.message_id else None
    if key is not None and (known := await context.engine.receipt(said.job_id, key)) is not None:
        return known
    store = None if key is None else lambda receipt: (key, receipt)
    receipt = await context.tracker.apply(said.job_id, status_update(said), receipt=store)
    await context.broker.room(said.job_id)
    return receipt


async def transcription_status(context: Context, match: Match, _asked: Request) -> Answer:
    """What its clients poll when they cannot stream."""
    session = await context.tracker.get(match.params["id"])
    data = _status(match, session)
    return Answer(200, data, (("Content-Type", "application/json"), ("Cache-Control", "no-cache")))


HANDLERS = {
    "create_job": create_job,
    "demo": quick_demo,
    "list_jobs": list_jobs,
    "job": get_job,
    "cancel_job": control_job,
    "pause_job": control_job,
    "resume_job": control_job,
    "create_v1": create_v1,
    "job_v1": get_v1,
    "pubsub": pubsub,
    "transcription_poll": transcription_status,
}
