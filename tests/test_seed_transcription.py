"""Seed 004, the coaching assistant: statuses of a transcription, polling beside it, limits."""

from __future__ import annotations

import pytest
import trio
from harness import HTTP2Client, ServerHarness
from raw_client import RawConnection, connect, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve

PATH = "/api/v1/sessions/s/status"
STREAM = f"{PATH}/stream"
MESSAGE = {"session_id", "status", "progress", "message", "timestamp"}


@pytest.fixture
def harness(nursery):
    return ServerHarness(nursery)


async def publish(harness, status, progress=None, message=None, **extras):
    said = {"status": status, "progress": progress, "message": message, **extras}
    return await harness.post(PATH, {name: value for name, value in said.items() if value is not None})


async def test_a_message_has_the_five_members(autojump_clock, harness):
    """Messages are unnamed, so ``onmessage`` gets them, and have the seed's members and no others."""
    await publish(harness, "processing", 10, "Starting audio processing...")
    said = await (await harness.stream(STREAM)).next()
    assert said.event == "message"
    assert said.data == {
        "session_id": "s",
        "status": "processing",
        "progress": 10,
        "message": "Starting audio processing...",
        "timestamp": "2026-01-02T03:00:00.000Z",
    }


async def test_the_current_status_comes_first(autojump_clock, harness):
    """Who comes late gets where the session stands, not how it came there."""
    for percent in (10, 25, 50):
        await publish(harness, "processing", percent, f"at {percent}")
    stream = await harness.stream(STREAM)
    assert (await stream.next()).data["progress"] == 50
    await publish(harness, "processing", 75)
    assert (await stream.next()).data["progress"] == 75


async def test_the_current_status_has_the_extras_too(autojump_clock, harness):
    """What a worker adds is there for those who come late, and for those who poll."""
    await publish(harness, "processing", 50, "m", speaker_count=2, segment={"start": 1.5})
    said = await (await harness.stream(STREAM)).next()
    assert (said.data["speaker_count"], said.data["segment"]) == (2, {"start": 1.5})
    assert (await harness.get(PATH)).json == said.data
    await harness.tracker.update("s", progress=60)  # somebody else's word has no extras
    assert (await harness.get(PATH)).json.keys() == MESSAGE


async def test_extras_are_flattened_through(autojump_clock, harness):
    """All members that a worker publishes arrive beside the five, as it wrote them."""
    await publish(harness, "processing", 1)
    stream = await harness.stream(STREAM)
    await stream.next()
    body = b'{"status":"processing","progress":10.50,"duration":12.0,"words":["a"],"nested":{"b":null}}'
    assert (await harness.post(PATH, body)).status == 202
    said = await stream.next()
    assert said.data.keys() == MESSAGE | {"duration", "words", "nested"}
    assert b'"progress":10.50' in stream.raw
    assert b'"duration":12.0,"words":["a"],"nested":{"b":null}' in stream.raw
    assert said.data["message"] is None


async def test_a_worker_cannot_speak_for_another_session(autojump_clock, harness):
    """The session is the path's, whatever the body says."""
    await harness.post(PATH, {"status": "processing", "session_id": "other"})
    assert (await (await harness.stream(STREAM)).next()).data["session_id"] == "s"


async def test_a_timestamp_of_the_worker_is_kept(autojump_clock, harness):
    """The worker's clock is the one that its clients see."""
    await publish(harness, "processing", 1, timestamp="2025-01-01T00:00:00")
    assert (await (await harness.stream(STREAM)).next()).data["timestamp"] == "2025-01-01T00:00:00"


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_the_stream_stops_on_completed_and_failed(autojump_clock, harness, status):
    """Both words end the stream, for those who watch and for those who come later."""
    await publish(harness, "processing", 10)
    stream = await harness.stream(STREAM)
    await publish(harness, status, 0, "Transcription failed: x", result="r")
    said = await stream.read_to_end()
    assert [s.data["status"] for s in said] == ["processing", status]
    assert said[-1].data["result"] == "r"
    late = await harness.watch(STREAM)
    assert late == said[-1:]
    assert (await harness.get(STREAM, [("Last-Event-ID", late[0].id)])).status == 204


@pytest.mark.parametrize(
    ("status", "word"),
    [("done", "completed"), ("succeeded", "completed"), ("cancelled", "failed"), ("error", "failed")],
)
@pytest.mark.parametrize("own", [True, False], ids=["published here", "published elsewhere"])
async def test_every_end_is_one_of_the_two_words(autojump_clock, harness, status, word, own):
    """Clients close at ``completed`` and ``failed`` alone; at another word they would come back for ever."""
    if own:
        await publish(harness, status, 50, "m", extra=1)
    else:
        await harness.tracker.update("s", status=status, progress=50, message="m")
    (said,) = await harness.watch(STREAM)
    assert said.data["status"] == word
    assert said.data.get("extra") == (1 if own else None)
    assert (await harness.get("/api/sessions/s/status")).json["status"] == status


async def test_polling(autojump_clock, harness):
    """Who cannot stream asks for the same record; of an unknown session there is none."""
    assert (await harness.get(PATH)).error["code"] == "session_not_found"
    assert (await harness.get(STREAM)).error["code"] == "session_not_found"
    await publish(harness, "processing", 10, "m")
    response = await harness.get(PATH)
    assert response.headers["cache-control"] == "no-cache"
    assert response.json == (await (await harness.stream(STREAM)).next()).data
    await harness.tracker.emit("events-only", "note", 1)
    assert (await harness.get("/api/v1/sessions/events-only/status")).json["status"] == "queued"


