"""Creating jobs: for this server's queue, or for services elsewhere."""

from __future__ import annotations

import random

import msgspec

from ..http.messages import Request, Response, read_body
from ..http.routing import Match
from ..jsontext import decode
from ..model import Session
from ..progress.queue import JobQueue, Runner
from ..progress.tracker import Tracker
from .dispatch import Handler
from .sessions import created_response

__all__ = ["JobHandlers"]


class JobHandlers:
    """The handlers that create jobs.

    Args:
        tracker: creates the sessions.
        queue: runs the jobs.
        demo: runs a demonstration job.
        max_body: limit of a request's body, in bytes.
    """

    def __init__(self, tracker: Tracker, queue: JobQueue, demo: Runner, *, max_body: int) -> None:
        self._tracker = tracker
        self._queue = queue
        self._demo = demo
        self._max_body = max_body

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {"queue_job": self.queue_job, "queue_demo": self.queue_demo, "create_job": self.create_job}

    async def queue_job(self, request: Request, match: Match) -> Response:
        async with self._queue.reserve():
            session = await self._create(request)
            self._queue.submit(session)
        return created_response(202, match, session)

    async def queue_demo(self, request: Request, match: Match) -> Response:
        """Queue a demonstration, whatever the server's runner; without a body, each with another film."""
        async with self._queue.reserve():
            seed = msgspec.Raw(str(random.getrandbits(32)).encode())
            session = await self._create(request, title="Demonstration", data=seed)
            self._queue.submit(session, self._demo)
        return created_response(202, match, session)

    async def create_job(self, request: Request, match: Match) -> Response:
        """Create a job that services elsewhere work on, and publish to."""
        return created_response(201, match, await self._create(request))

    async def _create(
        self,
        request: Request,
        *,
        title: str | None = None,
        data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET,
    ) -> Session:
        """Create a job's session. The request's body is for the runner; only a ``title`` is read here.

        Without a body the job has ``data``.
        """
        body = await read_body(request, self._max_body)
        members: dict[str, msgspec.Raw] = decode(body, dict[str, msgspec.Raw]) if body.strip() else {}
        return await self._tracker.create(
            title=decode(bytes(members["title"]), str) if "title" in members else title,
            correlation_id=request.correlation_id,
            data=msgspec.Raw(msgspec.json.format(body, indent=-1)) if body.strip() else data,
        )
