"""Jobs that workers elsewhere claim: who gets which, leases, and the server's own runner beside them."""

from __future__ import annotations

import pytest
import trio
from harness import ServerHarness, logged
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.errors import ConfigError
from sseserve.http.auth import Grant
from sseserve.progress.queue import JobQueue


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery, job_workers="remote")


async def create(harness, value=None):
    response = await harness.post("/api/jobs", value)
    assert response.status == 202
    return response.json["jobId"]


async def claim(harness, query=""):
    """Claim a job; return its record, None if there was none."""
    response = await harness.post(f"/api/claims{query}")
    assert response.status in (200, 204), response
    return response.json if response.status == 200 else None


async def status(harness, job):
    return (await harness.get(f"/api/jobs/{job}")).json["status"]


async def test_claims_get_the_jobs_in_their_order(autojump_clock, harness):
    """A claim gets the job's record with its request and links; where no job waits it gets 204."""
    assert await claim(harness) is None
    jobs = [await create(harness, {"brief": number}) for number in range(3)]
    for number, job in enumerate(jobs):
        stream = await harness.stream(f"/api/jobs/{job}/events")
        await stream.take(2)
        claimed = await claim(harness, "?worker=gpu-1&lease=5")
        assert (claimed["jobId"], claimed["request"]) == (job, {"brief": number})
        assert (claimed["status"], claimed["lease"], claimed["control"]) == ("Running", 5, "continue")
        assert claimed["links"]["progress"] == f"/api/jobs/{job}/progress"
        assert claimed["links"]["control"] == f"/api/sessions/{job}/control"
        message = await stream.next()
        assert (message.event, message.data["status"]) == ("job-status", "Running")
    assert await claim(harness) is None
    assert (await harness.get("/api/jobs")).json["waiting"] == 0


async def test_a_waiting_claim_gets_the_next_job(autojump_clock, harness, nursery):
    """Of those who wait the first one gets it; the others get 204 when their time is over."""
    claimed = []

    async def wait_for_job(name):
        claimed.append((name, await claim(harness, "?wait=30"), trio.current_time()))

    for name in "ab":
        nursery.start_soon(wait_for_job, name)
        await wait_all_tasks_blocked()
    await trio.sleep(10)
    job = await create(harness)
    await trio.sleep(30)
    (first, record, at), (second, nothing, until) = claimed
    assert (first, record["jobId"], at) == ("a", job, 10)
    assert (second, nothing, until) == ("b", None, 30)


async def test_no_job_is_handed_out_twice(autojump_clock, harness, nursery):
    """Whoever claims, waits or leaves while jobs are created: each job is handed out once."""
    claimed = []

    async def work():
        while (record := await claim(harness, "?wait=5")) is not None:
            claimed.append(record["jobId"])

    for _ in range(8):
        nursery.start_soon(work)
    jobs = []
    for number in range(60):
        jobs.append(await create(harness))
        if number % 3 == 0:
            await trio.sleep(0.01)
    await trio.sleep(60)
    assert sorted(claimed) == sorted(jobs)


async def test_ended_jobs_are_never_handed_out(autojump_clock, harness):
    """Neither a job that was cancelled while it waited, nor a deleted one, nor another of its id."""
    cancelled, deleted, replaced, last = [await create(harness) for _ in range(4)]
    await harness.post(f"/api/jobs/{cancelled}/cancel")
    for job in (deleted, replaced):
        await harness.tracker.delete(job)
    await harness.tracker.create(replaced)
    assert (await claim(harness))["jobId"] == last
    assert await claim(harness) is None
    assert await status(harness, replaced) == "Queued"
    assert (await harness.get(f"/api/jobs/{deleted}")).status == 404


async def test_a_job_that_somebody_has_begun_is_not_handed_out(autojump_clock, harness):
    """A claim gets the next one."""
    begun, last = [await create(harness) for _ in range(2)]
    await harness.post(f"/api/jobs/{begun}/progress", {"stage": "tts"})
    assert (await claim(harness))["jobId"] == last
    assert await claim(harness) is None
    assert (await harness.get(f"/api/jobs/{begun}")).json["lease"] is None


async def test_a_deleted_job_is_skipped_where_no_session_can_be_created(autojump_clock, nursery):
    """Claiming it creates nothing, so the limit of sessions does not matter."""
    harness = ServerHarness(nursery, job_workers="remote", max_sessions=1)
    await harness.tracker.delete(await create(harness))
    await harness.tracker.create("other")
    assert await claim(harness) is None


async def test_a_job_of_a_worker_that_dies_is_lost(autojump_clock, harness):
    """It is stalled after a lease and lost after three, and nobody gets it again."""
    job = await create(harness)
    await claim(harness, "?lease=10")
    events = await harness.watch(f"/api/jobs/{job}/events")
    assert 30 <= trio.current_time() <= 32
    assert [event.event for event in events][-4:] == ["stalled", "job-status", "error", "job-failed"]
    assert events[-1].data["errorCode"] == "worker_lost"
    assert await claim(harness) is None


async def test_a_worker_publishes_by_the_ordinary_paths(autojump_clock, harness):
    """Its updates renew the lease, even empty ones, and their responses say what the watchers ask."""
    job = await create(harness)
    await claim(harness, "?lease=10")
    progress = f"/api/jobs/{job}/progress"
    for number in range(10):
        await trio.sleep(9)
        body = {"stage": "tts", "progress": number * 10} if number % 2 else {}
        assert (await harness.post(progress, body)).json["control"] == "continue"
    assert await status(harness, job) == "Running"
    await harness.post(f"/api/jobs/{job}/cancel")
    assert (await harness.post(progress, {})).json["control"] == "cancel"
    await harness.post(progress, {"status": "cancelled"})
    assert await status(harness, job) == "Canceled"


