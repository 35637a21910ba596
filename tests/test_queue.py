"""The server's own queue: the limit of running jobs, their order, and how each job can end."""

from __future__ import annotations

import json
import logging

import pytest
import trio
from harness import ServerHarness, logged
from raw_client import get, post
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.model import Control
from sseserve.progress.rules import Update


class BlockingRunner:
    """A runner whose jobs run until ``finish``; it records which started and how many ran at once."""

    def __init__(self):
        self.started = []
        self.data = {}
        self.running = 0
        self.most_running = 0
        self._finished = {}

    async def __call__(self, tracker, session_id, data):
        self.started.append(session_id)
        self.data[session_id] = json.loads(bytes(data))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self._finished[session_id] = trio.Event()
        try:
            await self._finished[session_id].wait()
        finally:
            self.running -= 1

    async def finish(self, session_id):
        self._finished[session_id].set()
        await wait_all_tasks_blocked()


async def create(harness, value=None):
    response = await harness.post("/api/jobs", value)
    assert response.status == 202
    await wait_all_tasks_blocked()
    return response.json["jobId"]


async def status(harness, job):
    return (await harness.get(f"/api/jobs/{job}")).json["status"]


async def test_running_jobs_are_limited_and_start_in_order(autojump_clock, nursery):
    """The other jobs stay queued; each job that ends lets the next one start."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=2)
    jobs = [await create(harness) for _ in range(6)]
    assert runner.started == jobs[:2]
    assert [await status(harness, job) for job in jobs] == ["Running"] * 2 + ["Queued"] * 4
    assert (await harness.get("/api/jobs")).json["waiting"] == 4
    assert b"sseserve_jobs_waiting 4.0" in (await harness.get("/metrics")).body
    for done, job in enumerate([jobs[1], jobs[0], *jobs[2:]], 1):
        await runner.finish(job)
        assert runner.started == jobs[: 2 + done]
        assert await status(harness, job) == "Done"
    assert (runner.most_running, runner.running) == (2, 0)


@pytest.mark.parametrize("trial", range(8))
async def test_jobs_submitted_together_keep_their_order(autojump_clock, nursery, trial):
    """Jobs start in the order of submission, even if all are submitted within one scheduler step."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    sessions = [await harness.tracker.create(job="") for _ in range(4)]
    for session in sessions:
        harness.app.queue.submit(session)
    for session in sessions:
        await wait_all_tasks_blocked()
        assert runner.started[-1] == session.id
        await runner.finish(session.id)


async def test_job_cancelled_while_queued_never_runs(autojump_clock, nursery):
    """Its watchers get the end at once, and its turn goes to the next job."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    first, second, third = [await create(harness) for _ in range(3)]
    stream = await harness.stream(f"/api/jobs/{second}/events")
    response = await harness.post(f"/api/jobs/{second}/cancel")
    assert (response.status, response.json["status"]) == (202, "Canceled")
    assert [s.event for s in await stream.read_to_end()][-1] == "job-cancelled"
    await runner.finish(first)
    assert runner.started == [first, third]


async def test_job_deleted_while_queued_never_runs(autojump_clock, nursery):
    """A queued job that is deleted is skipped and its session is not created again."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    first, second, third = [await create(harness) for _ in range(3)]
    await harness.app.tracker.delete(second)
    await runner.finish(first)
    assert runner.started == [first, third]
    assert (await harness.get(f"/api/jobs/{second}")).status == 404


async def test_full_queue_is_unavailable(autojump_clock, nursery):
    """A job beyond the limit gets 503 and creates no session; a job that ends frees a slot."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1, max_waiting_jobs=1)
    first, _ = [await create(harness) for _ in range(2)]
    for target in ("/api/jobs", "/api/quick/demo"):
        response = await harness.post(target)
        assert (response.status, response.error["code"]) == (503, "unavailable")
        assert response.headers["retry-after"] == "5"
    assert len(await harness.tracker.sessions()) == 2
    await runner.finish(first)
    await create(harness)


async def test_queued_jobs_that_end_free_their_slots(autojump_clock, nursery):
    """Jobs cancelled or deleted while queued no longer count towards the limit."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1, max_waiting_jobs=2)
    first, second, third = [await create(harness) for _ in range(3)]
    assert (await harness.post("/api/jobs")).status == 503
    await harness.post(f"/api/jobs/{second}/cancel")
    await harness.tracker.delete(third)
    fourth, fifth = await create(harness), await create(harness)
    assert (await harness.post("/api/jobs")).status == 503
    await harness.post(f"/api/jobs/{fifth}/cancel")
    assert (await harness.get("/api/jobs")).json["waiting"] == 1
    await runner.finish(first)
    assert runner.started == [first, fourth]


