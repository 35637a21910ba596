"""The server's own queue: at most so many jobs at a time, in their order, whatever becomes of each."""

from __future__ import annotations

import json
import logging

import pytest
import trio
from harness import ServerHarness
from raw_client import get, post
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.model import Control


class Workshop:
    """A runner whose jobs go on until they are let go; it notes which of them ran, and how many at once."""

    def __init__(self):
        self.began = []
        self.data = {}
        self.now = 0
        self.most = 0
        self._gates = {}

    async def __call__(self, tracker, session_id, data):
        self.began.append(session_id)
        self.data[session_id] = json.loads(bytes(data))
        self.now += 1
        self.most = max(self.most, self.now)
        self._gates[session_id] = trio.Event()
        try:
            await self._gates[session_id].wait()
        finally:
            self.now -= 1

    async def finish(self, session_id):
        self._gates[session_id].set()
        await wait_all_tasks_blocked()


async def create(harness, value=None):
    response = await harness.post("/api/jobs", value)
    assert response.status == 202
    await wait_all_tasks_blocked()
    return response.json["jobId"]


async def status(harness, job):
    return (await harness.get(f"/api/jobs/{job}")).json["status"]


async def test_at_most_so_many_run_at_a_time_in_order(autojump_clock, nursery):
    """The others wait, queued; each that ends lets the next one begin."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=2)
    jobs = [await create(harness) for _ in range(6)]
    assert shop.began == jobs[:2]
    assert [await status(harness, job) for job in jobs] == ["Queued"] * 6
    assert (await harness.get("/api/jobs")).json["waiting"] == 4
    assert b"sseserve_jobs_waiting 4.0" in (await harness.get("/metrics")).body
    for done, job in enumerate([jobs[1], jobs[0], *jobs[2:]], 1):
        await shop.finish(job)
        assert shop.began == jobs[: 2 + done]
        assert await status(harness, job) == "Done"
    assert (shop.most, shop.now) == (2, 0)


@pytest.mark.parametrize("trial", range(8))
async def test_jobs_that_come_at_once_keep_their_order(autojump_clock, nursery, trial):
    """The order is that of submission, even within one moment of the scheduler."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=1)
    sessions = [await harness.tracker.create() for _ in range(4)]
    for session in sessions:
        harness.app.queue.submit(session)
    for session in sessions:
        await wait_all_tasks_blocked()
        assert shop.began[-1] == session.id
        await shop.finish(session.id)


async def test_a_job_that_is_cancelled_while_it_waits_never_runs(autojump_clock, nursery):
    """Its watchers get the end at once; when its turn comes, the next one has it."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=1)
    first, second, third = [await create(harness) for _ in range(3)]
    stream = await harness.stream(f"/api/jobs/{second}/events")
    response = await harness.post(f"/api/jobs/{second}/cancel")
    assert (response.status, response.json["status"]) == (202, "Canceled")
    assert [s.event for s in await stream.read_to_end()][-1] == "job-cancelled"
    await shop.finish(first)
    assert shop.began == [first, third]


async def test_a_job_that_is_deleted_while_it_waits_never_runs(autojump_clock, nursery):
    """Neither does it come back to life."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=1)
    first, second, third = [await create(harness) for _ in range(3)]
    await harness.app.tracker.delete(second)
    await shop.finish(first)
    assert shop.began == [first, third]
    assert (await harness.get(f"/api/jobs/{second}")).status == 404


async def test_a_full_queue_says_so(autojump_clock, nursery):
    """No job more than it can hold: 503, and no session is left of it. An end makes room."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=1, max_waiting_jobs=1)
    first, _ = [await create(harness) for _ in range(2)]
    for target in ("/api/jobs", "/api/quick/demo"):
        response = await harness.post(target)
        assert (response.status, response.error["code"]) == (503, "unavailable")
    assert len(await harness.tracker.sessions()) == 2
    await shop.finish(first)
    await create(harness)


async def test_jobs_that_are_over_give_up_their_places(autojump_clock, nursery):
    """One that was cancelled and one that was deleted while they waited count no more."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=1, max_waiting_jobs=2)
    first, second, third = [await create(harness) for _ in range(3)]
    assert (await harness.post("/api/jobs")).status == 503
    await harness.post(f"/api/jobs/{second}/cancel")
    await harness.tracker.delete(third)
    fourth, fifth = await create(harness), await create(harness)
    assert (await harness.post("/api/jobs")).status == 503
    await harness.post(f"/api/jobs/{fifth}/cancel")
    assert (await harness.get("/api/jobs")).json["waiting"] == 1
    await shop.finish(first)
    assert shop.began == [first, fourth]


async def test_an_id_that_begins_anew_is_not_the_job_that_waited(autojump_clock, nursery):
    """Somebody else's session is left to somebody else."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=1)
    first, second = [await create(harness) for _ in range(2)]
    await harness.tracker.delete(second)
    await harness.tracker.update(second, message="somebody else's")
    await shop.finish(first)
    assert shop.began == [first]
    session = await harness.tracker.get(second)
    assert not session.ended


async def test_places_are_not_given_twice(autojump_clock, nursery):
    """Jobs that are created at the same time do not share the last place."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop, max_running_jobs=1, max_waiting_jobs=1)
    statuses = []

    async def post():
        statuses.append((await harness.post("/api/jobs")).status)

    async with trio.open_nursery() as posts:
        for _ in range(6):
            posts.start_soon(post)
    assert sorted(statuses) == [202, 202, 503, 503, 503, 503]


