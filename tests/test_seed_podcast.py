"""Seed 002, the podcast generator: unnamed messages, Pub/Sub, maximum age, environment variables."""

from __future__ import annotations

import base64
import json
import signal
import sys

import msgspec
import pytest
import trio
from harness import ServerHarness
from processes import Program
from raw_client import chunk, request_bytes
from trio.testing import wait_all_tasks_blocked

from sseserve.config import Settings, ignored_variables, load
from sseserve.errors import ConfigError
from sseserve.http.auth import Grant

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
    """Return what a Google Pub/Sub push subscription posts (its documented envelope)."""
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


async def count_bad_messages(harness):
    """Return the metric of invalid Pub/Sub messages."""
    lines = (await harness.get("/metrics")).body.decode().splitlines()
    return next(
        float(line.split()[1]) for line in lines if line.startswith("sseserve_pubsub_invalid_messages_total")
    )


# Create and watch


async def test_create_returns_the_endpoint(autojump_clock, harness):
    """{jobId, sseEndpoint}; the endpoint is the stream of that job."""
    response = await harness.post("/api/v1/jobs", {"topics": ["technology"], "sources": ["ars-technica"]})
    assert response.status == 201
    assert response.json["sseEndpoint"] == f"/api/v1/jobs/{response.json['jobId']}/events"
    message = await (await harness.stream(response.json["sseEndpoint"])).next()
    assert (message.data["jobId"], message.data["status"]) == (response.json["jobId"], "pending")


async def test_created_job_stays_pending(autojump_clock, harness):
    """Other services do the work: until one publishes, the job is pending."""
    job = (await harness.post("/api/v1/jobs", {})).json["jobId"]
    await trio.sleep(60)
    assert (await harness.get(f"/api/v1/jobs/{job}")).json["status"] == "pending"


async def test_a_message_has_the_members_of_the_interface(autojump_clock, harness):
    """A message is unnamed, so that ``onmessage`` gets it, and has all members of SSEStatusUpdate."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.next()
    await harness.post(PUSH, envelope(UPDATE))
    message = await stream.next()
    assert message.event == "message"
    assert message.data == UPDATE


async def test_messages_are_as_published(autojump_clock, harness):
    """Unknown members are kept, and ``data`` is that of this update alone; so are snapshot and history."""
    job = (await harness.post("/api/v1/jobs", {"topics": ["technology"]})).json["jobId"]
    stream = await harness.stream(f"/api/v1/jobs/{job}/events")
    assert "data" not in (await stream.next()).data
    update = {**UPDATE, "jobId": job, "attempt": {"number": 2}, "worker": None}
    without_data = {k: v for k, v in update.items() if k != "data"} | {"progress": 41.5}
    for number, published in enumerate((update, without_data)):
        await harness.post(PUSH, envelope(json.dumps(published, indent=2).encode(), f"m-{number}"))
        assert (await stream.next()).data == published
    assert (await (await harness.stream(f"/api/v1/jobs/{job}/events")).next()).data == without_data
    described = (await harness.get(f"/api/v1/jobs/{job}")).json
    assert described == {**without_data, "connections": 2}


async def test_members_that_were_not_published(autojump_clock, harness):
    """The interface has them all, so the job's current values stand for what an update does not have."""
    await harness.post(PUSH, envelope(UPDATE))
    stream = await harness.stream(EVENTS)
    await stream.next()
    await harness.post(PUSH, envelope({"jobId": "j", "status": "retrieving", "stage": None}, "m-2"))
    assert (await stream.next()).data == {
        "jobId": "j",
        "status": "processing",
        "progress": 40,
        "stage": "retrieving-content",
        "message": "3 of 7 sources",
        "timestamp": "2026-01-02T03:00:00.000Z",
    }


async def test_a_percent_that_falls_is_held(autojump_clock, harness):
    """The rest of the update counts, as it was published; live, for late clients and in the status."""
    await harness.post(PUSH, envelope(UPDATE))
    stream = await harness.stream(EVENTS)
    await stream.next()
    falling = UPDATE | {"progress": 10, "stage": "processing-articles", "message": "1 of 7", "extra": 1}
    assert (await harness.post(PUSH, envelope(falling, "m-2"))).status == 200
    held = falling | {"progress": 40}
    assert (await stream.next()).data == held
    assert (await (await harness.stream(EVENTS)).next()).data == held
    assert (await harness.get("/api/v1/jobs/j")).json == held | {"connections": 2}


