"""Seed 002, the podcast generator: unnamed statuses, Pub/Sub, planned ends, its environment."""

from __future__ import annotations

import base64
import json

import msgspec
import pytest
import trio
from harness import ServerHarness
from trio.testing import wait_all_tasks_blocked

from sseserve.config import Settings, load
from sseserve.errors import ConfigError

EVENTS = "/api/v1/jobs/j/events"
PUSH = "/api/v1/pubsub/push"
UPDATE = {
    "jobId": "j",
    "status": "processing",
    "progress": 40,
    "stage": "retrieving-content",
    "message": "3 of 7 sources",
    "timestamp": "2026-01-01T00:00:00Z",
    "data": {"sources": ["techcrunch"]},
}


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


def envelope(update, message_id="m-1"):
    """What Google's push subscription posts (its documented wrapping)."""
    data = update if isinstance(update, bytes) else json.dumps(update).encode()
    return {
        "message": {
            "attributes": {"origin": "content-retrieval-service"},
            "data": base64.b64encode(data).decode(),
            "messageId": message_id,
            "message_id": message_id,
            "publishTime": "2026-01-02T03:00:00Z",
            "publish_time": "2026-01-02T03:00:00Z",
        },
        "subscription": "projects/p/subscriptions/sse-service-subscription",
    }


async def bad_messages(harness):
    lines = (await harness.get("/metrics")).body.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("sseserve_bad_messages_total"))


# Create and watch


async def test_create_answers_where_to_watch(autojump_clock, harness):
    """{jobId, sseEndpoint}; the endpoint is a stream of that job."""
    response = await harness.post("/api/v1/jobs", {"topics": ["technology"], "sources": ["ars-technica"]})
    assert response.status == 201
    assert response.json["sseEndpoint"] == f"/api/v1/jobs/{response.json['jobId']}/events"
    said = await (await harness.stream(response.json["sseEndpoint"])).next()
    assert (said.data["jobId"], said.data["status"]) == (response.json["jobId"], "pending")


async def test_nobody_here_works_on_such_a_job(autojump_clock, harness):
    """Other services do: it stays pending until they say something."""
    job = (await harness.post("/api/v1/jobs", {})).json["jobId"]
    await trio.sleep(60)
    assert (await harness.get(f"/api/v1/jobs/{job}")).json["status"] == "pending"


async def test_a_message_has_the_members_of_the_interface(autojump_clock, harness):
    """Unnamed, so ``onmessage`` gets it; all members of SSEStatusUpdate."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.next()
    await harness.post(PUSH, envelope(UPDATE))
    said = await stream.next()
    assert said.event == "message"
    assert said.data == {**UPDATE, "timestamp": "2026-01-02T03:00:00.000Z"}


async def test_every_message_has_a_stage(autojump_clock, harness):
    """The interface has no optional stage: before there is one, the state stands for it."""
    await harness.tracker.update("j", progress=0)
    said = await (await harness.stream(EVENTS)).next()
    assert said.data["stage"] == "running"
    assert {"jobId", "status", "progress", "stage", "message", "timestamp"} <= said.data.keys()


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ("queued", "pending"),
        ("running", "processing"),
        ("retrieving", "processing"),
        ("paused", "processing"),
        ("succeeded", "completed"),
        ("failed", "failed"),
        ("cancelled", "failed"),
        ("lost", "failed"),
    ],
)
async def test_a_status_is_one_of_four_words(autojump_clock, harness, status, word):
    """pending, processing, completed, failed: whatever the others call it."""
    await harness.tracker.update("j", status=status)
    assert (await (await harness.stream(EVENTS)).next()).data["status"] == word
    assert (await harness.get("/api/v1/jobs/j")).json["status"] == word


async def test_updates_come_until_the_job_is_complete(autojump_clock, harness):
    """The stream ends with the job, and who comes back behind the end is stopped."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    for percent in (20, 60):
        await harness.tracker.update("j", progress=percent)
    await harness.tracker.update("j", status="completed")
    said = await stream.read_to_end()
    assert [(s.data["status"], s.data["progress"]) for s in said] == [
        ("processing", 0),
        ("processing", 20),
        ("processing", 60),
        ("completed", 100),
    ]
    assert (await harness.get(EVENTS, [("Last-Event-ID", said[-1].id)])).status == 204


async def test_a_failure_says_why(autojump_clock, harness):
    """The interface has no error: the message explains it."""
    await harness.tracker.update("j", status="failed", error={"code": "E", "message": "no sources"})
    assert (await (await harness.stream(EVENTS)).next()).data["message"] == "no sources"