async def test_a_claim_whose_client_leaves_takes_no_job(autojump_clock, harness):
    """The job stays for the next one."""
    connection = harness.connect()
    await connection.send(b"POST /api/claims?wait=30 HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 0\r\n\r\n")
    await wait_all_tasks_blocked()
    await connection.stream.aclose()
    await wait_all_tasks_blocked()
    job = await create(harness)
    assert await status(harness, job) == "Queued"
    assert (await claim(harness))["jobId"] == job


async def test_a_cancelled_claim_keeps_the_order(autojump_clock, harness, monkeypatch):
    """A claim that is cancelled while the engine stores it puts its job back to the front."""
    queue: JobQueue = harness.app.queue
    first, second = [await create(harness) for _ in range(2)]
    with monkeypatch.context() as patch, trio.move_on_after(1):
        patch.setattr(harness.tracker, "claim", lambda _session, _lease: trio.sleep_forever())
        await queue.claim(30)
    assert [(await claim(harness))["jobId"] for _ in range(2)] == [first, second]


async def test_a_claim_that_is_cancelled_as_its_job_comes_takes_none(autojump_clock, harness, nursery):
    """Its client has left in that moment: the next one that waits gets the job."""
    queue: JobQueue = harness.app.queue
    claimed: list[str] = []

    async def wait_for_job(name, scope):
        with scope:
            await queue.wait_for_job()
            if await queue.claim(30) is not None:
                claimed.append(name)

    scopes = {name: trio.CancelScope() for name in "ab"}
    for name, scope in scopes.items():
        nursery.start_soon(wait_for_job, name, scope)
        await wait_all_tasks_blocked()
    queue.submit(await harness.tracker.create(job=""))
    scopes["a"].cancel()
    await wait_all_tasks_blocked()
    assert claimed == ["b"]


async def test_waiting_claims_end_when_the_server_stops(autojump_clock, harness, nursery):
    """They are told that there is no job, so that nothing holds up the shutdown."""
    ended = []

    async def wait_for_job():
        ended.append((await claim(harness, "?wait=60"), trio.current_time()))

    nursery.start_soon(wait_for_job)
    await trio.sleep(1)
    harness.app.stopping.set()
    await wait_all_tasks_blocked()
    assert ended == [(None, 1)]


async def test_the_server_runs_demonstrations_itself(autojump_clock, harness):
    """Demo Mode needs no worker, so a claim never gets a demonstration."""
    demo = (await harness.post("/api/quick/demo")).json["jobId"]
    job = await create(harness)
    assert (await claim(harness))["jobId"] == job
    assert await claim(harness) is None
    assert (await harness.watch(f"/api/jobs/{demo}/events"))[-1].event == "job-completed"


async def test_claims_beside_the_servers_runner(autojump_clock, nursery):
    """A claim gets the job that has waited longest, and the server's runner never runs that one."""
    started, go_on = [], trio.Event()

    async def runner(tracker, session_id, data):
        started.append(session_id)
        await go_on.wait()

    harness = ServerHarness(nursery, runner=runner, max_running_jobs=1)
    first, second, third = [await create(harness) for _ in range(3)]
    assert (await claim(harness))["jobId"] == second
    go_on.set()
    await wait_all_tasks_blocked()
    assert started == [first, third]
    assert await status(harness, second) == "Running"


async def test_the_queue_is_bounded(autojump_clock, nursery):
    """Jobs that wait for a worker count; a claim makes room."""
    harness = ServerHarness(nursery, job_workers="remote", max_running_jobs=1, max_waiting_jobs=1)
    for _ in range(2):
        await create(harness)
    assert (await harness.post("/api/jobs")).status == 503
    await claim(harness)
    await create(harness)


@pytest.mark.parametrize("query", ["lease=0.5", "lease=86401", "lease=x", "wait=-1", "wait=61"])
async def test_invalid_claims(autojump_clock, harness, query):
    """They take no job."""
    job = await create(harness)
    assert (await harness.post(f"/api/claims?{query}")).error["code"] == "invalid"
    assert await status(harness, job) == "Queued"


@pytest.mark.parametrize(("role", "expected"), [("patient", 403), ("service", 200)])
async def test_only_workers_may_claim(autojump_clock, harness, role, expected):
    """Those whose grant lets them publish."""
    await create(harness)

    async def authenticate(_request):
        return Grant("somebody", role)

    harness.app.admission.authenticate = authenticate
    assert (await harness.post("/api/claims")).status == expected


async def test_a_runner_and_remote_workers_only():
    """The runner would never be called: an error at the start says so."""

    async def runner(tracker, session_id, data):
        raise AssertionError

    with pytest.raises(ConfigError, match="job_workers"):
        async with sseserve.serve(port=0, runner=runner, job_workers="remote"):
            pass


async def test_a_claim_is_logged(autojump_clock, harness, caplog):
    """With the worker's name, which cannot break the log's lines."""
    caplog.set_level("INFO", "sseserve")
    job = await create(harness)
    await claim(harness, "?worker=gpu%0A1")
    (line,) = logged(caplog, "the job is claimed")
    assert (line["session_id"], line["worker"], line["lease"]) == (job, "gpu\n1", 30)
    assert r'worker="gpu\n1"' in caplog.text
