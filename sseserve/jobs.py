"""The server's own queue of jobs: at most so many run at a time, the others wait in their order.

What runs is a runner: ``async def runner(tracker, session_id, data)``, a worker as any other. One that raises
has failed; one that returns without a last word has succeeded, or was cancelled if that was asked for.
Without a runner the jobs run in Demo Mode, which always works and really makes something.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import msgspec
import trio

from .errors import SessionEnded, SessionNotFound, SseserveError, Unavailable
from .model import Control, Session
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
        self._queue: deque[tuple[Session, Runner]] = deque()

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn."""
        return len(self._queue)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Keep a place for the job that is created and submitted in this block.

        Raises:
            Unavailable: there is none.
        """
        if self._running + len(self._queue) + self._placed >= self._most + self._room:
            raise Unavailable(f"{self.waiting} jobs are waiting already")
        self._placed += 1
        try:
            yield
        finally:
            self._placed -= 1

    def submit(self, session: Session, runner: Runner | None = None) -> None:
        """Run a job when its turn comes; one that has ended until then (cancelled) is passed over."""
        self._queue.append((session, runner or self._runner))
        self._next()

    def _next(self) -> None:
        while self._queue and self._running < self._most:
            self._running += 1
            self._nursery.start_soon(self._run, *self._queue.popleft())

    async def _run(self, session: Session, runner: Runner) -> None:
        data = msgspec.Raw(b"null") if session.data is msgspec.UNSET else session.data
        try:
            if not (await self._tracker.get(session.id)).ended:
                await runner(self._tracker, session.id, data)
                await self._finish(session.id)
        except (SessionEnded, SessionNotFound) as reason:
            log.info("job %s stops: %s", session.id, reason)
        except Exception as error:
            # The boundary of a job: the queue goes on.
            log.exception("job %s failed", session.id)
            await self._fail(session.id, error)
        # Cancelled, we do not come here: the server is done, and nobody's turn comes any more.
        self._running -= 1
        self._next()

    async def _finish(self, session_id: str) -> None:
        """End a job whose runner has returned without a last word."""
        session = await self._tracker.get(session_id)
        if not session.ended:
            status = "cancelled" if session.control is Control.CANCEL else "succeeded"
            await self._tracker.update(session_id, status=status)

    async def _fail(self, session_id: str, error: Exception) -> None:
        try:
            await self._tracker.update(session_id, status="failed", error=f"{type(error).__name__}: {error}")
        except SseserveError as reason:
            log.info("job %s: %s", session_id, reason)