async def test_data_published_in_another_dialect(autojump_clock, harness):
    """It is in the message of its update, and in that of a client that comes later, but in no other."""
    job = (await harness.post("/api/v1/jobs", {"topics": ["technology"]})).json["jobId"]
    path = f"/api/v1/jobs/{job}/events"
    stream = await harness.stream(path)
    await stream.next()
    await harness.tracker.update(job, progress=10, data={"pages": 3})
    assert (await stream.next()).data["data"] == {"pages": 3}
    await harness.tracker.update(job, progress=20)
    assert "data" not in (await stream.next()).data
    await harness.tracker.update(job, status="completed", data={"pages": 4})
    assert [message.data["data"] for message in await harness.watch(path)] == [{"pages": 4}]


async def test_stream_opened_before_its_job_is_known(autojump_clock, harness):
    """It waits, kept open by heartbeats: a 404 would close an EventSource for good."""
    stream = await harness.stream(EVENTS)
    await stream.connection.read_until(b": heartbeat")
    await harness.post(PUSH, envelope(UPDATE))
    assert (await stream.next()).data == UPDATE
    await harness.tracker.update("j", status="completed")
    assert [message.data["status"] for message in await stream.read_to_end()] == ["completed"]


async def test_every_message_has_a_stage(autojump_clock, harness):
    """In the interface the stage is not optional: before there is one, it is the state."""
    await harness.tracker.update("j", progress=0)
    message = await (await harness.stream(EVENTS)).next()
    assert message.data["stage"] == "running"
    assert {"jobId", "status", "progress", "stage", "message", "timestamp"} <= message.data.keys()


