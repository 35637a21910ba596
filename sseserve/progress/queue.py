"""The queue of jobs: they are run in this server, or by workers elsewhere, which claim them.

In this server a number of them run at a time, the others wait in their order. A job is run by a runner:
``async def runner(tracker, session_id, data)``, a worker as any other. If it raises, the job has failed; if
it returns without ending the session, the job has succeeded, or was cancelled if that was asked for.

A worker elsewhere gets the job that has waited longest, and nobody else gets that one. It holds a lease: if
it falls silent, the job is stalled and then lost. It is not run again, because its work may be half done.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import ClassVar

import msgspec
import trio

from ..errors import Conflict, SessionEnded, SessionNotFound, SseserveError, Unavailable
from ..model import Control, Session
from .rules import MAX_ENCODED
from .tracker import Tracker

__all__ = ["JobError", "JobQueue", "JobValidationError", "ProviderError", "Runner"]

log = logging.getLogger(__name__)

MAX_REASON = MAX_ENCODED // 8  # characters of it, each of which takes up to six bytes of JSON
MAX_REASONS = 3  # errors of a group that are named in the reason of a failure

Runner = Callable[[Tracker, str, msgspec.Raw], Awaitable[None]]


class JobError(Exception):
    """A runner raises this if the job fails for a known reason: watchers get its ``code`` and its text."""

    code: ClassVar[str] = "generic_error"


class JobValidationError(JobError):
    """The job's request cannot be processed: a member is missing or has a wrong value."""

    code = "validation_error"


class ProviderError(JobError):
    """A service that the job needs has failed."""

    code = "provider_error"


