"""Seed 004, the coaching assistant: statuses of a transcription, polling, limits."""

from __future__ import annotations

import msgspec
import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import RawConnection, connect, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.config import ignored_variables, load

PATH = "/api/v1/sessions/s/status"
STREAM = f"{PATH}/stream"
MESSAGE = {"session_id", "status", "progress", "message", "timestamp"}


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def publish(harness, status, progress=None, message=None, **extras):
    payload = {"status": status, "progress": progress, "message": message, **extras}
    return await harness.post(PATH, {name: value for name, value in payload.items() if value is not None})


async def test_a_message_has_the_five_members(autojump_clock, harness):
    """A message is unnamed, so that ``onmessage`` gets it, and has exactly the seed's members."""
    await publish(harness, "processing", 10, "Starting audio processing...")
    message = await (await harness.stream(STREAM)).next()
    assert message.event == "message"
    assert message.data == {
        "session_id": "s",
        "status": "processing",
        "progress": 10,
        "message": "Starting audio processing...",
        "timestamp": "2026-01-02T03:00:00.000Z",
    }


async def test_the_current_status_comes_first(autojump_clock, harness):
    """A client that connects late gets the current status, not the history."""
    for percent in (10, 25, 50):
        await publish(harness, "processing", percent, f"at {percent}")
    stream = await harness.stream(STREAM)
    assert (await stream.next()).data["progress"] == 50
    await publish(harness, "processing", 75)
    assert (await stream.next()).data["progress"] == 75


async def test_current_status_has_the_extra_members(autojump_clock, harness):
    """Members that a worker adds are sent to clients that connect late, and to those that poll."""
    await publish(harness, "processing", 50, "m", speaker_count=2, segment={"start": 1.5})
    message = await (await harness.stream(STREAM)).next()
    assert (message.data["speaker_count"], message.data["segment"]) == (2, {"start": 1.5})
    assert (await harness.get(PATH)).json == message.data
    await harness.tracker.update("s", progress=60)  # an update in another dialect has no extra members
    assert (await harness.get(PATH)).json.keys() == MESSAGE


async def test_extra_members_are_sent(autojump_clock, harness):
    """All members that a worker publishes arrive beside the five, as it wrote them."""
    await publish(harness, "processing", 1)
    stream = await harness.stream(STREAM)
    await stream.next()
    body = b'{"status":"processing","progress":10.50,"duration":12.0,"words":["a"],"nested":{"b":null}}'
    assert (await harness.post(PATH, body)).status == 202
    message = await stream.next()
    assert message.data.keys() == MESSAGE | {"duration", "words", "nested"}
    assert b'"progress":10.50' in stream.raw
    assert b'"duration":12.0,"words":["a"],"nested":{"b":null}' in stream.raw
    others = {"duration": 12.0, "words": ["a"], "nested": {"b": None}}
    assert (await harness.get("/api/sessions/s/status")).json["data"] == others


async def test_a_status_without_a_status(autojump_clock, harness):
    """``status_data.get("status")`` may be None: the update is seen, with what is known of the rest."""
    await publish(harness, "processing", 10, "Starting audio processing...")
    stream = await harness.stream(STREAM)
    await stream.next()
    nothing = {"status": None, "progress": None, "message": None, "timestamp": None}
    for body in ({"progress": 25}, {**nothing, "words": 7}, {**nothing, "message": "m"}):
        assert (await harness.post(PATH, body)).status == 202
        # The members beside the five are sent once, with their update.
        message = await stream.next()
        assert message.data.keys() == MESSAGE | (body.keys() - MESSAGE)
        assert message.data["status"] == "processing"
        assert message.data["progress"] == 25
        assert None not in message.data.values()
    assert message.data["message"] == "m"


async def test_a_percent_that_falls_is_held(autojump_clock, harness):
    """The rest of the update counts, and no client's bar goes back."""
    await publish(harness, "processing", 50, "a")
    assert (await publish(harness, "analyzing", 30, "b", words=3)).status == 202
    message = await (await harness.stream(STREAM)).next()
    record = {"session_id": "s", "status": "analyzing", "progress": 50, "message": "b", "words": 3}
    assert message.data.items() >= record.items()
    assert (await harness.get("/api/sessions/s/status")).json["progress"] == 50