async def test_sse_can_be_switched_off(autojump_clock, nursery):
    """With ENABLE_SSE off streams are refused with a code, and polling goes on."""
    harness = ServerHarness(nursery, enable_sse=False)
    await publish(harness, "processing", 10)
    response = await harness.get(STREAM)
    assert (response.status, response.error["code"]) == (503, "sse_disabled")
    client = HTTP2Client(harness.connect())
    (number,) = await client.request(STREAM)
    await client.read_until(lambda: number in client.ended)
    assert client.statuses[number] == 503
    assert (await harness.get(PATH)).json["progress"] == 10
    await harness.stream("/api/sessions/s/status/stream")  # other systems' clients are not concerned


async def test_an_idle_stream_ends_after_five_minutes(autojump_clock, harness):
    """Silence for 300 s, heartbeats or not, ends the stream as planned: ``retry``, and it comes back."""
    await publish(harness, "processing", 10)
    stream = await harness.stream(STREAM)
    first = await stream.next()
    began = autojump_clock.current_time()
    assert await stream.read_to_end() == []
    assert 299 <= autojump_clock.current_time() - began <= 303
    assert stream.comments.count("heartbeat") >= 18
    assert stream.retry == 1000
    resume = await (await harness.stream(STREAM, first.id)).next()
    assert (resume.event, resume.data) == ("resume", {"status": "ok", "missed": 0})


async def test_a_stream_that_is_used_does_not_end(autojump_clock, harness, nursery):
    """An event restarts the five minutes."""
    await publish(harness, "processing", 1)
    stream = await harness.stream(STREAM)
    await stream.next()
    for percent in (2, 3, 4):
        autojump_clock.jump(200)
        await publish(harness, "processing", percent)
        assert (await stream.next()).data["progress"] == percent
    began = autojump_clock.current_time()
    await stream.read_to_end()
    assert autojump_clock.current_time() - began >= 299


@pytest.mark.parametrize("first", [None, "/health"], ids=["first request", "second request"])
async def test_a_user_has_so_many_streams(autojump_clock, nursery, first):
    """One more is refused with 429; one that ends makes room. Whichever door it comes through."""
    harness = ServerHarness(nursery, max_streams_per_user=2)
    await publish(harness, "processing", 10)

    async def authenticate(_request):
        return sseserve.Grant("somebody", "admin")

    harness.app.admission.authenticate = authenticate

    async def open_(expected):
        connection = harness.connect()
        if first:
            assert (await connection.request("GET", first)).status == 200
        await connection.send(request_bytes("GET", STREAM))
        response = await (connection.read_head if expected == 200 else connection.read_response)()
        assert response.status == expected
        return connection, response

    opened = [(await open_(200))[0] for _ in range(2)]
    _, response = await open_(429)
    assert response.error["code"] == "too_many_streams"
    await harness.stream(STREAM, headers=[("Authorization", "Bearer other")])  # another user
    await opened[0].stream.aclose()
    await wait_all_tasks_blocked()
    await open_(200)
    await open_(429)
    assert (await harness.get(PATH)).status == 200  # polling goes on


async def test_streams_over_http2_are_counted_too(autojump_clock, nursery):
    """However many are asked for in one write; a stream that is left makes room."""
    harness = ServerHarness(nursery, max_streams_per_user=2)
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


async def test_streams_that_end_give_their_seats_back(autojump_clock, nursery):
    """The end, a departure before the answer, and a refusal leave nothing behind."""
    harness = ServerHarness(nursery, max_streams_per_user=1)
    for number in range(5):
        path = f"/api/v1/sessions/{number}/status"
        await harness.post(path, {"status": "completed"})
        assert len(await harness.watch(f"{path}/stream")) == 1
        client = HTTP2Client(harness.connect())
        (asked,) = await client.request(f"{path}/stream")
        if number % 2:
            await client.cancel(asked)
            await wait_all_tasks_blocked()
        else:
            await client.read_until(lambda m=client, a=asked: a in m.ended)
            assert client.statuses[asked] == 200
    await wait_all_tasks_blocked()
    assert harness.app.slots._taken == {}


async def test_streams_of_one_address_are_counted_together_over_both_protocols():
    """Over real sockets the address is the user, whoever serves the stream."""
    async with sseserve.serve(port=0, drain=0.2, max_streams_per_user=1) as server:
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


async def test_a_session_is_forgotten_after_its_time(autojump_clock, nursery):
    """TTL: after the end a status is kept for ``ttl`` seconds, then nothing of it is left."""
    harness = ServerHarness(nursery, ttl=60)
    await publish(harness, "completed", 100)
    autojump_clock.jump(58)
    await harness.get(PATH)
    assert (await harness.get(PATH)).status == 200
    await trio.sleep(4)
    assert (await harness.get(PATH)).status == 404
    assert (await harness.get(STREAM)).status == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"progress": 10}', b'{"status": 3}'])
async def test_what_is_no_status_is_refused(autojump_clock, harness, body):
    """A body that is no JSON, or none of a status, changes nothing."""
    assert (await harness.post(PATH, body)).status in (400, 422)
    assert await harness.tracker.sessions() == []


async def test_events_of_other_systems_keep_their_names(autojump_clock, harness):
    """``onmessage`` never gets anything but a status."""
    await publish(harness, "processing", 10)
    stream = await harness.stream(STREAM)
    await stream.next()
    await harness.tracker.emit("s", "error", {"a": 1})
    await harness.tracker.emit("s", "note", {"a": 2})
    assert [(s.event, s.data) for s in await stream.take(2)] == [("warning", {"a": 1}), ("note", {"a": 2})]
