"""The server's own queue of jobs: at most so many run at a time, the others wait in their order.

What runs is a runner: ``async def runner(tracker, session_id, data)``, a worker as any other. Without one
the jobs run in Demo Mode, which always works and really makes something.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec
import trio

from .errors import SessionEnded, SessionNotFound, SseserveError, Unavailable
from .model import Session
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
        self._slots = trio.Semaphore(running)  # first come, first served
        self._running = running
        self._waiting = waiting
        self._jobs = 0

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn."""
        return max(0, self._jobs - self._running)

    def check_room(self) -> None:
        """Raise Unavailable if another job would find no place."""
        if self._jobs >= self._running + self._waiting:
            raise Unavailable(f"{self.waiting} jobs are waiting already")

    def submit(self, session: Session, runner: Runner | None = None) -> None:
        """Run a job when its turn comes; one that has ended until then (cancelled) is passed over."""
        self._jobs += 1
        self._nursery.start_soon(self._run, session, runner or self._runner)

    async def _run(self, session: Session, runner: Runner) -> None:
        data = msgspec.Raw(b"null") if session.data is msgspec.UNSET else session.data
        try:
            async with self._slots:
                if not (await self._tracker.get(session.id)).ended:
                    await runner(self._tracker, session.id, data)
        except (SessionEnded, SessionNotFound) as reason:
            log.info("job %s stops: %s", session.id, reason)
        except Exception as error:
            # The boundary of a job: the queue goes on.
            log.exception("job %s failed", session.id)
            await self._fail(session.id, error)
        finally:
            self._jobs -= 1

    async def _fail(self, session_id: str, error: Exception) -> None:
        try:
            await self._tracker.update(session_id, status="failed", error=f"{type(error).__name__}: {error}")
        except SseserveError as reason:
            log.info("job %s: %s", session_id, reason)