async def test_a_retried_task_begins_another_attempt(autojump_clock, harness):
    """Celery runs a failed task again: its updates are a new log, and who comes back is told so."""
    await harness.post("/api/sessions", {"session_id": "s", "owner": "o", "title": "T", "data": {"a": 1}})
    await publish(harness, "processing", 50)
    stream = await harness.stream(STREAM)
    await publish(harness, "failed", 0, "Transcription failed: x")
    failed = (await stream.read_to_end())[-1]
    assert (await publish(harness, "failed", 0, "again")).status == 409
    assert (await publish(harness, "processing", 10, "Starting audio processing...")).status == 202
    resume, message = await (await harness.stream(STREAM, failed.id)).take(2)
    assert (resume.event, resume.data["status"]) == ("resume", "reset")
    assert (message.data["status"], message.data["progress"]) == ("processing", 10)
    assert (await harness.get(PATH)).json == message.data
    session = await harness.tracker.get("s")
    assert (session.attempt, session.owner, session.title, session.seq) == (2, "o", "T", 1)
    record = (await harness.get("/api/sessions/s/status")).json
    assert (record["state"], record["data"], record.get("error")) == ("running", {"a": 1}, None)
    assert (await publish(harness, "completed", 100)).status == 202
    assert (await publish(harness, "processing", 10)).status == 409


async def test_another_attempt_begins_afresh(autojump_clock, harness):
    """Nothing that was asked of the failed attempt, or that it made, is left; the lease is."""
    await harness.post("/api/sessions", {"session_id": "s", "lease": 10})
    made = {"stage": "tts", "progress": 50, "artifacts": [{"name": "a"}], "data": {"a": 1}}
    await harness.post("/api/sessions/s/progress", made)
    await harness.post("/api/sessions/s/cancel")
    assert (await publish(harness, "failed", 0)).json["control"] == "cancel"
    assert (await publish(harness, None)).json["control"] == "continue"
    record = (await harness.get("/api/sessions/s/status")).json
    assert (record["status"], record["progress"], record["message"]) == ("running", 0, "")
    assert not record.keys() & {"stage", "artifacts", "data", "error", "ended_at"}
    messages = await harness.watch("/api/sessions/s/status/stream")
    assert [message.event for message in messages] == ["progress", "stalled", "error"]
    assert messages[-1].data["status"] == "lost"


@pytest.mark.parametrize(
    ("end", "update", "expected"),
    [
        ("failed", {"progress": 10}, 202),
        ("failed", {"status": "completed"}, 202),
        ("lost", {"status": "processing"}, 202),
        ("failed", {"status": "cancelled"}, 409),
        ("cancelled", {"status": "processing"}, 409),
        ("completed", {"status": "processing"}, 409),
    ],
)
async def test_what_begins_another_attempt(autojump_clock, harness, end, update, expected):
    """Anything but a failure, after a failure; what was cancelled or has succeeded stays so."""
    await harness.tracker.update("s", status=end)
    assert (await harness.post(PATH, update)).status == expected
    assert (await harness.tracker.get("s")).attempt == (2 if expected == 202 else 1)


async def test_other_dialects_do_not_try_again(autojump_clock, harness):
    """Only the coaching assistant's worker publishes to the same session again."""
    await publish(harness, "failed")
    for path, body in (
        ("/api/sessions/s/progress", {"status": "processing"}),
        ("/api/jobs/s/progress", {"stage": "tts", "progress": 1}),
        ("/api/interaction/events/s", {"type": "processing", "data": {"progress": 0}}),
    ):
        assert (await harness.post(path, body)).error["code"] == "session_ended"


async def test_session_id_in_the_body_is_ignored(autojump_clock, harness):
    """The session is the one in the path."""
    await harness.post(PATH, {"status": "processing", "session_id": "other"})
    assert (await (await harness.stream(STREAM)).next()).data["session_id"] == "s"


async def test_a_timestamp_of_the_worker_is_kept(autojump_clock, harness):
    """A published timestamp replaces the server's."""
    await publish(harness, "processing", 1, timestamp="2025-01-01T00:00:00")
    assert (await (await harness.stream(STREAM)).next()).data["timestamp"] == "2025-01-01T00:00:00"


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_the_stream_stops_on_completed_and_failed(autojump_clock, harness, status):
    """Both end the stream, for clients that watch and for those that connect later."""
    await publish(harness, "processing", 10)
    stream = await harness.stream(STREAM)
    await publish(harness, status, 0, "Transcription failed: x", result="r")
    messages = await stream.read_to_end()
    assert [m.data["status"] for m in messages] == ["processing", status]
    assert messages[-1].data["result"] == "r"
    late = await harness.watch(STREAM)
    assert late == messages[-1:]
    assert (await harness.get(STREAM, [("Last-Event-ID", late[0].id)])).status == 204


@pytest.mark.parametrize(
    ("status", "expected"),
    [("done", "completed"), ("succeeded", "completed"), ("cancelled", "failed"), ("error", "failed")],
)
@pytest.mark.parametrize("same_dialect", [True, False], ids=["same dialect", "another dialect"])
async def test_every_end_is_completed_or_failed(autojump_clock, harness, status, expected, same_dialect):
    """Clients close on these two statuses alone; after another one they would reconnect for ever."""
    if same_dialect:
        await publish(harness, status, 50, "m", extra=1)
    else:
        await harness.tracker.update("s", status=status, progress=50, message="m")
    (message,) = await harness.watch(STREAM)
    assert message.data["status"] == expected
    assert message.data.get("extra") == (1 if same_dialect else None)
    assert (await harness.get("/api/sessions/s/status")).json["status"] == status


