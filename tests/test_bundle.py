"""Several sessions on one stream, with one cursor that resumes each of them exactly."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio
from harness import EventStream, FaultyHarness, HTTP2Client, ServerHarness
from raw_client import connect, get, request_bytes
from trio.testing import wait_all_tasks_blocked

import sseserve
from sseserve.dialects.sessions import SESSIONS
from sseserve.progress.rules import Update

A_B = "/api/streams?session=a&session=b"
A_B_C = "/api/streams?session=a&session=b&session=c"


@pytest.fixture
async def harness(nursery):
    harness = ServerHarness(nursery)
    for session_id in "abc":
        await harness.tracker.create(session_id)
    return harness


def session_of(message):
    return message.data["session_id"]


def progress_of(messages):
    """The (session, percent) pairs of the progress messages."""
    return [
        (session_of(s), s.data["progress"]) for s in messages if s.event in ("progress", "complete", "error")
    ]


def without_resume(messages):
    """The messages without the resume events."""
    return [s for s in messages if s.event != "resume"]


async def test_begins_with_a_snapshot_of_each_session(autojump_clock, harness):
    """Snapshots in the requested order, then new events."""
    await harness.tracker.update("a", progress=10)
    await harness.tracker.update("b", progress=20)
    stream = await harness.stream(A_B)
    assert progress_of(await stream.take(2)) == [("a", 10), ("b", 20)]
    await harness.tracker.update("b", progress=30)
    await harness.tracker.update("a", progress=40)
    assert sorted(progress_of(await stream.take(2))) == [("a", 40), ("b", 30)]
    await harness.tracker.update("c", progress=1)
    assert await stream.is_silent()


async def test_other_events_have_their_session_id(autojump_clock, harness):
    """An event's own data is unchanged, beside its session's id."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.emit("b", "note", [1, {"x": None}])
    message = await stream.next()
    assert (message.event, message.data) == ("note", {"session_id": "b", "data": [1, {"x": None}]})


async def test_cursor_has_a_position_in_each_session(autojump_clock, harness):
    """The id of every message is the joined cursor of what was sent of each session."""
    stream = await harness.stream(A_B)
    first, second = await stream.take(2)
    a, b = [str((await harness.tracker.get(s)).cursor) for s in "ab"]
    assert (first.id, second.id) == (a, f"{a}_{b}")
    await harness.tracker.update("a", progress=1)
    assert (await stream.next()).id == f"{a[:-1]}2_{b}"


async def test_stream_ends_with_its_last_session(autojump_clock, harness):
    """The stream continues for the sessions that have not ended."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.update("a", status="completed")
    assert (await stream.next()).event == "complete"
    await harness.tracker.update("b", progress=50)
    assert progress_of([await stream.next()]) == [("b", 50)]
    await harness.tracker.update("b", status="failed")
    (message,) = await stream.read_to_end()
    assert (message.event, session_of(message)) == ("error", "b")
    assert (await harness.get(A_B, [("Last-Event-ID", message.id)])).status == 204


async def test_missed_ends_are_sent(autojump_clock, harness):
    """204 needs a cursor at every end; otherwise the missing ends are sent at once and the stream ends."""
    for session_id in "ab":
        await harness.tracker.update(session_id, progress=10)
    stream = await harness.stream(A_B)
    cursor = (await stream.take(2))[1].id
    for session_id in "ab":
        await harness.tracker.update(session_id, status="completed")
    assert progress_of(without_resume(await harness.watch(A_B, cursor))) == [("a", 100), ("b", 100)]
    assert progress_of(await harness.watch(A_B)) == [("a", 100), ("b", 100)]


async def test_deleted_session_is_reported_and_removed(autojump_clock, harness):
    """The others continue; after the last one is deleted the stream ends."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.app.tracker.delete("a")
    message = await stream.next()
    assert (message.event, message.data) == ("deleted", {"session_id": "a"})
    assert message.id == str((await harness.tracker.get("b")).cursor)
    await harness.tracker.update("b", progress=50)
    assert progress_of([await stream.next()]) == [("b", 50)]
    await harness.app.tracker.delete("b")
    assert [s.event for s in await stream.read_to_end()] == ["deleted"]


