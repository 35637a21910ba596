"""The queue of jobs: they are run in this server, or by workers elsewhere, which claim them.

The queue is in the records: a session with a ``job`` and without an ``instance`` waits. So it outlives a
restart with the logs, and all instances share it. What is here of it is a view, for the order and the limits;
who claims a job first in its record has it.

In this server a number of them run at a time, the others wait in their order. A job is run by a runner:
``async def runner(tracker, session_id, data)``, a worker as any other. If it raises, the job has failed; if
it returns without ending the session, the job has succeeded, or was cancelled if that was asked for. If the
server stops before, the job is lost, as its work may be half done.

A worker elsewhere gets the job that has waited longest, and nobody else gets that one. It holds a lease: if
it falls silent, the job is stalled and then lost. It is not run again either.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import ClassVar, TypeVar

import msgspec
import trio

from ..concurrency import select
from ..engines.coordination import Coordination
from ..errors import Conflict, InsufficientStorage, SessionEnded, SessionNotFound, SseserveError, Unavailable
from ..logs import JobIds, Line, begin_context
from ..model import Control, Session
from ..trace_context import TraceContext
from ..tracing import Tracing
from .rules import MAX_ENCODED
from .tracker import Tracker

__all__ = ["DEFAULT_RUNNER", "JobError", "JobQueue", "JobValidationError", "ProviderError", "Runner"]

log = logging.getLogger(__name__)

MAX_REASON = MAX_ENCODED // 8  # characters of it, each of which takes up to six bytes of JSON
MAX_REASONS = 3  # errors of a group that are named in the reason of a failure
LOOK_INTERVAL = 5.0  # seconds between two looks at the jobs of all instances
SPARE_INTERVAL = 1.0  # seconds at least, while this instance could not begin any
STALE = 0.25  # seconds after a look in which other instances may have taken many jobs
RETRY_DELAY = 1.0  # seconds until something that could not be stored is tried again
DEFAULT_RUNNER = ""  # the name of the runner of a job that names no other

Runner = Callable[[Tracker, str, msgspec.Raw], Awaitable[None]]
T = TypeVar("T")


class JobError(Exception):
    """A runner raises this if the job fails for a known reason: watchers get its ``code`` and its text."""

    code: ClassVar[str] = "generic_error"


class JobValidationError(JobError):
    """The job's request cannot be processed: a member is missing or has a wrong value."""

    code = "validation_error"


class ProviderError(JobError):
    """A service that the job needs has failed."""

    code = "provider_error"


_Key = tuple[str, str]  # id and epoch