class JobQueue:
    """Runs jobs.

    Args:
        tracker: has the jobs' sessions.
        nursery: runs them.
        runner: runs a job that names no other; None: workers elsewhere do.
        max_running: that many at a time.
        max_waiting: that many may wait.
    """

    def __init__(
        self,
        tracker: Tracker,
        nursery: trio.Nursery,
        runner: Runner | None,
        *,
        max_running: int,
        max_waiting: int,
    ) -> None:
        self._tracker = tracker
        self._nursery = nursery
        self._runner = runner
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._running = 0
        self._reserved = 0  # places of jobs that are being created
        # By id and epoch, with the runner that a job names.
        self._queue: OrderedDict[tuple[str, str], tuple[Session, Runner | None]] = OrderedDict()
        self._claimers = trio.lowlevel.ParkingLot()

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn, including those that have ended since ``prune``."""
        return len(self._queue)

    async def prune(self) -> None:
        """Remove the jobs that have ended or were deleted while they waited."""
        for session, _ in list(self._queue.values()):
            if not await self._is_unfinished(session):
                self._queue.pop((session.id, session.epoch), None)

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[None]:
        """Reserve a place for the job that is created and submitted in this block.

        Raises:
            Unavailable: the queue is full.
        """
        if self._is_full:
            await self.prune()
        if self._is_full:
            raise Unavailable(f"the queue is full: {self.waiting} jobs are waiting")
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def submit(self, session: Session, runner: Runner | None = None) -> None:
        """Run a job when its turn comes.

        One that has ended until then (cancelled), or whose id is another session's, is skipped.
        """
        self._queue[session.id, session.epoch] = session, runner
        self._start_next()
        if runner is None:
            self._claimers.unpark()

    async def claim(self, lease: float) -> Session | None:
        """Hand out the job that has waited longest, with a lease (seconds); None if no job waits.

        A job that names its runner is not handed out. One that has ended while it waited is skipped.
        """
        while (job := self._take(lambda runner: runner is None)) is not None:
            session, _ = job
            try:
                # A client that has left gets none, and the engine may never notice.
                await trio.lowlevel.checkpoint_if_cancelled()
                if await self._is_unfinished(session):
                    return await self._tracker.claim(session, lease)
            except (Conflict, SessionNotFound):
                continue
            except BaseException:
                # Cancelled: the job keeps its place.
                self._queue[session.id, session.epoch] = job
                self._queue.move_to_end((session.id, session.epoch), last=False)
                self._claimers.unpark()
                raise
        return None

    async def wait_for_job(self) -> None:
        """Wait until there may be a job to claim. Of those who wait, the first one is told."""
        await self._claimers.park()

    def _take(self, is_eligible: Callable[[Runner | None], bool]) -> tuple[Session, Runner | None] | None:
        """Take the first job whose runner is eligible out of the queue."""
        for key, (_, runner) in self._queue.items():
            if is_eligible(runner):
                return self._queue.pop(key)
        return None

    @property
    def _is_full(self) -> bool:
        taken = self._running + len(self._queue) + self._reserved
        return taken >= self._max_running + self._max_waiting

    async def _is_unfinished(self, session: Session) -> bool:
        """Return whether this very session still exists and has not ended."""
        now = await self._tracker.engine.load(session.id)
        return now is not None and now.epoch == session.epoch and not now.ended

    def _start_next(self) -> None:
        while self._running < self._max_running:
            if (job := self._take(lambda runner: (runner or self._runner) is not None)) is None:
                return
            session, runner = job
            runner = runner or self._runner
            assert runner is not None
            self._running += 1
            self._nursery.start_soon(self._run, session, runner)

    async def _run(self, session: Session, runner: Runner) -> None:
        data = msgspec.Raw(b"null") if session.data is msgspec.UNSET else session.data
        try:
            if await self._is_unfinished(session):
                await runner(self._tracker, session.id, data)
                await self._finish(session)
        except Exception as error:  # noqa: BLE001 - the boundary of a job: the queue goes on
            await self._end(session, error)
        except BaseExceptionGroup as group:
            errors, others = group.split(Exception)
            if errors is not None:
                await self._end(session, errors)
            if others is not None:
                raise others from None  # Cancelled: the server stops
        # Not reached when cancelled: then the server has stopped, and no other job runs.
        self._running -= 1
        self._start_next()

    async def _finish(self, job: Session) -> None:
        """End a job whose runner has returned without ending it."""
        if await self._is_unfinished(job):
            session = await self._tracker.get(job.id)
            status = "cancelled" if session.control is Control.CANCEL else "succeeded"
            await self._tracker.update(job.id, status=status)

    async def _end(self, session: Session, error: Exception) -> None:
        """End a job whose runner has raised, unless the reason is that it has ended."""
        errors = [leaf for leaf in _leaves(error) if not isinstance(leaf, SessionEnded | SessionNotFound)]
        if not errors:
            log.info("%s stops: %s", _label(session), next(_leaves(error)))
        elif len(errors) == 1 and isinstance(errors[0], JobError):
            log.warning("%s failed: %s: %s", _label(session), errors[0].code, errors[0])
            await self._fail(session, str(errors[0]), errors[0].code)
        else:
            log.error("%s failed", _label(session), exc_info=error)
            reason = "; ".join(f"{type(leaf).__name__}: {leaf}" for leaf in errors[:MAX_REASONS])
            if len(errors) > MAX_REASONS:
                reason += f"; and {len(errors) - MAX_REASONS} more"
            await self._fail(session, reason)

    async def _fail(self, session: Session, reason: str, code: str | None = None) -> None:
        """Record a failure. A lone surrogate (in a file's name) becomes a ``?``."""
        try:
            if await self._is_unfinished(session):
                error = reason.encode(errors="replace").decode()[:MAX_REASON]
                await self._tracker.update(
                    session.id,
                    status="failed",
                    error=error if code is None else {"code": code, "message": error},
                )
        except SseserveError as refusal:
            log.info("job %s: %s", session.id, refusal)
        except Exception:
            # The boundary of a job again: its failure cannot be recorded, and the queue goes on.
            log.exception("the failure of job %s cannot be recorded", session.id)


def _label(session: Session) -> str:
    """Name a job in the log."""
    correlation = "" if session.correlation_id is None else f" (correlation {session.correlation_id})"
    return f"job {session.id}{correlation}"


def _leaves(error: Exception) -> Iterator[Exception]:
    """Yield the errors that a group, such as that of a runner's nursery, holds; or the error itself."""
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