@pytest.mark.parametrize(
    ("status", "expected"),
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
async def test_status_is_one_of_four(autojump_clock, harness, status, expected):
    """pending, processing, completed or failed, whatever other dialects call it."""
    await harness.tracker.update("j", status=status)
    assert (await (await harness.stream(EVENTS)).next()).data["status"] == expected
    assert (await harness.get("/api/v1/jobs/j")).json["status"] == expected


async def test_updates_come_until_the_job_is_complete(autojump_clock, harness):
    """The stream ends with the job, and a client that reconnects after the end gets 204."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    for percent in (20, 60):
        await harness.tracker.update("j", progress=percent)
    await harness.tracker.update("j", status="completed")
    messages = await stream.read_to_end()
    assert [(m.data["status"], m.data["progress"]) for m in messages] == [
        ("processing", 0),
        ("processing", 20),
        ("processing", 60),
        ("completed", 100),
    ]
    assert (await harness.get(EVENTS, [("Last-Event-ID", messages[-1].id)])).status == 204


async def test_failure_message_has_the_reason(autojump_clock, harness):
    """The interface has no error, so the message explains it."""
    await harness.tracker.update("j", status="failed", error={"code": "E", "message": "no sources"})
    assert (await (await harness.stream(EVENTS)).next()).data["message"] == "no sources"


async def test_other_events_keep_their_names(autojump_clock, harness):
    """``onmessage`` gets statuses and nothing else."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.next()
    await harness.tracker.emit("j", "error", {"a": 1})
    assert (await stream.next()).event == "warning"


# Heartbeats and maximum age


async def test_heartbeats_every_30_seconds(autojump_clock, harness):
    """At least every 30 s without events, and less often than in other dialects."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)
    await stream.next()
    at = trio.current_time()
    for _ in range(4):
        await stream.connection.read_until(b": heartbeat\n")
        assert 20 < trio.current_time() - at <= 30
        at = trio.current_time()


@pytest.mark.parametrize("busy", [False, True])
async def test_a_connection_ends_after_an_hour(autojump_clock, harness, nursery, busy):
    """Busy or idle: ``retry``, a clean end, and on reconnecting everything after the cursor."""
    await harness.tracker.update("j", progress=0)
    stream = await harness.stream(EVENTS)

    async def run_job():
        for number in range(1, 99):
            await trio.sleep(60)
            await harness.tracker.update("j", progress=number)

    if busy:
        nursery.start_soon(run_job)
    messages = await stream.read_to_end()
    assert 3600 <= trio.current_time() <= 3605
    assert stream.connection.ended == "eof"
    assert stream.retry == 1000
    assert len(messages) == (61 if busy else 1)
    await trio.sleep(300)
    await harness.tracker.update("j", status="completed")
    resume, *rest = await harness.watch(EVENTS, messages[-1].id)
    assert resume.data == {"status": "ok", "missed": 0}
    assert len(rest) == (6 if busy else 1)
    assert rest[-1].data["status"] == "completed"


async def test_maximum_age_is_a_setting(autojump_clock, nursery):
    """SSE_CONNECTION_TIMEOUT sets it in seconds; streams of other dialects have no maximum age."""
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
    """For each job and in all; a client that has disconnected is no longer counted."""
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
    """A job that has events and no progress is described as pending."""
    await harness.tracker.emit("j", "note", 1)
    body = (await harness.get("/api/v1/jobs/j")).json
    assert (body["jobId"], body["status"], body["progress"]) == ("j", "pending", 0)


# Pub/Sub


async def test_a_push_is_an_update(autojump_clock, harness):
    """The standard envelope gets 200, and the job has changed."""
    response = await harness.post(PUSH, envelope(UPDATE))
    assert response.status == 200
    progress = (await harness.tracker.get("j")).progress
    assert (progress.percent, progress.stage, progress.message) == (
        40,
        "retrieving-content",
        "3 of 7 sources",
    )
    assert await count_bad_messages(harness) == 0


async def test_a_second_delivery_changes_nothing(autojump_clock, harness):
    """Pub/Sub delivers at least once: a message ID that was seen gets the same response."""
    responses = [await harness.post(PUSH, envelope(UPDATE)) for _ in range(3)]
    assert {response.body for response in responses} == {responses[0].body}
    assert (await harness.tracker.get("j")).seq == 1
    await harness.post(PUSH, envelope(UPDATE, "m-2"))
    assert (await harness.tracker.get("j")).seq == 2


async def test_latency_of_pubsub_is_measured(autojump_clock, harness):
    """From a message's publishTime to the log; a second delivery, and one without a time, do not count."""
    await trio.sleep(2.5)  # the envelope says that it was published when the clock started
    for message_id in ("m-1", "m-1", "m-2"):
        await harness.post(PUSH, envelope(UPDATE, message_id))
    for number, time in enumerate((None, "yesterday", 5, "2026-01-02T03:00:00")):
        body = envelope(UPDATE, f"n-{number}")
        body["message"]["publishTime"] = time
        assert (await harness.post(PUSH, body)).status == 200
    metrics = (await harness.get("/metrics")).body.decode()
    assert "sseserve_pubsub_latency_seconds_count 2.0" in metrics
    assert "sseserve_pubsub_latency_seconds_sum 5.0" in metrics


async def test_job_ownership(autojump_clock, harness):
    """With authentication a user watches its own jobs only; what the others' are called it does not learn."""
    job = (await harness.post("/api/v1/jobs", {"topics": ["technology"], "owner": "ann"})).json

    async def authenticate(request):
        return Grant(request.headers["authorization"], "patient")

    harness.app.admission.authenticate = authenticate
    stream = await harness.stream(job["sseEndpoint"], headers=[("Authorization", "ann")])
    assert (await stream.next()).data["status"] == "pending"
    for path in (job["sseEndpoint"], "/api/v1/jobs/none/events"):
        response = await harness.get(path, [("Authorization", "bob")])
        assert (response.status, response.error["code"]) == (403, "forbidden")


async def test_concurrent_deliveries_of_one_message(autojump_clock, harness):
    """Concurrent deliveries are applied once."""
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
        json.dumps(envelope({"jobId": "j", "progress": 101})).encode(),
        json.dumps(envelope({"jobId": "j", "progress": "x"})).encode(),
        json.dumps(envelope({"jobId": "done", "progress": 50})).encode(),
    ],
)
async def test_invalid_message_is_acknowledged_and_counted(autojump_clock, harness, caplog, body):
    """Otherwise it would be redelivered for ever; it changes nothing, and is counted and logged."""
    await harness.tracker.update("j", progress=40)
    await harness.tracker.update("done", status="completed")
    assert (await harness.post(PUSH, body)).status == 204
    assert await count_bad_messages(harness) == 1
    assert "an invalid Pub/Sub message is dropped" in caplog.text
    assert [(s.id, s.seq) for s in await harness.tracker.sessions()] == [("done", 1), ("j", 1)]


