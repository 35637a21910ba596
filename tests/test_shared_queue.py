"""The queue of jobs after a restart, and with several instances over one engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import trio
from harness import ServerHarness
from trio.testing import wait_all_tasks_blocked

from sseserve import engines
from sseserve.config import Settings
from sseserve.demo.worker import run_demos
from sseserve.engines import EngineListener
from sseserve.engines.coordination import LocalCoordination
from sseserve.engines.memory import MemoryEngine
from sseserve.errors import Conflict, EngineUnavailable
from sseserve.model import Event, Session, State
from sseserve.progress import queue
from sseserve.progress.tracker import Tracker
from sseserve.server import application


class SharedEngine(MemoryEngine):
    """Logs that several instances share; what one appends is delivered to all."""

    def __init__(self) -> None:
        self.listeners: list[EngineListener] = []
        # A virtual clock runs on while a thread makes files: no session must expire meanwhile.
        super().__init__(Settings(ttl=1e9), self._Everybody(self.listeners))
        self.refuses = 0  # appends that are refused from now on

    class _Everybody(EngineListener):
        def __init__(self, listeners: list[EngineListener]) -> None:
            self._listeners = listeners

        def deliver(self, session: Session, events: Sequence[Event]) -> None:
            for listener in self._listeners:
                listener.deliver(session, events)

        def removed(self, session: Session, *, own: bool = True) -> None:
            for listener in self._listeners:
                listener.removed(session, own=own)

    async def append(self, session: Session, events: Sequence[Event], **options: Any) -> None:
        # As with a database: others append meanwhile.
        await trio.lowlevel.checkpoint()
        if self.refuses:
            self.refuses -= 1
            raise EngineUnavailable("the connection is lost")
        await super().append(session, events, **options)


class Instance(LocalCoordination):
    """The coordination of instances that do not hear of each other, and of which none is gone."""

    is_leader = False

    def is_gone(self, instance: str) -> bool:
        return False


@pytest.fixture
def engine(monkeypatch) -> SharedEngine:
    """The engine of every application that is made in a test."""
    engine = SharedEngine()

    def open_engine(_settings: Settings, listener: EngineListener) -> SharedEngine:
        engine.listeners.append(listener)
        return engine

    monkeypatch.setattr(application, "open_engine", open_engine)
    return engine


async def create(harness: ServerHarness, target: str = "/api/jobs") -> str:
    response = await harness.post(target)
    assert response.status == 202
    await wait_all_tasks_blocked()
    job: str = response.json["jobId"]
    return job


async def statuses(harness: ServerHarness, jobs: list[str]) -> list[str]:
    return [(await harness.get(f"/api/jobs/{job}")).json["status"] for job in jobs]


async def test_jobs_after_a_restart(autojump_clock, nursery, engine):
    """Those that ran are lost, those that waited run, and those of workers elsewhere go on."""
    started = []

    async def runner(_tracker, session_id, _data):
        started.append(session_id)
        await trio.sleep_forever()

    async with trio.open_nursery() as first:
        harness = ServerHarness(first, runner=runner, max_running_jobs=2)
        *ran, claimed, queued, cancelled = [await create(harness) for _ in range(5)]
        elsewhere = (await harness.post("/api/v1/jobs")).json["jobId"]
        assert (await harness.post("/api/claims?lease=10")).json["jobId"] == claimed
        await harness.post(f"/api/jobs/{cancelled}/cancel")
        await trio.sleep(9)
        first.cancel_scope.cancel()
    assert started == ran
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=2)
    restarted = trio.current_time()
    await wait_all_tasks_blocked()
    assert started == [*ran, queued]
    jobs = [*ran, claimed, queued, cancelled, elsewhere]
    ended = ["Failed", "Failed", "Running", "Running", "Canceled", "Queued"]
    assert await statuses(harness, jobs) == ended
    final = (await harness.watch(f"/api/jobs/{ran[0]}/events"))[-1]
    assert (final.event, final.data["errorCode"]) == ("job-failed", "worker_lost")
    assert final.data["message"] == "the server that ran it has stopped"
    # The lease of the worker elsewhere has begun afresh.
    stream = await harness.stream(f"/api/jobs/{claimed}/events")
    while (await stream.next()).event != "stalled":
        pass
    assert trio.current_time() - restarted > 10


async def test_demonstrations_after_a_restart(autojump_clock, nursery, engine):
    """They are made by the server itself, even where all other jobs are for workers elsewhere."""
    async with trio.open_nursery() as first:
        harness = ServerHarness(first, job_workers="remote", max_running_jobs=1)
        ran, queued = [await create(harness, "/api/quick/demo") for _ in range(2)]
        other = await create(harness)
        first.cancel_scope.cancel()
    harness = ServerHarness(nursery, job_workers="remote", max_running_jobs=1)
    await trio.sleep(40)
    assert await statuses(harness, [ran, queued, other]) == ["Failed", "Done", "Queued"]
    assert (await harness.post("/api/claims")).json["jobId"] == other


@pytest.mark.parametrize("body", [None, {"brief": "x"}])
async def test_files_of_demonstrations_after_a_restart(autojump_clock, nursery, engine, body):
    """They are the same, whichever instance is asked, as often as one likes; others are not made."""
    async with trio.open_nursery() as first:
        harness = ServerHarness(first)
        job = (await harness.post("/api/jobs" if body else "/api/quick/demo", body)).json["jobId"]
        artifacts = (await harness.watch(f"/api/jobs/{job}/events"))[-1].data["artifacts"]
        made = {artifact["path"]: (await harness.get(artifact["path"])).body for artifact in artifacts}
        first.cancel_scope.cancel()
    harness = ServerHarness(nursery)
    for artifact in artifacts * 2:
        response = await harness.get(artifact["path"])
        assert (response.status, response.headers["content-type"]) == (200, artifact["type"])
        assert response.body == made[artifact["path"]]
    film = {"name": "film.png", "url": "/api/artifacts/s/film.png"}
    await harness.post("/api/sessions/s/progress", {"status": "done", "artifacts": [film]})
    for path in ("s/film.png", f"{job}/other.png", "other/film.png"):
        assert (await harness.get(f"/api/artifacts/{path}")).status == 404


async def test_the_demo_command_after_a_restart(autojump_clock, nursery, engine):
    """The demonstration that it was showing is lost."""
    async with trio.open_nursery() as first:
        app = ServerHarness(first).app
        first.start_soon(partial(run_demos, app.tracker, app.artifacts, instance=app.coordination.instance))
        await trio.sleep(5)
        first.cancel_scope.cancel()
    harness = ServerHarness(nursery)
    await wait_all_tasks_blocked()
    assert await statuses(harness, ["demo-1"]) == ["Failed"]


async def test_no_job_runs_on_two_instances(autojump_clock, nursery, engine, monkeypatch):
    """Each is run once, whichever instance it was submitted to, and both instances take part."""
    monkeypatch.setattr(engines, "LocalCoordination", Instance)
    ran: Counter[tuple[int, str]] = Counter()

    def make_runner(number):
        async def runner(_tracker, session_id, _data):
            ran[number, session_id] += 1
            await trio.sleep(1)

        return runner

    harnesses = [ServerHarness(nursery, runner=make_runner(n), max_running_jobs=2) for n in range(2)]
    jobs = [await create(harnesses[number % 3 == 0]) for number in range(40)]
    await trio.sleep(60)
    assert Counter(job for _, job in ran.elements()) == Counter(jobs)
    assert {number for number, _ in ran} == {0, 1}
    assert await statuses(harnesses[0], jobs) == ["Done"] * 40


async def test_no_job_is_claimed_on_two_instances(autojump_clock, nursery, engine, monkeypatch):
    """Workers ask every instance; each job is handed out once, in the end all of them."""
    monkeypatch.setattr(engines, "LocalCoordination", Instance)
    harnesses = [ServerHarness(nursery, job_workers="remote") for _ in range(2)]
    claimed = []

    async def work(harness):
        while (response := await harness.post("/api/claims?wait=20")).status == 200:
            claimed.append(response.json["jobId"])

    async with trio.open_nursery() as workers:
        for number in range(6):
            workers.start_soon(work, harnesses[number % 2])
        jobs = [await create(harnesses[0]) for _ in range(30)]
    assert sorted(claimed) == sorted(jobs)


async def test_a_claim_finds_the_jobs_of_other_instances(autojump_clock, nursery, engine, monkeypatch):
    """At once, whether or not it has heard of them."""
    monkeypatch.setattr(engines, "LocalCoordination", Instance)
    harnesses = [ServerHarness(nursery, job_workers="remote") for _ in range(2)]
    await wait_all_tasks_blocked()
    job = await create(harnesses[0])
    assert (await harnesses[1].post("/api/claims")).json["jobId"] == job


async def test_an_instance_may_claim_a_job_again(engine):
    """It may not have learnt that it has got it. Nobody else gets a job that an instance runs."""
    tracker = Tracker(engine)
    session = await tracker.create("s", job="")
    claimed = await tracker.claim(session, instance="a")
    assert await tracker.claim(session, instance="a") == claimed
    await tracker.update("s", status="pending")
    for claim in ({"instance": "b"}, {"lease": 5.0}):
        with pytest.raises(Conflict):
            await tracker.claim(session, **claim)
    await tracker.update("s", status="done")
    with pytest.raises(Conflict):
        await tracker.claim(session, instance="a")


async def test_a_job_that_runs_elsewhere_has_left_the_queue(autojump_clock, nursery, engine, monkeypatch):
    """Every instance counts the jobs of all that wait, and refuses more than may."""
    monkeypatch.setattr(engines, "LocalCoordination", Instance)

    async def runner(_tracker, _session_id, _data):
        await trio.sleep(30)

    settings = {"runner": runner, "max_running_jobs": 1, "max_waiting_jobs": 2}
    harnesses = [ServerHarness(nursery, **settings) for _ in range(2)]
    for _ in range(3):
        await create(harnesses[0])
    await trio.sleep(6)
    assert [(await harness.get("/api/jobs")).json["waiting"] for harness in harnesses] == [1, 1]
    await create(harnesses[1])
    await trio.sleep(6)
    assert [(await harness.post("/api/jobs")).status for harness in harnesses] == [503, 503]


async def test_a_job_whose_claim_cannot_be_stored_runs_later(autojump_clock, nursery, engine):
    """As soon as the engine can store it; so is its end."""
    ran = []

    async def runner(_tracker, session_id, _data):
        ran.append((session_id, trio.current_time()))
        engine.refuses = 3

    harness = ServerHarness(nursery, runner=runner)
    session = await harness.tracker.create(job="")
    engine.refuses = 2
    harness.app.queue.submit(session)
    await trio.sleep(1.5)
    await harness.app.queue.refresh()
    assert harness.app.queue.waiting == 0  # its place is among those that run
    await trio.sleep(10)
    assert ran == [(session.id, 2)]
    assert await statuses(harness, [session.id]) == ["Done"]


async def test_a_claim_that_cannot_be_stored_leaves_the_job(autojump_clock, nursery, engine):
    """The worker gets 503, and the job is the next one's."""
    harness = ServerHarness(nursery, job_workers="remote")
    jobs = [await create(harness) for _ in range(2)]
    engine.refuses = 1
    response = await harness.post("/api/claims")
    assert (response.status, response.error["code"]) == (503, "engine_unavailable")
    assert [(await harness.post("/api/claims")).json["jobId"] for _ in range(2)] == jobs


