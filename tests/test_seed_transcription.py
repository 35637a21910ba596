"""Seed 004, the coaching assistant: statuses of a transcription, polling beside it, limits."""

from __future__ import annotations

import pytest
import trio
from house import House, Multiplexed
from raw_client import RawConnection, connect, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve

PATH = "/api/v1/sessions/s/status"
STREAM = f"{PATH}/stream"
MESSAGE = {"session_id", "status", "progress", "message", "timestamp"}


@pytest.fixture
def house(nursery):
    return House(nursery)


async def publish(house, status, progress=None, message=None, **extras):
    said = {"status": status, "progress": progress, "message": message, **extras}
    return await house.post(PATH, {name: value for name, value in said.items() if value is not None})


async def test_a_message_has_the_five_members(autojump_clock, house):
    """Messages are unnamed, so ``onmessage`` gets them, and have the seed's members and no others."""
    await publish(house, "processing", 10, "Starting audio processing...")
    said = await (await house.stream(STREAM)).next()
    assert said.event == "message"
    assert said.data == {
        "session_id": "s",
        "status": "processing",
        "progress": 10,
        "message": "Starting audio processing...",
        "timestamp": "2026-01-02T03:00:00.000Z",
    }


async def test_the_current_status_comes_first(autojump_clock, house):
    """Who comes late gets where the session stands, not how it came there."""
    for percent in (10, 25, 50):
        await publish(house, "processing", percent, f"at {percent}")
    stream = await house.stream(STREAM)
    assert (await stream.next()).data["progress"] == 50
    await publish(house, "processing", 75)
    assert (await stream.next()).data["progress"] == 75


async def test_the_current_status_has_the_extras_too(autojump_clock, house):
    """What a worker adds is there for those who come late, and for those who poll."""
    await publish(house, "processing", 50, "m", speaker_count=2, segment={"start": 1.5})
    said = await (await house.stream(STREAM)).next()
    assert (said.data["speaker_count"], said.data["segment"]) == (2, {"start": 1.5})
    assert (await house.get(PATH)).json == said.data
    await house.tracker.update("s", progress=60)  # somebody else's word has no extras
    assert (await house.get(PATH)).json.keys() == MESSAGE


async def test_extras_are_flattened_through(autojump_clock, house):
    """All members that a worker publishes arrive beside the five, as it wrote them."""
    await publish(house, "processing", 1)
    stream = await house.stream(STREAM)
    await stream.next()
    body = b'{"status":"processing","progress":10.50,"duration":12.0,"words":["a"],"nested":{"b":null}}'
    assert (await house.post(PATH, body)).status == 202
    said = await stream.next()
    assert said.data.keys() == MESSAGE | {"duration", "words", "nested"}
    assert b'"progress":10.50' in stream.raw
    assert b'"duration":12.0,"words":["a"],"nested":{"b":null}' in stream.raw
    assert said.data["message"] is None


async def test_a_worker_cannot_speak_for_another_session(autojump_clock, house):
    """The session is the path's, whatever the body says."""
    await house.post(PATH, {"status": "processing", "session_id": "other"})
    assert (await (await house.stream(STREAM)).next()).data["session_id"] == "s"


async def test_a_timestamp_of_the_worker_is_kept(autojump_clock, house):
    """The worker's clock is the one that its clients see."""
    await publish(house, "processing", 1, timestamp="2025-01-01T00:00:00")
    assert (await (await house.stream(STREAM)).next()).data["timestamp"] == "2025-01-01T00:00:00"


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_the_stream_stops_on_completed_and_failed(autojump_clock, house, status):
    """Both words end the stream, for those who watch and for those who come later."""
    await publish(house, "processing", 10)
    stream = await house.stream(STREAM)
    await publish(house, status, 0, "Transcription failed: x", result="r")
    said = await stream.read_to_end()
    assert [s.data["status"] for s in said] == ["processing", status]
    assert said[-1].data["result"] == "r"
    late = await house.watch(STREAM)
    assert late == said[-1:]
    assert (await house.get(STREAM, [("Last-Event-ID", late[0].id)])).status == 204