async def test_a_job_that_cannot_be_created_gives_its_place_back(autojump_clock, nursery):
    """A bad body costs no place."""
    harness = ServerHarness(nursery, runner=Workshop(), max_running_jobs=1, max_waiting_jobs=1)
    for _ in range(5):
        assert (await harness.post("/api/jobs", b"{")).status == 400
    await create(harness)
    await create(harness)


async def test_the_runner_gets_the_request(autojump_clock, nursery):
    """The body is the runner's to understand; without one it is null."""
    shop = Workshop()
    harness = ServerHarness(nursery, runner=shop)
    request = {"brief": {"topic": "x"}, "voices": ["a", None], "n": 1.5}
    first, second = await create(harness, request), await create(harness)
    assert shop.data == {first: request, second: None}
    assert (await harness.get(f"/api/jobs/{first}")).json["request"] == request


async def test_a_runner_that_raises_has_failed(autojump_clock, nursery, caplog):
    """Watchers get job-failed with the reason, the log the traceback, and the queue goes on."""

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="tts", progress=20)
        raise ValueError("no voice")

    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    jobs = [await create(harness) for _ in range(2)]
    for job in jobs:
        said = await harness.watch(f"/api/jobs/{job}/events")
        assert [s.event for s in said][-2:] == ["error", "job-failed"]
        assert said[-1].data["error"] == "ValueError: no voice"
        assert await status(harness, job) == "Failed"
    assert caplog.text.count("ValueError: no voice") >= 2
    assert "Traceback" in caplog.text


async def test_a_reason_that_is_no_text_is_a_reason(autojump_clock, nursery):
    """Half a surrogate pair, as in the name of a file that is no UTF-8, is no JSON."""

    async def runner(tracker, session_id, data):
        raise ValueError("cannot open \udcff.mp4")

    harness = ServerHarness(nursery, runner=runner)
    job = (await harness.get(f"/api/jobs/{await create(harness)}")).json
    assert (job["status"], job["error"]) == ("Failed", "ValueError: cannot open ?.mp4")


async def test_a_runner_that_raises_because_its_job_is_gone_does_not_bring_it_back(autojump_clock, nursery):
    """A deleted session stays deleted."""

    async def runner(tracker, session_id, data):
        await tracker.delete(session_id)
        raise ValueError("its files are gone")

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert (await harness.get(f"/api/jobs/{job}")).status == 404


async def test_a_runner_that_raises_behind_its_end_changes_nothing(autojump_clock, nursery, caplog):
    """The end that it published stands."""

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, status="succeeded")
        raise ValueError("too late")

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert await status(harness, job) == "Done"
    assert "too late" in caplog.text


async def test_a_runner_that_returns_has_succeeded(autojump_clock, nursery):
    """Without a last word of its own the job ends well, so its watchers do not wait for ever."""

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="render", progress=90)

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert [s.event for s in await harness.watch(f"/api/jobs/{job}/events")][-1] == "job-completed"


async def test_a_runner_that_returns_when_it_is_to_cancel_was_cancelled(autojump_clock, nursery):
    """It has done what was asked."""

    async def runner(tracker, session_id, data):
        while (await tracker.update(session_id)).control is not Control.CANCEL:
            await trio.sleep(1)

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert await status(harness, job) == "Running"
    await harness.post(f"/api/jobs/{job}/cancel")
    await trio.sleep(1)
    await wait_all_tasks_blocked()
    assert await status(harness, job) == "Canceled"


async def test_a_forced_cancel_stops_a_runner_at_its_next_word(autojump_clock, nursery, caplog):
    """Its update is refused, which ends it; that is no failure."""
    caplog.set_level(logging.INFO)

    async def runner(tracker, session_id, data):
        while True:
            await tracker.update(session_id, stage="tts")
            await trio.sleep(1)

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    response = await harness.post(f"/api/jobs/{job}/cancel", {"force": True})
    assert response.json["status"] == "Canceled"
    await trio.sleep(2)
    assert f"job {job} stops" in caplog.text
    assert "failed" not in caplog.text


async def test_a_runner_is_given_to_serve():
    """``serve(runner=...)``: jobs of POST /api/jobs are run by it, over real sockets."""
    ran = trio.Event()

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="render", progress=100)
        ran.set()

    async with sseserve.serve(port=0, drain=0.2, runner=runner) as server:
        job = (await post(server.port, "/api/jobs", {})).json["jobId"]
        await ran.wait()
        await wait_all_tasks_blocked()
        assert (await get(server.port, f"/api/jobs/{job}")).json["status"] == "Done"


async def test_jobs_that_wait_do_not_begin_when_the_server_stops(autojump_clock):
    """A cancelled job hands its slot to nobody."""
    shop = Workshop()
    async with trio.open_nursery() as nursery:
        harness = ServerHarness(nursery, runner=shop, max_running_jobs=1)
        for _ in range(3):
            await create(harness)
        nursery.cancel_scope.cancel()
    assert len(shop.began) == 1