async def test_no_job_begins_while_the_server_stops(autojump_clock, nursery, engine):
    """It would be lost with the server; it waits for the next one."""
    started = []

    async def runner(_tracker, session_id, _data):
        started.append(session_id)
        await trio.sleep(1)

    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    jobs = [await create(harness) for _ in range(2)]
    harness.app.stopping.set()
    await trio.sleep(5)
    states = [(await harness.tracker.get(job)).progress.state for job in jobs]
    assert states == [State.SUCCEEDED, State.QUEUED]
    assert started == jobs[:1]


async def test_only_jobs_of_the_queue_are_run(autojump_clock, nursery, engine):
    """Neither sessions nor jobs of services elsewhere, nor a job that somebody has begun and put back."""
    started = []

    async def runner(_tracker, session_id, _data):
        started.append(session_id)

    async with trio.open_nursery() as first:
        harness = ServerHarness(first, job_workers="remote")
        job = await create(harness)
        await harness.post(f"/api/jobs/{job}/progress", {"stage": "tts"})
        await harness.post(f"/api/jobs/{job}/progress", {"status": "queued"})
        await harness.post("/api/sessions", {})
        await harness.post("/api/v1/jobs")
        first.cancel_scope.cancel()
    harness = ServerHarness(nursery, runner=runner)
    await trio.sleep(10)
    assert started == []
    assert (await harness.post("/api/claims")).status == 204