async def test_recreated_session_is_not_watched(autojump_clock, harness):
    """Watchers get ``deleted``; a new session under the same id is not added to their stream."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.app.tracker.delete("a")
    await harness.tracker.update("a", progress=99)
    message = await stream.next()
    assert (message.event, session_of(message)) == ("deleted", "a")
    await harness.tracker.update("a", progress=100)
    assert await stream.is_silent()


async def test_session_that_is_tried_again_is_reset(autojump_clock, harness):
    """A bundle that has not been sent the end of the attempt before gets it, then the next one."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.update("a", status="failed")
    await harness.tracker.apply("a", Update(progress=7, retries_failure=True))
    end, resume, snapshot = await stream.take(3)
    assert (end.event, session_of(end)) == ("error", "a")
    assert (resume.event, session_of(resume), resume.data["status"]) == ("resume", "a", "reset")
    assert progress_of([snapshot]) == [("a", 7)]
    cursors = set(snapshot.id.split("_"))
    assert cursors == {str((await harness.tracker.get(session_id)).cursor) for session_id in "ab"}
    await harness.tracker.update("a", progress=8)
    assert progress_of([await stream.next()]) == [("a", 8)]


@pytest.mark.parametrize("status", ["failed", "lost"])
async def test_session_that_is_tried_again_after_its_end_was_seen(autojump_clock, harness, status):
    """A bundle that is still open goes on with the next attempt; it ends with the last session."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.update("a", status=status)
    assert (await stream.next()).event == "error"
    await harness.tracker.apply("a", Update(progress=7, retries_failure=True))
    resume, snapshot = await stream.take(2)
    assert (resume.event, session_of(resume), resume.data["status"]) == ("resume", "a", "reset")
    assert progress_of([snapshot]) == [("a", 7)]
    await harness.tracker.update("b", status="completed")
    await harness.tracker.update("a", status="completed")
    messages = await stream.read_to_end()
    assert [(m.event, session_of(m)) for m in messages] == [("complete", "b"), ("complete", "a")]
    assert (await harness.get(A_B, [("Last-Event-ID", messages[-1].id)])).status == 204


async def test_log_that_has_another_epoch(autojump_clock, harness):
    """The session is the same, but its log may have lost events: the client is told, and goes on."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    log = harness.app.engine._logs.get("a")
    log.session = msgspec.structs.replace(log.session, epoch="renewed")
    harness.app.broker.resync("a")
    resume, snapshot = await stream.take(2)
    assert (resume.event, session_of(resume), resume.data["status"]) == ("resume", "a", "reset")
    assert "renewed-" in snapshot.id
    await harness.tracker.update("a", progress=8)
    assert progress_of([await stream.next()]) == [("a", 8)]