async def test_other_events_keep_their_names(autojump_clock, harness):
    """``onmessage`` gets statuses and nothing else."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.next()
    await harness.tracker.emit("j", "error", {"a": 1})
    assert (await stream.next()).event == "warning"


# Time


async def test_heartbeats_every_30_seconds(autojump_clock, harness):
    """At least every 30 s of silence, and not as often as for the others."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.next()
    at = trio.current_time()
    for _ in range(4):
        await stream.connection.read_until(b": heartbeat\n\n")
        assert 20 < trio.current_time() - at <= 30
        at = trio.current_time()


@pytest.mark.parametrize("busy", [False, True])
async def test_a_connection_ends_after_an_hour(autojump_clock, harness, nursery, busy):
    """Busy or not: a ``retry``, an ordinary end, and everything behind the cursor when it comes back."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)

    async def work():
        for number in range(1, 99):
            await trio.sleep(60)
            await harness.tracker.update("j", progress=number)

    if busy:
        nursery.start_soon(work)
    said = await stream.read_to_end()
    assert 3600 <= trio.current_time() <= 3605
    assert stream.connection.ended == "eof"
    assert stream.retry == 1000
    assert len(said) == (61 if busy else 1)
    await trio.sleep(300)
    await harness.tracker.update("j", status="completed")
    resume, *rest = await harness.watch(EVENTS, said[-1].id)
    assert resume.data == {"status": "ok", "missed": 0}
    assert len(rest) == (6 if busy else 1)
    assert rest[-1].data["status"] == "completed"


async def test_the_hour_is_a_setting(autojump_clock, nursery):
    """SSE_CONNECTION_TIMEOUT: so many seconds instead; other dialects' streams have no such age."""
    environ = {"SSE_CONNECTION_TIMEOUT": "120", "SSE_HEARTBEAT_INTERVAL": "5000"}
    settings = msgspec.structs.asdict(load(environ=environ))
    harness = ServerHarness(nursery, **settings)
    await harness.tracker.update("j", progress=0)
    other = await harness.stream("/api/sessions/j/status/stream")
    await (await harness.stream(EVENTS)).read_to_end()
    assert 120 <= trio.current_time() <= 125
    await other.next()
    await trio.sleep(4000)
    await harness.tracker.update("j", status="completed")
    assert (await other.read_to_end())[-1].event == "complete"


# Health


async def test_health_counts_the_connections_of_each_job(autojump_clock, harness):
    """Per job and in all; one that leaves is no longer counted."""
    for job in "ab":
        await harness.tracker.update(job, progress=0)
    streams = [await harness.stream(f"/api/v1/jobs/{job}/events") for job in "aab"]
    await wait_all_tasks_blocked()
    health = (await harness.get("/health")).json
    assert health["status"] == "ok"
    assert (health["streams"], health["connections_per_job"]) == (3, {"a": 2, "b": 1})
    assert (await harness.get("/api/v1/jobs/a")).json["connections"] == 2
    await streams[0].disconnect()
    await wait_all_tasks_blocked()
    assert (await harness.get("/health")).json["connections_per_job"] == {"a": 1, "b": 1}
    assert (await harness.get("/api/v1/jobs/none")).error["code"] == "session_not_found"


async def test_a_job_without_a_status_is_pending(autojump_clock, harness):
    """A job that has had events and no progress yet is described all the same."""
    await harness.tracker.emit("j", "note", 1)
    said = (await harness.get("/api/v1/jobs/j")).json
    assert (said["jobId"], said["status"], said["progress"]) == ("j", "pending", 0)


# Pub/Sub


async def test_a_push_is_an_update(autojump_clock, harness):
    """The standard envelope is answered with success, and the job has moved."""
    response = await harness.post(PUSH, envelope(UPDATE))
    assert response.status == 200
    progress = (await harness.tracker.get("j")).progress
    assert (progress.percent, progress.stage, progress.message) == (
        40,
        "retrieving-content",
        "3 of 7 sources",
    )
    assert await bad_messages(harness) == 0


async def test_a_second_delivery_changes_nothing(autojump_clock, harness):
    """Pub/Sub delivers at least once: the message id tells, and the answer is the same."""
    responses = [await harness.post(PUSH, envelope(UPDATE)) for _ in range(3)]
    assert {response.body for response in responses} == {responses[0].body}
    assert (await harness.tracker.get("j")).seq == 1
    await harness.post(PUSH, envelope(UPDATE, "m-2"))
    assert (await harness.tracker.get("j")).seq == 2