async def test_only_the_leader_ends_jobs_and_judges_leases(autojump_clock, nursery, engine, monkeypatch):
    """An instance that begins to lead lets all leases begin afresh."""

    class Follower(LocalCoordination):
        is_leader = False

    monkeypatch.setattr(engines, "LocalCoordination", Follower)
    session = await ServerHarness(nursery).tracker.create(job="", instance="gone", lease=5)
    harness = ServerHarness(nursery)
    await trio.sleep(20)
    before = await harness.tracker.get(session.id)
    assert (before.ended, before.stalled) == (False, False)
    leased = await harness.tracker.create(lease=5)
    await trio.sleep(20)
    assert not harness.tracker._leases._silences  # nor are they remembered where nobody would forget them
    harness.app.coordination.is_leader = True  # type: ignore[misc]
    await trio.sleep(5.5)
    assert (await harness.tracker.get(session.id)).ended
    assert not (await harness.tracker.get(leased.id)).stalled
    await trio.sleep(2)
    assert (await harness.tracker.get(leased.id)).stalled


async def test_a_retry_of_a_lost_job_is_its_workers(autojump_clock, nursery, engine):
    """The server does not run the next attempt that a worker elsewhere begins."""
    session = await ServerHarness(nursery, job_workers="remote").tracker.create("s", job="", instance="gone")
    harness = ServerHarness(nursery)
    await wait_all_tasks_blocked()
    assert (await harness.tracker.get("s")).ended
    body = {"session_id": "s", "status": "pending"}
    assert (await harness.post("/api/v1/sessions/s/status", body)).status == 202
    again = await harness.tracker.get("s")
    assert (again.attempt, again.job, again.instance) == (session.attempt + 1, None, None)