async def test_recreated_session_is_not_run(autojump_clock, nursery):
    """A session created again under the id of a deleted queued job is not run by the queue."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    first, second = [await create(harness) for _ in range(2)]
    await harness.tracker.delete(second)
    await harness.tracker.update(second, message="another client's")
    await runner.finish(first)
    assert runner.started == [first]
    session = await harness.tracker.get(second)
    assert not session.ended


async def test_concurrent_jobs_do_not_share_a_slot(autojump_clock, nursery):
    """Of jobs created concurrently, only as many are accepted as there are slots."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1, max_waiting_jobs=1)
    statuses = []

    async def post():
        statuses.append((await harness.post("/api/jobs")).status)

    async with trio.open_nursery() as posts:
        for _ in range(6):
            posts.start_soon(post)
    assert sorted(statuses) == [202, 202, 503, 503, 503, 503]


async def test_rejected_job_frees_its_slot(autojump_clock, nursery):
    """A request with an invalid body does not use up a slot."""
    harness = ServerHarness(nursery, runner=BlockingRunner(), max_running_jobs=1, max_waiting_jobs=1)
    for _ in range(5):
        assert (await harness.post("/api/jobs", b"{")).status == 400
    await create(harness)
    await create(harness)


async def test_runner_gets_the_request_body(autojump_clock, nursery):
    """The runner gets the JSON body as it was sent; without a body it gets null."""
    runner = BlockingRunner()
    harness = ServerHarness(nursery, runner=runner)
    request = {"brief": {"topic": "x"}, "voices": ["a", None], "n": 1.5}
    first, second = await create(harness, request), await create(harness)
    assert runner.data == {first: request, second: None}
    assert (await harness.get(f"/api/jobs/{first}")).json["request"] == request


async def test_runner_that_raises_fails_the_job(autojump_clock, nursery, caplog):
    """Watchers get job-failed with the reason, the log has the traceback, and the next job starts."""

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="tts", progress=20)
        raise ValueError("no voice")

    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    jobs = [await create(harness) for _ in range(2)]
    for job in jobs:
        messages = await harness.watch(f"/api/jobs/{job}/events")
        assert [s.event for s in messages][-2:] == ["error", "job-failed"]
        assert messages[-1].data["error"] == "ValueError: no voice"
        assert await status(harness, job) == "Failed"
    assert caplog.text.count("ValueError: no voice") >= 2
    assert "Traceback" in caplog.text


async def test_reasons_in_an_exception_group(autojump_clock, nursery, caplog):
    """A runner with a nursery raises a group: the reason of the failure is what is in it."""

    async def fail(number):
        raise ValueError(f"no voice {number}")

    async def runner(tracker, session_id, data):
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            inner.start_soon(tracker.update, "other")
            for number in range(json.loads(bytes(data))["failures"]):
                outer.start_soon(fail, number)

    harness = ServerHarness(nursery, runner=runner)
    one = (await harness.get(f"/api/jobs/{await create(harness, {'failures': 1})}")).json
    assert one["error"] == "ValueError: no voice 0"
    assert "Traceback" in caplog.text
    many = (await harness.get(f"/api/jobs/{await create(harness, {'failures': 5})}")).json["error"]
    assert many.count("ValueError: no voice") == 3
    assert many.endswith("; and 2 more")


async def test_group_of_a_runner_that_was_stopped(autojump_clock, nursery, caplog):
    """If all that is in the group says that the session has ended, nothing has failed."""
    caplog.set_level(logging.INFO)

    async def runner(tracker, session_id, data):
        async with trio.open_nursery() as inner:
            await tracker.update(session_id, status="cancelled")
            inner.start_soon(tracker.update, session_id)

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert await status(harness, job) == "Canceled"
    (line,) = logged(caplog, "the job stops")
    assert line["error"] == "the session has ended: cancelled"
    assert "failed" not in caplog.text


async def test_runner_that_fails_while_the_server_stops(caplog):
    """Its error is logged, and the server ends as it does without it."""
    started = trio.Event()

    async def fail_when_cancelled():
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("cannot clean up")

    async def runner(tracker, session_id, data):
        async with trio.open_nursery() as inner:
            inner.start_soon(fail_when_cancelled)
            inner.start_soon(trio.sleep_forever)
            started.set()

    async with sseserve.serve(port=0, drain=0.2, runner=runner) as server:
        await post(server.port, "/api/jobs", {})
        await started.wait()
    assert "cannot clean up" in caplog.text