async def test_deliveries_of_one_message_at_the_same_time(autojump_clock, harness):
    """Two at once are one."""
    async with trio.open_nursery() as posts:
        for _ in range(4):
            posts.start_soon(harness.post, PUSH, envelope(UPDATE))
    assert (await harness.tracker.get("j")).seq == 1


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"{}",
        json.dumps({"message": {"data": "%%%", "messageId": "1"}}).encode(),
        json.dumps({"message": {"data": "YQ", "messageId": "1"}}).encode(),
        json.dumps({"message": {"data": "!" + envelope(UPDATE)["message"]["data"]}}).encode(),
        json.dumps(envelope(b"no json")).encode(),
        json.dumps(envelope(b'{"jobId": "\xff"}')).encode(),
        json.dumps(envelope([])).encode(),
        json.dumps(envelope({"status": "processing"})).encode(),
        json.dumps(envelope({"jobId": ""})).encode(),
        json.dumps(envelope({"jobId": "a/b", "status": "processing"})).encode(),
        json.dumps(envelope({"jobId": "j", "progress": 39})).encode(),
        json.dumps(envelope({"jobId": "j", "progress": 101})).encode(),
        json.dumps(envelope({"jobId": "j", "progress": "x"})).encode(),
        json.dumps(envelope({"jobId": "done", "progress": 50})).encode(),
    ],
)
async def test_a_bad_message_is_acknowledged_and_counted(autojump_clock, harness, caplog, body):
    """It would be delivered for ever otherwise; nothing changes, and the operator can see it."""
    await harness.tracker.update("j", progress=40)
    await harness.tracker.update("done", status="completed")
    assert (await harness.post(PUSH, body)).status == 204
    assert await bad_messages(harness) == 1
    assert "an invalid Pub/Sub message is dropped" in caplog.text
    assert [(s.id, s.seq) for s in await harness.tracker.sessions()] == [("done", 1), ("j", 1)]


async def test_a_message_that_is_too_large_is_acknowledged_too(autojump_clock, nursery):
    """It will be too large the next time as well."""
    harness = ServerHarness(nursery, max_body=1000)
    assert (await harness.post(PUSH, envelope({**UPDATE, "message": "x" * 1000}))).status == 204
    assert await bad_messages(harness) == 1


async def test_what_may_succeed_later_is_delivered_again(autojump_clock, nursery):
    """A server that is full says so; Pub/Sub keeps the message."""
    harness = ServerHarness(nursery, max_sessions=1)
    await harness.tracker.create("other")
    assert (await harness.post(PUSH, envelope(UPDATE))).status == 503
    assert await bad_messages(harness) == 0
    await harness.app.tracker.delete("other")
    assert (await harness.post(PUSH, envelope(UPDATE))).status == 200


# Environment


def test_its_environment_variables_are_understood():
    """Their names and their units: milliseconds for the heartbeat, seconds for the connection."""
    environ = {
        "PORT": "8080",
        "REDIS_HOST": "10.0.0.3",
        "REDIS_PORT": "6380",
        "REDIS_PASSWORD": "a,b",
        "SSE_HEARTBEAT_INTERVAL": "30000",
        "SSE_CONNECTION_TIMEOUT": "3600",
        "NODE_ENV": "production",
        "GOOGLE_CLOUD_PROJECT_ID": "p",
    }
    settings = load(environ=environ)
    assert (settings.port, settings.redis_host, settings.redis_port) == (8080, "10.0.0.3", 6380)
    assert settings.redis_password == "a,b"
    assert (settings.heartbeat, settings.max_age) == (30, 3600)


def test_our_own_names_are_stronger():
    """Who says it in our words means it; an alias that is empty is not set."""
    environ = {"PORT": "8080", "SSESERVE_PORT": "9000", "SSE_HEARTBEAT_INTERVAL": "", "REDIS_HOST": " "}
    settings = load(environ=environ)
    assert (settings.port, settings.heartbeat, settings.redis_host) == (9000, None, None)
    assert load(environ={"PORT": "8080"}, flags={"port": 1}).port == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "http"),
        ("PORT", "70000"),
        ("SSE_HEARTBEAT_INTERVAL", "30s"),
        ("SSE_HEARTBEAT_INTERVAL", "0"),
        ("SSE_CONNECTION_TIMEOUT", "-1"),
        ("REDIS_PORT", "0"),
    ],
)
def test_an_alias_that_makes_no_sense_is_an_error(name, text):
    """And the error names it."""
    with pytest.raises(ConfigError, match=name):
        load(environ={name: text})


def test_nothing_set_is_the_dialects_own():
    """Without a variable each dialect keeps its own times."""
    settings = load(environ={})
    assert settings == Settings()
    assert (settings.heartbeat, settings.max_age) == (None, None)