async def test_claims_go_on_while_a_look_takes_long(autojump_clock, nursery, engine, monkeypatch):
    """A job that is submitted while the queue reads the records is not forgotten."""
    harness = ServerHarness(nursery, job_workers="remote")
    read, look = engine.jobs, trio.Event()

    async def read_slowly():
        jobs = await read()
        await look.wait()
        return jobs

    with monkeypatch.context() as patch:
        patch.setattr(engine, "jobs", read_slowly)
        nursery.start_soon(harness.app.queue.refresh)
        await wait_all_tasks_blocked()
        job = await create(harness)
        look.set()
        await wait_all_tasks_blocked()
    assert harness.app.queue.waiting == 1
    assert (await harness.post("/api/claims")).json["jobId"] == job
    assert harness.app.queue.waiting == 0


async def test_an_instance_that_was_busy_looks_for_jobs_elsewhere(
    autojump_clock, nursery, engine, monkeypatch
):
    """As soon as it can run another one, also of jobs that it has not heard of."""
    monkeypatch.setattr(engines, "LocalCoordination", Instance)
    monkeypatch.setattr(queue, "LOOK_INTERVAL", 1000.0)
    ran = []

    async def runner(_tracker, session_id, _data):
        ran.append(session_id)
        await trio.sleep(1)

    elsewhere = ServerHarness(nursery, job_workers="remote")
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    jobs = [await create(harness)] + [await create(elsewhere) for _ in range(3)]
    await trio.sleep(10)
    assert ran == jobs