async def test_polling(autojump_clock, harness):
    """A client that cannot stream gets the same record by polling; an unknown session gets 404."""
    assert (await harness.get(PATH)).error["code"] == "session_not_found"
    assert (await harness.get(STREAM)).error["code"] == "session_not_found"
    await publish(harness, "processing", 10, "m")
    response = await harness.get(PATH)
    assert response.headers["cache-control"] == "no-store"
    assert response.json == (await (await harness.stream(STREAM)).next()).data
    await harness.tracker.emit("events-only", "note", 1)
    assert (await harness.get("/api/v1/sessions/events-only/status")).json["status"] == "queued"


async def test_sse_can_be_switched_off(autojump_clock, nursery):
    """With ENABLE_SSE off a stream gets 503 with an error code, and polling still works."""
    harness = ServerHarness(nursery, enable_sse=False)
    await publish(harness, "processing", 10)
    response = await harness.get(STREAM)
    assert (response.status, response.error["code"]) == (503, "sse_disabled")
    client = HTTP2Client(harness.connect())
    (number,) = await client.request(STREAM)
    await client.read_until(lambda: number in client.ended)
    assert client.statuses[number] == 503
    assert (await harness.get(PATH)).json["progress"] == 10
    await harness.stream("/api/sessions/s/status/stream")  # other dialects are not affected


async def test_an_idle_stream_ends_after_five_minutes(autojump_clock, harness):
    """After 300 s without events, heartbeats or not, the stream ends with ``retry`` and can be resumed."""
    await publish(harness, "processing", 10)
    stream = await harness.stream(STREAM)
    first = await stream.next()
    start = autojump_clock.current_time()
    assert await stream.read_to_end() == []
    assert 299 <= autojump_clock.current_time() - start <= 303
    assert stream.comments.count("heartbeat") >= 18
    assert stream.retry == 1000
    resume = await (await harness.stream(STREAM, first.id)).next()
    assert (resume.event, resume.data) == ("resume", {"status": "ok", "missed": 0})


async def test_idle_timeout_is_a_setting(autojump_clock, nursery):
    """SSE_CONNECTION_TIMEOUT sets it in seconds, and an event restarts it."""
    settings = load(environ={"SSE_CONNECTION_TIMEOUT": "60"})
    harness = ServerHarness(nursery, **msgspec.structs.asdict(settings))
    await publish(harness, "processing", 10)
    stream = await harness.stream(STREAM)
    await stream.next()
    await trio.sleep(40)
    await publish(harness, "processing", 20)
    await stream.next()
    start = autojump_clock.current_time()
    assert await stream.read_to_end() == []
    assert 59 <= autojump_clock.current_time() - start <= 63


def test_redis_url_selects_the_engine():
    """An engine that is named overrides it, and an empty variable counts as not set."""
    url = "redis://:secret@10.0.0.3:6379"
    assert load(None, {"REDIS_URL": url}).engine_url == url
    assert load(None, {"REDIS_URL": url, "SSESERVE_ENGINE": "memory:"}).engine_url == "memory:"
    assert load(None, {"REDIS_URL": ""}).engine_url == "memory:"
    assert ignored_variables({"REDIS_URL": url}) == []


async def test_an_event_restarts_the_idle_timeout(autojump_clock, harness, nursery):
    """The five minutes count from the last event."""
    await publish(harness, "processing", 1)
    stream = await harness.stream(STREAM)
    await stream.next()
    for percent in (2, 3, 4):
        autojump_clock.jump(200)
        await publish(harness, "processing", percent)
        assert (await stream.next()).data["progress"] == percent
    start = autojump_clock.current_time()
    await stream.read_to_end()
    assert autojump_clock.current_time() - start >= 299