async def test_failure_that_cannot_be_recorded(autojump_clock, nursery, caplog, monkeypatch):
    """The engine fails after the runner: the log says so, and the server goes on."""

    async def runner(tracker, session_id, data):
        monkeypatch.setattr(tracker, "update", fail)
        raise ValueError("no voice")

    async def fail(*_arguments, **_fields):
        raise OSError("no space left on device")

    harness = ServerHarness(nursery, runner=runner)
    await create(harness)
    assert "no space left on device" in caplog.text
    assert (await harness.get("/health")).status == 200


async def test_reason_with_a_lone_surrogate(autojump_clock, nursery):
    """A lone surrogate in the exception's text, which JSON cannot encode, is replaced."""

    async def runner(tracker, session_id, data):
        raise ValueError("cannot open \udcff.mp4")

    harness = ServerHarness(nursery, runner=runner)
    job = (await harness.get(f"/api/jobs/{await create(harness)}")).json
    assert (job["status"], job["error"]) == ("Failed", "ValueError: cannot open ?.mp4")


@pytest.mark.parametrize("character", ["\1", "\N{GRINNING FACE}"])
async def test_long_reason_that_json_makes_longer(autojump_clock, nursery, character):
    """A long text is cut to what an error may take, whatever its characters, and the job has failed."""

    async def runner(tracker, session_id, data):
        raise ValueError(character * 100_000)

    harness = ServerHarness(nursery, runner=runner)
    job = (await harness.get(f"/api/jobs/{await create(harness)}")).json
    assert job["status"] == "Failed"
    assert job["error"].endswith(1000 * character)


@pytest.mark.parametrize("raises", [False, True])
async def test_runner_of_an_attempt_that_has_failed(autojump_clock, nursery, raises):
    """Its end is not that of the next attempt, which somebody else works on."""

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, status="failed")
        await tracker.apply(session_id, Update(progress=5, retries_failure=True))
        if raises:
            raise ValueError("too late")

    harness = ServerHarness(nursery, runner=runner)
    assert await status(harness, await create(harness)) == "Running"


async def test_runner_that_raises_after_deletion(autojump_clock, nursery):
    """An exception after the session was deleted does not create the session again."""

    async def runner(tracker, session_id, data):
        await tracker.delete(session_id)
        raise ValueError("its files are gone")

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert (await harness.get(f"/api/jobs/{job}")).status == 404


async def test_runner_that_raises_after_the_end(autojump_clock, nursery, caplog):
    """An exception after the runner has ended the session is logged and does not change the state."""

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, status="succeeded")
        raise ValueError("too late")

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert await status(harness, job) == "Done"
    assert "too late" in caplog.text


async def test_runner_that_returns_completes_the_job(autojump_clock, nursery):
    """A runner that returns without a terminal status completes its job, so its watchers get an end."""

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="render", progress=90)

    harness = ServerHarness(nursery, runner=runner)
    job = await create(harness)
    assert [s.event for s in await harness.watch(f"/api/jobs/{job}/events")][-1] == "job-completed"


async def test_runner_that_returns_after_a_cancel_request(autojump_clock, nursery):
    """A runner that returns after it was asked to cancel leaves its job cancelled."""

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


async def test_forced_cancel_stops_the_runner(autojump_clock, nursery, caplog):
    """The runner's next update is rejected, which ends it; this is not logged as a failure."""
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
    assert [line["session_id"] for line in logged(caplog, "the job stops")] == [job]
    assert "failed" not in caplog.text


async def test_serve_accepts_a_runner():
    """``serve(runner=...)`` runs the jobs of POST /api/jobs with it, over real sockets."""
    ran = trio.Event()

    async def runner(tracker, session_id, data):
        await tracker.update(session_id, stage="render", progress=100)
        ran.set()

    async with sseserve.serve(port=0, drain=0.2, runner=runner) as server:
        job = (await post(server.port, "/api/jobs", {})).json["jobId"]
        await ran.wait()
        await wait_all_tasks_blocked()
        assert (await get(server.port, f"/api/jobs/{job}")).json["status"] == "Done"


async def test_queued_jobs_do_not_start_during_shutdown(autojump_clock):
    """A job cancelled by the shutdown does not let the next one start."""
    runner = BlockingRunner()
    async with trio.open_nursery() as nursery:
        harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
        for _ in range(3):
            await create(harness)
        nursery.cancel_scope.cancel()
    assert len(runner.started) == 1
