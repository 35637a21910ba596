"""Creating jobs, for this server's queue or for services elsewhere; and handing out queued ones."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated

import msgspec
import trio

from ..demo.worker import DEMO, TITLE
from ..errors import Invalid
from ..http.auth import Action, Grant, Policy, refusal
from ..http.messages import Request, Response, read_body
from ..http.open_streams import OpenStream, Poll
from ..http.routing import Match, number_parameter
from ..jsontext import decode
from ..logs import JobIds, Line
from ..model import Session
from ..progress.queue import DEFAULT_RUNNER, JobQueue
from ..progress.tracker import Tracker
from .dispatch import Handler
from .sessions import created_response

__all__ = ["JobHandlers"]

log = logging.getLogger(__name__)

DEFAULT_LEASE = 30.0  # seconds


class _JobMembers(msgspec.Struct, frozen=True):
    title: str | None = None
    owner: Annotated[str, msgspec.Meta(max_length=256)] | None = None


class JobHandlers:
    """The handlers that create jobs, and hand them out.

    Args:
        tracker: creates the sessions.
        queue: runs the jobs, or hands them out.
        policy: says who may create them, and whose they are.
        max_body: limit of a request's body, in bytes.
        stopping: is set when the server begins to stop; nothing waits from then on.
        open_poll: counts a request that may wait.
    """

    def __init__(
        self,
        tracker: Tracker,
        queue: JobQueue,
        policy: Policy,
        *,
        max_body: int,
        stopping: trio.Event,
        open_poll: Callable[[Request, Match], Awaitable[OpenStream]],
    ) -> None:
        self._tracker = tracker
        self._queue = queue
        self._policy = policy
        self._max_body = max_body
        self._stopping = stopping
        self._open_poll = open_poll

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {
            "queue_job": self.queue_job,
            "queue_demo": self.queue_demo,
            "create_job": self.create_job,
            "claim_job": self.claim_job,
        }

    async def queue_job(self, request: Request, match: Match) -> Response:
        async with self._queue.reserve():
            session = await self._create(request, job=DEFAULT_RUNNER)
            self._queue.submit(session)
        return created_response(202, match, session)

    async def queue_demo(self, request: Request, match: Match) -> Response:
        """Queue a demonstration, whatever the server's runner; without a body, each with another film."""
        async with self._queue.reserve():
            seed = msgspec.Raw(str(random.getrandbits(32)).encode())
            session = await self._create(request, title=TITLE, data=seed, job=DEMO)
            self._queue.submit(session)
        return created_response(202, match, session)

    async def create_job(self, request: Request, match: Match) -> Response:
        """Create a job that services elsewhere work on, and publish to."""
        return created_response(201, match, await self._create(request))

    async def claim_job(self, request: Request, match: Match) -> Response:
        """Hand a queued job to a worker elsewhere; with ``wait``, as soon as there is one."""
        query = request.query
        lease = number_parameter(query, match, "lease", DEFAULT_LEASE)
        if lease < 1:
            raise Invalid(f"lease must be at least 1 second, not {lease:g}")
        # Nothing is in it, but over HTTP/2 a client that leaves is not noticed before all of it is read.
        await read_body(request, self._max_body)
        if "wait" in query:
            wait = number_parameter(query, match, "wait", 0)
            expired = trio.Event()
            poll = Poll(expired.set)
            with await self._open_poll(request, match) as stream:
                stream.attach(poll)
                check = partial(self._check_right, request.grant)
                session = await self._claim(lease, trio.current_time() + wait, expired, check)
            if session is None:
                poll.check()
        else:
            session = await self._queue.claim(lease)
        if session is None:
            return Response(204)
        worker = query.get("worker") or request.peer
        log.info(
            Line(
                "the job is claimed",
                worker=worker,
                lease=lease,
                **JobIds(session.id, session.correlation_id).log_fields,
            )
        )
        return created_response(200, match, session)

    def _check_right(self, grant: Grant | None) -> None:
        # What the roles may do can be reloaded while a worker waits.
        if grant is not None and not self._policy.allows_any(grant, Action.PUBLISH, None):
            raise refusal(grant, Action.PUBLISH, of_all=True)

    async def _claim(
        self, lease: float, deadline: float, expired: trio.Event, check: Callable[[], None]
    ) -> Session | None:
        """Claim a job, as soon as there is one; return None if there is none in time.

        Only the waiting ends with the token: a claim that is being stored may succeed.
        """
        while not expired.is_set():
            if (session := await self._queue.claim(lease, check)) is not None:
                return session
            if not await self._wait_for_job(deadline, expired):
                break
        return None

    async def _wait_for_job(self, deadline: float, expired: trio.Event) -> bool:
        """Wait until there may be a job to claim; return False if there is none in time."""
        is_told = False
        async with trio.open_nursery() as nursery:

            async def cancel_when(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_when, self._stopping)
            nursery.start_soon(cancel_when, expired)
            nursery.cancel_scope.deadline = deadline
            await self._queue.wait_for_job()
            is_told = True
            nursery.cancel_scope.cancel()
        return is_told

    async def _create(
        self,
        request: Request,
        *,
        title: str | None = None,
        data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET,
        job: str | None = None,
    ) -> Session:
        """Create a job's session; without a body it has ``data``. ``job`` is the runner that it names.

        The request's body is for the runner; only the members of ``_JobMembers`` are read here.
        """
        body = await read_body(request, self._max_body)
        members = decode(body, _JobMembers) if body.strip() else _JobMembers()
        return await self._tracker.create(
            title=title if members.title is None else members.title,
            owner=self._policy.creation_owner(request.grant, Action.CREATE, None, members.owner),
            correlation_id=request.correlation_id,
            trace=request.trace,
            data=msgspec.Raw(msgspec.json.format(body, indent=-1)) if body.strip() else data,
            job=job,
        )