@pytest.mark.parametrize(
    ("status", "word"),
    [("done", "completed"), ("succeeded", "completed"), ("cancelled", "failed"), ("error", "failed")],
)
@pytest.mark.parametrize("own", [True, False], ids=["published here", "published elsewhere"])
async def test_every_end_is_one_of_the_two_words(autojump_clock, house, status, word, own):
    """Clients close at ``completed`` and ``failed`` alone; at another word they would come back for ever."""
    if own:
        await publish(house, status, 50, "m", extra=1)
    else:
        await house.tracker.update("s", status=status, progress=50, message="m")
    (said,) = await house.watch(STREAM)
    assert said.data["status"] == word
    assert said.data.get("extra") == (1 if own else None)
    assert (await house.get("/api/sessions/s/status")).json["status"] == status


async def test_polling(autojump_clock, house):
    """Who cannot stream asks for the same record; of an unknown session there is none."""
    assert (await house.get(PATH)).error["code"] == "session_not_found"
    assert (await house.get(STREAM)).error["code"] == "session_not_found"
    await publish(house, "processing", 10, "m")
    response = await house.get(PATH)
    assert response.headers["cache-control"] == "no-cache"
    assert response.json == (await (await house.stream(STREAM)).next()).data
    await house.tracker.emit("events-only", "note", 1)
    assert (await house.get("/api/v1/sessions/events-only/status")).json["status"] == "queued"


async def test_sse_can_be_switched_off(autojump_clock, nursery):
    """With ENABLE_SSE off streams are refused with a code, and polling goes on."""
    house = House(nursery, enable_sse=False)
    await publish(house, "processing", 10)
    response = await house.get(STREAM)
    assert (response.status, response.error["code"]) == (503, "sse_disabled")
    multiplexed = Multiplexed(house.meet())
    (number,) = await multiplexed.request(STREAM)
    await multiplexed.read_until(lambda: number in multiplexed.ended)
    assert multiplexed.statuses[number] == 503
    assert (await house.get(PATH)).json["progress"] == 10
    await house.stream("/api/sessions/s/status/stream")  # other systems' clients are not concerned


async def test_an_idle_stream_ends_after_five_minutes(autojump_clock, house):
    """Silence for 300 s, heartbeats or not, ends the stream as planned: ``retry``, and it comes back."""
    await publish(house, "processing", 10)
    stream = await house.stream(STREAM)
    first = await stream.next()
    began = autojump_clock.current_time()
    assert await stream.read_to_end() == []
    assert 299 <= autojump_clock.current_time() - began <= 303
    assert stream.comments.count("heartbeat") >= 18
    assert stream.retry == 1000
    resume = await (await house.stream(STREAM, first.id)).next()
    assert (resume.event, resume.data) == ("resume", {"status": "ok", "missed": 0})


async def test_a_stream_that_is_used_does_not_end(autojump_clock, house, nursery):
    """An event restarts the five minutes."""
    await publish(house, "processing", 1)
    stream = await house.stream(STREAM)
    await stream.next()
    for percent in (2, 3, 4):
        autojump_clock.jump(200)
        await publish(house, "processing", percent)
        assert (await stream.next()).data["progress"] == percent
    began = autojump_clock.current_time()
    await stream.read_to_end()
    assert autojump_clock.current_time() - began >= 299


