"""Runs a schedule and returns its history."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from contextvars import ContextVar

import trio

from .clients import ConnectionEnded, Publisher, Recorder, Watcher, request
from .cluster import Cluster, Store
from .history import History, Message
from .instances import Instance, LocalInstance
from .schedule import PROFILES, Schedule, Step

__all__ = ["run_schedule"]

# Bounds of what should take much less, in seconds.
ANSWERS = 0.1  # a pause between two faults, if nothing is answered any more
CATCH_UP = 1.0
FINISH = 15.0


MakeInstance = Callable[[int], Instance]


_problems: ContextVar[list[str]] = ContextVar("problems")  # of the run that a task belongs to


class _Errors(logging.Handler):
    """Collects what a server logs with a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        problems = _problems.get(None)
        if problems is not None and record.exc_info is not None and record.exc_info[1] is not None:
            problems.append(f"{record.getMessage()}\n{_describe(record.exc_info[1])}")


class _Run:
    """One run of a schedule on a new cluster."""

    def __init__(
        self, nursery: trio.Nursery, store: Store, make: MakeInstance, schedule: Schedule, session_id: str
    ) -> None:
        self._nursery = nursery
        self._schedule = schedule
        self._path = f"/api/sessions/{session_id}"
        self._profile = PROFILES[schedule.profile]
        self.recorder = Recorder()
        self.history = History(history_events=schedule.history_events, problems=self.recorder.problems)
        self.cluster = Cluster(
            nursery,
            store,
            [make(number) for number in range(self._profile.instances)],
            history_events=schedule.history_events,
            buffer_events=schedule.buffer_events,
        )
        count = self._profile.instances
        self.publishers = [
            Publisher(
                self.cluster.connect, count, session_id, f"p{n}", self.recorder, f"{schedule.seed} p{n}"
            )
            for n in range(schedule.publishers)
        ]
        self.watchers = [
            Watcher(self.cluster.connect, count, session_id, self.recorder, f"{schedule.seed} c{n}")
            for n in range(schedule.clients)
        ]

    async def run(self) -> None:
        await self.cluster.open()
        await self._create()
        for task in (*self.publishers, *self.watchers):
            self._nursery.start_soon(task.run)
        for step in self._schedule.steps:
            await self._apply(step)
        await self._finish()

    async def _create(self) -> None:
        """So that every client begins with a snapshot."""
        body = {"session_id": self._path.rpartition("/")[2]}
        with trio.move_on_after(FINISH):
            while True:
                try:
                    status, _ = await request(self.cluster.connect, 0, "POST", "/api/sessions", body)
                except ConnectionEnded:
                    status = 503
                if status in (201, 409):
                    return
                await trio.sleep(0.005)
        self.recorder.problems.append("the session could not be created")

    async def _apply(self, step: Step) -> None:
        publisher = self.publishers[step.who % len(self.publishers)]
        watcher = self.watchers[step.who % len(self.watchers)]
        match step.action:
            case "publish":
                for _ in range(step.amount):
                    publisher.add(step.how)
            case "run":
                target = self._answered + step.amount
                await self.recorder.wait_until(lambda: self._answered >= target, ANSWERS)
            case "catch up":
                await self.recorder.wait_until(lambda: not any(p.waiting for p in self.publishers), CATCH_UP)
            case "attempt":
                self.history.attempts += 1
                publisher.add("fail")
                publisher.add("retry")
            case "delete":
                await self._delete(step.who)
            case "move":
                watcher.move(step.amount % self._profile.instances, step.how)
            case "away":
                watcher.stay_away()
            case "back":
                watcher.come_back()
            case "stall":
                watcher.stall()
            case "read on":
                watcher.read_on()
            case action:
                if action in self._profile.losses:
                    self.history.losses += 1
                await self.cluster.apply(action, step.who, step.how)
        await trio.lowlevel.checkpoint()

    @property
    def _answered(self) -> int:
        return sum(len(publisher.publishes) for publisher in self.publishers)

    async def _delete(self, instance: int) -> None:
        self.history.deletions += 1
        try:
            status, answer = await request(self.cluster.connect, instance, "DELETE", self._path)
        except ConnectionEnded:
            return
        if status not in (204, 404, 503):
            self.recorder.problems.append(f"DELETE: {status} {answer}")

    async def _finish(self) -> None:
        """End all faults, publish the end, and wait until everybody has it."""
        await self.cluster.heal()
        for watcher in self.watchers:
            watcher.come_back()
            watcher.read_on()
        for publisher in self.publishers:
            publisher.patient = True
        if not await self.recorder.wait_until(lambda: not any(p.waiting for p in self.publishers), FINISH):
            waiting = {n: p.waiting for n, p in enumerate(self.publishers) if p.waiting}
            self.recorder.problems.append(f"requests were never acknowledged: {waiting}")
        await self._settle()
        last = self.publishers[0]
        last.add("end")
        await self.recorder.wait_until(lambda: not last.waiting, FINISH)
        end = last.publishes[-1].cursor
        if end is None and self.history.attempts:
            # Another publisher may have been told that its attempt has failed, and have ended it.
            end = self.publishers[0].publishes[-1].cursor
        if not await self.recorder.wait_until(lambda: all(w.place == end for w in self.watchers), FINISH):
            places = [watcher.place for watcher in self.watchers]
            self.recorder.problems.append(f"the end is {end}, but the clients are at {places}")
        for number in range(len(self.cluster)):
            self.history.logs.append(await self._read_log(number))
        self.history.publishes = [p for publisher in self.publishers for p in publisher.publishes]
        self.history.clients = [watcher.seen for watcher in self.watchers]
        self.history.conflated = self.cluster.conflated

    async def _settle(self) -> None:
        """Wait until everybody has what is stored: no later event may be needed to bring it."""
        place: str | None = None

        async def is_everywhere() -> bool:
            nonlocal place
            place = await self._read_place()
            return all(watcher.place == place for watcher in self.watchers)

        with trio.move_on_after(FINISH) as scope:
            while not await is_everywhere():
                await trio.sleep(0.02)  # between two questions: the log may get another epoch meanwhile
        if scope.cancelled_caught:
            places = [watcher.place for watcher in self.watchers]
            self.recorder.problems.append(f"the log is at {place}, but the clients are at {places}")

    async def _read_place(self) -> str | None:
        """Return the cursor of the end of the log; None if it cannot be read now."""
        place, query = None, ""
        try:
            while True:
                status, page = await request(self.cluster.connect, 0, "GET", f"{self._path}/events{query}")
                if status != 200 or page["next"] == place:
                    return place if status == 200 else None
                place = page["next"]
                query = f"?after={place}"
        except ConnectionEnded:
            return None

    async def _read_log(self, instance: int) -> list[Message]:
        log: list[Message] = []
        query = "?limit=1000"
        deadline = trio.current_time() + FINISH
        while True:
            try:
                status, page = await request(
                    self.cluster.connect, instance, "GET", f"{self._path}/events{query}"
                )
            except ConnectionEnded:
                status, page = 503, None
            if status == 503 and trio.current_time() < deadline:
                continue
            if status != 200:
                self.recorder.problems.append(f"the log of instance {instance}: {status} {page}")
                return log
            log += [Message(value["event"], value["data"], value["id"]) for value in page["events"]]
            if page["end"]:
                return log
            query = f"?limit=1000&after={page['next']}"


_numbers = iter(range(10**9))


async def run_schedule(
    store: Store, schedule: Schedule, make: MakeInstance = lambda _number: LocalInstance()
) -> History:
    """Run a schedule. ``store`` may have been used before; ``make`` returns a new instance of the server."""
    history = History()
    errors = _Errors(logging.ERROR)
    logger = logging.getLogger("sseserve")
    logger.addHandler(errors)
    try:
        async with trio.open_nursery() as nursery:
            run = _Run(nursery, store, make, schedule, f"s{schedule.seed}-{next(_numbers)}")
            history = run.history
            _problems.set(history.problems)
            await run.run()
            nursery.cancel_scope.cancel()
    except* Exception as group:  # noqa: BLE001 - whatever it is, it is what was looked for
        history.problems.append(_describe(group))
    finally:
        logger.removeHandler(errors)
    return history


def _describe(error: BaseException) -> str:
    """Return the end of the traceback, of each of its errors if it is a group."""
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(map(_describe, error.exceptions))
    return "".join(traceback.format_exception(error)[-8:])
