"""Publishers, jobs and background services while the engine cannot store, and when it is back."""

from __future__ import annotations

import json
import logging
from functools import partial

import pytest
import trio
from faulty_engine import FULL, UNREACHABLE, FaultyEngine
from harness import FaultyHarness
from test_seed_podcast import UPDATE, envelope
from trio.testing import wait_all_tasks_blocked

from sseserve.client import TRANSPORTS, Publisher, watch
from sseserve.http.routes import ROUTES
from sseserve.server import application, serve

CHANGES = [
    ("POST", "/api/sessions/s/progress", {"progress": 5}),
    ("POST", "/api/sessions/s/events", {"type": "note", "data": 1}),
    ("POST", "/api/sessions/new/progress", {"progress": 5}),
    ("POST", "/api/interaction/events/s", {"type": "note", "data": {}}),
    ("POST", "/api/jobs/s/progress", {"stage": "tts", "progress": 5}),
    ("POST", "/api/v1/sessions/s/status", {"status": "processing", "progress": 5}),
    ("POST", "/api/v1/pubsub/push", envelope({**UPDATE, "jobId": "s"})),
    ("POST", "/api/sessions", {"session_id": "new"}),
    ("POST", "/api/sessions/s/pause", None),
    ("POST", "/api/sessions/s/cancel", None),
    ("POST", "/api/jobs", {}),
    ("POST", "/api/quick/demo", None),
    ("POST", "/api/v1/jobs", {}),
]


@pytest.fixture
async def harness(nursery):
    harness = FaultyHarness(nursery)
    await harness.tracker.update("s", progress=1)
    return harness


@pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=[path for _, path, _ in CHANGES])
async def test_a_change_is_refused_and_changes_nothing(autojump_clock, harness, method, path, body):
    """503 while the engine is away, 507 while it is full, each with the reason and a time to come back."""
    before = await harness.engine.memory.sessions()
    harness.engine.fail()
    response = await harness.request(method, path, body)
    assert (response.status, response.headers["retry-after"]) == (503, "1")
    assert (response.error["code"], response.error["message"]) == ("engine_unavailable", UNREACHABLE)
    harness.engine.recover()
    harness.engine.fill()
    response = await harness.request(method, path, body)
    assert (response.status, response.headers["retry-after"]) == (507, "5")
    assert (response.error["code"], response.error["message"]) == ("insufficient_storage", FULL)
    assert await harness.engine.memory.sessions() == before
    queue = harness.app.queue
    assert (queue._reserved, queue._running, queue.waiting) == (0, 0, 0)
    assert {503, 507} <= {error.status for error in ROUTES.match(method, path).route.errors}
    harness.engine.recover()
    assert (await harness.request(method, path, body)).status in (200, 201, 202)


async def test_a_deletion_is_refused(autojump_clock, harness):
    harness.engine.fail()
    assert (await harness.request("DELETE", "/api/sessions/s")).status == 503
    harness.engine.recover()
    assert (await harness.request("DELETE", "/api/sessions/s")).status == 204


@pytest.mark.parametrize("stores_first", [False, True], ids=["not stored", "stored"])
async def test_lines_say_how_far_they_got_and_go_on(autojump_clock, harness, stores_first):
    """The line that could not be stored is named; with the key nothing is applied twice in any case."""
    lines = b"".join(json.dumps({"type": "n", "data": n}).encode() + b"\n" for n in range(5))
    headers = [("Content-Type", "application/x-ndjson"), ("Idempotency-Key", "k")]
    append = harness.engine.memory.append
    count = 0

    async def fail_at_third(*args, **options):
        nonlocal count
        count += 1
        if count == 2:
            harness.engine.fail(["append"], stores_first=stores_first)
        await append(*args, **options)

    harness.engine.memory.append = fail_at_third
    response = await harness.post("/api/sessions/s/events", lines, headers)
    assert (response.status, response.headers["retry-after"]) == (503, "1")
    assert (response.error["line"], response.error["applied"]) == (3, 2)
    harness.engine.recover()
    response = await harness.post("/api/sessions/s/events", lines, headers)
    assert (response.status, response.json["applied"]) == (202, 5)
    page = await harness.engine.memory.read("s", 1, 100)
    assert [json.loads(bytes(event.data)) for event in page.events] == [0, 1, 2, 3, 4]