@pytest.mark.parametrize("first", [None, "/health"], ids=["first request", "second request"])
async def test_a_user_has_so_many_streams(autojump_clock, nursery, first):
    """One more is refused with 429; one that ends makes room. Whichever door it comes through."""
    house = House(nursery, max_streams_per_user=2)
    await publish(house, "processing", 10)

    async def authenticate(_request):
        return sseserve.Grant("somebody", "admin")

    house.app.admission.authenticate = authenticate

    async def open_(expected):
        connection = house.meet()
        if first:
            assert (await connection.request("GET", first)).status == 200
        await connection.send(request_bytes("GET", STREAM))
        response = await (connection.read_head if expected == 200 else connection.read_response)()
        assert response.status == expected
        return connection, response

    opened = [(await open_(200))[0] for _ in range(2)]
    _, response = await open_(429)
    assert response.error["code"] == "too_many_streams"
    await house.stream(STREAM, headers=[("Authorization", "Bearer other")])  # another user
    await opened[0].stream.aclose()
    await wait_all_tasks_blocked()
    await open_(200)
    await open_(429)
    assert (await house.get(PATH)).status == 200  # polling goes on


async def test_streams_over_http2_are_counted_too(autojump_clock, nursery):
    """However many are asked for in one write; a stream that is left makes room."""
    house = House(nursery, max_streams_per_user=2)
    await publish(house, "processing", 10)
    multiplexed = Multiplexed(house.meet())
    numbers = await multiplexed.request(*[STREAM] * 5)
    await multiplexed.read_until(lambda: len(multiplexed.statuses) == 5)
    assert sorted(multiplexed.statuses.values()) == [200, 200, 429, 429, 429]
    opened = [number for number in numbers if multiplexed.statuses[number] == 200]
    await multiplexed.read_until(lambda: all(multiplexed.said(number) for number in opened))
    await multiplexed.leave(opened[0])
    await wait_all_tasks_blocked()
    (number,) = await multiplexed.request(STREAM)
    await multiplexed.read_until(lambda: number in multiplexed.statuses)
    assert multiplexed.statuses[number] == 200
    assert (await house.get("/api/v1/sessions/none/status/stream")).status == 404


async def test_streams_that_end_give_their_seats_back(autojump_clock, nursery):
    """The end, a departure before the answer, and a refusal leave nothing behind."""
    house = House(nursery, max_streams_per_user=1)
    for number in range(5):
        path = f"/api/v1/sessions/{number}/status"
        await house.post(path, {"status": "completed"})
        assert len(await house.watch(f"{path}/stream")) == 1
        multiplexed = Multiplexed(house.meet())
        (asked,) = await multiplexed.request(f"{path}/stream")
        if number % 2:
            await multiplexed.leave(asked)
            await wait_all_tasks_blocked()
        else:
            await multiplexed.read_until(lambda m=multiplexed, a=asked: a in m.ended)
            assert multiplexed.statuses[asked] == 200
    await wait_all_tasks_blocked()
    assert house.app.slots._taken == {}


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
                multiplexed = Multiplexed(second)
                (number,) = await multiplexed.request(STREAM)
                await multiplexed.read_until(lambda: number in multiplexed.statuses)
                assert multiplexed.statuses[number] == 429


async def test_a_session_is_forgotten_after_its_time(autojump_clock, nursery):
    """TTL: after the end a status is kept for ``ttl`` seconds, then nothing of it is left."""
    house = House(nursery, ttl=60)
    await publish(house, "completed", 100)
    autojump_clock.jump(58)
    await house.get(PATH)
    assert (await house.get(PATH)).status == 200
    await trio.sleep(4)
    assert (await house.get(PATH)).status == 404
    assert (await house.get(STREAM)).status == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"progress": 10}', b'{"status": 3}'])
async def test_what_is_no_status_is_refused(autojump_clock, house, body):
    """A body that is no JSON, or none of a status, changes nothing."""
    assert (await house.post(PATH, body)).status in (400, 422)
    assert await house.tracker.sessions() == []


async def test_events_of_other_systems_keep_their_names(autojump_clock, house):
    """``onmessage`` never gets anything but a status."""
    await publish(house, "processing", 10)
    stream = await house.stream(STREAM)
    await stream.next()
    await house.tracker.emit("s", "error", {"a": 1})
    await house.tracker.emit("s", "note", {"a": 2})
    assert [(s.event, s.data) for s in await stream.take(2)] == [("warning", {"a": 1}), ("note", {"a": 2})]