async def test_a_message_that_is_too_large_is_acknowledged_too(autojump_clock, nursery):
    """It would be too large on every redelivery."""
    harness = ServerHarness(nursery, max_body=1000)
    assert (await harness.post(PUSH, envelope({**UPDATE, "message": "x" * 1000}))).status == 204
    assert await count_bad_messages(harness) == 1


async def test_temporary_failure_is_not_acknowledged(autojump_clock, nursery):
    """A server at its session limit responds with 503, so Pub/Sub redelivers the message."""
    harness = ServerHarness(nursery, max_sessions=1)
    await harness.tracker.create("other")
    assert (await harness.post(PUSH, envelope(UPDATE))).status == 503
    assert await count_bad_messages(harness) == 0
    await harness.app.tracker.delete("other")
    assert (await harness.post(PUSH, envelope(UPDATE))).status == 200


@pytest.mark.parametrize("end", ["stalls", "is cut", "has a bad chunk"])
async def test_incomplete_body_is_not_acknowledged(autojump_clock, harness, end):
    """What is wrong with the connection says nothing about the message: Pub/Sub redelivers it."""
    connection = harness.connect()
    head = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
    await connection.send(request_bytes("POST", PUSH, b"", head))
    await connection.send(chunk(json.dumps(envelope(UPDATE)).encode()[:-5]))
    if end == "is cut":
        await connection.stream.send_eof()
        assert await connection.read_to_end() == b""
    else:
        if end == "has a bad chunk":
            await connection.send(b"x\r\n")
        assert (await connection.read_response()).status == 400
    assert await count_bad_messages(harness) == 0
    assert await harness.tracker.sessions() == []


# Environment


def test_environment_variables_of_the_seed():
    """Their names and units: milliseconds for the heartbeat, seconds for the connection."""
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


PUBSUB = {
    "GOOGLE_CLOUD_PROJECT_ID": "p",
    "PUBSUB_STATUS_UPDATES_TOPIC": "status-updates",
    "PUBSUB_STATUS_UPDATES_SUBSCRIPTION": "sse-service-subscription",
}


@pytest.mark.parametrize("name", PUBSUB)
def test_variables_of_a_pull_subscription_are_warned_about(name):
    """The server does not pull; the warning names the variable and what to do."""
    (sentence,) = ignored_variables({name: PUBSUB[name], "NODE_ENV": "production"})
    assert name in sentence
    assert "/api/v1/pubsub/push" in sentence


def test_environments_of_node():
    """The server is always as in production; another environment is warned about."""
    assert ignored_variables({"NODE_ENV": "production", "PUBSUB_STATUS_UPDATES_TOPIC": " "}) == []
    (sentence,) = ignored_variables({"NODE_ENV": "development"})
    assert "NODE_ENV=development" in sentence


def test_the_server_warns_at_its_start():
    """Each variable that has no effect is in the log of ``sseserve serve``."""
    command = (sys.executable, "-m", "sseserve", "serve", "--port", "0")
    with Program(*command, **PUBSUB, NODE_ENV="test") as program:
        program.wait_for_output("serving at")
        assert program.wait(signal.SIGTERM) == 0
    for name in (*PUBSUB, "NODE_ENV=test"):
        assert f"{name}" in program.output


def test_own_variables_override_the_aliases():
    """SSESERVE_ variables override the aliases, flags override both, and an empty alias is not set."""
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
def test_invalid_alias_values(name, text):
    """A value that is invalid for its setting is an error that names the variable."""
    with pytest.raises(ConfigError, match=name):
        load(environ={name: text})


def test_defaults_of_heartbeat_and_maximum_age():
    """Without variables neither is set, so each dialect keeps its own."""
    settings = load(environ={})
    assert settings == Settings()
    assert (settings.heartbeat, settings.max_age) == (None, None)