async def test_a_change_that_was_stored_after_all_is_not_repeated(autojump_clock, harness):
    """Whoever gets a 503 may have been stored; the same key says so when the engine is back."""
    harness.engine.fail(["append"], stores_first=True)
    headers = [("Idempotency-Key", "k")]
    assert (await harness.post("/api/sessions/s/progress", {"progress": 7}, headers)).status == 503
    harness.engine.recover()
    response = await harness.post("/api/sessions/s/progress", {"progress": 7}, headers)
    assert (response.status, response.json["id"]) == (202, str((await harness.tracker.get("s")).cursor))
    assert (await harness.tracker.get("s")).seq == 2


# Jobs


async def test_a_waiting_claim_ends_when_the_engine_is_away(autojump_clock, nursery):
    """As any other request, and the job is there for the next one."""
    harness = FaultyHarness(nursery, job_workers="remote")
    responses = []

    async def claim():
        responses.append(await harness.post("/api/claims?wait=60"))

    nursery.start_soon(claim)
    await wait_all_tasks_blocked()
    job = await harness.elsewhere.create(job="")
    harness.engine.fail()
    harness.app.queue.submit(job)
    await wait_all_tasks_blocked()
    assert [response.status for response in responses] == [503]
    harness.engine.recover()
    assert (await harness.post("/api/claims")).json["jobId"] == job.id


async def test_the_end_of_a_job_is_stored_when_it_can_be(autojump_clock, nursery, caplog):
    """Whether it has succeeded or failed, and however long that takes; one line in the log says so."""
    go_on = trio.Event()

    async def runner(_tracker, session_id, _data):
        await go_on.wait()
        if session_id == jobs[1]:
            raise ValueError("no such voice")

    harness = FaultyHarness(nursery, runner=runner)
    jobs = [(await harness.post("/api/jobs", {})).json["jobId"] for _ in range(2)]
    await wait_all_tasks_blocked()
    harness.engine.fail()
    go_on.set()
    await trio.sleep(300)
    assert {(await harness.engine.memory.load(job)).progress.state for job in jobs} == {"running"}
    harness.engine.recover()
    await trio.sleep(30)
    sessions = [await harness.tracker.get(job) for job in jobs]
    assert [session.progress.state for session in sessions] == ["succeeded", "failed"]
    assert sessions[1].progress.error == "ValueError: no such voice"
    for job in jobs:
        lines = [r for r in caplog.records if job in r.getMessage() and "cannot be stored" in r.getMessage()]
        assert len(lines) == 1


async def test_the_end_of_a_job_is_stored_once(autojump_clock, nursery):
    """Even if the engine had stored it, and could not say so."""

    async def runner(_tracker, _session_id, _data):
        harness.engine.fail(["append"], stores_first=True)

    harness = FaultyHarness(nursery, runner=runner)
    job = (await harness.post("/api/jobs", {})).json["jobId"]
    await trio.sleep(10)
    harness.engine.recover()
    await trio.sleep(10)
    session = await harness.tracker.get(job)
    assert (session.progress.state, session.seq) == ("succeeded", 3)  # queued, running, succeeded


@pytest.mark.parametrize("fault", ["fail", "fill"])
async def test_a_demonstration_goes_on(autojump_clock, nursery, fault):
    """Its work is not lost, and it is not taken for a success, because the engine was away."""
    harness = FaultyHarness(nursery, demo_seconds=20)
    job = (await harness.post("/api/quick/demo")).json["jobId"]
    await trio.sleep(5)
    getattr(harness.engine, fault)()
    await trio.sleep(100)
    assert (await harness.engine.memory.load(job)).progress.state == "running"
    harness.engine.recover()
    await trio.sleep(40)
    session = await harness.tracker.get(job)
    assert session.progress.state == "succeeded"
    assert session.progress.artifacts
    page = await harness.engine.memory.read(job, 0, 1000)
    percents = [event.progress.percent for event in page.events]
    assert percents == sorted(percents)