@pytest.mark.parametrize("earlier", [None, "/health"], ids=["new connection", "reused connection"])
async def test_stream_limit_per_user(autojump_clock, nursery, earlier):
    """One stream too many gets 429 until another one ends, on new and on reused connections."""
    harness = ServerHarness(nursery, max_streams_per_user=2, limit_loopback=True)
    await publish(harness, "processing", 10)

    async def authenticate(request):
        subject, _, _token = request.headers["authorization"].partition(" ")
        return sseserve.Grant(subject, "admin")

    harness.app.admission.authenticate = authenticate

    async def open_(expected):
        connection = harness.connect()
        if earlier:
            assert (await connection.request("GET", earlier)).status == 200
        # A user's second token has no slots of its own.
        authorization = ("Authorization", f"somebody {len(opened)}")
        await connection.send(request_bytes("GET", STREAM, headers=[authorization]))
        response = await (connection.read_head if expected == 200 else connection.read_response)()
        assert response.status == expected
        return connection, response

    opened: list[RawConnection] = []
    for _ in range(2):
        opened.append((await open_(200))[0])  # noqa: PERF401 - ``open_`` reads it
    _, response = await open_(429)
    assert response.error["code"] == "too_many_streams"
    await harness.stream(STREAM, headers=[("Authorization", "other 1")])  # another user
    await opened[0].stream.aclose()
    await wait_all_tasks_blocked()
    await open_(200)
    await open_(429)
    # Polling is still possible.
    assert (await harness.get(PATH, [("Authorization", "somebody 1")])).status == 200


async def test_streams_over_http2_are_counted_too(autojump_clock, nursery):
    """Streams that are requested in one write count as well; a cancelled one releases its slot."""
    harness = ServerHarness(nursery, max_streams_per_user=2, limit_loopback=True)
    await publish(harness, "processing", 10)
    client = HTTP2Client(harness.connect())
    numbers = await client.request(*[STREAM] * 5)
    await client.read_until(lambda: len(client.statuses) == 5)
    assert sorted(client.statuses.values()) == [200, 200, 429, 429, 429]
    opened = [number for number in numbers if client.statuses[number] == 200]
    await client.read_until(lambda: all(client.messages(number) for number in opened))
    await client.cancel(opened[0])
    await wait_all_tasks_blocked()
    (number,) = await client.request(STREAM)
    await client.read_until(lambda: number in client.statuses)
    assert client.statuses[number] == 200
    assert (await harness.get("/api/v1/sessions/none/status/stream")).status == 404


async def test_ended_streams_release_their_slots(autojump_clock, nursery):
    """The end of a stream and a cancellation before the response both leave no slot taken."""
    harness = ServerHarness(nursery, max_streams_per_user=1, limit_loopback=True)
    for number in range(5):
        path = f"/api/v1/sessions/{number}/status"
        await harness.post(path, {"status": "completed"})
        assert len(await harness.watch(f"{path}/stream")) == 1
        client = HTTP2Client(harness.connect())
        (stream_id,) = await client.request(f"{path}/stream")
        if number % 2:
            await client.cancel(stream_id)
            await wait_all_tasks_blocked()
        else:
            await client.read_until(lambda c=client, s=stream_id: s in c.ended)
            assert client.statuses[stream_id] == 200
    await wait_all_tasks_blocked()
    assert harness.app.coordination.slots.taken == {}


async def test_streams_are_counted_by_address_over_both_protocols():
    """Without authentication the address is the user, over HTTP/1.1 and HTTP/2 together."""
    async with sseserve.serve(port=0, drain=0.2, max_streams_per_user=1, limit_loopback=True) as server:
        await server.tracker.update("s", progress=1)
        direct = await connect(server.port)
        async with direct.stream:
            await direct.send(request_bytes("GET", STREAM))
            assert (await direct.read_head()).status == 200
            second = RawConnection(await trio.open_tcp_stream("127.0.0.1", server.port))
            async with second.stream:
                client = HTTP2Client(second)
                (number,) = await client.request(STREAM)
                await client.read_until(lambda: number in client.statuses)
                assert client.statuses[number] == 429


async def test_session_is_deleted_after_its_ttl(autojump_clock, nursery):
    """A session that has ended is kept for ``ttl`` seconds, and then nothing of it is left."""
    harness = ServerHarness(nursery, ttl=60)
    await publish(harness, "completed", 100)
    autojump_clock.jump(58)
    await harness.get(PATH)
    assert (await harness.get(PATH)).status == 200
    await trio.sleep(4)
    assert (await harness.get(PATH)).status == 404
    assert (await harness.get(STREAM)).status == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"progress": 101}', b'{"status": 3}'])
async def test_invalid_status_is_refused(autojump_clock, harness, body):
    """Malformed JSON, or a body without a valid status, changes nothing."""
    assert (await harness.post(PATH, body)).status in (400, 422)
    assert await harness.tracker.sessions() == []


async def test_other_events_keep_their_names(autojump_clock, harness):
    """``onmessage`` gets statuses and nothing else."""
    await publish(harness, "processing", 10)
    stream = await harness.stream(STREAM)
    await stream.next()
    await harness.tracker.emit("s", "error", {"a": 1})
    await harness.tracker.emit("s", "note", {"a": 2})
    assert [(m.event, m.data) for m in await stream.take(2)] == [("warning", {"a": 1}), ("note", {"a": 2})]