async def test_an_instance_that_is_busy_looks_rarely(autojump_clock, nursery, engine, monkeypatch):
    """However many jobs are announced that it cannot run now."""

    class Busy(Instance):
        async def wait_for_news(self) -> None:
            await trio.sleep(0.01)

    monkeypatch.setattr(engines, "LocalCoordination", Busy)
    harness = ServerHarness(nursery, runner=lambda *_arguments: trio.sleep_forever(), max_running_jobs=1)
    await create(harness)
    looks, jobs = 0, engine.jobs

    async def count_looks():
        nonlocal looks
        looks += 1
        return await jobs()

    monkeypatch.setattr(engine, "jobs", count_looks)
    await trio.sleep(10)
    assert looks <= 11


async def test_the_failure_of_a_claim_is_not_that_of_the_job(
    autojump_clock, nursery, engine, monkeypatch, caplog
):
    """The log has it, and the job is run later."""
    harness = ServerHarness(nursery, runner=lambda *_arguments: trio.lowlevel.checkpoint())

    async def fail(*_arguments, **_fields):
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(harness.tracker, "claim", fail)
        job = (await harness.post("/api/jobs")).json["jobId"]
        await trio.sleep(0.5)
        assert await statuses(harness, [job]) == ["Queued"]
    assert "cannot begin" in caplog.text
    await trio.sleep(3)
    assert await statuses(harness, [job]) == ["Done"]


@pytest.mark.parametrize("fails", [False, True])
async def test_the_end_of_a_job_is_that_of_its_instance(autojump_clock, nursery, engine, monkeypatch, fails):
    """A runner whose job another instance runs by now ends nothing."""
    monkeypatch.setattr(engines, "LocalCoordination", Instance)

    async def runner(_tracker, _session_id, _data):
        harness.app.coordination.instance = "another one now"  # type: ignore[misc]
        if fails:
            raise ValueError("broken")

    harness = ServerHarness(nursery, runner=runner)
    session = await harness.tracker.create(job="")
    harness.app.queue.submit(session)
    await wait_all_tasks_blocked()
    assert not (await harness.tracker.get(session.id)).ended


async def test_a_claim_does_not_try_all_jobs_that_others_have(autojump_clock, nursery, engine, monkeypatch):
    """After the first one that is another instance's it looks which are left."""
    monkeypatch.setattr(engines, "LocalCoordination", Instance)
    harnesses = [ServerHarness(nursery, job_workers="remote") for _ in range(2)]
    jobs = [await create(harnesses[0]) for _ in range(20)]
    for job in jobs[:-1]:
        assert (await harnesses[1].post("/api/claims")).json["jobId"] == job
    await trio.sleep(0.5)
    tried, claim = [], harnesses[0].tracker.claim

    async def count_claim(session, lease):
        tried.append(session.id)
        return await claim(session, lease)

    monkeypatch.setattr(harnesses[0].tracker, "claim", count_claim)
    assert (await harnesses[0].post("/api/claims")).json["jobId"] == jobs[-1]
    assert tried == [jobs[0], jobs[-1]]
