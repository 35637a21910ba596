"""The server's own queue of jobs: at most so many run at a time, the others wait in their order.

What runs is a runner: ``async def runner(tracker, session_id, data)``, a worker as any other. One that raises
has failed; one that returns without a last word has succeeded, or was cancelled if that was asked for.
Without a runner the jobs run in Demo Mode, which always works and really makes something.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from ..errors import SessionEnded, SessionNotFound, SseserveError, Unavailable
from ..model import Control, Session
from .tracker import Tracker

__all__ = ["JobQueue", "Runner"]

log = logging.getLogger(__name__)

Runner = Callable[[Tracker, str, msgspec.Raw], Awaitable[None]]


class JobQueue:
    """Runs jobs in ``nursery``: ``running`` at a time, and keeps at most ``waiting`` behind them."""

    def __init__(
        self, tracker: Tracker, nursery: trio.Nursery, runner: Runner, *, running: int, waiting: int
    ) -> None:
        self._tracker = tracker
        self._nursery = nursery
        self._runner = runner
        self._most = running
        self._room = waiting
        self._running = 0
        self._placed = 0  # jobs that are being created
        self._queue: OrderedDict[tuple[str, str], tuple[Session, Runner]] = OrderedDict()  # by id and epoch

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn, but for those that have ended since ``prune``."""
        return len(self._queue)

    async def prune(self) -> None:
        """Give up the places of jobs that have ended or were deleted while they waited."""
        for session, _ in list(self._queue.values()):
            if not await self._goes_on(session):
                self._queue.pop((session.id, session.epoch), None)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Keep a place for the job that is created and submitted in this block.

        Raises:
            Unavailable: there is none.
        """
        if self._full:
            await self.prune()
        if self._full:
            raise Unavailable(f"{self.waiting} jobs are waiting already")
        self._placed += 1
        try:
            yield
        finally:
            self._placed -= 1

    def submit(self, session: Session, runner: Runner | None = None) -> None:
        """Run a job when its turn comes.

        One that has ended until then (cancelled), or whose id is another session's, is passed over.
        """
        self._queue[session.id, session.epoch] = session, runner or self._runner
        self._next()

    @property
    def _full(self) -> bool:
        return self._running + len(self._queue) + self._placed >= self._most + self._room

    async def _goes_on(self, session: Session) -> bool:
        """Whether there still is this very session, and it has not ended."""
        now = await self._tracker.engine.load(session.id)
        return now is not None and now.epoch == session.epoch and not now.ended

    def _next(self) -> None:
        while self._queue and self._running < self._most:
            self._running += 1
            _, job = self._queue.popitem(last=False)
            self._nursery.start_soon(self._run, *job)

    async def _run(self, session: Session, runner: Runner) -> None:
        data = msgspec.Raw(b"null") if session.data is msgspec.UNSET else session.data
        try:
            if await self._goes_on(session):
                await runner(self._tracker, session.id, data)
                await self._finish(session.id)
        except (SessionEnded, SessionNotFound) as reason:
            log.info("job %s stops: %s", session.id, reason)
        except Exception as error:
            # The boundary of a job: the queue goes on.
            log.exception("job %s failed", session.id)
            await self._fail(session.id, f"{type(error).__name__}: {error}")
        # Cancelled, we do not come here: the server is done, and nobody's turn comes any more.
        self._running -= 1
        self._next()

    async def _finish(self, session_id: str) -> None:
        """End a job whose runner has returned without a last word."""
        session = await self._tracker.get(session_id)
        if not session.ended:
            status = "cancelled" if session.control is Control.CANCEL else "succeeded"
            await self._tracker.update(session_id, status=status)

    async def _fail(self, session_id: str, reason: str) -> None:
        """End a job whose runner has raised. What is no character (half of a file's name) becomes a ``?``."""
        try:
            if not (await self._tracker.get(session_id)).ended:
                error = reason.encode(errors="replace").decode()
                await self._tracker.update(session_id, status="failed", error=error)
        except SseserveError as refusal:
            log.info("job %s: %s", session_id, refusal)