# Background services


async def test_nobody_is_lost_because_the_engine_was_away(autojump_clock, harness):
    """Leases begin afresh when it is back: a producer could not publish, and gets its time to."""
    await harness.tracker.create("leased", lease=10)
    await harness.tracker.create("silent", lease=10)
    harness.engine.fail()
    await trio.sleep(300)
    harness.engine.recover()
    await trio.sleep(9)
    await harness.tracker.update("leased", progress=1)
    for _ in range(5):
        await trio.sleep(9)
        await harness.tracker.update("leased", progress=1)
    page = await harness.engine.memory.read("leased", 0, 100)
    assert {event.type for event in page.events} == {"progress"}
    silent = await harness.tracker.get("silent")
    assert silent.progress.state == "lost"
    page = await harness.engine.memory.read("silent", 0, 100)
    assert [event.type for event in page.events] == ["progress", "stalled", "progress"]


async def test_nobody_is_lost_because_the_disk_was_full(autojump_clock, harness):
    """Leases could be read all the time, but nobody could publish."""
    await harness.tracker.create("leased", lease=10)
    harness.engine.fill()
    await trio.sleep(300)
    harness.engine.recover()
    await trio.sleep(9)
    assert not (await harness.tracker.get("leased")).stalled


async def test_nobody_who_was_stalled_is_lost_because_the_disk_was_full(autojump_clock, harness):
    """Its time until ``lost`` does not go on meanwhile."""
    await harness.tracker.create("leased", lease=10)
    await trio.sleep(12)
    assert (await harness.tracker.get("leased")).stalled
    harness.engine.fill()
    await trio.sleep(17)
    harness.engine.recover()
    await trio.sleep(8)
    await harness.tracker.update("leased", progress=1)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced"])
async def test_the_log_is_not_flooded(autojump_clock, harness, caplog, announced):
    """For each service a line when it begins and one when it ends, unless the engine itself says so."""
    caplog.set_level(logging.INFO, logger="sseserve")
    harness.engine.fail(announced=announced)
    await trio.sleep(600)
    during = [record.getMessage() for record in caplog.records]
    assert len(during) == (0 if announced else 2)
    assert all(UNREACHABLE in message for message in during)
    harness.engine.recover()
    await trio.sleep(600)
    assert len(caplog.records) == 2 * len(during)
    assert "Traceback" not in caplog.text
    metrics = (await harness.get("/metrics")).body.decode()
    assert 'service="leases"} 0.0' in metrics


async def test_services_go_on_at_once(autojump_clock, nursery):
    """However long the engine was away, the next check is a second after it is back."""
    harness = FaultyHarness(nursery, ttl=5)
    await harness.tracker.update("s", status="done")
    harness.engine.fail()
    await trio.sleep(1000)
    harness.engine.recover()
    await trio.sleep(1.5)
    assert await harness.engine.memory.count() == 0


# Operations


@pytest.mark.parametrize("hangs", [0, 3600])
async def test_health_is_that_of_the_process(autojump_clock, harness, hangs):
    """200 within bounds, with the last number of sessions that is known; the server is not ready."""
    harness.engine.fail(hangs=hangs)
    started_at = trio.current_time()
    response = await harness.get("/health")
    assert (response.status, response.json["sessions"]) == (200, None)
    assert trio.current_time() - started_at <= 0.5
    harness.engine.recover()
    assert (await harness.get("/health")).json["sessions"] == 1
    harness.engine.fail(hangs=hangs)
    assert (await harness.get("/health")).json["sessions"] == 1