async def test_failed_session_that_is_created_again(autojump_clock, harness):
    """It is another session, which the bundle does not have."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.update("a", status="failed")
    await stream.next()
    await harness.app.tracker.delete("a")
    await harness.tracker.update("a", progress=1)
    await harness.tracker.update("b", status="completed")
    assert [(m.event, session_of(m)) for m in await stream.read_to_end()] == [("complete", "b")]


async def test_resume_reports_deleted_sessions(autojump_clock, harness):
    """A session deleted meanwhile does not cause a 404, which would stop an EventSource."""
    stream = await harness.stream(A_B)
    cursor = (await stream.take(2))[1].id
    await stream.disconnect()
    await harness.app.tracker.delete("a")
    await harness.tracker.update("b", progress=50)
    stream = await harness.stream(A_B, cursor)
    messages = await stream.take(3)
    assert [s.event for s in messages] == ["resume", "progress", "deleted"]
    assert session_of(messages[2]) == "a"
    await harness.tracker.update("b", status="completed")
    last = await stream.next()
    assert (last.event, session_of(last)) == ("complete", "b")
    assert (await harness.get(A_B, [("Last-Event-ID", last.id)])).status == 204


async def test_deletion_is_reported_before_204(autojump_clock, harness):
    """With one session ended and one deleted, ``deleted`` is sent first; the next request gets 204."""
    stream = await harness.stream(A_B)
    await stream.take(2)
    await harness.tracker.update("a", status="completed")
    cursor = (await stream.next()).id
    await stream.disconnect()
    await harness.app.tracker.delete("b")
    messages = await harness.watch(A_B, cursor)
    assert [(s.event, session_of(s)) for s in messages] == [("resume", "a"), ("deleted", "b")]
    assert (await harness.get(A_B, [("Last-Event-ID", messages[-1].id)])).status == 204


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/api/streams", 422),
        ("/api/streams?session=", 422),
        ("/api/streams?" + "&".join(f"session={n}" for n in range(51)), 422),
        ("/api/streams?session=a&session=none", 404),
        ("/api/streams?session=none", 404),
    ],
)
async def test_invalid_requests(autojump_clock, harness, target, status):
    """No session, too many, or one that never existed."""
    assert (await harness.get(target)).error
    assert (await harness.get(target)).status == status


async def test_repeated_session_id(autojump_clock, harness):
    """A session named twice is watched once."""
    stream = await harness.stream("/api/streams?session=a&session=a")
    await stream.next()
    await harness.tracker.update("a", progress=1)
    await stream.next()
    assert await stream.is_silent()


async def test_heartbeats(autojump_clock, nursery):
    """At least every 15 s without events, or as often as the setting says, as on other streams."""
    for settings, expected in (({}, 15), ({"heartbeat": 4}, 4)):
        harness = ServerHarness(nursery, **settings)
        await harness.tracker.create("a")
        stream = await harness.stream("/api/streams?session=a")
        await stream.next()
        for _ in range(3):
            before = trio.current_time()
            await stream.connection.read_until(b": heartbeat\n")
            assert expected * 0.8 - 2 <= trio.current_time() - before <= expected


async def test_trimmed_log_is_a_gap(autojump_clock, nursery):
    """Missed events are counted for their session, and a snapshot replaces them."""
    harness = ServerHarness(nursery, history_events=3)
    for session_id in "ab":
        await harness.tracker.create(session_id)
    stream = await harness.stream(A_B)
    cursor = (await stream.take(2))[1].id
    await stream.disconnect()
    for percent in range(1, 11):
        await harness.tracker.update("a", progress=percent)
    await harness.tracker.update("b", progress=1)
    messages = await (await harness.stream(A_B, cursor)).take(4)
    resumes = {session_of(s): s.data for s in messages if s.event == "resume"}
    assert resumes["a"] == {"session_id": "a", "status": "gap", "missed": 10}
    assert resumes["b"] == {"session_id": "b", "status": "ok", "missed": 0}
    assert progress_of(messages) == [("a", 10), ("b", 1)]


async def test_cursor_without_one_of_the_sessions(autojump_clock, harness):
    """A session without a position in the cursor starts with its snapshot: nothing of it has been seen."""
    cursor = (await (await harness.stream("/api/streams?session=a")).next()).id
    await harness.tracker.update("a", progress=1)
    await harness.tracker.update("b", progress=2)
    messages = await (await harness.stream(A_B, cursor)).take(3)
    assert progress_of(messages) == [("a", 1), ("b", 2)]
    assert [(session_of(s), s.data["status"]) for s in messages if s.event == "resume"] == [("a", "ok")]


async def test_cursor_with_the_position_of_another_log(autojump_clock, harness):
    """If a position fits no session, those without a position may be other logs than before: reset."""
    cursor = (await (await harness.stream(A_B)).take(2))[-1].id
    await harness.tracker.delete("b")
    await harness.tracker.update("b", progress=2)
    messages = await (await harness.stream(A_B, cursor)).take(3)
    assert [(session_of(s), s.data["status"]) for s in messages if s.event == "resume"] == [
        ("a", "ok"),
        ("b", "reset"),
    ]


# Resume


async def publish_randomly(harness, rng, count):
    """Publish random updates and events of three sessions."""
    percent = dict.fromkeys("abc", 0.0)
    for number in range(count):
        session_id = rng.choice("abc")
        if rng.random() < 0.3:
            await harness.tracker.emit(session_id, "note", number)
        else:
            percent[session_id] += 0.1
            await harness.tracker.update(session_id, progress=percent[session_id])
    for session_id in "abc":
        await harness.tracker.update(session_id, status="completed")


def by_session(messages):
    """The event and data of each message, by session: their ids depend on the order on the stream."""
    grouped = {session_id: [] for session_id in "abc"}
    for message in messages:
        grouped[session_of(message)].append((message.event, message.data))
    return grouped


@pytest.mark.parametrize("path", ["first request", "second request", "HTTP/2"])
async def test_resume_after_every_message(autojump_clock, harness, path):
    """Disconnected after every message and resumed: the log of each session, once; over every server path."""
    cursor = (await (await harness.stream(A_B_C)).take(3))[-1].id
    await publish_randomly(harness, random.Random(7), 30)
    expected = by_session(without_resume(await harness.watch(A_B_C, cursor)))
    received = []
    for _ in range(200):
        message = await first_message(harness, path, A_B_C, cursor)
        if message is None:
            break
        received.append(message)
        cursor = message.id
    assert len(received) == 33
    assert by_session(received) == expected
    notes = [s.data["data"] for s in received if s.event == "note"]
    assert len(notes) == len(set(notes))


async def first_message(harness, path, target, cursor):
    """Open the stream, read the first message after the resume events, and disconnect; None if 204."""
    connection = harness.connect()
    if path == "HTTP/2":
        client = HTTP2Client(connection)
        (number,) = await client.request(target, cursor=cursor)
        await client.read_until(lambda: number in client.ended or without_resume(client.messages(number)))
        messages = without_resume(client.messages(number))
        assert messages or client.statuses[number] == 204
        await connection.stream.aclose()
        return messages[0] if messages else None
    if path == "second request":
        assert (await connection.request("GET", "/health")).status == 200
    await connection.send(request_bytes("GET", target, headers=[("Last-Event-ID", cursor)]))
    response = await connection.read_head()
    if response.status == 204:
        return None
    stream = EventStream(connection, response)
    while (message := await stream.next()).event == "resume":
        pass
    await stream.disconnect()
    return message


async def test_live_and_resumed_streams_are_equal(autojump_clock, harness):
    """A live watcher and one that resumes later get the same messages."""
    live = await harness.stream(A_B_C)
    cursor = (await live.take(3))[-1].id
    await publish_randomly(harness, random.Random(3), 300)
    assert by_session(await live.read_to_end()) == by_session(
        without_resume(await harness.watch(A_B_C, cursor))
    )


async def test_http2(autojump_clock, harness):
    """Over HTTP/2 new events are sent at once as well, and the stream ends."""
    client = HTTP2Client(harness.connect())
    (number,) = await client.request(A_B)
    await client.read_until(lambda: len(client.messages(number)) == 2)
    await harness.tracker.update("b", progress=5)
    await client.read_until(lambda: len(client.messages(number)) == 3)
    for session_id in "ab":
        await harness.tracker.update(session_id, status="completed")
    await client.read_until(lambda: number in client.ended)
    assert progress_of(client.messages(number))[2:] == [("b", 5), ("a", 100), ("b", 100)]


@pytest.mark.parametrize("first", [None, "/health"], ids=["first request", "second request"])
async def test_disconnect_is_detected_at_once(autojump_clock, harness, first):
    """After the client has disconnected no topic is left."""
    connection = harness.connect()
    if first:
        await connection.request("GET", first)
    await connection.send(request_bytes("GET", A_B))
    await connection.read_head()
    await wait_all_tasks_blocked()
    assert harness.broker.is_watched("a")
    await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert not harness.broker.is_watched("a")


async def test_drain_sends_a_retry_time():
    """A server that stops sends a reconnection time and ends the stream."""
    async with sseserve.serve(port=0, drain=0.5) as server:
        for session_id in "ab":
            await server.tracker.create(session_id)
        connection = await connect(server.port)
        async with connection.stream:
            await connection.send(request_bytes("GET", A_B))
            stream = EventStream(connection, await connection.read_head())
            await stream.take(2)
            server.stop()
            assert await stream.read_to_end() == []
            assert 500 <= stream.retry <= 1000
            assert connection.ended == "eof"
    with pytest.raises(OSError):
        await get(server.port, "/health")


async def test_events_are_encoded_once_and_no_log_is_read(autojump_clock, nursery):
    """However many clients watch a session, and which others; no log is read once they are live."""
    harness = FaultyHarness(nursery)
    ids = [f"s{number}" for number in range(12)]
    for session_id in ids:
        await harness.tracker.update(session_id, progress=1)
    rng = random.Random(1)
    chosen = [ids[:6], ids[:6], *(rng.sample(ids, 6) for _ in range(10))]
    streams = [await harness.stream(bundle_of(session_ids)) for session_ids in chosen]
    for stream in streams:
        await stream.take(6)
    before = harness.engine.calls.copy()
    encodings = []
    render = SESSIONS.render

    def count(session_id, event):
        encodings.append((session_id, event.seq))
        return render(session_id, event)

    msgspec.structs.force_setattr(SESSIONS, "render", count)
    try:
        for percent in range(10, 15):
            for session_id in ids:
                await harness.tracker.update(session_id, progress=percent)
        received = [await stream.take(30) for stream in streams]
    finally:
        msgspec.structs.force_setattr(SESSIONS, "render", render)
    watched = set().union(*chosen)
    assert sorted(encodings) == sorted((session_id, seq) for session_id in watched for seq in range(2, 7))
    assert harness.engine.calls["read"] == before["read"]
    assert harness.engine.calls["load"] == before["load"]
    for session_ids, messages in zip(chosen, received, strict=True):
        assert sorted(progress_of(messages)) == sorted((s, p) for s in session_ids for p in range(10, 15))


def bundle_of(session_ids):
    return "/api/streams?" + "&".join(f"session={session_id}" for session_id in session_ids)


async def test_bundles_are_counted_as_other_streams_are(autojump_clock, harness):
    """A bundle is one stream; each event that it is sent is a delivery; its sessions have a watcher each."""
    streams = [await harness.stream(A_B), await harness.stream("/api/streams?session=b&session=c")]
    for stream in streams:
        await stream.take(2)
    single = await harness.stream("/api/sessions/b/status/stream")
    await single.next()
    before = harness.broker.statistics()
    assert (before.subscribers, before.topics) == (3, 3)
    for session_id in "abc":
        await harness.tracker.update(session_id, progress=1)
    for stream in streams:
        await stream.take(2)
    health = (await harness.get("/health")).json
    assert (health["streams"], health["connections_per_job"]) == (3, {"a": 1, "b": 3, "c": 1})
    assert harness.broker.statistics().delivered - before.delivered == 5
    metrics = (await harness.get("/metrics")).body.decode()
    assert 'sseserve_streams{dialect="sessions",transport="sse"} 3.0' in metrics
    assert "sseserve_watched_sessions 3.0" in metrics
    assert f"sseserve_deliveries_total {before.delivered + 5}.0" in metrics
    for stream in (*streams, single):
        await stream.disconnect()
    assert (await harness.get("/health")).json["streams"] == 0
    metrics = (await harness.get("/metrics")).body.decode()
    assert 'sseserve_stream_duration_seconds_count{dialect="sessions",transport="sse"} 3.0' in metrics
    assert "sseserve_watched_sessions 0.0" in metrics
    stream = await harness.stream(A_B, "x-1")
    await stream.next()
    assert harness.broker.statistics().resumed == 1