class JobQueue:
    """Runs jobs.

    Args:
        tracker: has the jobs' sessions.
        nursery: runs them.
        runners: by the names that jobs have for them; jobs with another name are left to others.
        coordination: knows the other instances.
        stopping: is set when the server begins to stop; no job begins from then on.
        max_running: that many at a time.
        max_waiting: that many may wait.
    """

    def __init__(
        self,
        tracker: Tracker,
        nursery: trio.Nursery,
        runners: Mapping[str, Runner],
        coordination: Coordination,
        *,
        stopping: trio.Event,
        max_running: int,
        max_waiting: int,
    ) -> None:
        self._tracker = tracker
        self._nursery = nursery
        self._runners = runners
        self._coordination = coordination
        self._stopping = stopping
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._running = 0
        self._reserved = 0  # places of jobs that are being created
        self._view: dict[_Key, Session] = {}  # the jobs that wait, the oldest first
        self._looked_at = -math.inf
        self._taken: set[_Key] = set()  # those that are being claimed, or run, here
        self._claimers = trio.lowlevel.ParkingLot()
        self.tracing: Tracing | None = None

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn, as of the last ``refresh``."""
        return len(self._view)

    @property
    def running(self) -> int:
        """How many jobs run in this process."""
        return self._running

    async def refresh(self) -> list[Session]:
        """Look which jobs wait; return those that have not ended."""
        known = self._view.keys() | self._taken
        looked_at = trio.current_time()
        jobs = await self._tracker.engine.jobs()
        waiting = await select(jobs, lambda job: job.is_waiting)
        view = {_key(job): job for job in waiting if _key(job) not in self._taken}
        for key, job in self._view.items():
            if key not in known:
                view.setdefault(key, job)  # was submitted in the meantime
        self._view, self._looked_at = view, looked_at
        return jobs

    async def _refresh_if_stale(self) -> None:
        """Look again after another instance has taken a job, as it may have taken more."""
        if trio.current_time() - self._looked_at > STALE:
            await self.refresh()

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[None]:
        """Reserve a place for the job that is created and submitted in this block.

        Raises:
            Unavailable: the queue is full.
        """
        if self._is_full:
            await self.refresh()
        if self._is_full:
            raise Unavailable(
                f"the queue is full: {self.waiting} jobs are waiting; max_waiting_jobs = {self._max_waiting}",
                limit="max_waiting_jobs",
            )
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def submit(self, session: Session) -> None:
        """Have a job that was just created run when its turn comes.

        One that has ended until then (cancelled), or whose id is another session's, is skipped.
        """
        self._view[_key(session)] = session
        self._start_next()
        if _key(session) in self._view:
            self._claimers.unpark()
            self._coordination.announce_job()

    async def claim(self, lease: float, check: Callable[[], None] | None = None) -> Session | None:
        """Hand out the job that has waited longest, with a lease (seconds); None if no job waits.

        A job that names its runner is not handed out. One that has ended while it waited is skipped.
        ``check`` is called when there is one; if it raises, the job keeps its place.
        """
        is_fresh = False
        while True:
            if (job := self._take((DEFAULT_RUNNER,))) is None:
                if is_fresh:
                    return None
                await self.refresh()
                is_fresh = True
                continue
            try:
                # A client that has left gets none, and the engine may never notice.
                await trio.lowlevel.checkpoint_if_cancelled()
                if check is not None:
                    check()
                if await self._is_unfinished(job):
                    return await self._tracker.claim(job, lease)
            except (Conflict, SessionNotFound):
                pass
            except BaseException:
                # Cancelled, or it cannot be stored: the job keeps its place.
                self._view = {_key(job): job, **self._view}
                self._claimers.unpark()
                raise
            finally:
                self._taken.discard(_key(job))
            await self._refresh_if_stale()

    async def wait_for_job(self) -> None:
        """Wait until there may be a job to claim. Of those who wait, the first one is told."""
        await self._claimers.park()

    async def run(self) -> None:
        """For ever, begin jobs that were submitted elsewhere, and end those whose instance has stopped."""
        while True:
            await self._look()
            if self._running >= self._max_running and not self._claimers:
                await trio.sleep(SPARE_INTERVAL)
            with trio.move_on_after(LOOK_INTERVAL):
                await self._coordination.wait_for_news()

    async def _look(self) -> None:
        """Begin jobs that wait, and end those whose instance has stopped."""
        try:
            jobs = await self.refresh()
            self._start_next()
            self._claimers.unpark(count=sum(job.job == DEFAULT_RUNNER for job in self._view.values()))
            if self._coordination.is_leader:
                for job in jobs:
                    if job.instance is not None and self._coordination.is_gone(job.instance):
                        log.warning(
                            Line("the job is lost, as the instance that ran it has stopped", **_ids(job))
                        )
                        await self._tracker.end_as_lost(job, "the server that ran it has stopped")
        except (Unavailable, InsufficientStorage) as reason:
            log.debug("the queue waits: %s", reason)

    def _take(self, names: Collection[str]) -> Session | None:
        """Take the first job that names one of these runners out of the view."""
        for key, job in self._view.items():
            if job.job in names:
                self._taken.add(key)
                return self._view.pop(key)
        return None

    @property
    def _is_full(self) -> bool:
        taken = self._running + len(self._view) + self._reserved
        return taken >= self._max_running + self._max_waiting

    async def _is_unfinished(self, session: Session) -> bool:
        """Return whether this very session still exists and has not ended."""
        now = await self._tracker.engine.load(session.id)
        return now is not None and now.epoch == session.epoch and not now.ended

    def _start_next(self) -> None:
        while self._running < self._max_running and not self._stopping.is_set():
            if (job := self._take(self._runners)) is None:
                return
            assert job.job is not None
            self._running += 1
            self._nursery.start_soon(self._run, job, self._runners[job.job])

    async def _run(self, job: Session, runner: Runner) -> None:
        data = msgspec.Raw(b"null") if job.data is msgspec.UNSET else job.data
        begin_context(JobIds(job.id, job.correlation_id))
        try:
            if await self._begin(job):
                if self.tracing is None:
                    await runner(self._tracker, job.id, data)
                else:
                    with self.tracing.job(job.id, await self._creation(job)):
                        await runner(self._tracker, job.id, data)
                await self._finish(job)
        except Exception as error:  # noqa: BLE001 - the boundary of a job: the queue goes on
            await self._end(job, error)
        except BaseExceptionGroup as group:
            errors, others = group.split(Exception)
            if errors is not None:
                await self._end(job, errors)
            if others is not None:
                raise others from None  # Cancelled: the server stops
        begin_context()  # what follows does not belong to the job
        # Not reached when cancelled: then the server has stopped, and no other job runs.
        self._running -= 1
        self._taken.discard(_key(job))
        self._start_next()
        if self._running < self._max_running:
            await self._look()  # others may have been submitted elsewhere

    async def _creation(self, job: Session) -> TraceContext | None:
        """Return the trace of the request that has created a job, if its log still has that."""
        page = await self._tracker.engine.read(job.id, 0, 1)
        return page.events[0].trace if page is not None and page.events else None

    async def _is_ours(self, job: Session) -> bool:
        """Return whether a job is run by this instance, and has not ended."""
        now = await self._tracker.engine.load(job.id)
        if now is None or now.epoch != job.epoch or now.ended:
            return False
        return now.instance == self._coordination.instance

    async def _begin(self, job: Session) -> bool:
        """Claim a job for this instance; return whether it has got it."""

        async def claim() -> bool:
            if not await self._is_unfinished(job) or self._stopping.is_set():
                return False
            await self._tracker.claim(job, instance=self._coordination.instance)
            return True

        try:
            return await self._retry(claim)
        except (Conflict, SessionNotFound):
            return False
        except Exception:
            # The boundary of a job: it stays in the queue, and is tried again.
            log.exception(Line("the job cannot begin"))
            await trio.sleep(RETRY_DELAY)
            return False

    async def _finish(self, job: Session) -> None:
        """End a job whose runner has returned without ending it."""

        async def end() -> None:
            if await self._is_ours(job):
                session = await self._tracker.get(job.id)
                status = "cancelled" if session.control is Control.CANCEL else "succeeded"
                await self._tracker.update(job.id, status=status)

        await self._retry(end)

    async def _retry(self, task: Callable[[], Awaitable[T]]) -> T:
        """Do a task that needs the engine, again and again while it is unavailable."""
        has_failed = False
        while True:
            try:
                return await task()
            except (Unavailable, InsufficientStorage) as reason:
                if not has_failed:
                    log.warning(Line("the state of the job cannot be stored yet", error=str(reason)))
                has_failed = True
            await trio.sleep(RETRY_DELAY)

    async def _end(self, session: Session, error: Exception) -> None:
        """End a job whose runner has raised, unless the reason is that it has ended."""
        errors = [leaf for leaf in _leaves(error) if not isinstance(leaf, SessionEnded | SessionNotFound)]
        if not errors:
            log.info(Line("the job stops", error=str(next(_leaves(error)))))
        elif len(errors) == 1 and isinstance(errors[0], JobError):
            log.warning(Line("the job has failed", code=errors[0].code, error=str(errors[0])))
            await self._fail(session, str(errors[0]), errors[0].code)
        else:
            log.error(Line("the job has failed"), exc_info=error)
            reason = "; ".join(f"{type(leaf).__name__}: {leaf}" for leaf in errors[:MAX_REASONS])
            if len(errors) > MAX_REASONS:
                reason += f"; and {len(errors) - MAX_REASONS} more"
            await self._fail(session, reason)

    async def _fail(self, session: Session, reason: str, code: str | None = None) -> None:
        """Record a failure. A lone surrogate (in a file's name) becomes a ``?``."""
        message = reason.encode(errors="replace").decode()[:MAX_REASON]
        error = message if code is None else {"code": code, "message": message}

        async def fail() -> None:
            if await self._is_ours(session):
                await self._tracker.update(session.id, status="failed", error=error)

        try:
            await self._retry(fail)
        except SseserveError as refusal:
            log.info(Line("the failure of the job is not recorded", error=str(refusal)))
        except Exception:
            # The boundary of a job again: its failure cannot be recorded, and the queue goes on.
            log.exception(Line("the failure of the job cannot be recorded"))


def _key(session: Session) -> _Key:
    return session.id, session.epoch


def _ids(job: Session) -> dict[str, object]:
    """Return what every line of the log has that belongs to a job."""
    return JobIds(job.id, job.correlation_id).log_fields


def _leaves(error: Exception) -> Iterator[Exception]:
    """Yield the errors that a group, such as that of a runner's nursery, holds; or the error itself."""
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