async def test_readiness_and_metrics(autojump_clock, harness):
    def samples(response):
        lines = response.body.decode().splitlines()
        return [
            line
            for line in lines
            if line.startswith(("sseserve_engine_up", "sseserve_append_failures_total"))
        ]

    assert samples(await harness.get("/metrics")) == [
        "sseserve_engine_up 1.0",
        "sseserve_append_failures_total 0.0",
    ]
    harness.engine.fill()
    await harness.post("/api/sessions/s/progress", {"progress": 3})
    await harness.post("/api/sessions", {"session_id": "new"})
    assert samples(await harness.get("/metrics")) == [
        "sseserve_engine_up 0.0",
        "sseserve_append_failures_total 2.0",
    ]
    response = await harness.get("/ready")
    assert (response.status, response.error["message"]) == (503, FULL)
    assert "retry-after" in response.headers
    harness.engine.recover()
    assert (await harness.get("/ready")).status == 200


# What an instance knows may be out of date


async def test_a_silent_producer_is_noticed_whatever_is_known_of_it(autojump_clock, harness):
    """Its last update may have gone to another instance: what counts is what is stored."""
    await harness.tracker.create("leased", lease=10)
    known = await harness.tracker.get("leased")

    async def latest(session_id):
        return known if session_id == "leased" else await harness.engine.memory.load(session_id)

    harness.engine.memory.latest = latest
    await harness.elsewhere.update("leased", progress=1)
    await trio.sleep(35)
    page = await harness.engine.memory.read("leased", 2, 100)
    assert [event.type for event in page.events] == ["stalled", "progress"]
    assert page.session.progress.state == "lost"


async def test_a_claim_that_was_stored_is_handed_out(autojump_clock, nursery):
    """Also if nothing can be read after it: the job would be lost otherwise."""
    harness = FaultyHarness(nursery, job_workers="remote")
    job = (await harness.post("/api/jobs", {})).json["jobId"]
    append = harness.engine.memory.append

    async def append_last(*args, **options):
        await append(*args, **options)
        harness.engine.fail()

    harness.engine.memory.append = append_last
    response = await harness.post("/api/claims")
    assert (response.status, response.json["jobId"], response.json["status"]) == (200, job, "Running")


async def test_a_session_that_is_tried_again_meanwhile_is_deleted(autojump_clock, harness):
    """Its log is another one then, and its id the same."""
    status = "/api/v1/sessions/s/status"
    await harness.post(status, {"status": "failed"})
    delete = harness.engine.memory.delete

    async def delete_late(session_id, epoch):
        harness.engine.memory.delete = delete
        await harness.post(status, {"status": "processing", "progress": 5})
        return await delete(session_id, epoch)

    harness.engine.memory.delete = delete_late
    assert (await harness.request("DELETE", "/api/sessions/s")).status == 204
    assert await harness.engine.memory.count() == 0
    assert (await harness.request("DELETE", "/api/sessions/s")).status == 404


# The Python client


async def test_clients_wait_for_the_engine(monkeypatch, nursery):
    """Publishers retry, and watchers get everything once and in order, over each transport."""
    engines = []

    def make_engine(settings, listener):
        engines.append(FaultyEngine(settings, listener))
        return engines[0]

    monkeypatch.setattr(application, "open_engine", make_engine)
    received = {transport: [] for transport in TRANSPORTS}
    async with serve(port=0) as server, Publisher(server.url) as publisher:
        await publisher.progress("s", progress=1)

        async def follow(transport):
            async with watch(server.url, "s", transport=transport) as messages:
                async for message in messages:
                    received[transport].append(message)

        async with trio.open_nursery() as watchers:
            for transport in TRANSPORTS:
                watchers.start_soon(follow, transport)
            while not all(received.values()):
                await trio.sleep(0.01)
            engine = engines[0]
            engine.fail()
            watchers.start_soon(partial(publisher.progress, "s", progress=2))
            while not all(any(m.event == "degraded" for m in received[t]) for t in ("sse", "ws")):
                await trio.sleep(0.01)
            while engine.calls["receipt"] < 2:
                await trio.sleep(0.01)
            engine.recover()
            while (await server.tracker.get("s")).progress.percent < 2:
                await trio.sleep(0.01)
            await publisher.progress("s", status="done")
    for transport in TRANSPORTS:
        records = [m for m in received[transport] if m.event in ("progress", "complete")]
        assert [m.data["progress"] for m in records] == [1, 2, 100], transport
